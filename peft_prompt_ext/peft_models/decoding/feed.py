"""Adds prompts to the base model's inputs at each decoding step.

Shapes: B rows, P virtual tokens, S text tokens in a cache, T text tokens of a call, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from inspect import signature
from typing import Any

import torch
from peft.utils import ModulesToSaveWrapper

from ..padding import reorder
from ..position import is_suffix
from .held_prompt import HeldPrompt, Place, count_cached, count_seen, get_held, place, set_held
from .view import unwrap


# names of the cache in a forward; "cache" is new in transformers 5.24
CACHES = ("cache", "past_key_values", "cache_params")
_PLACE = "_peft_prompt_ext_place"  # attribute of ids and embeddings from `PromptFeed.prepare`


class PromptFeed:
    """Adds the prompt that is active in `__init__`, or the prompt of each row, to the base model's inputs.

    Attributes:
        names: The adapter of each row of `generate`; none: the active one.
        prompts: By the name of their adapter, [their P, H].
        prompt: The longest, [P, H].
        first: The place of the first call's tokens; None before it.
        left_out: The number of text tokens that are missing in the ids of `generate`.
        masked: Whether the caller gave an attention mask; if so, no mask in a step means no pads.
        chunks: The number of text tokens that `generate` reads at once; None: all.
        is_suffix: Whether the prompt stands behind the text.
        in_front: With a suffix, the number of text columns in front of the prompt; else 0.
        put_prompts: In `generate`, `kept.put_prompts` with its first arguments; if it writes the prompts to the cache
            of the first step, that step reads only the text.
    """

    def __init__(self, model: Any, names: Sequence[str] = ()) -> None:
        """Read a model's active prompt, or those that are named."""
        self.base_model = unwrap(model.get_base_model())
        active = model.get_prompt(batch_size=1)[0, : model.active_peft_config.num_virtual_tokens]
        self.names, self.prompts = list(names), {model.active_adapter: active}
        if names:
            self.prompts = model._embed_prompts(self.names, active)
        self.prompt = max(self.prompts.values(), key=len)
        self.embed = model.word_embeddings
        self.first: Place | None = None
        self.left_out, self.masked, self.chunks = 0, False, None
        self.put_prompts: Callable[[Any, Place, torch.Tensor], bool] | None = None
        self.is_suffix, self.in_front = not names and is_suffix(model.active_peft_config), 0
        self._detached_prompt = self.prompt.detach().clone()
        self._heads: dict[ModulesToSaveWrapper, Any] | None = None

    def count_seen(self, stored: Any) -> int | None:
        """See `held_prompt.count_seen`."""
        return count_seen(stored, self._detached_prompt, self.in_front)

    def place(self, stored: Any, new: int, mask: torch.Tensor | None) -> Place:
        """See `held_prompt.place`.

        Raises:
            ValueError: The cache is too small for the tokens.
            NotImplementedError: The base model would count pads behind text, or cannot continue from its states with
                more than one token.
        """
        where = place(stored, self.count_seen(stored), new, mask, len(self.prompt), self.in_front)
        if self.names and mask is not None:
            where = replace(where, virtual_mask=self._mask_virtual(mask), padded=True)
        room = _find_room(stored, self.base_model.config)
        if where.width > room:
            raise ValueError(
                f"past_key_values has room for {room} tokens; prompt and text need {where.width}. Raise its "
                f"max_cache_len by the {where.virtual} virtual tokens."
            )
        if where.holes and (counts_columns(stored) or "position_ids" not in self._arguments):
            raise NotImplementedError(
                f"Some rows have pads behind real tokens, and {type(self.base_model).__name__} would count them "
                "(in windows, states or distances). Make batches of rows of one length."
            )
        if not where.begins and new > 1 and has_states(stored) and not self._can_continue():
            raise NotImplementedError(
                f"{type(self.base_model).__name__} cannot continue from the states of its cache with several tokens "
                f"at once (got {new}). Begin with an empty cache and the whole text."
            )
        return where

    def number_prompts(self, rows: int) -> torch.Tensor:
        """Number the prompts of B rows, several for each name, [B]; `len(self.prompts)`: none."""
        known = list(self.prompts)
        numbers = [known.index(name) if name in known else len(known) for name in self.names]
        return torch.tensor(numbers).repeat_interleave(rows // len(numbers))

    def _mask_virtual(self, mask: torch.Tensor) -> torch.Tensor:
        """Make the mask of the virtual tokens, [B, P], as the text's mask is; a shorter prompt stands last."""
        lengths = torch.tensor([*map(len, self.prompts.values()), 0])[self.number_prompts(len(mask))]
        return (torch.arange(len(self.prompt), 0, -1) <= lengths[:, None]).to(mask)

    @torch.no_grad()
    def _can_continue(self) -> bool:
        """Whether the base model gives the same result for tokens in two parts, with a cache, as for all at once."""
        from transformers import DynamicCache

        name = cache_name(self.base_model)
        embeds = self.embed(torch.arange(8, device=self.prompt.device)[None])
        want = self.base_model(inputs_embeds=embeds, use_cache=False).logits[:, -1].float()
        stored = DynamicCache(config=self.base_model.config.get_text_config(decoder=True))
        for part in embeds.split(5, dim=1):
            got = self.base_model(inputs_embeds=part, use_cache=True, **{name: stored}).logits[:, -1].float()
        return bool((got - want).norm() <= (1e-3 if embeds.dtype == torch.float32 else 5e-2) * want.norm())

    def positions(self, where: Place, are_required: bool = False) -> torch.Tensor | None:
        """Make `position_ids`, [B or 1, P + S + T]; None if the base model makes them itself.

        Args:
            where: The tokens' place.
            are_required: Make them also without pads.
        """
        if "position_ids" not in self._arguments:
            return None
        numbers = where.positions
        if numbers is None and (are_required or self._first_position):
            numbers = torch.arange(where.width, device=self.prompt.device)[None]
        return None if numbers is None else numbers + self._first_position

    @cached_property
    def _arguments(self) -> frozenset[str]:
        return frozenset(signature(self.base_model.forward).parameters)

    @cached_property
    def _first_position(self) -> int:
        """The position of a row's first token; RoBERTa counts from padding_idx + 1, but not after a cache."""
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
        """Make the base model's inputs for a step of `generate`; replaces its `prepare_inputs_for_generation`.

        Args:
            prepare: The base model's own function.
            input_ids: The whole text so far, [B, T], or a chunk of the given text.
            next_sequence_length: None for a chunk. The number itself is not used, because it does not count virtual
                tokens.
            attention_mask: [B, S + T], or None.
            inputs_embeds: The given text as embeddings, [B, T, H].
            is_first_iteration: Whether `inputs_embeds` are still to be read.
            kwargs: Other arguments of the base model's function.

        Raises:
            ValueError: See `held_prompt`; or the active head was changed during the call.
        """
        self._check_heads()
        device = self.base_model.device
        if device.type != "meta":  # `generate` accepts inputs on another device
            input_ids = input_ids.to(device)
            attention_mask = None if attention_mask is None else attention_mask.to(device)
            inputs_embeds = None if inputs_embeds is None else inputs_embeds.to(device)
        stored = find_cache(kwargs)
        seen = self.count_seen(stored) or 0
        text = inputs_embeds if inputs_embeds is not None and is_first_iteration else input_ids
        if self.chunks is not None and next_sequence_length is None:
            new = text.shape[1]
        else:
            new = text.shape[1] + (self.left_out if text is input_ids else 0) - seen
        if attention_mask is None and self.masked:
            attention_mask = input_ids.new_ones(len(text), seen + new) if seen else None
        if attention_mask is None and (self.in_front or self.names):
            attention_mask = input_ids.new_ones(len(text), seen + new)
        where = self.place(stored, new, attention_mask)
        put_prompts, self.put_prompts = self.put_prompts, None  # in the first step alone
        if where.begins and put_prompts is not None:
            words = text[:, :1] if text is inputs_embeds else self.embed(text[:, :1])
            if put_prompts(stored, where, words):
                set_held(stored, HeldPrompt(self._detached_prompt, where.virtual))
                where = self.place(stored, new, attention_mask)
        if self.chunks is not None and where.blocks:
            raise ValueError(
                f"prefill_chunk_size ({self.chunks}) needs rows without pads, because pads are moved to the front of "
                "the prompt. Leave it out, or make batches of rows of one length."
            )
        self.first = self.first or (where if where.begins else None)
        return self.prepare(prepare, where, text, input_ids, is_first_iteration=is_first_iteration, **kwargs)

    def _check_heads(self) -> None:
        heads = (module for module in self.base_model.modules() if isinstance(module, ModulesToSaveWrapper))
        if self._heads is None:
            self._heads = {head: _read_state(head) for head in heads}
        if any(_read_state(head) != state for head, state in self._heads.items()):
            raise ValueError(
                "The active adapter was switched while generate ran, and the adapters have different heads "
                "(modules_to_save). Switch back before the next step, or switch after the call."
            )

    def prepare(
        self,
        prepare: Callable[..., dict[str, Any]],
        where: Place,
        text: torch.Tensor,
        input_ids: torch.Tensor,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Make the base model's inputs for the last tokens of `text`.

        The base model's own function gets ids and a mask that include the virtual tokens, so that lengths are right.

        Args:
            prepare: The base model's own function.
            where: The place of the new tokens.
            text: Ids [B, T] or embeddings [B, T, H].
            input_ids: [B, T]; the same as `text` unless that is embeddings.
            kwargs: Arguments of the base model's function.

        Raises:
            NotImplementedError: The function does not select the new tokens.
        """
        ids = input_ids.new_zeros(len(input_ids), where.width)  # 0: virtual tokens, and text without ids
        known = min(input_ids.shape[1], where.seen + where.new)
        ids[:, where.width - known :] = input_ids[:, input_ids.shape[1] - known :]
        whole = ids[:, where.virtual :] if known == where.seen + where.new else None
        for name in ("position_ids", "cache_position"):  # these do not count virtual tokens
            kwargs.pop(name, None)
        # OPT counts positions in its mask, which has four dimensions with a static cache
        positions = self.positions(where, are_required=getattr(find_cache(kwargs), "is_compileable", False))
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
        stored = find_cache(result)
        if text is input_ids and stored is None and not where.begins and whole is not None:
            # Phi-3 reads the whole text again when its rotary positions change
            again = {name: value for name, value in kwargs.items() if name not in CACHES}
            where = replace(where, begins=True, seen=0, new=where.seen + where.new)
            return self.prepare(prepare, where, text, input_ids, **again)
        if text is input_ids and (where.begins or stored is None or result["input_ids"].shape[1] != where.new):
            if whole is None or result["input_ids"].shape[1] != where.width or not where.begins:
                raise NotImplementedError(
                    f"{type(self.base_model).__name__} does not accept only new tokens with a cache. Pass "
                    "use_cache=False, with the whole text as input_ids."
                )
            result["inputs_embeds"] = self.put_in(self.embed(whole), where)
            result["input_ids"] = None
        for key in ("input_ids", "inputs_embeds"):
            if result.get(key) is not None:
                setattr(result[key], _PLACE, where)
        dynamic = self.base_model._supports_default_dynamic_cache()
        if stored is None and kwargs.get("use_cache") is not False and dynamic:
            from transformers import DynamicCache

            stored = DynamicCache(config=self.base_model.config.get_text_config(decoder=True))
        if stored is not None:
            result = {name: value for name, value in result.items() if name not in CACHES}
            result[cache_name(self.base_model)] = stored
        self.mark(stored, where, whole)
        return result

    def put_in(self, text: torch.Tensor, where: Place) -> torch.Tensor:
        """Add the prompt to the text's embeddings [B, T, H] if the text begins, and put the columns in order."""
        if where.begins and self.names:  # the first step reads kept prompts, so the base model begins anew
            raise NotImplementedError(
                f"generate with adapter_names needs a cache in all steps, and {type(self.base_model).__name__} reads "
                "the whole text again: its rotary positions change at this length (LongRoPE). Generate for the rows "
                "of each adapter alone, after set_adapter, or generate fewer tokens."
            )
        if where.begins:
            text = torch.cat([self.prompt.to(text).expand(len(text), -1, -1), text], dim=1)
        return text if where.order_now is None else reorder(text, where.order_now)

    def mark(self, stored: Any, where: Place, ids: torch.Tensor | None) -> None:
        """Mark a cache, if there is one, with its content after a call; `ids` are those of the whole text."""
        if stored is None:
            return
        held = HeldPrompt(self._detached_prompt, where.width, where.blocks, ids, None, where.in_front, where.is_ahead)
        set_held(stored, held)


def get_place(inputs: Mapping[str, Any]) -> Place | None:
    """Get the place of inputs from `PromptFeed.prepare`; None for other inputs."""
    tensors = (inputs.get("input_ids"), inputs.get("inputs_embeds"))
    return next((getattr(x, _PLACE) for x in tensors if hasattr(x, _PLACE)), None)


def has_states(stored: Any) -> bool:
    """Whether a cache has layers with a state instead of keys and values."""
    from transformers.cache_utils import LinearAttentionCacheLayerMixin

    return any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in getattr(stored, "layers", ()))


def _find_room(stored: Any, config: Any) -> float:
    """Return the number of columns that fit into a cache; a full sliding window drops old ones."""
    static = [layer for layer in getattr(stored, "layers", ()) if hasattr(layer, "max_cache_len")]
    if not static:
        return float("inf")
    config = config.get_text_config(decoder=True)
    window = getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None) or 0
    limits = (layer.max_cache_len for layer in static if not layer.is_sliding or layer.max_cache_len < window)
    return min(limits, default=float("inf"))


