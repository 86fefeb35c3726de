"""Index maths of a padded batch as one packed sequence `[prompt_1 | prompt_2 | ... | text_1 | text_2 | ...]`.

All indices are computed on the host and copied to a device in one transfer, because a read from a device waits for
all its pending work.

Shapes: B rows and T columns of the batch, R texts, K prompts, P_k virtual tokens of prompt k, P the longest prompt,
S real text tokens, M tokens of the longest text, N = sum P_k + S packed tokens. A row has one text, several if the
caller packed them, or none.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch

from .transfer import upload


@dataclass(eq=False)
class PackedLayout:
    """Index tensors of one batch, with texts in the order of the batch. A place is an index of the packed sequence.

    Attributes:
        prompt_lengths: P_k of each prompt.
        shape: (B, T).
        longest_text: M.
        lengths: P_k as a tensor, [K].
        prompt_of_row: The prompt of each row, [B].
        prompt_of_text: The prompt of each text, [R].
        text: The text of each text token, [S].
        source: Index of each text token in the flattened batch, [S].
        within: Index of each text token in its text, [S].
        position_ids: 0.. for each prompt, P_k.. for the tokens of a text with prompt k, [1, N].
        prompts: Place of each prompt's tokens, aligned left; any place after its end, [K, P].
        prefix: The same, aligned right: the last column is the token before the text, [K, P].
        texts: Place of each text's tokens; any place after its end, [R, M].
        last: Place of each row's last real token, or of its prompt's last token in a row without text, [B].
        derived: Indices that an attention derives from the layout, for all layers.
    """

    prompt_lengths: tuple[int, ...]
    shape: tuple[int, int]
    longest_text: int
    lengths: torch.Tensor
    prompt_of_row: torch.Tensor
    prompt_of_text: torch.Tensor
    text: torch.Tensor
    source: torch.Tensor
    within: torch.Tensor
    position_ids: torch.Tensor
    prompts: torch.Tensor
    prefix: torch.Tensor
    texts: torch.Tensor
    last: torch.Tensor
    derived: dict[Any, Any] = field(default_factory=dict, repr=False)
    _masks: dict[int | None, torch.Tensor] = field(default_factory=dict, repr=False)
    _copies: dict[torch.device, PackedLayout] = field(default_factory=dict, repr=False)
    _host: PackedLayout | None = field(default=None, repr=False)

    def to(self, device: torch.device | str | int) -> PackedLayout:
        """Get the layout with its tensors on a device; one copy per device."""
        device = torch.empty(0, device=device).device  # "cuda" is the current one
        if device == self.texts.device:
            return self
        if device not in self._copies:
            tensors = {f.name: value for f in fields(self) if isinstance(value := getattr(self, f.name), torch.Tensor)}
            uploaded: dict[str, Any] = dict(zip(tensors, upload(device, *tensors.values()), strict=True))
            self._copies[device] = replace(self, **uploaded, derived={}, _masks={}, _host=self.on_host())
        return self._copies[device]

    def on_host(self) -> PackedLayout:
        """Get the layout with its tensors on the host."""
        return self._host or self

    @property
    def num_prompt_tokens(self) -> int:
        """The number of virtual tokens of all prompts, which is the place of the first text token."""
        return sum(self.prompt_lengths)

    @property
    def flat(self) -> torch.Tensor:
        """Index of each text token in the flattened `texts`, [S]."""
        return self.text * self.longest_text + self.within

    def mask(self, sliding_window: int | None = None) -> torch.Tensor:
        """Make the mask of the keys of `[prefix | text]` that each text token sees.

        Returns:
            Bool, [M, P+M] if all prompts have one length, else [R, 1, M, P+M].
        """
        if sliding_window not in self._masks:
            longest = self.prefix.shape[1]
            key = torch.arange(longest + self.longest_text, device=self.texts.device)
            mask = causal(key[longest:], key, sliding_window)
            if len(set(self.prompt_lengths)) > 1:
                missing = longest - self.lengths[self.prompt_of_text]
                mask = mask & (key >= missing[:, None])[:, None, None]
            self._masks[sliding_window] = mask
        return self._masks[sliding_window]

    def spans(self, sliding_window: int | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Find the two spans of places that a token sees: in its text's prompt, and in its own text (or prompt).

        Returns:
            Start and end of the first span, which may be empty and is for virtual tokens; start of the second span,
            which ends with the token. Each [N].
        """
        which = self.prompt_of_text[self.text]
        none = which.new_zeros(self.num_prompt_tokens)
        length, end = (torch.cat([none, x[which]]) for x in (self.lengths, self.lengths.cumsum(0)))
        start, position = end - length, self.position_ids[0]
        place = torch.arange(len(position), device=position.device)
        own = place - (position - length)
        if sliding_window is not None:
            start = torch.maximum(start, start + position - sliding_window + 1)
            own = torch.maximum(own, place - sliding_window + 1)
        return start, end, own

    def column_sources(self) -> torch.Tensor:
        """Find the place of each column of the padded batch `[prompt | text]`, [B, P+T]; -1 at pads.

        Shorter prompts are aligned right, next to the text.
        """
        (rows, columns), longest = self.shape, self.prefix.shape[1]
        missing = longest - self.lengths
        prefix = self.prefix.masked_fill(torch.arange(longest, device=missing.device) < missing[:, None], -1)
        texts = self.source.new_full((rows * columns,), -1)
        texts[self.source] = torch.arange(len(self.source), device=texts.device) + self.num_prompt_tokens
        return torch.cat([prefix[self.prompt_of_row], texts.view(rows, columns)], dim=1)

    def predicting(self) -> torch.Tensor:
        """Find the place of the token that predicts the next column, [B, P+T]; -1 if the next column is a pad."""
        (rows, columns), longest = self.shape, self.prefix.shape[1]
        before = self.source.new_full((rows * columns,), -1)
        before[self.source] = self.previous()
        whole = torch.cat([before.new_full((rows, longest), -1), before.view(rows, columns)], dim=1)
        return torch.cat([whole[:, 1:], whole.new_full((rows, 1), -1)], dim=1)

    def previous(self) -> torch.Tensor:
        """Find the place of the token before each text token, [S]; -1 before a first token without a prompt."""
        ends = torch.where(self.lengths > 0, self.lengths.cumsum(0) - 1, -1)
        places = torch.arange(len(self.text), device=ends.device) + self.num_prompt_tokens - 1
        return torch.where(self.within == 0, ends[self.prompt_of_text[self.text]], places)


