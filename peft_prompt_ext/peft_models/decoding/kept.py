"""The prompt in the cache of `generate`, computed once for the model instead of once for each row of each call.

The first step of a call finds the prompt in its cache, and reads only the text: `[prompt | pads | text]`. What does
not allow this takes the other path, where the first step reads `[pads | prompt | text]`.

Shapes: B rows, P virtual tokens, G key-value heads, D head size, H hidden size.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...shared_prefix.watch import is_sharded
from ..packed import BASE
from ..position import is_suffix
from .feed import PromptFeed, cache_name, counts_columns, find_cache, takes
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


def find_mode_obstacle(config: Any, kwargs: Mapping[str, Any], feed: PromptFeed) -> str | None:
    """Find what in a call of `generate` needs the prompt to run with the text; None if nothing.

    Args:
        config: The config of generation.
        kwargs: The caller's arguments.
        feed: The feed of the call.

    Raises:
        NotImplementedError: There is an obstacle, and each row has a prompt of its own.
    """
    obstacles = {
        "the prompt stands behind the text": feed.is_suffix,
        "the caller gives a cache": find_cache(kwargs) is not None,
        "use_cache=False": not config.use_cache,
        "hidden states or attentions of the prompt are returned": config.output_hidden_states
        or config.output_attentions,
        "prefill_chunk_size is set": config.prefill_chunk_size is not None,
    }
    obstacle = next((reason for reason, is_there in obstacles.items() if is_there), None)
    if obstacle is not None and feed.names:
        raise _make_names_error(obstacle)
    return obstacle


def put_prompts(
    model: Any, feed: PromptFeed, obstacle: str | None, stored: Any, where: Place, words: torch.Tensor
) -> bool:
    """Write kept prompts to the empty cache of a call of `generate`, or log why that is not possible.

    Args:
        model: A PeftModel for causal language modelling.
        feed: The feed of the call.
        obstacle: See `find_mode_obstacle`.
        stored: The cache.
        where: The place of the text.
        words: Embeddings of text, [B, 1, H].

    Returns:
        Whether the cache has the prompts.

    Raises:
        NotImplementedError: It is not possible, and each row has a prompt of its own.
    """
    found: str | list[KeptCache] | None = obstacle or _find_obstacle(model.get_base_model(), stored, where)
    if found is None:
        prompts = {name: prompt.to(words) for name, prompt in feed.prompts.items()}
        found = _get_kept(model, prompts, where.width)
    if isinstance(found, str) and feed.names:
        raise _make_names_error(found)
    if isinstance(found, str):
        logger.debug("The prompt runs with the text of each row: %s.", found)
        return False
    rows = feed.number_prompts(len(words)) if feed.names else None
    for number, layer in enumerate(found[0].cache.layers):
        if layer.is_initialized:  # a layer that shares another one's keys and values has none
            each = [kept.cache.layers[number] for kept in found]
            parts = [x.keys for x in each], [x.values for x in each]
            stored.update(*(_repeat(part, where.virtual, rows, len(words)) for part in parts), number)
    return True


def _repeat(each: list[torch.Tensor], virtual: int, rows: torch.Tensor | None, count: int) -> torch.Tensor:
    """Give B = `count` rows their keys or values, [B, G, P, D], where P = `virtual` is that of the longest prompt.

    Args:
        each: Those of each prompt, [1, G, its P, D].
        virtual: The longest P; a shorter prompt stands last.
        rows: The number of each row's prompt, [B], `len(each)` for none; None: all have the first.
        count: B.
    """
    if rows is None:
        return each[0].expand(count, -1, -1, -1)
    wide = [torch.nn.functional.pad(x, (0, 0, virtual - x.shape[2], 0)) for x in each]
    return torch.cat([*wide, torch.zeros_like(wide[0])])[rows.to(wide[0].device)]


def check_names(model: Any, names: Sequence[str] | None, text: torch.Tensor | None) -> list[str]:
    """Check the adapter of each row of a call of `generate`; no names: all rows have the active one.

    Args:
        model: A PeftModel for causal language modelling.
        names: The caller's `adapter_names`.
        text: The caller's ids or embeddings, [B, T, ...]; None: one row.

    Raises:
        ValueError: There is not one name for each row, or a name is unknown.
        NotImplementedError: The adapters differ in more than their prompts, which stand in front of the text.
    """
    if names is None:
        return []
    names = list(names)
    model._list_prompts(torch.empty(1) if text is None else text, names)
    obstacle = model._find_unshared(names)
    behind = sorted(name for name in set(names) - {BASE} if is_suffix(model.peft_config[name]))
    if behind:
        obstacle = f"the prompt of {behind[0]!r} stands behind the text"
    if obstacle is not None:
        raise _make_names_error(obstacle)
    return names


def _make_names_error(reason: str) -> NotImplementedError:
    return NotImplementedError(
        f"generate with adapter_names reads prompts that are kept, and here they cannot be: {reason}. Generate for "
        "the rows of each adapter alone, after set_adapter."
    )


def _get_kept(model: Any, prompts: dict[str, torch.Tensor], width: int) -> list[KeptCache] | str:
    """Get the kept caches of prompts [P, H] for rows of `width` tokens, or the reason why there are none."""
    engine, base_model = model._engine, model.get_base_model()
    if is_sharded(base_model.modules(), base_model.parameters()):  # a proof is a pass that other processes may not run
        return "the base model gathers its weights for each pass"
    with engine.lock:  # of several threads, one computes
        status = model._prove(behind=False)
        if not status.packed:
            return str(status.reason)
        if status.max_tokens is not None and width > status.max_tokens:
            return f"a row of {width} tokens is longer than {status.max_tokens}, its window or its short positions"
        kept = engine.keep_caches(base_model, model.word_embeddings, prompts, keep_cache)
    if kept is None:
        return "the base model is in training mode or has hooks"
    unknown = _find_unknown_layer(kept[0].cache)
    if unknown is not None:
        return unknown
    for one in kept:
        if any(layer.is_initialized and layer.keys.shape[2] < len(one.prompt) for layer in one.cache.layers):
            return f"a sliding window is not longer than the prompt of {len(one.prompt)} virtual tokens"
    return kept


def _find_obstacle(base_model: Any, stored: Any, where: Place) -> str | None:
    """Find why an empty cache of `generate` cannot take a prompt before the text; None if it can."""
    from transformers import DynamicCache, StaticCache

    if type(stored) not in {DynamicCache, StaticCache} or getattr(stored, "offloading", False):
        return f"a prompt cannot be written to a cache of the type {type(stored).__name__}"
    if where.blocks and counts_columns(stored):
        return "rows have pads, which sliding windows behind the prompt would count"
    if where.blocks and not takes(base_model, "position_ids"):
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
