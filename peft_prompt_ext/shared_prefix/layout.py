"""How a padded batch lies as one packed sequence `[prompt_1 | prompt_2 | ... | text_1 | text_2 | ...]`: index maths.

Shapes: B rows, T padded text length, K prompts, P_k virtual tokens of prompt k, P the longest prompt, S real text
tokens, M real tokens of the longest row, N = sum P_k + S packed tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch


if TYPE_CHECKING:
    from .cache import KeysValues, PromptState
    from .choice import AttentionCall


@dataclass(eq=False)
class PackedLayout:
    """Index tensors of one batch. Text tokens stand in row order, and in a row in the order of their columns.

    Attributes:
        prompt_lengths: P_k of each prompt, K of them.
        num_columns: T.
        prompt_of_row: Which prompt each row has, [B].
        row: Row of each text token, [S].
        column: Column of each text token in the padded batch, [S].
        within: Number of each text token inside its row, [S].
        position_ids: 0.. for each prompt, P_k.. for the real tokens of a row that has prompt k, [1, N].
        prompts: Place in the packed sequence of each prompt's tokens, from the left; behind its end any place, [K, P].
        prefix: The same from the right, so that the last column is the token before the text, [K, P].
        rows: Place in the packed sequence of each row's text tokens; behind its end any place, [B, M].
        last: Place of each row's last real token; of its prompt's last token in a row without text, [B].
        attention: What computes attention, with the signature of `attention.packed_attention`; None: that one.
        blocks: The masks that FlexAttention makes of the layout, once for all layers.
        calls: Where attention leaves what each layer asks of it, if anybody wants it.
        recorded: Where attention leaves its keys and values, if anybody wants them.
        cached: The prompts that have tokens, in order, if they ran before: then the text tokens run alone.
    """

    prompt_lengths: tuple[int, ...]
    num_columns: int
    prompt_of_row: torch.Tensor
    row: torch.Tensor
    column: torch.Tensor
    within: torch.Tensor
    position_ids: torch.Tensor
    prompts: torch.Tensor
    prefix: torch.Tensor
    rows: torch.Tensor
    last: torch.Tensor
    attention: Callable[..., torch.Tensor] | None = None
    blocks: dict[Any, Any] = field(default_factory=dict, repr=False)
    calls: list[AttentionCall] | None = None
    recorded: KeysValues | None = None
    cached: list[PromptState] | None = None
    _masks: dict[int | None, torch.Tensor] = field(default_factory=dict, repr=False)

    @property
    def num_prompt_tokens(self) -> int:
        """Virtual tokens of all prompts together: the place of the first text token."""
        return sum(self.prompt_lengths)

    @property
    def flat(self) -> torch.Tensor:
        """Where each text token stands in `rows`, if that is read as one list, [S]."""
        return self.row * self.rows.shape[1] + self.within

    def mask(self, sliding_window: int | None = None) -> torch.Tensor:
        """What a text token sees of `[prefix | rows]`: True at keys not behind it, nor out of its window.

        Returns:
            Bool, [M, P+M] if all prompts are equally long, else [B, 1, M, P+M].
        """
        if sliding_window not in self._masks:
            longest, width = self.prefix.shape[1], self.rows.shape[1]
            key = torch.arange(longest + width, device=self.rows.device)
            mask = causal(key[longest:], key, sliding_window)
            if len(set(self.prompt_lengths)) > 1:
                lengths = torch.tensor(self.prompt_lengths, device=self.rows.device)[self.prompt_of_row]
                mask = mask & (key >= longest - lengths[:, None])[:, None, None]
            self._masks[sliding_window] = mask
        return self._masks[sliding_window]

    def spans(self, sliding_window: int | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The two runs of places that a token sees: of its prompt, and of its own row (or prompt) up to itself.

        Returns:
            Where the first run starts, and the place behind its end, which may be no further (virtual tokens have an
            empty one); where the second run starts. Each [N].
        """
        device, virtual = self.rows.device, self.num_prompt_tokens
        lengths = torch.tensor(self.prompt_lengths, device=device)
        which = self.prompt_of_row[self.row]
        none = torch.zeros(virtual, dtype=torch.long, device=device)
        length, end = (torch.cat([none, x[which]]) for x in (lengths, lengths.cumsum(0)))
        start, position = end - length, self.position_ids[0]
        place = torch.arange(len(position), device=device)
        own = place - (position - length)
        if sliding_window is not None:
            start = torch.maximum(start, start + position - sliding_window + 1)
            own = torch.maximum(own, place - sliding_window + 1)
        return start, end, own

    def column_sources(self) -> torch.Tensor:
        """Place in the packed sequence of each column of the padded batch `[prompt | text]`; -1 where there is none.

        Rows with a prompt that is shorter than the longest have it right before the text. [B, P+T].
        """
        longest = self.prefix.shape[1]
        sources = torch.full(
            (len(self.prompt_of_row), longest + self.num_columns), -1, device=self.rows.device, dtype=torch.long
        )
        starts = longest - torch.tensor(self.prompt_lengths, device=self.rows.device)
        empty = torch.arange(longest, device=self.rows.device) < starts[:, None]
        sources[:, :longest] = self.prefix.masked_fill(empty, -1)[self.prompt_of_row]
        places = torch.arange(len(self.row), device=self.rows.device) + self.num_prompt_tokens
        sources[self.row, longest + self.column] = places
        return sources

    def previous(self) -> torch.Tensor:
        """Place of the token before each text token: the last virtual token before the first, -1 if there is none."""
        places = torch.arange(len(self.row), device=self.rows.device) + self.num_prompt_tokens - 1
        ends = torch.tensor(self.prompt_lengths, device=self.rows.device).cumsum(0) - 1
        ends[torch.tensor(self.prompt_lengths, device=ends.device) == 0] = -1
        return torch.where(self.within == 0, ends[self.prompt_of_row[self.row]], places)


