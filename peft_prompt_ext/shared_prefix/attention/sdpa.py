"""Causal attention over a packed sequence: a trunk sees itself, a branch sees its trunk and itself.

Shapes: N packed tokens, K trunks of at most L tokens, R branches of at most M tokens, S tokens of all branches,
A query heads, G key-value heads, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

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
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute attention; masks are at most [M, L+M], one per branch if trunks have several lengths.

    Args:
        query: [1, A, N, D]; with `kept`, of the branches alone, [1, A, S, D].
        key: [1, G, N or S, D], of the same tokens.
        value: [1, G, N or S, D], of the same tokens.
        layout: The place of each token.
        kept: Keys and values of the trunks' tokens, [1, G, N-S, D] each; they are constants.
        scaling: Factor of the scores, by default D**-0.5.
        dropout: Probability of dropping an attention weight.
        sliding_window: The number of tokens that a token sees, including itself.
        softcap: Scores become `softcap * tanh(scores / softcap)` (Gemma 2).
        sinks: [A], an extra score of each head in the softmax, without a value (gpt-oss).

    Returns:
        [1, N or S, A, D], with as many tokens as `query`.
    """
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))  # [tokens, heads, D]
    options = {"scaling": scaling, "dropout": dropout, "softcap": softcap, "sinks": sinks}
    trunks = (key, value) if kept is None else tuple(x[0].transpose(0, 1).to(key.dtype) for x in kept)
    parts = []
    if kept is None and layout.num_trunk_tokens:
        parts.append(_attend_trunks(query, key, value, layout, sliding_window, options))
    if len(layout.branch):
        parts.append(_attend_branches(query, key, value, trunks, layout, sliding_window, options))
    return torch.cat(parts)[None]


def _attend_trunks(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: PackedLayout,
    sliding_window: int | None,
    options: dict[str, Any],
) -> torch.Tensor:
    """Compute the attention of the trunks' tokens, [N-S, A, D]."""
    longest = layout.trunks.shape[1]
    if len(layout.trunks) == 1:
        query, key, value = (x[None, :longest] for x in (query, key, value))
    else:
        query, key, value = (x[layout.trunks] for x in (query, key, value))  # [K, L, heads, D]
    mask = None
    if sliding_window is not None and sliding_window < longest:
        position = torch.arange(longest, device=query.device)
        mask = causal(position, position, sliding_window)
    out = _attend(query, key, value, mask, options)
    if len(layout.trunks) == 1:
        return out[0]
    return torch.cat([trunk[:length] for trunk, length in zip(out, layout.trunk_lengths, strict=True)])


def _attend_branches(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    trunks: tuple[torch.Tensor, ...],
    layout: PackedLayout,
    sliding_window: int | None,
    options: dict[str, Any],
) -> torch.Tensor:
    """Compute the attention of the branches' tokens, [S, A, D]."""
    if sliding_window is not None and sliding_window >= layout.trunk_ends.shape[1] + layout.longest_branch:
        sliding_window = None
    first = len(key) - len(layout.branch)  # index of the first branch token
    plain = sliding_window is None and not options["dropout"] and options["softcap"] is options["sinks"] is None
    if plain and _shares_long_text(layout) and not torch.is_grad_enabled():
        query, key, value = (_Pad.apply(x, layout, first) for x in (query, key, value))
        trunk_key, trunk_value = (x[: layout.num_trunk_tokens] for x in trunks)
        out = _attend_shared(query, key, value, trunk_key, trunk_value, options["scaling"])
        return out.flatten(0, 1)[layout.flat]
    keys, values = (
        torch.cat([_expand_trunks(trunk, layout), _Pad.apply(x, layout, first)], dim=1)
        for trunk, x in zip(trunks, (key, value), strict=True)
    )
    out = _attend(_Pad.apply(query, layout, first), keys, values, layout.mask(sliding_window), options)
    return out.flatten(0, 1)[layout.flat]  # from [R, M, A, D]


def _shares_long_text(layout: PackedLayout) -> bool:
    """Whether several branches share one trunk that is longer than they are, so that copies of it would be costly."""
    is_shared = len(layout.trunks) == 1 and len(layout.branches) > 1
    return is_shared and layout.has_prompts_behind and layout.num_trunk_tokens > layout.longest_branch


