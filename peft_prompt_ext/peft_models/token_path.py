"""Proof that a prompt of real words gives what the words give as ids, before a base model is trusted with a prompt.

A prompt enters as `inputs_embeds`. That is the same as ids only where nothing but the word embeddings looks at the
ids. Some models read them again (embeddings of each layer, positions of images) or scale what they look up themselves;
their results with a prompt would be wrong without a word.

Shapes: B rows, P virtual tokens, T text tokens, H hidden size.
"""

from __future__ import annotations

import inspect
import logging
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from .decoding.feed import CACHES
from .tokens import OF_PACKED_ROWS


logger = logging.getLogger(__name__)

TOKENS, WORDS = 16, 5  # of the probe's row; its first tokens stand for the prompt
# the relative error of the results that rounding explains; both ways do the same arithmetic
FP32_TOLERANCE = 1e-5
LOW_PRECISION_TOLERANCE = 1e-2
# what the text of a model with images or sounds comes with
TEXT_INPUTS = {
    *OF_PACKED_ROWS,
    *(
        "input_ids",
        "inputs",
        "inputs_embeds",
        "attention_mask",
        "position_ids",
        "token_type_ids",
        "labels",
        "task_ids",
    ),
    *("decoder_input_ids", "decoder_attention_mask", "decoder_inputs_embeds", *CACHES, "cache_position"),
    *("logits_to_keep", "num_items_in_batch", "shift_labels", "start_positions", "end_positions"),
}
_ONE_AT_A_TIME = threading.Lock()  # while a probe runs, the base model is not in training mode


def check_task(base_model: Any, task_type: str) -> None:
    """Refuse a base model that cannot take a prompt for its task, by what its config and its signature tell.

    Raises:
        ValueError: An encoder-decoder asked for as a causal model or the reverse; a forward without `inputs_embeds`.
    """
    name = type(base_model).__name__
    pair = bool(getattr(getattr(base_model, "config", None), "is_encoder_decoder", False))
    if pair and task_type == "CAUSAL_LM":
        raise ValueError(
            f"task_type 'CAUSAL_LM' wants a decoder alone; {name} is an encoder and a decoder. Set "
            "task_type='SEQ_2_SEQ_LM', or load the decoder with AutoModelForCausalLM."
        )
    if not pair and task_type == "SEQ_2_SEQ_LM":
        raise ValueError(
            f"task_type 'SEQ_2_SEQ_LM' wants an encoder and a decoder; {name} is not both. Set task_type='CAUSAL_LM'."
        )
    parameters = inspect.signature(base_model.forward).parameters
    if "inputs_embeds" not in parameters and all(p.kind is not p.VAR_KEYWORD for p in parameters.values()):
        raise ValueError(
            f"A prompt enters as inputs_embeds, and {name}.forward takes {', '.join(parameters)}. Prompt tuning "
            "cannot work on this model; LoRA can."
        )


def check_inputs(base_model: Any, inputs: Mapping[str, Any]) -> None:
    """Refuse what a model with images or sounds takes beside the text.

    Such a model finds the places of images by the ids, and some count positions by them. A prompt shifts the text and
    has no ids.

    Raises:
        ValueError: Names the inputs.
    """
    modalities, config = getattr(base_model, "input_modalities", "text"), base_model.config
    has_text_alone = set([modalities] if isinstance(modalities, str) else modalities) <= {"text"}
    if has_text_alone and config.get_text_config() is config:
        return
    found = sorted(name for name, value in inputs.items() if name not in TEXT_INPUTS and _holds_something(value))
    if found:
        raise ValueError(
            f"{type(base_model).__name__} got {', '.join(found)} beside the text. With a prompt a model takes text "
            "alone: images and sounds are placed by the ids of the whole sequence, and a prompt has none. Leave them "
            "out, or train LoRA."
        )


def _holds_something(value: Any) -> bool:
    """Whether an input is a tensor, or holds one, that is not a mark of text (zero)."""
    if isinstance(value, (list, tuple)):
        return any(_holds_something(item) for item in value)
    return isinstance(value, torch.Tensor) and (value.is_floating_point() or bool(value.any()))


