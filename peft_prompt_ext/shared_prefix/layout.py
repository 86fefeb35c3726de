"""How a padded batch lies as one packed sequence `[prompt_1 | prompt_2 | ... | text_1 | text_2 | ...]`: index maths.

All of it is computed on the host and goes to a device in one transfer: to read a number from a device is to wait for
all its pending work.

Shapes: B rows and T columns of the batch, R texts, K prompts, P_k virtual tokens of prompt k, P the longest prompt,
S real text tokens, M tokens of the longest text, N = sum P_k + S packed tokens. A row is one text, or
none if it has no real token, or several if it is packed already.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch

from .transfer import upload


@dataclass(eq=False)
class PackedLayout:
    """Index tensors of one batch.

    Texts keep the order of the batch.

    Attributes:
        prompt_lengths: P_k of each prompt, K of them.
        shape: (B, T).
        longest_text: M.
        lengths: P_k as a tensor, [K].
        prompt_of_row: Which prompt each row has, [B].
        prompt_of_text: Which prompt each text has, [R].
        text: Which text each text token is in, [S].
        source: Place of each text token in the batch, read as one list of B*T tokens, [S].
        within: Number of each text token inside its text, [S].
        position_ids: 0.. for each prompt, P_k.. for the tokens of a text that has prompt k, [1, N].
        prompts: Place in the packed sequence of each prompt's tokens, from the left; behind its end any place, [K, P].
        prefix: The same from the right, so that the last column is the token before the text, [K, P].
        texts: Place in the packed sequence of each text's tokens; behind its end any place, [R, M].
        last: Place of each row's last real token; of its prompt's last token in a row without text, [B].
        derived: Indices that an attention derives from the layout, once for all layers.
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
    _moved: dict[torch.device, PackedLayout] = field(default_factory=dict, repr=False)
    _host: PackedLayout | None = field(default=None, repr=False)

    def to(self, device: torch.device | str | int) -> PackedLayout:
        """The layout with its tensors on a device, made once for each device."""
        device = torch.empty(0, device=device).device  # "cuda" is the current one
        if device == self.texts.device:
            return self
        if device not in self._moved:
            tensors = {f.name: value for f in fields(self) if isinstance(value := getattr(self, f.name), torch.Tensor)}
            moved: dict[str, Any] = dict(zip(tensors, upload(device, *tensors.values()), strict=True))
            self._moved[device] = replace(self, **moved, derived={}, _masks={}, _host=self.on_host())
        return self._moved[device]

    def on_host(self) -> PackedLayout:
        """The layout with its tensors on the host, where their numbers can be read."""
        return self._host or self

    @property
    def num_prompt_tokens(self) -> int:
        """Virtual tokens of all prompts together: the place of the first text token."""
        return sum(self.prompt_lengths)

    @property
    def flat(self) -> torch.Tensor:
        """Where each text token stands in `texts`, if that is read as one list, [S]."""
        return self.text * self.longest_text + self.within

    def mask(self, sliding_window: int | None = None) -> torch.Tensor:
        """The keys of `[prefix | text]` that each text token sees: those not behind it, and inside its window.

        Returns:
            Bool, [M, P+M] if all prompts are equally long, else [R, 1, M, P+M].
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
        """The two runs of places that a token sees: in its prompt, and in its own text (or prompt) up to itself.

        Returns:
            Where the first run starts, and the place behind its end, which may be no further (virtual tokens have an
            empty one); where the second run starts. Each [N].
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
        """Place in the packed sequence of each column of the padded batch `[prompt | text]`; -1 where there is none.

        Rows with a prompt that is shorter than the longest have it right before the text. [B, P+T].
        """
        (rows, columns), longest = self.shape, self.prefix.shape[1]
        missing = longest - self.lengths
        prefix = self.prefix.masked_fill(torch.arange(longest, device=missing.device) < missing[:, None], -1)
        texts = self.source.new_full((rows * columns,), -1)
        texts[self.source] = torch.arange(len(self.source), device=texts.device) + self.num_prompt_tokens
        return torch.cat([prefix[self.prompt_of_row], texts.view(rows, columns)], dim=1)

    def predicting(self) -> torch.Tensor:
        """Place of the token that predicts the token of the *next* column, -1 where that has none; [B, P+T]."""
        (rows, columns), longest = self.shape, self.prefix.shape[1]
        before = self.source.new_full((rows * columns,), -1)
        before[self.source] = self.previous()
        whole = torch.cat([before.new_full((rows, longest), -1), before.view(rows, columns)], dim=1)
        return torch.cat([whole[:, 1:], whole.new_full((rows, 1), -1)], dim=1)

    def previous(self) -> torch.Tensor:
        """Place of the token before each text token: the last virtual token before the first, -1 if there is none."""
        ends = torch.where(self.lengths > 0, self.lengths.cumsum(0) - 1, -1)
        places = torch.arange(len(self.text), device=ends.device) + self.num_prompt_tokens - 1
        return torch.where(self.within == 0, ends[self.prompt_of_text[self.text]], places)


def causal(query: torch.Tensor, key: torch.Tensor, sliding_window: int | None) -> torch.Tensor:
    """Which keys a query sees, by their positions: [..., Q], [..., L] -> bool [..., Q, L]."""
    distance = query[..., :, None] - key[..., None, :]
    seen = distance >= 0
    return seen if sliding_window is None else seen & (distance < sliding_window)


def find_texts(position_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor | None:
    """Find the texts that rows already hold, as batches without padding have them: positions begin again at 0.

    Args:
        position_ids: [B, T] on the host.
        attention_mask: [B, T], nonzero at real tokens.

    Returns:
        True at the first token of every text but the first of a row, [B, T]; None if positions do not count the
        tokens of each text from 0.
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
    """Lay out a batch. All tensors are the host's.

    Args:
        attention_mask: [B, T], nonzero at real tokens: left- or right-padded, or with holes.
        prompt_lengths: P_k of each prompt; 0 is a row without a prompt.
        prompt_of_row: Which prompt each row has, [B]; by default the first.
        begins: True at real tokens with which another text of their row begins, [B, T]; by default nowhere.
    """
    real = attention_mask != 0
    if prompt_of_row is None:
        prompt_of_row = torch.zeros(len(real), dtype=torch.long)
    lengths = torch.tensor(prompt_lengths)
    ends = lengths.cumsum(0)
    total, longest = sum(prompt_lengths), max(prompt_lengths)
    slot = torch.arange(longest)
    # any place will do behind an end, but it has to exist
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
