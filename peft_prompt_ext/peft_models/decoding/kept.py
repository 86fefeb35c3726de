"""The prompt in the cache of `generate`, computed once for the model instead of once for each row of each call.

The first step of a call finds the prompt in its cache, and reads only the text: `[prompt | pads | text]`. What does
not allow this takes the other path, where the first step reads `[pads | prompt | text]`.

Shapes: B rows, P virtual tokens, G key-value heads, D head size, H hidden size.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .feed import cache_name, counts_columns, find_cache, takes
from .held_prompt import Place


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class KeptCache:
    """A prompt in a cache of the base model's own.

    Attributes:
        prompt: The virtual tokens, [P, H].
        cache: A DynamicCache with one row, keys and values [1, G, P, D] in each layer.
    """

    prompt: torch.Tensor
    cache: Any


@torch.no_grad()
def keep_cache(base_model: Any, prompt: torch.Tensor) -> KeptCache:
    """Run a prompt [P, H] alone through the base model, without its head."""
    from transformers import DynamicCache

    prompt, backbone = prompt.clone(), base_model.base_model
    cache = DynamicCache(config=base_model.config.get_text_config(decoder=True))
    backbone(inputs_embeds=prompt[None], use_cache=True, **{cache_name(backbone): cache})
    return KeptCache(prompt, cache)


def find_mode_obstacle(config: Any, kwargs: Mapping[str, Any], is_suffix: bool) -> str | None:
    """Find what in a call of `generate` needs the prompt to run with the text; None if nothing.

    Args:
        config: The config of generation.
        kwargs: The caller's arguments.
        is_suffix: Whether the prompt stands behind the text.
    """
    obstacles = {
        "the prompt stands behind the text": is_suffix,
        "the caller gives a cache": find_cache(kwargs) is not None,
        "use_cache=False": not config.use_cache,
        "hidden states or attentions of the prompt are returned": config.output_hidden_states
        or config.output_attentions,
        "prefill_chunk_size is set": config.prefill_chunk_size is not None,
    }
    return next((reason for reason, is_there in obstacles.items() if is_there), None)


def put_prompt(
    model: Any, prompt: torch.Tensor, obstacle: str | None, stored: Any, where: Place, words: torch.Tensor
) -> bool:
    """Write a model's kept prompt to the empty cache of a call of `generate`, or log why that is not possible.

    Args:
        model: A PeftModel for causal language modelling.
        prompt: Its active prompt, [P, H].
        obstacle: See `find_mode_obstacle`.
        stored: The cache.
        where: The place of the text.
        words: Embeddings of text, [B, 1, H].

    Returns:
        Whether the cache has the prompt.
    """
    found: str | KeptCache | None = obstacle or _find_obstacle(model.get_base_model(), stored, where)
    found = found or _get_kept(model, prompt.to(words), where.width)
    if isinstance(found, str):
        logger.debug("The prompt runs with the text of each row: %s.", found)
        return False
    for number, layer in enumerate(found.cache.layers):
        if layer.is_initialized:  # a layer that shares another one's keys and values has none
            stored.update(*(x.expand(len(words), -1, -1, -1) for x in (layer.keys, layer.values)), number)
    return True


def _get_kept(model: Any, prompt: torch.Tensor, width: int) -> KeptCache | str:
    """Get the kept cache of the active prompt [P, H] for rows of `width` tokens, or the reason why there is none."""
    engine = model._engine
    with engine.lock:  # of several threads, one computes
        status = model._prove()
        if not status.packed:
            return str(status.reason)
        if status.max_tokens is not None and width > status.max_tokens:
            return f"a row of {width} tokens is longer than {status.max_tokens}, its window or its short positions"
        kept = engine.keep_caches(
            model.get_base_model(), model.word_embeddings, {model.active_adapter: prompt}, keep_cache
        )
    if kept is None:
        return "the base model is in training mode, has hooks, or gathers its weights for each pass"
    unknown = _find_unknown_layer(kept[0].cache)
    if unknown is not None:
        return unknown
    if any(layer.is_initialized and layer.keys.shape[2] < len(prompt) for layer in kept[0].cache.layers):
        return f"a sliding window is not longer than the prompt of {len(prompt)} virtual tokens"
    return kept[0]


def _find_obstacle(base_model: Any, stored: Any, where: Place) -> str | None:
    """Find why an empty cache of `generate` cannot take a prompt before the text; None if it can."""
    from transformers import DynamicCache, StaticCache

    if type(stored) not in {DynamicCache, StaticCache} or getattr(stored, "offloading", False):
        return f"a prompt cannot be written to a cache of the type {type(stored).__name__}"
    if where.padded and counts_columns(stored):
        return "rows have pads, which sliding windows behind the prompt would count"
    if where.padded and not takes(base_model, "position_ids"):
        return "rows have pads, and the base model takes no position_ids"
    return _find_unknown_layer(stored)


def _find_unknown_layer(cache: Any) -> str | None:
    """Find a layer of a cache that has more than keys and values of each token; None if there is none."""
    from transformers import cache_utils as kinds

    known = {
        kinds.DynamicLayer,
        kinds.DynamicSlidingWindowLayer,
        kinds.StaticLayer,
        kinds.StaticSlidingWindowLayer,
    }
    unknown = next((layer for layer in cache.layers if type(layer) not in known), None)
    return None if unknown is None else f"{type(unknown).__name__} of its cache cannot be repeated over rows"