def prove(base_model: Any, word_embeddings: Any, limit: int | None = None, decoder: bool = False) -> None:
    """Compare a row of words as ids with the same row as embeddings, whose first words are what a prompt would be.

    A second row has no words in their place: some models look for the words of embeddings, and fail where they find
    none.

    Args:
        base_model: A model of transformers with its head, on the device and in the precision that it will be used in.
        word_embeddings: The module that gives the embeddings of text, [B, T] to [B, T, H].
        limit: How many positions the model has; None or less than 1 if there is no end.
        decoder: Whether the model gets `decoder_input_ids`, which have no prompt.

    Raises:
        ValueError: The results differ, with the figure; or the model cannot run with `inputs_embeds`.
    """
    weight, name = word_embeddings.weight, type(base_model).__name__
    length = min(TOKENS, limit) if limit is not None and limit > 0 else TOKENS
    if length < 2 or (weight.is_meta and not hasattr(word_embeddings, "_hf_hook")):
        logger.info("%s is not proved to take a prompt: it has no room for one, or no weights yet.", name)
        return
    device = torch.device("cpu") if weight.is_meta else weight.device
    ids = (
        _plain_words(base_model.config, getattr(word_embeddings, "num_embeddings", weight.shape[0]), length)
        .to(device)
        .repeat(2, 1)
    )
    further: dict[str, Any] = {"decoder_input_ids": ids[:, :2]} if decoder else {}
    with _ONE_AT_A_TIME, _without_trace(base_model), torch.no_grad():
        words = min(WORDS, length - 1)
        prompt, text = word_embeddings(ids[:, :words]), word_embeddings(ids[:, words:])
        prompt = torch.cat([prompt[:1], (prompt[1:] + prompt[1:].roll(1, 1)) / 2])
        try:
            want = _run(base_model, device, input_ids=ids, attention_mask=torch.ones_like(ids), **further)
        except Exception as error:
            logger.info("%s is not proved to take a prompt: it wants more than ids (%s).", name, error)
            want = {}
        embeds, mask = torch.cat([prompt, text], dim=1), torch.ones(2, length).to(device)  # as PEFT makes them
        try:
            got = _run(base_model, device, inputs_embeds=embeds, attention_mask=mask, **further)
        except Exception as error:
            if not want and not isinstance(error, NotImplementedError):
                return  # something else is missing
            raise ValueError(
                f"{name} does not run with inputs_embeds that belong to no ids, which is how a prompt enters "
                f"({type(error).__name__}: {error}). Prompt tuning cannot work on it so; LoRA can."
            ) from error
    _compare(base_model, got, want, words)


def _compare(base_model: Any, got: dict[Any, torch.Tensor], want: dict[Any, torch.Tensor], words: int) -> None:
    exact = all(x.dtype.itemsize >= 4 for x in want.values()) and getattr(base_model, "hf_quantizer", None) is None
    for output in want.keys() & got.keys():
        error = _relative_error(got[output][0], want[output][0])
        if not error <= (FP32_TOLERANCE if exact else LOW_PRECISION_TOLERANCE):  # NaN differs as well
            raise ValueError(
                f"{type(base_model).__name__} gives other {output} for the embeddings of words than for their ids: "
                f"relative error {error:.1e} with {words} words in the place of a prompt. It reads the ids beside its "
                "word embeddings (embeddings of each layer, a scale or positions of its own), and a prompt has no "
                "ids, so all results would be wrong. Prompt tuning cannot work on this model; LoRA can."
            )


def _relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    if got.shape != want.shape:
        return float("inf")
    got, want = got.float(), want.float()
    apart = torch.where(got == want, 0.0, got - want)  # infinite numbers may be equal
    size = want[want.isfinite()].norm().clamp(min=torch.finfo(torch.float32).tiny)
    return float(apart.norm() / size)


def _run(base_model: Any, device: torch.device, **inputs: Any) -> dict[Any, torch.Tensor]:
    """The results that are numbers for each of two rows, by name; random ones are the same in every run."""
    accelerator = "cuda" if device.type == "cpu" else device.type
    with torch.random.fork_rng(devices=[] if device.type == "cpu" else [device], device_type=accelerator):
        output = base_model(**inputs, return_dict=True)
    named = output.items() if hasattr(output, "items") else enumerate(output)
    tensors = ((name, x) for name, x in named if isinstance(x, torch.Tensor) and x.is_floating_point())
    return {name: x for name, x in tensors if x.shape[:1] == (2,)}


def _plain_words(config: Any, rows: int, length: int) -> torch.Tensor:
    """Ids [length] that stand for nothing but words, as far as the config tells."""
    special: set[int] = set()
    for part in (config, config.get_text_config()):
        for name, value in part.to_dict().items():
            if name.endswith(("_id", "_ids", "_index")):
                special.update(i for i in (value if isinstance(value, list) else [value]) if isinstance(i, int))
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(0)).tolist()
    words = [i for i in order if i not in special] or order
    return torch.tensor([words[i % len(words)] for i in range(length)])


@contextmanager
def _without_trace(model: torch.nn.Module) -> Iterator[None]:
    """Run in evaluation mode, then put back every attribute that a forward pass has set on a module.

    BigBird changes its attention for good on a short text, Qwen2-VL keeps the positions of its last image.
    """
    kept: list[tuple[torch.nn.Module, bool, list[tuple[Any, dict[str, Any]]]]] = [
        (module, module.training, [(own, dict(own)) for own in (module.__dict__, module._modules, module._buffers)])
        for module in model.modules()
    ]
    sharded = any(c.__module__.startswith("torch.distributed") for module, *_ in kept for c in type(module).__mro__)
    try:
        for module, *_ in kept:
            module.training = False
        yield
    finally:
        for module, was_training, before in kept:
            module.training = was_training
            for now, then in [] if sharded else before:  # FSDP moves its parameters while a module runs
                if now.keys() != then.keys() or any(now[key] is not value for key, value in then.items()):
                    now.clear()
                    now.update(then)
