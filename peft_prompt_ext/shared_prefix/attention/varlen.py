"""Attention over a packed sequence with FlashAttention for sequences of several lengths, without pads or masks.

A branch is the end of the sequence `[its trunk | branch]`, and FlashAttention aligns the last query with the last key,
so one call computes branches and trunks. A trunk's keys and values are repeated for each of its branches, with the G
heads of grouped queries.

Shapes: N packed tokens, Q queries, L keys, A query heads, G key-value heads, D head size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..layout import PackedLayout
from ..repeat import repeat
from ..transfer import upload
from . import sdpa


DTYPES = (torch.float16, torch.bfloat16)


class Sequences(NamedTuple):
    """Concatenated sequences of queries and of keys.

    Attributes:
        keys: Place of each key in the packed sequence, [L].
        query_ends: Cumulative number of queries at the end of each sequence, with a 0 in front, int32.
        key_ends: The same for keys.
        longest_query: Number of queries of the longest sequence.
        longest_key: The same for keys.
    """

    keys: torch.Tensor
    query_ends: torch.Tensor
    key_ends: torch.Tensor
    longest_query: int
    longest_key: int


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
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `sdpa.packed_attention`, which is used with dropout.

    Raises:
        NotImplementedError: FlashAttention does not support the dtype, soft-capping or sinks.
    """
    if query.dtype not in DTYPES:
        raise NotImplementedError(f"FlashAttention supports float16 and bfloat16, not {query.dtype}")
    if softcap is not None or sinks is not None:
        raise NotImplementedError("FlashAttention in PyTorch supports neither soft-capping nor sinks")
    if dropout:
        return sdpa.packed_attention(query, key, value, layout, kept, scaling, dropout, sliding_window)
    if kept is not None:
        key, value = (torch.cat([trunks.to(x.dtype), x], dim=2) for trunks, x in zip(kept, (key, value), strict=True))
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))  # [N, heads, D]
    kind = "varlen", kept is not None
    if kind not in layout.derived:
        layout.derived[kind] = make_sequences(layout, branches_alone=kind[1])
    parts = layout.derived[kind]
    key, value = (repeat(x, parts.keys) for x in (key, value))
    return flash_attention(query, key, value, parts, scaling, sliding_window)[None]


def flash_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    parts: Sequences,
    scaling: float | None,
    sliding_window: int | None,
) -> torch.Tensor:
    """Compute causal attention in each sequence, from its end: [Q, A, D], [L, G, D] -> [Q, A, D]."""
    return torch.ops.aten._flash_attention_forward(
        *(query, key, value, parts.query_ends, parts.key_ends, parts.longest_query, parts.longest_key),
        dropout_p=0.0,
        is_causal=True,
        return_debug_mask=False,
        scale=scaling,
        window_size_left=None if sliding_window is None else sliding_window - 1,
        window_size_right=None if sliding_window is None else 0,
    )[0]


def make_sequences(layout: PackedLayout, branches_alone: bool) -> Sequences:
    """Make the sequences of the trunks, unless only branches run, and of each branch with its trunk."""
    host = layout.on_host()
    trunks = host.lengths[:0] if branches_alone else host.lengths[host.lengths > 0]
    starts = torch.cat([trunks.cumsum(0) - trunks, (host.lengths.cumsum(0) - host.lengths)[host.trunk_of_branch]])
    in_front = torch.cat([trunks, host.lengths[host.trunk_of_branch]])
    tokens = torch.cat([torch.zeros_like(trunks), host.branch.bincount(minlength=len(host.trunk_of_branch))])
    behind = host.num_trunk_tokens + tokens.cumsum(0) - tokens
    length = in_front + tokens
    which = torch.repeat_interleave(length)
    within = torch.arange(len(which)) - (length.cumsum(0) - length)[which]
    in_trunk = within < in_front[which]
    keys = torch.where(in_trunk, starts[which] + within, (behind - in_front)[which] + within)
    queries = torch.cat([trunks, tokens[len(trunks) :]])
    keys, query_ends, key_ends = upload(layout.branches.device, keys, _find_ends(queries), _find_ends(length))
    return Sequences(keys, query_ends, key_ends, int(queries.max()), int(length.max()))


def _find_ends(counts: torch.Tensor) -> torch.Tensor:
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()
