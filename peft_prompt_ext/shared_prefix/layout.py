"""Index maths of a padded batch as one packed sequence `[trunk_1 | trunk_2 | ... | branch_1 | branch_2 | ...]`.

A branch sees its trunk and itself, a trunk sees itself. With a prompt in front of the texts (a prefix), prompts are
trunks and texts are branches. With a prompt behind the texts (a suffix), texts are trunks, and a branch is the prompt
and the answer of a row.

All indices are computed on the host and copied to a device in one transfer, because a read from a device waits for
all its pending work.

Shapes: B rows and T columns of the batch, K trunks, L tokens of the longest trunk, R branches, M tokens of the longest
branch, S tokens of all branches, N tokens of trunks and branches, P virtual tokens of the longest prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch

from .transfer import upload


_ON_HOST = {"columns", "text_columns"}


@dataclass(eq=False)
class PackedLayout:
    """Index tensors of one batch. A place is an index of the packed sequence.

    Attributes:
        trunk_lengths: The number of tokens of each trunk.
        shape: (B, T).
        longest_branch: M.
        lengths: `trunk_lengths` as a tensor, [K].
        trunk_of_branch: [R].
        branch: The branch of each branch token, [S].
        within: Index of each branch token in its branch, [S].
        sources: Index of each token in `[virtual tokens of all prompts | flattened batch]`, [N].
        position_ids: 0.. for each trunk, and counted on from there for its branches, [1, N].
        trunks: Place of each trunk's tokens, aligned left; any place after its end, [K, L].
        trunk_ends: The same, aligned right: the last column is the token before the branch, [K, L].
        branches: Place of each branch's tokens; any place after its end, [R, M].
        last: Place of each row's last token, [B].
        columns: Place of each column of the outputs, [B, P+T]; -1 at pads. Always on the host.
        text_columns: Column of the outputs of each text token, [B, T]. Always on the host.
        num_trunk_tokens: The number of tokens of all trunks, which is the place of the first branch token.
        has_equal_trunks: Whether all trunks have one length.
        has_prompts_behind: Whether trunks are texts, in some rows at least.
        derived: Indices that an attention derives from the layout, for all layers.
    """

    trunk_lengths: tuple[int, ...]
    shape: tuple[int, int]
    longest_branch: int
    lengths: torch.Tensor
    trunk_of_branch: torch.Tensor
    branch: torch.Tensor
    within: torch.Tensor
    sources: torch.Tensor
    position_ids: torch.Tensor
    trunks: torch.Tensor
    trunk_ends: torch.Tensor
    branches: torch.Tensor
    last: torch.Tensor
    columns: torch.Tensor
    text_columns: torch.Tensor
    num_trunk_tokens: int  # fields, because torch.compile would compile again for other lengths
    has_equal_trunks: bool
    has_prompts_behind: bool = False
    derived: dict[Any, Any] = field(default_factory=dict, repr=False)
    _masks: dict[int | None, torch.Tensor] = field(default_factory=dict, repr=False)
    _copies: dict[torch.device, PackedLayout] = field(default_factory=dict, repr=False)
    _host: PackedLayout | None = field(default=None, repr=False)

    def to(self, device: torch.device | str | int) -> PackedLayout:
        """Get the layout with its tensors on a device; one copy per device."""
        device = torch.empty(0, device=device).device  # "cuda" is the current one
        if device == self.branches.device:
            return self
        if device not in self._copies:
            names = [f.name for f in fields(self) if f.name not in _ON_HOST]
            tensors = {name: value for name in names if isinstance(value := getattr(self, name), torch.Tensor)}
            uploaded: dict[str, Any] = dict(zip(tensors, upload(device, *tensors.values()), strict=True))
            self._copies[device] = replace(self, **uploaded, derived={}, _masks={}, _host=self.on_host())
        return self._copies[device]

    def on_host(self) -> PackedLayout:
        """Get the layout with its tensors on the host."""
        return self._host or self

    @property
    def num_tokens(self) -> int:
        """N."""
        return self.position_ids.shape[1]

    @property
    def longest_row(self) -> int:
        """The number of tokens of the longest trunk with its longest branch."""
        return int(self.on_host().position_ids.max()) + 1 if self.num_tokens else 0

    @property
    def flat(self) -> torch.Tensor:
        """Index of each branch token in the flattened `branches`, [S]."""
        return self.branch * self.longest_branch + self.within

    def mask(self, sliding_window: int | None = None) -> torch.Tensor:
        """Make the mask of the keys of `[trunk | branch]` that each branch token sees.

        Returns:
            Bool, [M, L+M] if all trunks have one length, else [R, 1, M, L+M].
        """
        if sliding_window not in self._masks:
            longest = self.trunk_ends.shape[1]
            key = torch.arange(longest + self.longest_branch, device=self.branches.device)
            mask = causal(key[longest:], key, sliding_window)
            if not self.has_equal_trunks:
                missing = longest - self.lengths[self.trunk_of_branch]
                mask = mask & (key >= missing[:, None])[:, None, None]
            self._masks[sliding_window] = mask
        return self._masks[sliding_window]

    def spans(self, sliding_window: int | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Find the two spans of places that a token sees: in its branch's trunk, and in its own branch (or trunk).

        Returns:
            Start and end of the first span, which is empty for tokens of trunks; start of the second span, which ends
            with the token. Each [N].
        """
        which = self.trunk_of_branch[self.branch]
        none = which.new_zeros(self.num_trunk_tokens)
        length, end = (torch.cat([none, x[which]]) for x in (self.lengths, self.lengths.cumsum(0)))
        start, position = end - length, self.position_ids[0]
        place = torch.arange(len(position), device=position.device)
        own = place - (position - length)
        if sliding_window is not None:
            start = torch.maximum(start, start + position - sliding_window + 1)
            own = torch.maximum(own, place - sliding_window + 1)
        return start, end, own

    def previous(self) -> torch.Tensor:
        """Find the place of the token before each token, [N]; -1 before a first token."""
        ends = torch.where(self.lengths > 0, self.lengths.cumsum(0) - 1, -1)
        places = torch.arange(len(self.branch), device=ends.device) + self.num_trunk_tokens - 1
        in_branches = torch.where(self.within == 0, ends[self.trunk_of_branch[self.branch]], places)
        in_trunks = torch.arange(self.num_trunk_tokens, device=ends.device) - 1
        first = self.lengths.cumsum(0) - self.lengths
        in_trunks[first[self.lengths > 0]] = -1
        return torch.cat([in_trunks, in_branches])

    def places_of_text(self) -> torch.Tensor:
        """Find the place of each text token, [B, T]; -1 at pads."""
        return self.columns.gather(1, self.text_columns)

    def predicting(self) -> torch.Tensor:
        """Find the place of the token that predicts the next column, [B, P+T]; -1 if the next column is a pad."""
        columns = torch.cat([self.columns[:, 1:], self.columns.new_full((len(self.columns), 1), -1)], dim=1)
        return torch.where(columns >= 0, self.on_host().previous()[columns], -1)


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
    """Make the layout of a batch with prompts in front of the texts. All tensors are on the host.

    A row has one branch, several if it holds several texts, or none.

    Args:
        attention_mask: [B, T], nonzero at real tokens; pads may be anywhere.
        prompt_lengths: The number of virtual tokens of each prompt; 0 for rows without a prompt.
        prompt_of_row: The prompt of each row, [B]; by default the first.
        begins: True at the first token of a row's second and further texts, [B, T]; by default none.
    """
    real = attention_mask != 0
    if prompt_of_row is None:
        prompt_of_row = torch.zeros(len(real), dtype=torch.long)
    total, longest = sum(prompt_lengths), max(prompt_lengths)
    row, column = real.nonzero(as_tuple=True)
    place = torch.arange(len(row)) + total
    first = row != row.roll(1)
    first[:1] = True
    if begins is not None:
        first |= begins[row, column]
    lengths = torch.tensor(prompt_lengths)
    ends = lengths.cumsum(0)
    slot = torch.arange(longest)
    prefix = torch.where(slot < longest - lengths[:, None], -1, ends[:, None] + slot - longest)
    columns = torch.cat([prefix[prompt_of_row], torch.full(real.shape, -1)], dim=1)
    columns[row, column + longest] = place
    return _assemble(
        trunk_lengths=prompt_lengths,
        first=first,
        trunk_of_branch=prompt_of_row[row[first]],
        shape=(real.shape[0], real.shape[1]),
        sources=torch.cat([torch.arange(total), row * real.shape[1] + column + total]),
        last=(ends - 1)[prompt_of_row].scatter_reduce(0, row, place, "amax"),
        columns=columns,
        text_columns=(torch.arange(real.shape[1]) + longest).expand(real.shape),
    )


