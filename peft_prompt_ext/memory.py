"""What a training step needs, in bytes, before anything is downloaded: `peft-prompt-ext memory --help`.

The step itself is run on fake tensors (shapes without data), and every allocation is counted until it is freed.

Shapes: B rows, T text tokens a row, P virtual tokens, L labelled tokens a row, H hidden size.
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
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from ._choices import check_choice
from ._versions import checkpoint_activations
from .config import POSITIONS
from .quantization import check_quantization, quantizable_layers, unquantized_modules
from .shared_prefix.forward import run
from .shared_prefix.interface import attach
from .shared_prefix.layout import PackedLayout, pack, pack_behind, pack_trunks
from .shared_prefix.packed_pass import KeysValues, PackedPass
from .shared_prefix.probe import refuse_early
from .shared_prefix.texts import evaluation_mode
from .training.methods import METHODS as ALL_METHODS
from .training.methods import Method


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
        kept_texts_bytes: Keys and values of kept texts. They are in the memory of the host, so no sum here has them;
            training on a CPU needs them as well.
    """

    weights_bytes: int
    trainable_bytes: int
    optimizer_bytes: int
    step_bytes: int
    allocator_bytes: int
    kept_texts_bytes: int = 0

    @property
    def above_weights_bytes(self) -> int:
        """Everything but the base model."""
        return self.trainable_bytes + self.optimizer_bytes + self.step_bytes + self.allocator_bytes

    @property
    def total_bytes(self) -> int:
        """Everything on the device."""
        return self.weights_bytes + self.above_weights_bytes


