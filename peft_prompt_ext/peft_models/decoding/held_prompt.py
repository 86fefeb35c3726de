"""Which prompt a cache holds, and where the next tokens of the text stand behind it.

What a cache holds is an attribute of the cache: copies keep it, and cropping or choosing rows leaves it true.

Shapes: B rows, P virtual tokens, S text tokens that a cache holds, T text tokens of a call, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from ..padding import real_last, reorder


_ATTRIBUTE = "_peft_prompt_ext_held"


@dataclass(frozen=True)
class Block:
    """Text columns of one call that had pads: in the cache each row's real tokens stand last among them.

    Attributes:
        start: The first column; the first block of a text has the prompt between its pads and its real tokens.
        stop: The column behind the last one.
        moved: Whether a pad stood behind a real token, so that the columns of the text are not those of the cache.
    """

    start: int
    stop: int
    moved: bool


@dataclass(frozen=True)
class HeldPrompt:
    """What stands in a cache.

    Attributes:
        prompt: The virtual tokens, [P, H].
        columns: How many columns there are, P + S.
        blocks: The columns with pads.
        text: The ids of the text, [B, S or more]; None if they are not known.
        refusal: Why nothing can stand behind it; None if something can.
    """

    prompt: torch.Tensor
    columns: int = 0
    blocks: tuple[Block, ...] = ()
    text: torch.Tensor | None = None
    refusal: str | None = None


@dataclass(frozen=True)
class Place:
    """Where the tokens of a call stand.

    Attributes:
        virtual: P.
        begins: Whether the prompt is to be put in as well: there is no cache, or it is empty.
        seen: S.
        new: T.
        text_mask: Which text tokens are real, [B, S + T], in the caller's order; None if the caller gave no mask.
        order: The column that stands at each place of the cache if the prompt is put before the text, [B, P + S + T];
            None if each stands at its own.
        blocks: The columns with pads, those of this call included.
        padded: Whether some text token is not real.
        holes: Whether one is that does not stand before the whole text of its row.
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

    @property
    def width(self) -> int:
        """P + S + T."""
        return self.virtual + self.seen + self.new

    @property
    def now(self) -> int:
        """How many columns the base model gets in this call: T, or P + T."""
        return self.new + self.virtual * self.begins

    @property
    def mask(self) -> torch.Tensor | None:
        """Which columns are real, [B, P + S + T], in the order of the cache."""
        if self.text_mask is None:
            return None
        mask = torch.cat([self.text_mask.new_ones(len(self.text_mask), self.virtual), self.text_mask], dim=1)
        return mask if self.order is None else reorder(mask, self.order)

    @property
    def positions(self) -> torch.Tensor | None:
        """Number of each real token in its row, [B, P + S + T]; None if these are the numbers of the columns."""
        mask = self.mask if self.padded else None
        return None if mask is None else (mask.long().cumsum(1) - 1).clamp(min=0)

    @property
    def order_now(self) -> torch.Tensor | None:
        """The part of `order` for the columns of this call, counted from the first of them."""
        return None if self.order is None else self.order[:, -self.now :] - (self.width - self.now)


def held_by(cache: Any) -> HeldPrompt | None:
    """What was noted of a cache; None if no prompt was put in."""
    return getattr(cache, _ATTRIBUTE, None)


def same_prompt(held: HeldPrompt, prompt: torch.Tensor) -> bool:
    """Whether a prompt [P, H] is the one that is held."""
    return held.prompt.shape == prompt.shape and torch.equal(held.prompt, prompt.detach().to(held.prompt.device))


def note(cache: Any, held: HeldPrompt) -> None:
    """Note what a cache holds."""
    setattr(cache, _ATTRIBUTE, held)


def check_hold_no_prompt(values: Iterable[Any]) -> None:
    """Raise a ValueError if one of the values is a cache with a prompt: the base model alone is to read it."""
    if any(held_by(value) is not None for value in values):
        raise ValueError(
            "past_key_values holds a prompt, and the adapter is disabled: the base model would go on behind virtual "
            "tokens. Give it a cache of its own."
        )


