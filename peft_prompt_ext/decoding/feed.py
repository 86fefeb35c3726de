"""Puts a prompt into what a base model is given at each step of decoding.

Shapes: B rows, P virtual tokens, S text tokens that a cache holds, T text tokens of a call, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from inspect import signature
from typing import Any

import torch
from peft.utils import ModulesToSaveWrapper

from ..padding import reorder
from .held_prompt import HeldPrompt, Place, cache_length, held_by, note, place, seen_by
from .view import unwrapped


# what forward calls its cache: the first name of all models where transformers knows that one alone (5.24)
CACHES = ("cache", "past_key_values", "cache_params")
_IN_PLACE = "_peft_prompt_ext_place"  # of ids and embeddings that come from `PromptFeed.prepare`


class PromptFeed:
    """Puts one prompt into the inputs of one base model; the prompt is the one that was active when it was made.

    Attributes:
        prompt: [P, H].
        first: Where the tokens of the first call stand; None before it.
        left_out: How many tokens of the text the ids of `generate` do not have.
        masked: Whether the caller gave an attention mask, so that no mask means no pads.
        chunks: How much of the text `generate` reads at a time; None if all of it.
    """

    def __init__(self, model: Any) -> None:
        """Read a model's active prompt."""
        self.base_model = unwrapped(model.get_base_model())
        self.prompt = model.get_prompt(batch_size=1)[0, : model.active_peft_config.num_virtual_tokens]
        self.embed = model.word_embeddings
        self.first: Place | None = None
        self.left_out, self.masked, self.chunks = 0, False, None
        self._noted = self.prompt.detach().clone()
        self._heads: dict[ModulesToSaveWrapper, Any] | None = None

    def seen_by(self, stored: Any) -> int | None:
        """See `held_prompt.seen_by`."""
        return seen_by(stored, self._noted)

    def place(self, stored: Any, new: int, mask: torch.Tensor | None) -> Place:
        """See `held_prompt.place`.

        Raises:
            ValueError: The cache has no room for the tokens.
            NotImplementedError: The base model would count pads that stand behind text, or would not go on from its
                states with more than one token.
        """
        where = place(stored, self.seen_by(stored), new, mask, len(self.prompt))
        room = _room(stored, self.base_model.config)
        if where.width > room:
            raise ValueError(
                f"past_key_values has room for {room} tokens; with the virtual tokens {where.width} are needed. Make "
                "its max_cache_len as much longer as the prompt is."
            )
        if where.holes and (counts_columns(stored) or "position_ids" not in self._arguments):
            raise NotImplementedError(
                f"Some rows have pads behind real tokens, and {type(self.base_model).__name__} would count them "
                "(in windows, states or distances). Continue rows of one length together."
            )
        if not where.begins and new > 1 and has_states(stored) and not self._goes_on():
            raise NotImplementedError(
                f"{type(self.base_model).__name__} does not go on from the states of its cache when it gets several "
                f"tokens at once ({new} here). Begin with an empty cache and the whole text."
            )
        return where

    @torch.no_grad()
    def _goes_on(self) -> bool:
        """Whether a few tokens give in two parts, with a cache between them, what they give at once."""
        from transformers import DynamicCache

        name = cache_name(self.base_model)
        embeds = self.embed(torch.arange(8, device=self.prompt.device)[None])
        want = self.base_model(inputs_embeds=embeds, use_cache=False).logits[:, -1].float()
        stored = DynamicCache(config=self.base_model.config.get_text_config(decoder=True))
        for part in embeds.split(5, dim=1):
            got = self.base_model(inputs_embeds=part, use_cache=True, **{name: stored}).logits[:, -1].float()
        return bool((got - want).norm() <= (1e-3 if embeds.dtype == torch.float32 else 5e-2) * want.norm())

    def positions(self, where: Place, asked: bool = False) -> torch.Tensor | None:
        """What the base model has to be given as `position_ids`, [B or 1, P + S + T]; None if it counts itself.

        Args:
            where: Where the tokens stand.
            asked: Whether it cannot count itself, even without pads.
        """
        if "position_ids" not in self._arguments:
            return None
        numbers = where.positions
        if numbers is None and (asked or self._first_position):
            numbers = torch.arange(where.width, device=self.prompt.device)[None]
        return None if numbers is None else numbers + self._first_position

    @cached_property
    def _arguments(self) -> frozenset[str]:
        return frozenset(signature(self.base_model.forward).parameters)

    @cached_property
    def _first_position(self) -> int:
        """The number of a row's first token: RoBERTa counts from padding_idx + 1, but not behind a cache."""
        for name, module in self.base_model.named_modules():
            if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
                return module.padding_idx + 1
        return 0

    def step(
        self,
        prepare: Callable[..., dict[str, Any]],
        input_ids: torch.Tensor,
        next_sequence_length: int | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        is_first_iteration: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The base model's inputs of a step of `generate`, in place of its `prepare_inputs_for_generation`.

        Args:
            prepare: The base model's own function.
            input_ids: All the text that `generate` was given and made, [B, T], or a chunk of what it was given.
            next_sequence_length: What `generate` takes to be new. It does not count the virtual tokens, so only
                whether it is there tells something: a chunk comes without.
            attention_mask: [B, S + T], or None.
            inputs_embeds: The text that `generate` was given in place of ids, [B, T, H].
            is_first_iteration: Whether that text has still to be read.
            kwargs: More arguments of the base model's function.

        Raises:
            ValueError: See `held_prompt`, or the head was changed during the call.
        """
        self._check_heads()
        device = self.base_model.device
        if device.type != "meta":  # `generate` takes inputs that are elsewhere
            input_ids = input_ids.to(device)
            attention_mask = None if attention_mask is None else attention_mask.to(device)
            inputs_embeds = None if inputs_embeds is None else inputs_embeds.to(device)
        stored = cache_of(kwargs)
        seen = self.seen_by(stored) or 0
        text = inputs_embeds if inputs_embeds is not None and is_first_iteration else input_ids
        if self.chunks is not None and next_sequence_length is None:
            new = text.shape[1]
        else:
            new = text.shape[1] + (self.left_out if text is input_ids else 0) - seen
        if attention_mask is None and self.masked:
            attention_mask = input_ids.new_ones(len(text), seen + new) if seen else None
        where = self.place(stored, new, attention_mask)
        if self.chunks is not None and where.blocks:
            raise ValueError(
                f"prefill_chunk_size ({self.chunks}) needs rows without pads: pads are moved before the prompt, and "
                "that across chunks. Leave it out, or generate for rows of one length."
            )
        self.first = self.first or (where if where.begins else None)
        return self.prepare(prepare, where, text, input_ids, is_first_iteration=is_first_iteration, **kwargs)

    def _check_heads(self) -> None:
        heads = (module for module in self.base_model.modules() if isinstance(module, ModulesToSaveWrapper))
        if self._heads is None:
            self._heads = {head: _state(head) for head in heads}
        if any(_state(head) != state for head, state in self._heads.items()):
            raise ValueError(
                "The active adapter was switched while generate ran, and the adapters have heads of their own "
                "(modules_to_save). Switch back before the call goes on, or let it end first."
            )

    def prepare(
        self,
        prepare: Callable[..., dict[str, Any]],
        where: Place,
        text: torch.Tensor,
        input_ids: torch.Tensor,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The base model's inputs for the last tokens of `text`, whose place is known.

        The base model's own function gets ids and a mask that have the virtual tokens, so that its lengths are true.

        Args:
            prepare: The base model's own function.
            where: Where the new tokens stand.
            text: Ids [B, T] or embeddings [B, T, H].
            input_ids: [B, T]; `text` itself unless that is embeddings.
            kwargs: Arguments of the base model's function.

        Raises:
            NotImplementedError: The function does not give the new tokens alone.
        """
        ids = input_ids.new_zeros(len(input_ids), where.width)  # 0 for virtual tokens, and for text without ids
        known = min(input_ids.shape[1], where.seen + where.new)
        ids[:, where.width - known :] = input_ids[:, input_ids.shape[1] - known :]
        whole = ids[:, where.virtual :] if known == where.seen + where.new else None
        for name in ("position_ids", "cache_position"):  # of the text alone
            kwargs.pop(name, None)
        # behind a static cache the mask has four dimensions, and opt counts in its mask
        positions = self.positions(where, asked=getattr(cache_of(kwargs), "is_compileable", False))
        if positions is not None:
            kwargs["position_ids"] = positions.expand(len(input_ids), -1)
        if text is not input_ids:
            kwargs["inputs_embeds"] = self.put_in(text[:, text.shape[1] - where.new :], where)
        result = prepare(
            ids if where.order is None else reorder(ids, where.order),
            next_sequence_length=None if where.begins or text is not input_ids else where.new,
            attention_mask=where.mask,
            **kwargs,
        )
        stored = cache_of(result)
        if text is input_ids and stored is None and not where.begins and whole is not None:
            # it wants to read all of the text again (phi3, where its positions change)
            again = {name: value for name, value in kwargs.items() if name not in CACHES}
            where = replace(where, begins=True, seen=0, new=where.seen + where.new)
            return self.prepare(prepare, where, text, input_ids, **again)
        if text is input_ids and (where.begins or stored is None or result["input_ids"].shape[1] != where.new):
            if whole is None or result["input_ids"].shape[1] != where.width or not where.begins:
                raise NotImplementedError(
                    f"{type(self.base_model).__name__} does not take new tokens alone behind a cache. Pass "
                    "use_cache=False, with the whole text as input_ids."
                )
            result["inputs_embeds"] = self.put_in(self.embed(whole), where)
            result["input_ids"] = None
        for key in ("input_ids", "inputs_embeds"):
            if result.get(key) is not None:
                setattr(result[key], _IN_PLACE, where)
        dynamic = self.base_model._supports_default_dynamic_cache()
        if stored is None and kwargs.get("use_cache") is not False and dynamic:
            from transformers import DynamicCache

            stored = DynamicCache(config=self.base_model.config.get_text_config(decoder=True))
        if stored is not None:
            result = {name: value for name, value in result.items() if name not in CACHES}
            result[cache_name(self.base_model)] = stored
        self.note(stored, where, whole)
        return result

    def put_in(self, text: torch.Tensor, where: Place) -> torch.Tensor:
        """Embeddings of a call's columns from those of its text [B, T, H]: with the prompt if it begins the text."""
        if where.begins:
            text = torch.cat([self.prompt.to(text).expand(len(text), -1, -1), text], dim=1)
        return text if where.order_now is None else reorder(text, where.order_now)

    def note(self, stored: Any, where: Place, ids: torch.Tensor | None) -> None:
        """Note in a cache, if there is one, what it holds after a call; `ids` are those of all the text."""
        if stored is None:
            return
        note(stored, HeldPrompt(self._noted, where.width, where.blocks, ids))


def place_of(inputs: Mapping[str, Any]) -> Place | None:
    """Where inputs stand that come from `PromptFeed.prepare`; None for all others."""
    tensors = (inputs.get("input_ids"), inputs.get("inputs_embeds"))
    return next((getattr(x, _IN_PLACE) for x in tensors if hasattr(x, _IN_PLACE)), None)


def has_states(stored: Any) -> bool:
    """Whether a cache has layers that keep a state in place of keys and values."""
    from transformers.cache_utils import LinearAttentionCacheLayerMixin

    return any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in getattr(stored, "layers", ()))


