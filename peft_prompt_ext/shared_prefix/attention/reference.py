"""The slow reference of `sdpa.packed_attention`, with one dense mask.

Shapes: N packed tokens, A query heads, G key-value heads, D head size.
"""

from __future__ import annotations

import torch

from ..layout import PackedLayout, causal


def packed_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: PackedLayout,
    kept: tuple[torch.Tensor, torch.Tensor] | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """See `sdpa.packed_attention`; allocates scores [A, N, N]."""
    if kept is not None:
        key, value = (torch.cat(pair, dim=2) for pair in zip(kept, (key, value), strict=True))
    groups = query.shape[1] // key.shape[1]
    key, value = key[0].repeat_interleave(groups, 0), value[0].repeat_interleave(groups, 0)  # [A, N, D]
    scores = query[0] @ key.transpose(1, 2) * (scaling if scaling is not None else query.shape[-1] ** -0.5)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~make_mask(layout, sliding_window)[-scores.shape[1] :], float("-inf"))
    weights = torch.dropout(
        scores.softmax(-1, torch.promote_types(scores.dtype, torch.float32)).to(query.dtype), dropout, dropout > 0
    )
    return (weights @ value).transpose(0, 1)[None]


def make_mask(layout: PackedLayout, sliding_window: int | None = None) -> torch.Tensor:
    """Make the mask of the keys (columns) that each packed token (row) sees, bool [N, N]."""
    device = layout.branch.device
    number = torch.arange(len(layout.lengths), device=device)
    trunk = torch.cat([number.repeat_interleave(layout.lengths), layout.trunk_of_branch[layout.branch]])
    branch = torch.cat([torch.full((layout.num_trunk_tokens,), -1, device=device), layout.branch])  # -1: a trunk
    same_trunk = trunk[:, None] == trunk[None]
    same_branch_or_trunk = (branch[None] == -1) | (branch[:, None] == branch[None])
    position = layout.position_ids[0]
    return same_trunk & same_branch_or_trunk & causal(position, position, sliding_window)
