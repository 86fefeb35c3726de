"""What a training step needs, in bytes, before anything is downloaded: `peft-prompt-ext memory --help`.

The step itself is run on fake tensors (shapes without data), and every allocation is counted until it is freed.

Shapes: B rows, T text tokens a row, P virtual tokens, H hidden size.
"""

from __future__ import annotations

import argparse
import copy
import logging
import math
import re
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from ._versions import checkpoint_activations
from .quantization import check_quantization, quantizable_layers, unquantized_modules
from .shared_prefix.forward import run
from .shared_prefix.interface import attach
from .shared_prefix.layout import pack
from .shared_prefix.packed_pass import PackedPass
from .shared_prefix.probe import refuse_early
from .training.methods import METHODS as ALL_METHODS


if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


logger = logging.getLogger(__name__)

METHODS = {name: method for name, method in ALL_METHODS.items() if method.trains in {"adapter", "model"}}
ALLOCATOR_SHARE = (
    0.15  # of what a step allocates: allocators keep freed memory in pieces that do not fit the next tensor
)
ADAM_BYTES = 8  # two moments of fp32 for each trained number
BLOCK, DOUBLE_BLOCK = 64, 256  # numbers with one scale in 4 bits, and scales with one scale of their own
CODE_BYTES = 64  # the 16 values that 4 bits stand for, in fp32
NESTED_BYTES = 1028  # the 256 values of 8-bit scales, and their offset


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that training needs on one device.

    Attributes:
        weights_bytes: The base model.
        trainable_bytes: What the method adds to it.
        optimizer_bytes: AdamW's moments of what is trained.
        step_bytes: The peak of what a step allocates: activations, logits, gradients.
        allocator_bytes: A share of `step_bytes` for what the allocator cannot use again.
    """

    weights_bytes: int
    trainable_bytes: int
    optimizer_bytes: int
    step_bytes: int
    allocator_bytes: int

    @property
    def above_weights_bytes(self) -> int:
        """Everything but the base model."""
        return self.trainable_bytes + self.optimizer_bytes + self.step_bytes + self.allocator_bytes

    @property
    def total_bytes(self) -> int:
        """Everything."""
        return self.weights_bytes + self.above_weights_bytes


def estimate_memory(
    model_or_config: PreTrainedModel | PretrainedConfig | str,
    method: str = "prompt_tuning",
    quantization: str | None = None,
    *,
    batch: int = 8,
    tokens: int = 128,
    num_virtual_tokens: int = 20,
    gradient_checkpointing: bool = False,
    dtype: torch.dtype = torch.float32,
    double_quant: bool = True,
    labels_per_row: int = 1,
    lora_r: int = 8,
) -> MemoryEstimate:
    """Estimate the memory of training a causal language model, from its config alone.

    Args:
        model_or_config: A config, a model (only its config is read), or what `AutoConfig.from_pretrained` takes.
        method: "prompt_tuning" (this plugin, packed where the attention can be reached, `train_logits="supervised"`),
            "lora" (PEFT's default layers) or "full".
        quantization: "nf4", "fp4", "int8" or None, of the frozen weights.
        batch: B.
        tokens: T, of every row: the estimate knows no shorter ones.
        num_virtual_tokens: P.
        gradient_checkpointing: Recompute activations in the backward pass.
        dtype: Of the weights that are not quantised and of the arithmetic.
        double_quant: As in `load_frozen_backbone`.
        labels_per_row: Labelled tokens a row.
        lora_r: Rank of LoRA.

    Returns:
        The parts and their sum.

    Raises:
        ValueError: Unknown method or quantization; full fine-tuning of quantised weights.
    """
    from transformers import AutoModelForCausalLM

    _check(method, quantization, batch=batch, tokens=tokens, num_virtual_tokens=num_virtual_tokens)
    config = _config(model_or_config)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    sizes = {
        name: _stored_bytes(parameter, False, quantization, double_quant)
        for name, parameter in model.named_parameters()
    }
    quantized = quantizable_layers(model, unquantized_modules(model)) if quantization is not None else []
    for name in quantized:
        sizes[f"{name}.weight"] = _stored_bytes(
            model.get_parameter(f"{name}.weight"), True, quantization, double_quant
        )
    base_bytes = sum(sizes.values())
    trains_all, adds_lora = METHODS[method].trains == "model", METHODS[method].peft_type == "LORA"
    model.requires_grad_(trains_all).train()
    layers = [model.get_submodule(name) for name in quantized]
    hidden = config.get_text_config().hidden_size
    trainable = num_virtual_tokens * hidden if METHODS[method].has_prompt else 0
    if adds_lora:
        from peft import LoraConfig, get_peft_model

        with torch.device("meta"):
            model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=lora_r))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        _to_fake(model)
        for layer in layers:
            layer.forward = _QuantizedForward(layer.weight, saves_input=quantization == "int8")
        if gradient_checkpointing:
            base = model.get_base_model() if adds_lora else model
            checkpoint_activations(base)
            base.enable_input_require_grads()
        if METHODS[method].has_prompt:
            step = _prompt_step(mode, model, batch, tokens, num_virtual_tokens, labels_per_row)
        else:
            trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
            step = _peak(
                model, lambda: _padded_loss(model, {"input_ids": torch.empty(batch, tokens, dtype=torch.long)})
            )
    return MemoryEstimate(
        weights_bytes=base_bytes,
        trainable_bytes=0 if trains_all else 4 * trainable,
        optimizer_bytes=ADAM_BYTES * trainable,
        step_bytes=step,
        allocator_bytes=math.ceil(ALLOCATOR_SHARE * step),
    )


def _check(method: str, quantization: str | None, **positive: int) -> None:
    if method not in METHODS:
        raise ValueError(f"method is one of {', '.join(METHODS)}; got {method!r}.")
    check_quantization(quantization)
    if quantization is not None and not METHODS[method].takes_quantized:
        raise ValueError(f"Quantised weights cannot be trained: method={method!r} with quantization={quantization!r}.")
    for name, value in positive.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1; got {value}.")


def _config(model_or_config: Any) -> PretrainedConfig:
    from transformers import AutoConfig

    from .assets import resolve

    if isinstance(model_or_config, str):
        return AutoConfig.from_pretrained(resolve(model_or_config))
    return copy.deepcopy(getattr(model_or_config, "config", model_or_config))


def _stored_bytes(weight: torch.Tensor, quantized: bool, quantization: str | None, double_quant: bool) -> int:
    """Bytes of one parameter; of a quantised weight with its scales."""
    count = weight.numel()
    if not quantized:
        return count * weight.element_size()
    if quantization == "int8":
        return count + 4 * weight.shape[0]
    blocks = math.ceil(count / BLOCK)
    scales = blocks + 4 * math.ceil(blocks / DOUBLE_BLOCK) + NESTED_BYTES if double_quant else 4 * blocks
    return math.ceil(count / 2) + scales + CODE_BYTES


class _Quantized(torch.autograd.Function):
    """A product with a quantised weight, as far as memory goes: the backward pass makes the weight whole."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, saves_input: bool) -> torch.Tensor:
        ctx.kept = x if saves_input else None
        ctx.weight, ctx.input_size = weight, x.shape[-1]
        return x.new_empty(*x.shape[:-1], weight.numel() // x.shape[-1])

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        whole = grad.new_empty(grad.shape[-1], ctx.input_size)
        return grad @ whole, None, None


class _QuantizedForward:
    """Stands in for a layer's forward."""

    def __init__(self, weight: torch.Tensor, saves_input: bool) -> None:
        self.weight, self.saves_input = weight, saves_input

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return _Quantized.apply(x, self.weight, self.saves_input)


def _to_fake(model: torch.nn.Module) -> None:
    """Give a model on the meta device weights that pretend to be on the CPU, whose kernels keep other things."""
    made: dict[int, torch.nn.Parameter] = {}  # tied weights stay tied
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in made:
                    empty = torch.empty(parameter.shape, dtype=parameter.dtype)
                    made[id(parameter)] = torch.nn.Parameter(empty, parameter.requires_grad)
                module._parameters[name] = made[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _prompt_step(mode: Any, model: Any, batch: int, tokens: int, virtual: int, labels: int) -> int:
    hidden = model.config.get_text_config().hidden_size
    words = model.get_input_embeddings()
    prompt = torch.nn.Parameter(torch.empty(virtual, hidden))
    try:
        refuse_early(model)
        attach(model)
        layout = _fake_layout(mode, batch, tokens, virtual)

        def packed_loss() -> torch.Tensor:
            text = words(torch.empty(batch * tokens, dtype=torch.long))
            embeds = torch.cat([prompt.to(text.dtype), text])[None]
            wanted = torch.empty(batch * labels, dtype=torch.long)
            logits = run(model, embeds, PackedPass(layout), logits_to_keep=wanted).logits
            return model.loss_function(
                logits=logits, labels=wanted[None], vocab_size=logits.shape[-1], shift_labels=wanted[None]
            )

        return _peak(model, packed_loss)
    except Exception as reason:  # PEFT's path is for whatever cannot run packed
        logger.info("Estimated for PEFT's path, with each row's own virtual tokens: %s", reason)

    def padded_loss() -> torch.Tensor:
        text = words(torch.empty(batch, tokens, dtype=torch.long))
        embeds = torch.cat([prompt.to(text.dtype).expand(batch, -1, -1), text], dim=1)
        return _padded_loss(model, {"inputs_embeds": embeds})

    return _peak(model, padded_loss)


def _fake_layout(mode: Any, batch: int, tokens: int, virtual: int) -> Any:
    with unset_fake_temporarily():
        layout = pack(torch.ones(batch, tokens), (virtual,))
        layout.mask()  # it may depend on data
    for name, value in vars(layout).items():
        if isinstance(value, torch.Tensor):
            setattr(layout, name, mode.from_tensor(value))
    layout._masks = {window: mode.from_tensor(mask) for window, mask in layout._masks.items()}
    return layout


def _padded_loss(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    (text,) = inputs.values()
    return model(**inputs, labels=torch.empty(text.shape[:2], dtype=torch.long), use_cache=False).loss


def _peak(model: Any, loss: Callable[[], torch.Tensor]) -> int:
    with _Peak(model.parameters()) as counting:
        loss().backward()
    return counting.peak


class _Peak(TorchDispatchMode):
    """Counts the bytes of every tensor that an operation makes, until it is freed.

    Attributes:
        peak: The most bytes at one time.
    """

    def __init__(self, weights: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known = {weight.untyped_storage()._cdata for weight in weights}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_iter(out):
            if isinstance(value, torch.Tensor):
                self._count(value.untyped_storage())
        return out

    def _count(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:  # views share one storage
            self.known.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


WAYS = {
    "prompt tuning": ("prompt_tuning", None),
    "prompt tuning, int8": ("prompt_tuning", "int8"),
    "prompt tuning, nf4": ("prompt_tuning", "nf4"),
    "LoRA": ("lora", None),
    "QLoRA (LoRA, nf4)": ("lora", "nf4"),
    "full fine-tuning": ("full", None),
}


def show(options: argparse.Namespace) -> None:
    """Print what each way of training needs, and whether it fits.

    Args:
        options: The flags of `peft-prompt-ext memory`.
    """
    from rich.console import Console
    from rich.progress import track
    from rich.table import Table

    console = Console()
    title = f"{options.model}: {options.dtype}, {options.batch} rows of {options.tokens} tokens"
    table = Table(title=title + (", gradient checkpointing" if options.gradient_checkpointing else ""))
    for column in ("", "weights", "trained, optimizer", "step", "in all", *(["fits"] if options.card else [])):
        table.add_column(column, justify="left" if column in {"", "fits"} else "right")
    for name, (method, quantization) in track(
        WAYS.items(), "estimating", console=Console(stderr=True), transient=True
    ):
        estimate = estimate_memory(
            options.model,
            method,
            quantization,
            dtype=getattr(torch, options.dtype),
            gradient_checkpointing=options.gradient_checkpointing,
            batch=options.batch,
            tokens=options.tokens,
            num_virtual_tokens=options.num_virtual_tokens,
        )
        parts = (
            estimate.weights_bytes,
            estimate.trainable_bytes + estimate.optimizer_bytes,
            estimate.step_bytes + estimate.allocator_bytes,
            estimate.total_bytes,
        )
        fits = [] if not options.card else ["yes" if estimate.total_bytes <= options.card else "no"]
        table.add_row(name, *(f"{part / 1e9:.2f} GB" for part in parts), *fits)
    console.print(table)


def parse_bytes(text: str) -> int:
    """Read a size such as "8GB", "24 GiB" or "500MB".

    Raises:
        ValueError: It is not a number with one of these units.
    """
    found = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*([KMGT])(i?)B?\s*", text, re.IGNORECASE)
    if not found:
        raise ValueError(f"A size such as '8GB' or '24GiB' was wanted; got {text!r}.")
    number, unit, binary = found.groups()
    return int(float(number) * (1024 if binary else 1000) ** ("KMGT".index(unit.upper()) + 1))