def _room(stored: Any, config: Any) -> float:
    """How many columns a cache can have; a layer with a window forgets, but not before its window is full."""
    static = [layer for layer in getattr(stored, "layers", ()) if hasattr(layer, "max_cache_len")]
    if not static:
        return float("inf")
    config = config.get_text_config(decoder=True)
    window = getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None) or 0
    limits = (layer.max_cache_len for layer in static if not layer.is_sliding or layer.max_cache_len < window)
    return min(limits, default=float("inf"))


def check_rows(stored: Any, rows: int, each: int = 1) -> None:
    """Raise a ValueError unless a cache has a row for each of the call's, or `each` rows of one text."""
    kept = next((len(layer.keys) for layer in stored.layers if getattr(layer, "keys", None) is not None), rows * each)
    if kept != rows * each:
        raise ValueError(
            f"past_key_values has {kept} rows, the call has {rows * each}. Choose or repeat its rows first."
        )
    held = held_by(stored)
    if each > 1 and held is not None and held.text is not None and len(held.text) == kept:
        groups = held.text.view(rows, each, -1)
        if not bool((groups == groups[:, :1]).all()):
            raise ValueError(f"past_key_values has other texts in the {each} rows that each row of the call gets.")


def counts_columns(stored: Any) -> bool:
    """Whether a cache has layers for which pads between two real tokens are not nothing."""
    from transformers.cache_utils import DynamicLayer, StaticLayer

    layers = getattr(stored, "layers", ())
    kinds = DynamicLayer | StaticLayer
    return has_states(stored) or any(layer.is_sliding or not isinstance(layer, kinds) for layer in layers)


