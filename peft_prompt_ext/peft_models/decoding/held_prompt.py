"""The prompt in a cache, and the place of the next text tokens.

It is an attribute of the cache, so that copies have it. It stays valid if the cache is cropped or its rows selected.

Shapes: B rows, P virtual tokens, S text tokens in a cache, T text tokens of a call, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from ..padding import real_last, reorder
from ..position import order_columns


_ATTRIBUTE = "_peft_prompt_ext_held"


@dataclass(frozen=True)
class Block:
    """Text columns of one call up to its last pad. In the cache, each row's pads come first, then its real tokens.

    Attributes:
        start: The first column. The first block of a text includes the prompt, behind the pads, unless the prompt was
            in the cache before.
        stop: The column after the last one.
        is_reordered: Whether pads behind real tokens were moved.
    """

    start: int
    stop: int
    is_reordered: bool


@dataclass(frozen=True)
class HeldPrompt:
    """The content of a cache.

    Attributes:
        prompt: The virtual tokens, [P, H].
        columns: The number of columns, P + S.
        blocks: The columns with pads.
        text: The ids of the text, [B, S or more]; None: unknown.
        refusal: The reason if the cache cannot be continued, else None.
        in_front: See `Place`.
        is_ahead: See `Place`.
    """

    prompt: torch.Tensor
    columns: int = 0
    blocks: tuple[Block, ...] = ()
    text: torch.Tensor | None = None
    refusal: str | None = None
    in_front: int = 0
    is_ahead: bool = False


@dataclass(frozen=True)
class Place:
    """The place of a call's tokens.

    Attributes:
        virtual: P.
        begins: Whether the text begins, and with it the prompt: there is no cache, or an empty one.
        seen: S.
        new: T.
        text_mask: The mask of the text, [B, S + T], in the caller's order; None if the caller gave no mask.
        order: The column of `[prompt | text]` at each place of the cache, [B, P + S + T]; None: no reordering.
        blocks: The columns with pads, including those of this call.
        padded: Whether the row has pads.
        holes: Whether the text has pads that are not in front of a whole row.
        in_front: The number of text columns in front of the prompt: 0, or with a suffix those that `generate` got.
        is_ahead: Whether the prompt was in the cache before the text, so that all pads stand behind it.
        virtual_mask: The mask of the virtual tokens, [B, P], where rows have prompts of their own; None: all are real.
    """

    virtual: int
    begins: bool
    seen: int
    new: int
    text_mask: torch.Tensor | None = None
    order: torch.Tensor | None = None
    blocks: tuple[Block, ...] = ()
    padded: bool = False
    holes: bool = False
    in_front: int = 0
    is_ahead: bool = False
    virtual_mask: torch.Tensor | None = None

    @property
    def width(self) -> int:
        """P + S + T."""
        return self.virtual + self.seen + self.new

    @property
    def now(self) -> int:
        """The number of columns that the base model gets in this call: T, or P + T."""
        return self.new + self.virtual * self.begins

    @property
    def mask(self) -> torch.Tensor | None:
        """The mask of prompt and text, [B, P + S + T], in the order of the cache."""
        if self.text_mask is None:
            return None
        virtual = self.virtual_mask
        if virtual is None:
            virtual = self.text_mask.new_ones(len(self.text_mask), self.virtual)
        mask = torch.cat([virtual, self.text_mask], dim=1)
        return mask if self.order is None else reorder(mask, self.order)

    @property
    def positions(self) -> torch.Tensor | None:
        """The count of each real token in its row, [B, P + S + T]; None without pads."""
        mask = self.mask if self.padded else None
        return None if mask is None else (mask.long().cumsum(1) - 1).clamp(min=0)

    @property
    def order_now(self) -> torch.Tensor | None:
        """The part of `order` for the columns of this call, counted from 0."""
        return self._cut(self.order)

    @property
    def back(self) -> torch.Tensor | None:
        """The place in the cache of each column in the caller's order, [B, P + S + T]; None: no reordering."""
        if self.order is None:
            return None
        return reorder(self.order.argsort(1), _order_known(self.order, self.in_front, self.virtual))

    @property
    def back_now(self) -> torch.Tensor | None:
        """The part of `back` for the columns of this call, counted from 0."""
        return self._cut(self.back)

    def _cut(self, columns: torch.Tensor | None) -> torch.Tensor | None:
        return None if columns is None else columns[:, -self.now :] - (self.width - self.now)


def get_held(cache: Any) -> HeldPrompt | None:
    """Get the content of a cache; None if it has no prompt."""
    return getattr(cache, _ATTRIBUTE, None)


def is_same_prompt(held: HeldPrompt, prompt: torch.Tensor) -> bool:
    """Whether a prompt [P, H] is the one in a cache."""
    return held.prompt.shape == prompt.shape and torch.equal(held.prompt, prompt.detach().to(held.prompt.device))


