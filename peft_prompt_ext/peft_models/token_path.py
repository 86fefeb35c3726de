"""Proof that a base model gives the same results for words as embeddings and as ids.

A prompt enters as `inputs_embeds`. Some models use the ids again (embeddings of each layer, positions of images), or
scale the embeddings that they look up themselves. Their results with a prompt would be wrong, without an error.

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

from ..quantization import ignore_outliers
from .decoding.feed import CACHES
from .tokens import PACKED_ROW_INPUTS


logger = logging.getLogger(__name__)

TOKENS, WORDS = 16, 5  # length of the probe's row, and of its start that acts as the prompt
# largest relative error from rounding
FP32_TOLERANCE = 1e-5
LOW_PRECISION_TOLERANCE = 1e-2
# inputs that belong to the text in a model with images or sounds
TEXT_INPUTS = {
    *PACKED_ROW_INPUTS,
    "answer_start",
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
_LOCK = threading.Lock()  # a probe changes the base model's training mode


def check_task(base_model: Any, task_type: str) -> None:
    """Check a base model's config and signature for a task.

    Raises:
        ValueError: An encoder-decoder with task type CAUSAL_LM, a decoder with SEQ_2_SEQ_LM, or a forward without
            `inputs_embeds`.
    """
    name = type(base_model).__name__
    has_both = bool(getattr(getattr(base_model, "config", None), "is_encoder_decoder", False))
    if has_both and task_type == "CAUSAL_LM":
        raise ValueError(
            f"task_type 'CAUSAL_LM' needs a decoder; {name} is an encoder-decoder. Set task_type='SEQ_2_SEQ_LM', or "
            "load the decoder with AutoModelForCausalLM."
        )
    if not has_both and task_type == "SEQ_2_SEQ_LM":
        raise ValueError(
            f"task_type 'SEQ_2_SEQ_LM' needs an encoder-decoder; {name} is not one. Set task_type='CAUSAL_LM'."
        )
    parameters = inspect.signature(base_model.forward).parameters
    if "inputs_embeds" not in parameters and all(p.kind is not p.VAR_KEYWORD for p in parameters.values()):
        raise ValueError(
            f"Prompt tuning needs inputs_embeds; {name}.forward takes {', '.join(parameters)}. Use LoRA for this "
            "model."
        )


def check_inputs(base_model: Any, inputs: Mapping[str, Any]) -> None:
    """Check that a model with images or sounds gets only text.

    Such a model places images by ids, and some models count positions by them. A prompt shifts the text and has no
    ids.

    Raises:
        ValueError: It gets other inputs.
    """
    modalities, config = getattr(base_model, "input_modalities", "text"), base_model.config
    is_text_model = set([modalities] if isinstance(modalities, str) else modalities) <= {"text"}
    if is_text_model and config.get_text_config() is config:
        return
    found = sorted(name for name, value in inputs.items() if name not in TEXT_INPUTS and _has_data(value))
    if found:
        raise ValueError(
            f"{type(base_model).__name__} got {', '.join(found)} beside the text. With a prompt, a model takes only "
            "text: it places images and sounds by ids, and a prompt has none. Leave them out, or use LoRA."
        )


def _has_data(value: Any) -> bool:
    """Whether an input has a tensor with more than zeros, which mark text."""
    if isinstance(value, (list, tuple)):
        return any(_has_data(item) for item in value)
    return isinstance(value, torch.Tensor) and (value.is_floating_point() or bool(value.any()))


def prove(base_model: Any, word_embeddings: Any, limit: int | None = None, decoder: bool = False) -> None:
    """Compare a row of words as ids with the same row as embeddings; its first words act as the prompt.

    A second row starts with embeddings of no word, because some models search the ids of embeddings and fail there.

    Args:
        base_model: A model of transformers with its head, on its device and in its precision.
        word_embeddings: The module that embeds text, [B, T] to [B, T, H].
        limit: The model's number of positions; None or less than 1: no limit.
        decoder: Whether the model gets `decoder_input_ids`, which have no prompt.

    Raises:
        ValueError: The results differ, or the model cannot run with `inputs_embeds`.
    """
    weight, name = word_embeddings.weight, type(base_model).__name__
    length = min(TOKENS, limit) if limit is not None and limit > 0 else TOKENS
    if length < 2 or (weight.is_meta and not hasattr(word_embeddings, "_hf_hook")):
        logger.info("%s was not probed with a prompt: it has too few positions, or no weights yet.", name)
        return
    device = torch.device("cpu") if weight.is_meta else weight.device
    ids = (
        _sample_words(base_model.config, getattr(word_embeddings, "num_embeddings", weight.shape[0]), length)
        .to(device)
        .repeat(2, 1)
    )
    further: dict[str, Any] = {"decoder_input_ids": ids[:, :2]} if decoder else {}
    with _LOCK, _preserve_attributes(base_model), ignore_outliers(base_model), torch.no_grad():
        words = min(WORDS, length - 1)
        prompt, text = word_embeddings(ids[:, :words]), word_embeddings(ids[:, words:])
        prompt = torch.cat([prompt[:1], (prompt[1:] + prompt[1:].roll(1, 1)) / 2])
        try:
            want = _run(base_model, device, input_ids=ids, attention_mask=torch.ones_like(ids), **further)
        except Exception as error:
            logger.info("%s was not compared with ids: it needs other inputs too (%s).", name, error)
            want = {}
        embeds, mask = torch.cat([prompt, text], dim=1), torch.ones(2, length).to(device)  # as PEFT makes them
        try:
            got = _run(base_model, device, inputs_embeds=embeds, attention_mask=mask, **further)
        except Exception as error:
            if not want and not isinstance(error, NotImplementedError):
                return  # another input is missing
            raise ValueError(
                f"{name} does not run with inputs_embeds of no ids, as prompt tuning needs "
                f"({type(error).__name__}: {error}). Use LoRA for this model."
            ) from error
    _compare(base_model, got, want, words)


def _compare(base_model: Any, got: dict[Any, torch.Tensor], want: dict[Any, torch.Tensor], words: int) -> None:
    exact = all(x.dtype.itemsize >= 4 for x in want.values()) and getattr(base_model, "hf_quantizer", None) is None
    for output in want.keys() & got.keys():
        error = _relative_error(got[output][0], want[output][0])
        if not error <= (FP32_TOLERANCE if exact else LOW_PRECISION_TOLERANCE):  # NaN differs as well
            raise ValueError(
                f"{type(base_model).__name__} gives other {output} for the embeddings of words than for their ids: "
                f"relative error {error:.1e} with {words} words in place of a prompt. It uses ids for more than word "
                "embeddings (embeddings of each layer, a scale or positions), and a prompt has no ids, so results "
                "would be wrong. Use LoRA for this model."
            )


def _relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    if got.shape != want.shape:
        return float("inf")
    got, want = got.float(), want.float()
    difference = torch.where(got == want, 0.0, got - want)  # infinite numbers may be equal
    size = want[want.isfinite()].norm().clamp(min=torch.finfo(torch.float32).tiny)
    return float(difference.norm() / size)


def _run(base_model: Any, device: torch.device, **inputs: Any) -> dict[Any, torch.Tensor]:
    """Run the base model on two rows, with a fixed random state. Returns its float outputs per row, by name."""
    accelerator = "cuda" if device.type == "cpu" else device.type
    with torch.random.fork_rng(devices=[] if device.type == "cpu" else [device], device_type=accelerator):
        output = base_model(**inputs, return_dict=True)
    named = output.items() if hasattr(output, "items") else enumerate(output)
    tensors = ((name, x) for name, x in named if isinstance(x, torch.Tensor) and x.is_floating_point())
    return {name: x for name, x in tensors if x.shape[:1] == (2,)}


def _sample_words(config: Any, rows: int, length: int) -> torch.Tensor:
    """Sample ids [length] that are not special in the config."""
    special: set[int] = set()
    for part in (config, config.get_text_config()):
        for name, value in part.to_dict().items():
            if name.endswith(("_id", "_ids", "_index")):
                special.update(i for i in (value if isinstance(value, list) else [value]) if isinstance(i, int))
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(0)).tolist()
    words = [i for i in order if i not in special] or order
    return torch.tensor([words[i % len(words)] for i in range(length)])


@contextmanager
def _preserve_attributes(model: torch.nn.Module) -> Iterator[None]:
    """Run in evaluation mode, then restore every attribute that a forward pass sets on a module.

    BigBird switches its attention permanently on a short text; Qwen2-VL stores the positions of its last image.
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