def has_keys(stored: Any) -> bool:
    """Whether a cache has layers with keys and values, for which the pads before them have to be masked."""
    from transformers.cache_utils import CacheLayerMixin

    return any(isinstance(layer, CacheLayerMixin) for layer in stored.layers)


def _state(head: ModulesToSaveWrapper) -> tuple[Any, ...]:
    return tuple(head.active_adapters), head.disable_adapters


def cache_of(values: Any) -> Any:
    """The cache among inputs or outputs, whatever its name; None if there is none, or they have no names."""
    named = values.items() if isinstance(values, Mapping) else ()
    return next((value for name, value in named if name in CACHES and value is not None), None)


def given_length(values: Mapping[str, Any]) -> int:
    """How many columns the cache among inputs has; 0 without one, or if it is none of transformers."""
    stored = cache_of(values)
    return cache_length(stored) if hasattr(stored, "get_seq_length") else 0


def given_cache(base_model: Any, values: dict[str, Any]) -> Any:
    """The cache that a caller gives, which gets the name that the base model takes; None if there is none.

    Raises:
        ValueError: It has a name that the base model does not take, and would pass over; or there are two.
    """
    given = [name for name in CACHES if values.get(name) is not None]
    for name in given:
        if not (takes(base_model, name) or takes(base_model, CACHES[0])):
            raise ValueError(f"{type(base_model).__name__} takes no {name}: it would be passed over, or the prompt.")
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} were given: they are names of one cache. Give one of them.")
    caches = [values.pop(name) for name in CACHES if name in values]
    stored = next((cache for cache in caches if cache is not None), None)
    if caches:
        values[cache_name(base_model)] = stored
    return stored


def cache_name(base_model: Any) -> str:
    """What a base model calls its cache."""
    return next((name for name in CACHES if takes(base_model, name)), CACHES[1])


def takes(base_model: Any, name: str) -> bool:
    """Whether a base model's forward has an argument of this name."""
    return name in signature(base_model.forward).parameters