def set_held(cache: Any, held: HeldPrompt) -> None:
    """Mark a cache with its content."""
    setattr(cache, _ATTRIBUTE, held)


def check_hold_no_prompt(values: Iterable[Any]) -> None:
    """Raise ValueError if one of the values is a cache with a prompt, because the base model runs alone."""
    if any(get_held(value) is not None for value in values):
        raise ValueError(
            "past_key_values has a prompt, but the adapter is disabled, so the base model would see virtual tokens. "
            "Pass another cache."
        )


def count_seen(cache: Any, prompt: torch.Tensor, in_front: int = 0) -> int | None:
    """Count the text tokens with a prompt [P, H] in a cache; None if there is no cache, or it is empty.

    `in_front` of them are in front of the prompt.

    Raises:
        ValueError: It is not a cache of transformers, or it does not have this prompt.
    """
    if cache is None:
        return None
    from transformers import Cache

    if not isinstance(cache, Cache):
        raise ValueError(
            f"past_key_values is of type {type(cache).__name__}. Pass a Cache of transformers, such as DynamicCache."
        )
    held, length = get_held(cache), count_cached(cache)
    if held is not None and held.refusal is not None:
        raise ValueError(f"past_key_values cannot be continued: {held.refusal}.")
    if not length:
        return None
    if held is None:
        raise ValueError(
            f"past_key_values has {length} tokens of another model, without the prompt. Begin with an empty cache; "
            "this model adds the prompt."
        )
    if held.in_front != in_front:
        raise ValueError(
            "past_key_values cannot be continued: its prompt stands behind the text of one call of generate "
            "(prompt_position='suffix'). Pass the whole text without past_key_values."
        )
    if held.prompt is not prompt and not is_same_prompt(held, prompt):
        raise ValueError(
            "past_key_values has another prompt than the active one, or the prompt has changed since. Begin with an "
            "empty cache for each prompt."
        )
    if length < len(prompt):
        raise ValueError(
            f"past_key_values has {length} tokens, the prompt has {len(prompt)}: part of the prompt was cropped. Crop "
            "only text, or begin with an empty cache."
        )
    return length - len(prompt)


def count_cached(cache: Any) -> int:
    """Return the number of columns of a cache of transformers."""
    try:
        return int(cache.get_seq_length())
    except ValueError:  # a cache that has only states of linear attention does not count
        held = get_held(cache)
        return (1 if held is None else held.columns) if cache.has_previous_state() else 0


def count_text(ids: torch.Tensor, mask: torch.Tensor | None, cache: Any, seen: int, virtual: int) -> int:
    """Count the tokens of the text: `ids` are the whole text, or the tokens after those in the cache.

    Args:
        ids: [B, T].
        mask: As wide as the whole text, with or without virtual tokens. Its width decides what `ids` are.
        cache: The whole text has to begin with the text in it.
        seen: S.
        virtual: P.

    Returns:
        T, or S + T.

    Raises:
        ValueError: The mask has another width, or the ids do not continue the text in the cache.
    """
    tokens, text = ids.shape[1], getattr(get_held(cache), "text", None)
    width = tokens if mask is None else mask.shape[-1]
    is_whole, is_rest = (width in {length, virtual + length} for length in (tokens, seen + tokens))
    if not seen or (is_whole and not is_rest):
        is_rest = False
    elif is_whole:  # ambiguous: P == S
        is_rest = tokens <= seen or not _begin_with(ids, text, seen, mask)
    if is_rest:
        return seen + tokens
    if not is_whole:
        wanted = f"[B, {tokens}]" if not seen else f"[B, {tokens}] (or [B, {seen + tokens}] for only new ids)"
        raise _make_mask_error(mask, wanted, virtual)
    if seen and tokens <= seen:
        raise ValueError(
            f"The call has {tokens} text tokens, and past_key_values has {seen}, so nothing is new. Pass the whole "
            f"text, or new tokens with an attention_mask over the whole text, [B, {seen + tokens}]."
        )
    if seen and not _begin_with(ids, text, seen, mask):
        raise ValueError(
            f"The text does not begin with the {seen} tokens in past_key_values. Pass the whole text, or new tokens "
            f"with an attention_mask over the whole text, [B, {seen + tokens}], or another cache."
        )
    return tokens


def _begin_with(ids: torch.Tensor, text: torch.Tensor | None, seen: int, mask: torch.Tensor | None) -> bool:
    """Whether each row of ids begins as some row of `text`, because rows may be reordered; True if it is unknown."""
    if text is None or text.shape[1] < seen:
        return True
    same = ids[:, None, :seen].to(text.device) == text[None, :, :seen]
    if mask is not None:
        same |= (mask[:, mask.shape[1] - ids.shape[1] :][:, None, :seen] == 0).to(text.device)
    return bool(same.all(2).any(1).all())


