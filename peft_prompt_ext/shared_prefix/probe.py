"""Proof on a small ragged batch that a packed batch gives a model's own results.

Shapes: B rows, T longest row, P virtual tokens, N packed tokens, H hidden size, V words, C classes.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from ..devices import device_of
from ..evaluation import evaluation_mode
from ..quantization import ignore_outliers
from ..sizes import max_positions
from .attention.select import ATTENTIONS, AttentionCall, list_candidates, select
from .interface import NotPackable, attach
from .kept_prefix import KeptPrefixes, keep_prefix
from .layout import pack, pack_behind
from .lengths import FAR, Trial, find_longest
from .packed_pass import PackedPass
from .precision import Tolerance
from .status import EngineStatus
from .texts import Texts


logger = logging.getLogger(__name__)

PROMPT_LENGTH = 3
ROW_LENGTHS = (5, 1, 9)
TEXT_LENGTHS = (4, 1, 7)  # the rest of a row is the answer
TOLERANCE = Tolerance(float32=1e-4, reduced=1e-2, low=5e-2)  # for the logits


@torch.compiler.disable  # the probe of a compiled model is not traced
def prove(
    base_model: Any,
    packed_forward: Callable[..., Any],
    word_embeddings: Any,
    run: bool = True,
    behind: bool = False,
) -> EngineStatus:
    """Prove that a model's batches may run packed.

    Args:
        base_model: A model of transformers with its head.
        packed_forward: `packed_forward(base_model, embeds [1, N, H], packed)` returns an output with logits
            [B, P+T, V] or [B, C].
        word_embeddings: Its word embeddings.
        run: Whether to run the ragged batch. Without it, only the config is checked, and attention is SDPA.
        behind: Whether prompts stand behind the texts: a batch of these runs too.

    Raises:
        ValueError: The environment variable is not the name of an attention.
    """
    names = list_candidates(device_of(word_embeddings))
    try:
        refuse_early(base_model)
        attach(base_model)
        status = EngineStatus(True, "not probed", keeps_prompts=True, attention="sdpa")
        if run:
            status = _probe(base_model, packed_forward, word_embeddings, names)
            if behind:
                status = _probe_behind(base_model, packed_forward, word_embeddings, status)
    except NotPackable as refusal:
        status = EngineStatus(False, str(refusal))
    except Exception as error:  # an unknown architecture may raise any error
        status = EngineStatus(False, f"its forward cannot run a packed batch ({type(error).__name__}: {error})")
    path = f"run packed, with {status.attention} attention" if status.packed else "take PEFT's path"
    logger.info("Batches %s: %s.", path, status.reason)
    return status


@torch.no_grad()
def check_causal(base_model: Any, word_embeddings: Any) -> None:
    """Raise ValueError if a text changes with what is behind it, so that a prompt there would change the text."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(word_embeddings.num_embeddings, (1, max(ROW_LENGTHS)), generator=generator)
    with evaluation_mode(base_model), ignore_outliers(base_model):
        words = word_embeddings(ids.to(device_of(word_embeddings)))
        whole, part = (base_model.base_model(inputs_embeds=x)[0].float() for x in (words, words[:, : ROW_LENGTHS[0]]))
    error = float((whole[:, : ROW_LENGTHS[0]] - part).norm() / part.norm())
    if not error <= (TOLERANCE.low if words.dtype.itemsize < 4 else TOLERANCE.reduced):
        raise ValueError(
            f"prompt_position='suffix' needs a decoder: in {type(base_model).__name__} a text sees what is behind it "
            f"(relative change {error:.0e}). Use prompt_position='prefix'."
        )


def refuse_early(base_model: Any) -> None:
    """Raise NotPackable if the config or the signature excludes packed batches."""
    config = base_model.config.get_text_config(decoder=True)
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
    calls: list[AttentionCall] = []
    batch = PackedPass(pack(mask, (PROMPT_LENGTH,)), calls=calls)
    with evaluation_mode(base_model), ignore_outliers(base_model):
        embeds = word_embeddings(ids[None])
        prompt, *texts = embeds[0].split((PROMPT_LENGTH, *ROW_LENGTHS))
        packed = _run_packed(base_model, partial(packed_forward, base_model, embeds, batch), calls)
        cached = _run_kept(base_model, packed_forward, prompt, torch.cat(texts), mask)
        alone = [
            base_model(inputs_embeds=torch.cat([prompt, text])[None], use_cache=False).logits[0].float()
            for text in texts
        ]
    error = _relative_error(packed, alone)
    figure = f"relative error {error:.1e} on rows of {', '.join(map(str, ROW_LENGTHS))} tokens"
    low = torch.is_autocast_enabled(device.type) or getattr(base_model, "hf_quantizer", None) is not None
    tolerance = TOLERANCE.of(device, embeds.dtype, low)
    if not error <= tolerance:  # NaN is refused as well
        raise NotPackable(f"{figure}: its layers mix rows, or do not see where a row begins")
    keeps = cached is not None and _relative_error(cached, alone) <= tolerance
    trial = Trial(
        base_model.config.get_text_config(decoder=True),
        lambda: pack(mask, (PROMPT_LENGTH,)),
        partial(packed_forward, base_model, embeds),
        partial(base_model.base_model, inputs_embeds=embeds, use_cache=False),
        ROW_LENGTHS[-1],
        max_positions(base_model) or FAR,
        tolerance == TOLERANCE.float32,
    )
    with evaluation_mode(base_model), ignore_outliers(base_model):
        row, packs = find_longest(trial)
    attention, refused = select(attentions, calls)
    return EngineStatus(True, "; ".join([figure, *refused]), row, keeps, attention, packs)