@dataclass(frozen=True)
class _Batch:
    """The batch of a step.

    Attributes:
        rows: B.
        tokens: T.
        virtual: P.
        labels: L.
        behind: Whether the prompt stands behind the text, in front of the labelled tokens.
    """

    rows: int
    tokens: int
    virtual: int
    labels: int
    behind: bool

    @property
    def in_front(self) -> int:
        """The number of a row's tokens in front of its prompt."""
        return self.tokens - self.labels if self.behind else 0


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
    prompt_position: str = "prefix",
    text_rows: int = 0,
    text_cache_bytes: int | None = None,
) -> MemoryEstimate:
    """Estimate the memory of training a causal language model, from its config alone.

    Args:
        model_or_config: A config, a model (only its config is read), or what `AutoConfig.from_pretrained` takes.
        method: "prompt_tuning" (this plugin, packed where the attention can be reached, `train_logits="supervised"`),
            "lora" (PEFT's default layers) or "full".
        quantization: "nf4", "fp4", "int8" or None, of the frozen weights.
        batch: B.
        tokens: T, of every row, its answer included: the estimate knows no shorter ones.
        num_virtual_tokens: P.
        gradient_checkpointing: Recompute activations in the backward pass.
        dtype: Of the weights that are not quantised and of the arithmetic.
        double_quant: As in `load_frozen_backbone`.
        labels_per_row: L, the tokens of a row's answer.
        lora_r: Rank of LoRA.
        prompt_position: "prefix" or "suffix", as in `PromptTuningExtConfig`.
        text_rows: With a suffix, the rows of the data set whose texts are kept.
        text_cache_bytes: The most bytes of kept texts; None: all are kept.

    Returns:
        The parts and their sum.

    Raises:
        ValueError: Unknown method, quantization or position; full fine-tuning of quantised weights; a suffix of
            another method, or without text in front of it; kept texts without a suffix.
    """
    _check(method, quantization, batch=batch, tokens=tokens, num_virtual_tokens=num_virtual_tokens)
    shape = _Batch(batch, tokens, num_virtual_tokens, labels_per_row, prompt_position == "suffix")
    _check_position(method, prompt_position, shape, text_rows)
    model = _make_model(_config(model_or_config), dtype)
    quantized = quantizable_layers(model, unquantized_modules(model)) if quantization is not None else []
    weights_bytes = _count_weights(model, quantized, quantization, double_quant)
    way, layers = METHODS[method], [model.get_submodule(name) for name in quantized]
    model.requires_grad_(way.trains == "model").train()
    if way.peft_type == "LORA":
        model = _add_lora(model, lora_r)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        _to_fake(model)
        _replace_forwards(model, layers, quantization, gradient_checkpointing)
        step_bytes, text_bytes = _run_step(mode, model, way, shape)
    trainable = _count_trainable(model, way, num_virtual_tokens)
    return MemoryEstimate(
        weights_bytes=weights_bytes,
        trainable_bytes=0 if way.trains == "model" else 4 * trainable,
        optimizer_bytes=ADAM_BYTES * trainable,
        step_bytes=step_bytes,
        allocator_bytes=math.ceil(ALLOCATOR_SHARE * step_bytes),
        kept_texts_bytes=_count_kept(text_bytes, text_rows, text_cache_bytes),
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


def _check_position(method: str, position: str, shape: _Batch, text_rows: int) -> None:
    check_choice("prompt_position", position, POSITIONS)
    if not shape.behind:
        if text_rows:
            raise ValueError(f"Only texts in front of a suffix are kept: text_rows={text_rows} with a prefix.")
        return
    if not METHODS[method].has_prompt:
        raise ValueError(f"prompt_position='suffix' needs a prompt; method={method!r} has none.")
    if not 1 <= shape.labels < shape.tokens:
        raise ValueError(
            f"labels_per_row is {shape.labels}, tokens is {shape.tokens}. With prompt_position='suffix' a row needs "
            "an answer of 1 token or more, and text in front of it."
        )


def _make_model(config: PretrainedConfig, dtype: torch.dtype) -> Any:
    """Make a model without data."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def _add_lora(model: Any, rank: int) -> Any:
    from peft import LoraConfig, get_peft_model

    with torch.device("meta"):
        return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=rank))


def _count_weights(model: Any, quantized: Iterable[str], quantization: str | None, double_quant: bool) -> int:
    """Bytes of the base model, of which some layers are quantised."""
    of_layers = {f"{name}.weight" for name in quantized}
    return sum(
        _stored_bytes(parameter, name in of_layers, quantization, double_quant)
        for name, parameter in model.named_parameters()
    )


def _count_trainable(model: Any, way: Method, virtual: int) -> int:
    if way.has_prompt:
        return virtual * model.config.get_text_config().hidden_size
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _count_kept(text_bytes: int, rows: int, budget: int | None) -> int:
    """Bytes of the texts that are kept: as many whole ones as the budget allows."""
    most = rows if budget is None or not text_bytes else min(rows, budget // text_bytes)
    return most * text_bytes


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


def _replace_forwards(model: Any, layers: Iterable[Any], quantization: str | None, checkpointing: bool) -> None:
    """Give quantised layers their stand-in, and switch gradient checkpointing on."""
    for layer in layers:
        layer.forward = _QuantizedForward(layer.weight, saves_input=quantization == "int8")
    if checkpointing:
        base = getattr(model, "get_base_model", lambda: model)()
        checkpoint_activations(base)
        base.enable_input_require_grads()


def _run_step(mode: FakeTensorMode, model: Any, way: Method, shape: _Batch) -> tuple[int, int]:
    """Run a step. Returns its peak, and the bytes of the keys and values of one text."""
    if not way.has_prompt:
        ids = torch.empty(shape.rows, shape.tokens, dtype=torch.long)
        return _peak(model, lambda: _padded_loss(model, {"input_ids": ids})), 0
    prompt = torch.nn.Parameter(torch.empty(shape.virtual, model.config.get_text_config().hidden_size))
    try:
        refuse_early(model)
        attach(model)
        step = _SuffixStep(mode, model, prompt, shape) if shape.behind else _PrefixStep(mode, model, prompt, shape)
        return _peak(model, step.loss), step.text_bytes
    except Exception as reason:  # PEFT's path is for whatever cannot run packed
        logger.info("Estimated for PEFT's path, with each row's own virtual tokens: %s", reason)

    def padded_loss() -> torch.Tensor:
        text = _embed_text(model, shape).unflatten(0, (shape.rows, shape.tokens))
        embeds = torch.cat([prompt.to(text.dtype).expand(shape.rows, -1, -1), text], dim=1)
        return _padded_loss(model, {"inputs_embeds": embeds})

    return _peak(model, padded_loss), 0


class _PrefixStep:
    """A packed step with the prompt in front of the texts.

    Attributes:
        text_bytes: Bytes of the keys and values of one text that may be kept.
    """

    def __init__(self, mode: FakeTensorMode, model: Any, prompt: torch.Tensor, shape: _Batch) -> None:
        self.model, self.prompt, self.shape, self.text_bytes = model, prompt, shape, 0
        with unset_fake_temporarily():
            layout = self.lay_out()
            layout.mask()  # it may depend on data
        self.layout = _to_fake_layout(mode, layout)

    def lay_out(self) -> PackedLayout:
        return pack(torch.ones(self.shape.rows, self.shape.tokens), (self.shape.virtual,))

    def loss(self) -> torch.Tensor:
        text = _embed_text(self.model, self.shape)
        return self.compute_loss(torch.cat([self.prompt.to(text.dtype), text]), PackedPass(self.layout))

    def compute_loss(self, embeds: torch.Tensor, packed: PackedPass) -> torch.Tensor:
        wanted = torch.empty(self.shape.rows * self.shape.labels, dtype=torch.long)
        logits = run(self.model, embeds[None], packed, logits_to_keep=wanted).logits
        return self.model.loss_function(
            logits=logits, labels=wanted[None], vocab_size=logits.shape[-1], shift_labels=wanted[None]
        )


class _SuffixStep(_PrefixStep):
    """A packed step with the prompt behind the texts, which run without gradients."""

    def __init__(self, mode: FakeTensorMode, model: Any, prompt: torch.Tensor, shape: _Batch) -> None:
        super().__init__(mode, model, prompt, shape)
        with unset_fake_temporarily():
            texts = pack_trunks(self.layout.trunk_lengths)
        self.texts = _to_fake_layout(mode, texts)

    def lay_out(self) -> PackedLayout:
        rows, start = self.shape.rows, self.shape.in_front
        prompt_of_row = torch.zeros(rows, dtype=torch.long)
        mask, starts = torch.ones(rows, self.shape.tokens), torch.full((rows,), start)
        return pack_behind(mask, (self.shape.virtual,), prompt_of_row, starts, range(rows))

    def loss(self) -> torch.Tensor:
        text, count = _embed_text(self.model, self.shape), self.layout.num_trunk_tokens
        embeds = torch.cat([text, self.prompt.to(text.dtype).repeat(self.shape.rows, 1)])
        keys_values = self.run_texts(embeds[:count])
        texts: Any = SimpleNamespace(get=keys_values.__getitem__)
        return self.compute_loss(embeds[count:], PackedPass(self.layout, trunks=texts))

    @torch.no_grad()
    def run_texts(self, embeds: torch.Tensor) -> KeysValues:
        """Run the texts of the batch, which keep nothing but their keys and values."""
        keys_values: KeysValues = {}
        with evaluation_mode(self.model):
            run(self.model.base_model, embeds[None], PackedPass(self.texts, keys_values=keys_values))
        tensors = [tensor for pair in keys_values.values() for tensor in pair]
        self.text_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors) // self.shape.rows
        return keys_values


def _embed_text(model: Any, shape: _Batch) -> torch.Tensor:
    return model.get_input_embeddings()(torch.empty(shape.rows * shape.tokens, dtype=torch.long))


def _to_fake_layout(mode: FakeTensorMode, layout: PackedLayout) -> PackedLayout:
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
    "prompt tuning": ("prompt_tuning", None, "prefix"),
    "prompt tuning, int8": ("prompt_tuning", "int8", "prefix"),
    "prompt tuning, nf4": ("prompt_tuning", "nf4", "prefix"),
    "prompt tuning, suffix": ("prompt_tuning", None, "suffix"),
    "prompt tuning, suffix, nf4": ("prompt_tuning", "nf4", "suffix"),
    "LoRA": ("lora", None, "prefix"),
    "QLoRA (LoRA, nf4)": ("lora", "nf4", "prefix"),
    "full fine-tuning": ("full", None, "prefix"),
}


def show(options: argparse.Namespace) -> None:
    """Print what each way of training needs, and whether it fits.

    Args:
        options: The flags of `peft-prompt-ext memory`.

    Raises:
        ValueError: See `estimate_memory`.
    """
    from rich.console import Console
    from rich.progress import track
    from rich.table import Table

    console = Console()
    title = f"{options.model}: {options.dtype}, {options.batch} rows of {options.tokens} tokens"
    table = Table(title=title + (", gradient checkpointing" if options.gradient_checkpointing else ""))
    kept, fits = ["kept texts"] if options.text_rows else [], ["fits"] if options.card else []
    for column in ("", "weights", "trained, optimizer", "step", "in all", *kept, *fits):
        table.add_column(column, justify="left" if column in {"", "fits"} else "right")
    for name, way in track(WAYS.items(), "estimating", console=Console(stderr=True), transient=True):
        estimate = _estimate_way(options, *way)
        parts = [
            estimate.weights_bytes,
            estimate.trainable_bytes + estimate.optimizer_bytes,
            estimate.step_bytes + estimate.allocator_bytes,
            estimate.total_bytes,
        ]
        parts += [estimate.kept_texts_bytes] if kept else []
        verdict = ["yes" if estimate.total_bytes <= options.card else "no"] if fits else []
        table.add_row(name, *(f"{part / 1e9:.2f} GB" for part in parts), *verdict)
    console.print(table)
    if kept:
        console.print("Kept texts are in the host's memory, not in the card's.")


def _estimate_way(options: argparse.Namespace, method: str, quantization: str | None, position: str) -> MemoryEstimate:
    return estimate_memory(
        options.model,
        method,
        quantization,
        dtype=getattr(torch, options.dtype),
        gradient_checkpointing=options.gradient_checkpointing,
        batch=options.batch,
        tokens=options.tokens,
        num_virtual_tokens=options.num_virtual_tokens,
        labels_per_row=options.labels_per_row,
        prompt_position=position,
        text_rows=options.text_rows if position == "suffix" else 0,
        text_cache_bytes=options.text_cache_bytes,
    )


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
