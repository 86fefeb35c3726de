"""Attention over a packed sequence with FlexAttention, without padding rows or copying prompts.

Shapes: N packed tokens, Q queries, A query heads, G key-value heads, D head size, X blocks of queries,
Y blocks of keys.
"""

from __future__ import annotations

from functools import cache
from inspect import signature
from typing import Any

import torch
from torch.nn.functional import pad

from ..layout import PackedLayout
from . import sdpa


# the kernel for fewer than 128 queries has no tiles for some ratios of query to key-value heads
ORDINARY_KERNEL: dict[str, Any] = {"FORCE_USE_FLEX_ATTENTION": True}
KINDS = 64  # limit of compiled kinds of calls
BLOCK = 128  # tokens; kernels skip blocks of keys that a block of queries does not see


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
    """See `sdpa.packed_attention`, which is used with dropout, because FlexAttention has none.

    Raises:
        NotImplementedError: The call has sinks.
    """
    if sinks is not None:
        raise NotImplementedError("FlexAttention has no sinks")
    if dropout:
        return sdpa.packed_attention(query, key, value, layout, kept, scaling, dropout, sliding_window, softcap)
    if kept is not None:
        key, value = (torch.cat([trunks.to(x.dtype), x], dim=2) for trunks, x in zip(kept, (key, value), strict=True))
    kind = sliding_window, kept is None
    if kind not in layout.derived:
        layout.derived[kind] = make_block_mask(layout, query.shape[2], sliding_window)
    out = _get_flex_attention(query.device.type)(
        query,
        key,
        value,
        score_mod=None if softcap is None else _make_softcap(softcap, query.device),
        block_mask=layout.derived[kind],
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
        kernel_options=ORDINARY_KERNEL,
    )
    return out.transpose(1, 2)


@cache
def _get_flex_attention(device_type: str) -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    if device_type == "cpu":  # no gradients if compiled
        return flex_attention
    # dynamic: compile once for all lengths; by default, after 8 kinds of calls it would compute dense scores
    if "isolate_recompiles" in signature(torch.compile).parameters:  # torch 2.12
        options: dict[str, Any] = {"recompile_limit": KINDS, "isolate_recompiles": True}
        return torch.compile(flex_attention, dynamic=True, **options)
    return torch._dynamo.config.patch(recompile_limit=KINDS)(torch.compile(flex_attention, dynamic=True))


def _make_softcap(softcap: float, device: torch.device) -> Any:
    # a tensor, because kernels cannot capture a float, which torch.compile makes a dynamic symbol
    cap = torch.tensor(softcap, device=device)

    def score_mod(score: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        return cap * torch.tanh(score / cap)

    return score_mod


def make_block_mask(layout: PackedLayout, queries: int, sliding_window: int | None = None) -> Any:
    """Make FlexAttention's mask for the last Q tokens of the packed sequence.

    `create_block_mask` would build the mask [Q, N]. A token sees two spans of keys, and the ends of the spans give the
    blocks that it sees, [Q, Y].

    Args:
        layout: The place of each token.
        queries: Q.
        sliding_window: The number of tokens that a token sees, including itself.

    Returns:
        A `BlockMask`.
    """
    from torch.nn.attention.flex_attention import BlockMask

    place = torch.arange(layout.num_tokens, device=layout.branches.device)
    start, end, own, place = (x[-queries:] for x in (*layout.spans(sliding_window), place))

    def sees(_batch: torch.Tensor, _head: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return ((start[q] <= k) & (k < end[q])) | ((own[q] <= k) & (k <= place[q]))

    length = layout.num_tokens
    first = torch.arange(0, length, BLOCK, device=place.device)  # [Y]
    behind = first + BLOCK
    spans = [(x[:, None], y[:, None]) for x, y in ((start, end), (own, place + 1))]  # [Q, 1]
    some = torch.stack([(x < y) & (x < behind) & (first < y) for x, y in spans]).any(0)  # [Q, Y]
    every = torch.stack([(x <= first) & (behind <= y) for x, y in spans]).any(0)
    some, every = (pad(x, (0, 0, 0, -queries % BLOCK)).view(-1, BLOCK, len(first)) for x in (some, every))
    some, every = some.any(1), every.all(1)  # [X, Y]
    return BlockMask.from_kv_blocks(
        *_list_blocks(some & ~every),
        *_list_blocks(every),
        BLOCK_SIZE=BLOCK,
        mask_mod=sees,
        seq_lengths=(queries, length),
    )


def _list_blocks(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Count the blocks of each row, [1, 1, X], and list their indices, then the other indices, [1, 1, X, Y]."""
    blocks = blocks.int()[None, None]
    return blocks.sum(-1, dtype=torch.int32), blocks.argsort(dim=-1, descending=True, stable=True).int()