@torch.no_grad()
def _probe_behind(
    base_model: Any, packed_forward: Callable[..., Any], word_embeddings: Any, status: EngineStatus
) -> EngineStatus:
    """Compare rows `[text | prompt | answer]`, whose texts run in a pass of their own, with each row alone."""
    device = device_of(word_embeddings)
    generator = torch.Generator().manual_seed(1)
    mask = torch.arange(max(ROW_LENGTHS)) < torch.tensor(ROW_LENGTHS)[:, None]
    ids = torch.randint(word_embeddings.num_embeddings, mask.shape, generator=generator)
    is_classifier = hasattr(base_model, "score")
    starts = ROW_LENGTHS if is_classifier else TEXT_LENGTHS
    layout = pack_behind(mask, (PROMPT_LENGTH,), torch.zeros(len(mask), dtype=torch.long), torch.tensor(starts), "abc")
    with evaluation_mode(base_model), ignore_outliers(base_model):
        words = word_embeddings(ids.to(device))
        prompt = words[0, :PROMPT_LENGTH]
        packed = torch.cat([prompt, words.flatten(0, 1)])[layout.to(device).sources]
        count = layout.num_trunk_tokens
        texts = Texts(base_model, ATTENTIONS[status.attention or "sdpa"], packed[:count], layout.trunk_lengths)
        run = PackedPass(layout, texts.attention, trunks=texts)
        try:
            got = packed_forward(base_model, packed[None, count:], run).logits.float()
        except NotPackable:
            raise
        except Exception as failure:
            raise NotPackable(f"texts cannot run alone ({type(failure).__name__}: {failure})") from failure
        alone = [
            base_model(inputs_embeds=torch.cat([row[:start], prompt, row[start:length]])[None], use_cache=False)
            .logits[0]
            .float()
            for row, start, length in zip(words, starts, ROW_LENGTHS, strict=True)
        ]
    error = _relative_error(got, alone)
    low = torch.is_autocast_enabled(device.type) or getattr(base_model, "hf_quantizer", None) is not None
    figure = f"relative error {error:.1e} with the prompt behind texts of {', '.join(map(str, starts))} tokens"
    if not error <= TOLERANCE.of(device, words.dtype, low):
        raise NotPackable(f"{figure}: its layers do not see the text that ran before")
    return replace(status, reason=f"{status.reason}; {figure}")


def _relative_error(got: torch.Tensor, rows: list[torch.Tensor]) -> float:
    want = torch.cat(rows)
    # cut the pads off a language model's rows
    cut = torch.cat([row[: len(alone)] if alone.dim() == 2 else row for row, alone in zip(got, rows, strict=True)])
    return float((cut - want).norm() / want.norm())


def _run_kept(
    base_model: Any, packed_forward: Callable[..., Any], prompt: torch.Tensor, text: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor | None:
    """Compute logits of the ragged batch with a kept prefix; None if the model does not support it."""
    try:
        packed = PackedPass(pack(mask, (len(prompt),)), trunks=KeptPrefixes([keep_prefix(base_model, prompt)]))
        return packed_forward(base_model, text[None], packed).logits.float()
    except Exception as error:  # kept prefixes are optional
        logger.debug("Prompts are not kept: %s", error)
        return None


def _run_packed(base_model: Any, run: Callable[[], Any], calls: list[AttentionCall]) -> torch.Tensor:
    layers = base_model.config.get_text_config(decoder=True).num_hidden_layers
    use = f"of its {layers} layers use transformers' attention interface"
    try:
        logits: torch.Tensor = run().logits.float()
    except NotPackable:
        raise
    except Exception as error:  # a layer with its own attention fails at the mask
        reason = f"it reads the attention mask itself, {len(calls)} {use} ({type(error).__name__}: {error})"
        raise NotPackable(reason) from error
    if not calls or len(calls) % layers:  # some layers attend twice
        raise NotPackable(f"{len(calls)} {use}")
    return logits