def causal(query: torch.Tensor, key: torch.Tensor, sliding_window: int | None) -> torch.Tensor:
    """Make a causal mask from positions of queries and keys: [..., Q], [..., L] -> bool [..., Q, L]."""
    distance = query[..., :, None] - key[..., None, :]
    seen = distance >= 0
    return seen if sliding_window is None else seen & (distance < sliding_window)


def find_texts(position_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor | None:
    """Find the texts of rows that hold several, as padding-free collators make them: positions begin again at 0.

    Args:
        position_ids: [B, T] on the host.
        attention_mask: [B, T], nonzero at real tokens.

    Returns:
        True at the first token of a row's second and further texts, [B, T]; None if positions do not count the tokens
        of each text from 0.
    """
    row, column = (attention_mask != 0).nonzero(as_tuple=True)
    position = position_ids[row, column]
    first = row != row.roll(1)
    first[:1] = True
    again = ~first & (position == 0)
    if bool((position != torch.where(first | again, 0, position.roll(1) + 1)).any()):
        return None
    found = torch.zeros_like(position_ids, dtype=torch.bool)
    found[row[again], column[again]] = True
    return found


def pack(
    attention_mask: torch.Tensor,
    prompt_lengths: tuple[int, ...],
    prompt_of_row: torch.Tensor | None = None,
    begins: torch.Tensor | None = None,
) -> PackedLayout:
    """Make the layout of a batch. All tensors are on the host.

    Args:
        attention_mask: [B, T], nonzero at real tokens; pads may be anywhere.
        prompt_lengths: P_k of each prompt; 0 for rows without a prompt.
        prompt_of_row: The prompt of each row, [B]; by default the first.
        begins: True at the first token of a row's second and further texts, [B, T]; by default none.
    """
    real = attention_mask != 0
    if prompt_of_row is None:
        prompt_of_row = torch.zeros(len(real), dtype=torch.long)
    lengths = torch.tensor(prompt_lengths)
    ends = lengths.cumsum(0)
    total, longest = sum(prompt_lengths), max(prompt_lengths)
    slot = torch.arange(longest)
    # after the end, any valid place
    prompts = ((ends - lengths)[:, None] + slot).clamp(max=max(total - 1, 0))
    prefix = (ends[:, None] + slot - longest).clamp(min=0)

    row, column = real.nonzero(as_tuple=True)
    place = torch.arange(len(row))
    first = row != row.roll(1)
    first[:1] = True
    if begins is not None:
        first |= begins[row, column]
    text, starts = first.cumsum(0) - 1, place[first]
    within = place - starts[text]
    counts = text.bincount(minlength=len(starts))
    longest_text = int(counts.max()) if len(counts) else 0
    texts = torch.zeros(len(starts), longest_text, dtype=torch.long)
    texts[text, within] = place + total
    prompt_of_text = prompt_of_row[row[starts]]
    last = (ends - 1)[prompt_of_row].scatter_reduce(0, row, place + total, "amax")
    return PackedLayout(
        prompt_lengths=prompt_lengths,
        shape=(real.shape[0], real.shape[1]),
        longest_text=longest_text,
        lengths=lengths,
        prompt_of_row=prompt_of_row,
        prompt_of_text=prompt_of_text,
        text=text,
        source=row * real.shape[1] + column,
        within=within,
        position_ids=torch.cat([*map(torch.arange, prompt_lengths), within + lengths[prompt_of_text[text]]])[None],
        prompts=prompts,
        prefix=prefix,
        texts=texts,
        last=last,
    )