def causal(query: torch.Tensor, key: torch.Tensor, sliding_window: int | None) -> torch.Tensor:
    """Which keys a query sees, by their positions: [..., Q], [..., L] -> bool [..., Q, L]."""
    distance = query[..., :, None] - key[..., None, :]
    seen = distance >= 0
    return seen if sliding_window is None else seen & (distance < sliding_window)


def pack(
    attention_mask: torch.Tensor, prompt_lengths: tuple[int, ...], prompt_of_row: torch.Tensor | None = None
) -> PackedLayout:
    """Lay out a batch.

    Args:
        attention_mask: [B, T], nonzero at real tokens: left- or right-padded, or with holes.
        prompt_lengths: P_k of each prompt; 0 is a row without a prompt.
        prompt_of_row: Which prompt each row has, [B]; by default the first.
    """
    real = attention_mask != 0
    device = real.device
    if prompt_of_row is None:
        prompt_of_row = torch.zeros(len(real), dtype=torch.long, device=device)
    row, column = real.nonzero(as_tuple=True)
    within = (real.cumsum(1) - 1)[row, column]
    lengths = torch.tensor(prompt_lengths, device=device)
    starts = lengths.cumsum(0) - lengths
    total, longest = sum(prompt_lengths), max(prompt_lengths)
    slot = torch.arange(longest, device=device)
    # any place will do behind an end, but it has to exist
    prompts = (starts[:, None] + slot).clamp(max=max(total - 1, 0))
    prefix = (starts[:, None] + slot - (longest - lengths)[:, None]).clamp(min=0)

    counts = real.sum(1)
    width = int(counts.max()) if len(counts) else 0
    rows = torch.zeros(len(real), width, dtype=torch.long, device=device)
    rows[row, within] = torch.arange(len(row), device=device) + total
    ends = starts + lengths - 1
    last = torch.where(counts > 0, total + counts.cumsum(0) - 1, ends[prompt_of_row])
    positions = [torch.arange(length, device=device) for length in prompt_lengths]
    positions.append(within + lengths[prompt_of_row[row]])
    return PackedLayout(
        prompt_lengths=prompt_lengths,
        num_columns=real.shape[1],
        prompt_of_row=prompt_of_row,
        row=row,
        column=column,
        within=within,
        position_ids=torch.cat(positions)[None],
        prompts=prompts,
        prefix=prefix,
        rows=rows,
        last=last,
    )