def pack_behind(
    attention_mask: torch.Tensor,
    prompt_lengths: tuple[int, ...],
    prompt_of_row: torch.Tensor,
    start: torch.Tensor,
    text_of_row: Sequence[Any],
) -> PackedLayout:
    """Make the layout of a batch where some prompts stand behind the texts. All tensors are on the host.

    Args:
        attention_mask: [B, T], nonzero at real tokens; pads may be anywhere.
        prompt_lengths: The number of virtual tokens of each prompt; 0 for rows without a prompt.
        prompt_of_row: The prompt of each row, [B].
        start: The number of the row's columns in front of the prompt, [B]; 0: the prompt is a prefix.
        text_of_row: Rows with equal values here have the same tokens in front of their prompts, and share a trunk.
    """
    real, (rows, columns) = attention_mask != 0, attention_mask.shape
    total, longest = sum(prompt_lengths), max(prompt_lengths)
    ends = torch.tensor(prompt_lengths).cumsum(0)
    virtual = [torch.arange(int(end) - length, int(end)) for end, length in zip(ends, prompt_lengths, strict=True)]
    column = torch.arange(columns)
    text_columns = column + longest * (column >= start[:, None])
    trunks: dict[Any, tuple[int, torch.Tensor]] = {}
    branches, trunk_of_branch = [], []
    for row in range(rows):
        prompt, tokens = int(prompt_of_row[row]), row * columns + total + column
        in_front = tokens[real[row] & (column < start[row])]
        behind = tokens[real[row] & (column >= start[row])]
        is_prefix = not start[row]
        key = ("prompt", prompt) if is_prefix else ("text", text_of_row[row])
        number, _ = trunks.setdefault(key, (len(trunks), virtual[prompt] if is_prefix else in_front))
        branches.append(behind if is_prefix else torch.cat([virtual[prompt], behind]))
        trunk_of_branch.append(number)
    trunk_lengths = tuple(len(tokens) for _, tokens in trunks.values())
    counts = torch.tensor([len(branch) for branch in branches])
    place = sum(trunk_lengths) + counts.cumsum(0) - counts
    trunk_ends = torch.tensor(trunk_lengths).cumsum(0)
    outputs, last = torch.full((rows, longest + columns), -1), torch.zeros(rows, dtype=torch.long)
    for row, (number, branch) in enumerate(zip(trunk_of_branch, branches, strict=True)):
        length, begin, end = prompt_lengths[int(prompt_of_row[row])], int(start[row]), int(trunk_ends[number])
        behind = text_columns[row, real[row] & (column >= begin)]
        slots = torch.arange(begin + longest - length, begin + longest)
        in_front = text_columns[row, real[row] & (column < begin)]
        where = torch.cat([slots, behind] if not begin else [in_front, slots, behind])
        in_trunk = torch.arange(end - trunk_lengths[number], end)
        outputs[row, where] = torch.cat([in_trunk, place[row] + torch.arange(len(branch))])
        last[row] = place[row] + len(branch) - 1 if len(branch) else end - 1
    first = torch.zeros(int(counts.sum()), dtype=torch.bool)
    begun = counts > 0
    first[(place - sum(trunk_lengths))[begun]] = True
    return _assemble(
        trunk_lengths=trunk_lengths,
        first=first,
        trunk_of_branch=torch.tensor(trunk_of_branch)[begun],
        shape=(rows, columns),
        sources=torch.cat([*(tokens for _, tokens in trunks.values()), *branches]),
        last=last,
        columns=outputs,
        text_columns=text_columns,
        has_prompts_behind=True,
    )


