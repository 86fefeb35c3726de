"""Proof on a small ragged batch that the packed path gives a model's own results, before it is trusted with a user's.

Shapes: B rows, T longest row, P virtual tokens, N packed tokens, H hidden size, V words, C classes.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..devices import device_of
from .cache import precision, prompt_state
from .choice import AttentionCall, candidates, choose
from .interface import NotPackable, attach, detach
from .layout import pack
from .status import EngineStatus


logger = logging.getLogger(__name__)

PROMPT_LENGTH = 3
ROW_LENGTHS = (5, 1, 9)
# the relative error of the logits that rounding explains; a token that sees its neighbour is far beyond
FP32_TOLERANCE = 1e-4
LOW_PRECISION_TOLERANCE = 5e-2


def prove(base_model: Any, packed_forward: Callable[..., Any], word_embeddings: Any, run: bool = True) -> EngineStatus:
    """Decide whether a model may take the packed path.

    Args:
        base_model: A model of transformers with its head.
        packed_forward: `packed_forward(base_model, embeds [1, N, H], layout)` returns an output with logits
            [B, P+T, V] or [B, C].
        word_embeddings: Its word embeddings.
        run: Run the ragged batch; without it every model is trusted whose attention can be reached, and that
            attention is SDPA.

    Raises:
        ValueError: An attention is asked for that does not exist.
    """
    names = candidates(device_of(word_embeddings))
    try:
        refuse_early(base_model)
        attach(base_model)
        status = EngineStatus(True, "not probed", keeps_prompts=True, attention="sdpa")
        if run:
            status = _probe(base_model, packed_forward, word_embeddings, names)
    except NotPackable as refusal:
        status = EngineStatus(False, str(refusal))
    except Exception as error:  # an unknown architecture may do anything with one packed sequence
        status = EngineStatus(False, f"its forward cannot run a packed batch ({type(error).__name__}: {error})")
    if not status.packed:
        detach(base_model)
    how = f"used, with {status.attention} attention" if status.packed else "not used, PEFT's path is"
    logger.info("The shared prefix is %s: %s.", how, status.reason)
    return status


def refuse_early(base_model: Any) -> None:
    """Raise NotPackable for what the config or the signature tells without a forward pass."""
    config = base_model.config.get_text_config()
    if getattr(config, "is_encoder_decoder", False):
        raise NotPackable("an encoder's prompt sees the text, so it is not the same for every row")
    if getattr(config, "alibi", False) or config.model_type in {"bloom", "mpt"}:
        raise NotPackable("its attention adds a bias by the distance of tokens (ALiBi)")
    if getattr(config, "output_router_logits", False):
        raise NotPackable("output_router_logits is set, and the router's loss counts each row's virtual tokens")
    if "position_ids" not in inspect.signature(base_model.forward).parameters:
        raise NotPackable("its forward takes no position_ids")


@torch.no_grad()
def _probe(
    base_model: Any, packed_forward: Callable[..., Any], word_embeddings: Any, attentions: tuple[str, ...]
) -> EngineStatus:
    device = device_of(word_embeddings)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(word_embeddings.num_embeddings, (PROMPT_LENGTH + sum(ROW_LENGTHS),), generator=generator).to(
        device
    )
    mask = torch.arange(max(ROW_LENGTHS)) < torch.tensor(ROW_LENGTHS)[:, None]
    layout = pack(mask.to(device), (PROMPT_LENGTH,))
    calls = layout.calls = []
    with _evaluating(base_model):
        embeds = word_embeddings(ids[None])
        prompt, *texts = embeds[0].split((PROMPT_LENGTH, *ROW_LENGTHS))
        packed = packed_forward(base_model, embeds, layout).logits.float()
        _every_layer_packed(base_model, calls)
        cached = _with_kept_prompt(base_model, packed_forward, prompt, torch.cat(texts), mask.to(device))
        alone = [
            base_model(inputs_embeds=torch.cat([prompt, text])[None], use_cache=False).logits[0].float()
            for text in texts
        ]
    error = _relative_error(packed, alone)
    figure = f"relative error {error:.1e} on rows of {', '.join(map(str, ROW_LENGTHS))} tokens"
    _, dtype, autocast = precision(embeds)
    exact = dtype.itemsize >= 4 and not autocast and getattr(base_model, "hf_quantizer", None) is None
    tolerance = FP32_TOLERANCE if exact else LOW_PRECISION_TOLERANCE
    if not error <= tolerance:  # NaN is refused as well
        raise NotPackable(f"{figure}: its layers mix rows, or do not see where a row begins")
    keeps = cached is not None and _relative_error(cached, alone) <= tolerance
    attention, not_taken = choose(attentions, calls)
    longest = _longest_row(base_model.config.get_text_config(), calls)
    return EngineStatus(True, "; ".join([figure, *not_taken]), longest, keeps, attention)


def _relative_error(got: torch.Tensor, rows: list[torch.Tensor]) -> float:
    want = torch.cat(rows)
    # a language model's rows have pads behind them
    cut = torch.cat([row[: len(alone)] if alone.dim() == 2 else row for row, alone in zip(got, rows, strict=True)])
    return float((cut - want).norm() / want.norm())


def _with_kept_prompt(
    base_model: Any, packed_forward: Callable[..., Any], prompt: torch.Tensor, text: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor | None:
    """Logits of the ragged batch behind a prompt that ran before; None if the model cannot run so."""
    layout = pack(mask, (len(prompt),))
    try:
        layout.cached = [prompt_state(base_model, prompt)]
        return packed_forward(base_model, text[None], layout).logits.float()
    except Exception as error:  # every batch can take its prompt along
        logger.debug("Prompts are not kept: %s", error)
        return None


def _every_layer_packed(base_model: Any, calls: list[AttentionCall]) -> None:
    layers = base_model.config.get_text_config().num_hidden_layers
    if len(calls) != layers:
        raise NotPackable(f"{len(calls)} of its {layers} layers use transformers' attention interface")


def _longest_row(config: Any, calls: list[AttentionCall]) -> int | None:
    """Rows up to this length have a result of their own.

    A longer one would need a window that the model does not hand to its attention; or it makes the rotary positions
    of the whole batch other ones (LongRoPE), those of a kept prompt not.
    """
    windows = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
    handed = {dict(call.options).get("sliding_window") for call in calls}
    limits = {window for window in windows if window and window not in handed}
    rotary = getattr(config, "rope_parameters", None) or {}
    for kind in (rotary, *(value for value in rotary.values() if isinstance(value, dict))):
        if kind.get("rope_type") == "longrope":
            limits.add(kind["original_max_position_embeddings"])
    return min(limits, default=None)


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