def seen_by(cache: Any, prompt: torch.Tensor) -> int | None:
    """How many text tokens stand behind a prompt [P, H] in a cache; None if there is no cache or it is empty.

    Raises:
        ValueError: It is no cache of transformers, or it does not hold this prompt and text behind it.
    """
    if cache is None:
        return None
    from transformers import Cache

    if not isinstance(cache, Cache):
        raise ValueError(
            f"past_key_values is a {type(cache).__name__}, not a Cache of transformers such as DynamicCache."
        )
    held, length = held_by(cache), cache_length(cache)
    if held is not None and held.refusal is not None:
        raise ValueError(f"past_key_values cannot be continued: {held.refusal}.")
    if not length:
        return None
    if held is None:
        raise ValueError(
            f"past_key_values has {length} tokens that this model did not put behind its prompt, so the prompt would "
            "be missing. Begin with an empty cache; the model puts the prompt in."
        )
    if held.prompt is not prompt and not same_prompt(held, prompt):
        raise ValueError(
            "past_key_values holds another prompt than the active one, or the prompt was changed since. Begin with an "
            "empty cache for each prompt."
        )
    if length < len(prompt):
        raise ValueError(
            f"past_key_values has {length} tokens, the prompt alone has {len(prompt)}: part of the prompt was cropped "
            "away. Crop text only, or begin with an empty cache."
        )
    return length - len(prompt)


def cache_length(cache: Any) -> int:
    """How many columns a cache of transformers has."""
    try:
        return int(cache.get_seq_length())
    except ValueError:  # states of linear attention alone are not counted
        held = held_by(cache)
        return (1 if held is None else held.columns) if cache.has_previous_state() else 0


def count_text(ids: torch.Tensor, mask: torch.Tensor | None, cache: Any, seen: int, virtual: int) -> int:
    """How long the text is with these ids: they are all of it, or what comes behind the `seen` tokens of the cache.

    Args:
        ids: [B, T].
        mask: As wide as the whole text, with or without `virtual` columns; it tells which of the two ids are.
        cache: What is held by it is what the ids have to begin with.
        seen: S.
        virtual: P.

    Returns:
        T, or S + T.

    Raises:
        ValueError: The mask is for neither, or the ids do not go on with the text of the cache.
    """
    tokens, text = ids.shape[1], getattr(held_by(cache), "text", None)
    width = tokens if mask is None else mask.shape[-1]
    whole, rest = (width in {length, virtual + length} for length in (tokens, seen + tokens))
    if not seen or (whole and not rest):
        rest = False
    elif whole:  # as many virtual tokens as seen ones
        rest = tokens <= seen or not _begin_with(ids, text, seen, mask)
    if rest:
        return seen + tokens
    if not whole:
        wanted = f"[B, {tokens}]" if not seen else f"[B, {tokens}] (or [B, {seen + tokens}] if the ids are only new)"
        raise _wrong_mask(mask, wanted, virtual)
    if seen and tokens <= seen:
        raise ValueError(
            f"{tokens} text tokens were given, and past_key_values has {seen}: nothing is new. Give the whole text, "
            f"or the new tokens with an attention_mask over the whole text, [B, {seen + tokens}]."
        )
    if seen and not _begin_with(ids, text, seen, mask):
        raise ValueError(
            f"The text does not begin with the {seen} tokens that past_key_values has. Give the whole text, the new "
            f"tokens alone with an attention_mask over the whole text, [B, {seen + tokens}], or another cache."
        )
    return tokens


def _begin_with(ids: torch.Tensor, text: torch.Tensor | None, seen: int, mask: torch.Tensor | None) -> bool:
    """Whether each row of ids has the first `seen` tokens of a row of `text`; true if these are not known.

    The rows of a cache may have been chosen and reordered since its text was noted.
    """
    if text is None or text.shape[1] < seen:
        return True
    same = ids[:, None, :seen].to(text.device) == text[None, :, :seen]
    if mask is not None:
        same |= (mask[:, mask.shape[1] - ids.shape[1] :][:, None, :seen] == 0).to(text.device)
    return bool(same.all(2).any(1).all())