def check_rows(stored: Any, rows: int, each: int = 1) -> None:
    """Raise ValueError unless a cache has `each` rows, of one text, for each row of the call."""
    kept = next((len(layer.keys) for layer in stored.layers if getattr(layer, "keys", None) is not None), rows * each)
    if kept != rows * each:
        raise ValueError(
            f"past_key_values has {kept} rows, the call has {rows * each}. Select or repeat its rows first."
        )
    held = get_held(stored)
    if each > 1 and held is not None and held.text is not None and len(held.text) == kept:
        groups = held.text.view(rows, each, -1)
        if not bool((groups == groups[:, :1]).all()):
            raise ValueError(
                f"past_key_values has other texts in the {each} rows for one row of the call. Repeat one row for them."
            )


def counts_columns(stored: Any) -> bool:
    """Whether a cache has layers that would count pads between two real tokens."""
    from transformers.cache_utils import DynamicLayer, StaticLayer

    layers = getattr(stored, "layers", ())
    kinds = DynamicLayer | StaticLayer
    return has_states(stored) or any(layer.is_sliding or not isinstance(layer, kinds) for layer in layers)


def has_keys(stored: Any) -> bool:
    """Whether a cache has layers with keys and values, where pads have to be masked."""
    from transformers.cache_utils import CacheLayerMixin

    return any(isinstance(layer, CacheLayerMixin) for layer in stored.layers)