def _attend_shared(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    trunk_key: torch.Tensor,
    trunk_value: torch.Tensor,
    scaling: float | None,
) -> torch.Tensor:
    """Compute attention of branches to themselves and to one trunk, whose keys and values are not copied.

    Scores are computed in float32: [R, M, A, D], [R, M, G, D], [L, G, D] -> [R, M, A, D].
    """
    longest, heads, size = query.shape[1:]
    groups, count = key.shape[2], len(trunk_key)
    dtype = torch.promote_types(query.dtype, torch.float32)
    q = query.to(dtype).unflatten(2, (groups, heads // groups)) * (size**-0.5 if scaling is None else scaling)
    scores = torch.einsum("rmgad,lgd->rmgal", q, trunk_key.to(dtype))
    own = torch.einsum("rmgad,rlgd->rmgal", q, key.to(dtype))
    place = torch.arange(longest, device=query.device)
    own = own.masked_fill(~causal(place, place, None)[:, None, None], float("-inf"))
    weights = torch.cat([scores, own], -1).softmax(-1)
    out = torch.einsum("rmgal,lgd->rmgad", weights[..., :count], trunk_value.to(dtype))
    out = out + torch.einsum("rmgal,rlgd->rmgad", weights[..., count:], value.to(dtype))
    return out.flatten(2, 3).to(query.dtype)


def _expand_trunks(x: torch.Tensor, layout: PackedLayout) -> torch.Tensor:
    """Get the trunk's keys (or values) for each branch: [N-S or more, G, D] -> [R, L, G, D]."""
    if len(layout.trunk_ends) == 1:
        return x[None, : layout.trunk_ends.shape[1]].expand(len(layout.branches), -1, -1, -1)
    if "trunk_ends_of_branches" not in layout.derived:
        layout.derived["trunk_ends_of_branches"] = layout.trunk_ends[layout.trunk_of_branch]
    return x[layout.derived["trunk_ends_of_branches"]]


class _Pad(torch.autograd.Function):
    """Pad the branches' tokens to one length: [first + S, heads, D] -> [R, M, heads, D].

    Pads contain values of other tokens; no real token sees them, so they have no gradient. The backward pass is a
    gather too, where autograd would add up all R*M tokens.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layout: PackedLayout, first: int) -> torch.Tensor:
        ctx.layout, ctx.first = layout, first
        missing = layout.num_trunk_tokens - first
        return x[layout.branches if not missing else (layout.branches - missing).clamp(min=0)]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        branches = grad.flatten(0, 1)[ctx.layout.flat]
        if ctx.first:
            branches = torch.cat([branches.new_zeros(ctx.first, *branches.shape[1:]), branches])
        return branches, None, None


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, options: dict[str, Any]
) -> torch.Tensor:
    """Compute attention: [rows, Q, A, D], [rows, L, G, D] -> [rows, Q, A, D]; causal without a mask, where Q = L."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    if options["softcap"] is not None or options["sinks"] is not None:
        return _attend_by_scores(query, key, value, mask, options).transpose(1, 2)
    if mask is not None and query.device.type == "cuda":
        # with a mask and grouped heads, only the kernel that stores all scores is available
        key, value = _repeat_heads(key, query), _repeat_heads(value, query)
    out = scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=mask is None,
        dropout_p=options["dropout"],
        scale=options["scaling"],
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out.transpose(1, 2)


def _repeat_heads(x: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """Repeat key-value heads for the query heads: [rows, G, L, D] -> [rows, A, L, D]."""
    return x.repeat_interleave(query.shape[1] // x.shape[1], 1)


def _attend_by_scores(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, options: dict[str, Any]
) -> torch.Tensor:
    """Compute attention with soft-capping or sinks, which scaled_dot_product_attention does not support."""
    key, value = _repeat_heads(key, query), _repeat_heads(value, query)
    scaling = options["scaling"] if options["scaling"] is not None else query.shape[-1] ** -0.5
    scores = query @ key.transpose(-1, -2) * scaling
    if options["softcap"] is not None:
        scores = options["softcap"] * torch.tanh(scores / options["softcap"])
    if mask is None:
        position = torch.arange(query.shape[2], device=query.device)
        mask = causal(position, position, None)
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    if options["sinks"] is not None:
        sinks = options["sinks"].to(scores)[:, None, None].expand(len(scores), -1, scores.shape[2], 1)
        scores = torch.cat([scores, sinks], -1)
    weights = scores.softmax(-1, torch.promote_types(scores.dtype, torch.float32)).to(query.dtype)
    return torch.dropout(weights[..., : key.shape[2]], options["dropout"], options["dropout"] > 0) @ value