def without_virtual(mask: torch.Tensor, text: int, virtual: int) -> torch.Tensor:
    """A mask over the text, [B, text], from one that may have the virtual tokens before each row's first real one.

    Raises:
        ValueError: It has another width, or masks a virtual token.
    """
    if mask.dim() != 2 or mask.shape[1] not in {text, virtual + text}:
        raise _wrong_mask(mask, f"[B, {text}]", virtual)
    if mask.shape[1] == text:
        return mask
    pads = (mask.cumsum(1) == 0).sum(1, keepdim=True)  # in front
    places = torch.arange(virtual, device=mask.device)
    if bool((pads > text).any()) or not bool(mask.gather(1, pads + places).all()):
        raise ValueError(
            f"attention_mask {tuple(mask.shape)} masks virtual tokens: its {virtual} columns before the text have to "
            f"be 1. Give a mask of the text alone, [B, {text}]."
        )
    columns = torch.arange(text, device=mask.device).expand(len(mask), -1)
    return mask.gather(1, columns + virtual * (columns >= pads))


def _wrong_mask(mask: Any, wanted: str, virtual: int) -> ValueError:
    return ValueError(
        f"attention_mask has the shape {tuple(mask.shape)}; over the text, with that of the cache, it has to be "
        f"{wanted}, or wider by the {virtual} virtual tokens in front."
    )


def place(cache: Any, seen: int | None, new: int, mask: torch.Tensor | None, virtual: int) -> Place:
    """Tell where the `new` last tokens of a text stand in a cache, or in a row of their own.

    Args:
        cache: May be None.
        seen: As `seen_by` gives it.
        new: T.
        mask: [B, S + T], with or without the virtual tokens; None if all are real.
        virtual: P.

    Raises:
        ValueError: The mask has another width, or pads cannot be told from the text.
    """
    before = 0 if seen is None else seen
    held = held_by(cache) if seen is not None else None
    noted = [block for block in (held.blocks if held else ()) if block.start < before]
    if mask is None and noted:
        raise ValueError(
            f"past_key_values has rows with pads: give an attention_mask over the whole text, [B, {before + new}]."
        )
    if mask is None:
        return Place(virtual, seen is None, before, new)
    mask = without_virtual(mask, before + new, virtual)
    blocks = [_cropped(block, before, mask) for block in noted]
    fresh = mask[:, before:] != 0
    if not bool(fresh.all()):
        blocks.append(Block(before, before + new, bool((fresh[:, :-1] & ~fresh[:, 1:]).any())))
    padded = bool((mask == 0).any())
    if not blocks:
        return Place(virtual, seen is None, before, new, mask, padded=padded, holes=padded)
    full = torch.cat([mask.new_ones(len(mask), virtual), mask], dim=1)
    order = torch.arange(full.shape[1], device=full.device).repeat(len(full), 1)
    for block in blocks:
        first = 0 if block.start == 0 else virtual + block.start
        order[:, first : virtual + block.stop] = first + real_last(full[:, first : virtual + block.stop])
    start = blocks[0].stop if blocks[0].start == 0 else 0
    holes = bool((mask[:, start:] == 0).any())
    return Place(virtual, seen is None, before, new, mask, order, tuple(blocks), padded, holes)


def _cropped(block: Block, seen: int, mask: torch.Tensor) -> Block:
    """What cropping to `seen` text tokens left of a block; the last columns of the cache went."""
    if block.stop <= seen:
        return block
    lost_prompt = block.start == 0 and not bool(mask[:, :seen].any(1).all())  # it may be more than the row's text
    if block.moved or lost_prompt:
        raise ValueError(
            f"past_key_values was cropped to {seen} text tokens, among {block.stop} that had pads. In the cache pads "
            "stand before the prompt, so tokens went that attention_mask still has. Crop less, or begin with an empty "
            "cache."
        )
    return Block(block.start, seen, False)