def _read_state(head: ModulesToSaveWrapper) -> tuple[Any, ...]:
    return tuple(head.active_adapters), head.disable_adapters


def find_cache(values: Any) -> Any:
    """Find the cache among named inputs or outputs, under any of its names; None if there is none."""
    named = values.items() if isinstance(values, Mapping) else ()
    return next((value for name, value in named if name in CACHES and value is not None), None)


def count_given(values: Mapping[str, Any]) -> int:
    """Count the columns in the cache among inputs; 0 without one, or if it is not a cache of transformers."""
    stored = find_cache(values)
    return count_cached(stored) if hasattr(stored, "get_seq_length") else 0


def take_cache(base_model: Any, values: dict[str, Any]) -> Any:
    """Find the caller's cache, and give it the name that the base model takes; None if there is none.

    Raises:
        ValueError: The base model does not take a cache of that name, or there are two.
    """
    given = [name for name in CACHES if values.get(name) is not None]
    for name in given:
        if not (takes(base_model, name) or takes(base_model, CACHES[0])):
            raise ValueError(
                f"{type(base_model).__name__} takes no {name}. Pass its cache as {cache_name(base_model)}, or none."
            )
    if len(given) > 1:
        raise ValueError(f"Got {' and '.join(given)}, which are names of one cache. Pass one of them.")
    caches = [values.pop(name) for name in CACHES if name in values]
    stored = next((cache for cache in caches if cache is not None), None)
    if caches:
        values[cache_name(base_model)] = stored
    return stored


def cache_name(base_model: Any) -> str:
    """Get the base model's name for its cache."""
    return next((name for name in CACHES if takes(base_model, name)), CACHES[1])


def takes(base_model: Any, name: str) -> bool:
    """Whether a base model's forward has this argument."""
    return name in signature(base_model.forward).parameters