def pack_trunks(lengths: Sequence[int]) -> PackedLayout:
    """Make the layout of trunks alone."""
    return pack(torch.ones(0, 0), tuple(lengths))


def _assemble(
    *, trunk_lengths: tuple[int, ...], first: torch.Tensor, trunk_of_branch: torch.Tensor, **others: Any
) -> PackedLayout:
    """Make a layout from its trunks and branches; `first` is True at the first token of each branch, [S]."""
    lengths = torch.tensor(trunk_lengths, dtype=torch.long)
    ends, total, longest = lengths.cumsum(0), sum(trunk_lengths), max(trunk_lengths, default=0)
    slot = torch.arange(longest)
    place = torch.arange(len(first))
    branch, starts = first.cumsum(0) - 1, place[first]
    within = place - starts[branch]
    counts = branch.bincount(minlength=len(starts))
    longest_branch = int(counts.max()) if len(counts) else 0
    branches = torch.zeros(len(starts), longest_branch, dtype=torch.long)
    branches[branch, within] = place + total
    positions = [*map(torch.arange, trunk_lengths), within + lengths[trunk_of_branch[branch]]]
    return PackedLayout(
        trunk_lengths=trunk_lengths,
        longest_branch=longest_branch,
        num_trunk_tokens=total,
        has_equal_trunks=len(set(trunk_lengths)) <= 1,
        lengths=lengths,
        trunk_of_branch=trunk_of_branch,
        branch=branch,
        within=within,
        position_ids=torch.cat(positions)[None],
        # after the end, any valid place
        trunks=((ends - lengths)[:, None] + slot).clamp(max=max(total - 1, 0)),
        trunk_ends=(ends[:, None] + slot - longest).clamp(min=0),
        branches=branches,
        **others,
    )