def drop_virtual(mask: torch.Tensor, text: int, virtual: int) -> torch.Tensor:
    """Cut virtual tokens, which come before each row's first real token, off a mask. Returns [B, text].

    Raises:
        ValueError: The mask has another width, or masks a virtual token.
    """
    if mask.dim() != 2 or mask.shape[1] not in {text, virtual + text}:
        raise _make_mask_error(mask, f"[B, {text}]", virtual)
    if mask.shape[1] == text:
        return mask
    pads = (mask.cumsum(1) == 0).sum(1, keepdim=True)  # in front
    places = torch.arange(virtual, device=mask.device)
    if bool((pads > text).any()) or not bool(mask.gather(1, pads + places).all()):
        raise ValueError(
            f"attention_mask {tuple(mask.shape)} masks virtual tokens: its {virtual} columns before the text must be "
            f"1. Pass a mask of the text, [B, {text}]."
        )
    columns = torch.arange(text, device=mask.device).expand(len(mask), -1)
    return mask.gather(1, columns + virtual * (columns >= pads))


def _make_mask_error(mask: Any, wanted: str, virtual: int) -> ValueError:
    more = f" {virtual} more columns in front, for the virtual tokens, are allowed." if virtual else ""
    return ValueError(
        f"attention_mask has the shape {tuple(mask.shape)}; wanted {wanted} for the text, including that in the "
        f"cache.{more}"
    )


def place(cache: Any, seen: int | None, new: int, mask: torch.Tensor | None, virtual: int, in_front: int = 0) -> Place:
    """Find the place of the last `new` tokens of a text, with or without a cache.

    Args:
        cache: A cache, or None.
        seen: From `count_seen`.
        new: T.
        mask: [B, S + T], with or without the virtual tokens; None: all are real (only for a prefix).
        virtual: P.
        in_front: See `Place`.

    Raises:
        ValueError: The mask has another width, or is missing for a cache with pads.
    """
    before = 0 if seen is None else seen
    held = get_held(cache) if seen is not None else None
    old_blocks = [block for block in (held.blocks if held else ()) if block.start < before or _has_prompt(block, held)]
    is_ahead = held is not None and (held.is_ahead or not before)
    if mask is None and old_blocks:
        raise ValueError(
            f"past_key_values has rows with pads. Pass an attention_mask over the whole text, [B, {before + new}]."
        )
    if mask is None:
        return Place(virtual, seen is None, before, new, is_ahead=is_ahead)
    mask = drop_virtual(mask, before + new, virtual)
    blocks = [_crop(block, before, mask, _has_prompt(block, held)) for block in old_blocks]
    fresh = mask[:, before:] != 0
    if not bool(fresh.all()):
        last = int((~fresh).any(0).nonzero()[-1])  # real columns behind it stay in place, and may be cropped
        blocks.append(Block(before, before + last + 1, bool((fresh[:, :-1] & ~fresh[:, 1:]).any())))
    padded = bool((mask == 0).any())
    if not blocks and not in_front:
        return Place(virtual, seen is None, before, new, mask, padded=padded, holes=padded, is_ahead=is_ahead)
    full = torch.cat([mask.new_ones(len(mask), virtual), mask], dim=1)
    order = _order_known(full, in_front, virtual)
    full = reorder(full, order)
    for block in blocks:
        part = slice(0 if block.start == 0 and not is_ahead else virtual + block.start, virtual + block.stop)
        order[:, part] = reorder(order[:, part], real_last(full[:, part]))
    start = blocks[0].stop if blocks and blocks[0].start == 0 and not is_ahead else 0
    holes = bool((mask[:, start:] == 0).any())
    return Place(virtual, seen is None, before, new, mask, order, tuple(blocks), padded, holes, in_front, is_ahead)


def _order_known(like: torch.Tensor, in_front: int, virtual: int) -> torch.Tensor:
    """List the columns of `[prompt | text]` in the caller's order, with pads in place; [B, P + S + T], as `like`."""
    start = torch.full((len(like),), in_front, device=like.device)
    return order_columns(start, like.shape[1] - virtual, virtual)


def _has_prompt(block: Block, held: HeldPrompt | None) -> bool:
    """Whether the prompt is in a block, behind the pads."""
    return held is not None and not held.is_ahead and block.start == 0


def _crop(block: Block, seen: int, mask: torch.Tensor, has_prompt: bool) -> Block:
    """Crop a block to `seen` text tokens, as the last columns of its cache were."""
    if block.stop <= seen:
        return block
    lost_prompt = has_prompt and not bool(mask[:, :seen].any(1).all())  # in a row with few real tokens
    if block.is_reordered or lost_prompt:
        raise ValueError(
            f"past_key_values was cropped to {seen} text tokens, among {block.stop} with pads. In the cache, pads "
            "come before real tokens, so the crop removed tokens that attention_mask still has. Crop less, or begin "
            "with an empty cache."
        )
    return Block(block.start, seen, False)
