"""Causal attention over a packed sequence: a prompt sees itself, a text sees its prompt and itself.

Shapes: N packed tokens, K prompts of at most P tokens, B rows of at most M tokens, A query heads, G key-value heads,
D head size.
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
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute attention; masks are at most [M, P+M], one per row if prompts have several lengths.

    Args:
        query: [1, A, N, D], or only the text tokens.
        key: [1, G, N, D].
        value: [1, G, N, D].
        layout: The place of each token.
        scaling: Factor of the scores, by default D**-0.5.
        dropout: Probability of dropping an attention weight.
        sliding_window: The number of tokens that a token sees, including itself.
        softcap: Scores become `softcap * tanh(scores / softcap)` (Gemma 2).
        sinks: [A], an extra score of each head in the softmax, without a value (gpt-oss).

    Returns:
        [1, N, A, D], with as many tokens as `query`.
    """
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))  # [N, heads, D]
    options = {"scaling": scaling, "dropout": dropout, "softcap": softcap, "sinks": sinks}
    parts = []
    if len(query) == len(key) and layout.num_prompt_tokens:
        parts.append(_attend_prompts(query, key, value, layout, sliding_window, options))
    if len(layout.text):
        parts.append(_attend_texts(query, key, value, layout, sliding_window, options))
    return torch.cat(parts)[None]


def _attend_prompts(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: PackedLayout,
    sliding_window: int | None,
    options: dict[str, Any],
) -> torch.Tensor:
    """Compute the attention of the virtual tokens, [sum P_k, A, D]."""
    longest = layout.prompts.shape[1]
    if len(layout.prompts) == 1:
        query, key, value = (x[None, :longest] for x in (query, key, value))
    else:
        query, key, value = (x[layout.prompts] for x in (query, key, value))  # [K, P, heads, D]
    mask = None
    if sliding_window is not None and sliding_window < longest:
        position = torch.arange(longest, device=query.device)
        mask = causal(position, position, sliding_window)
    out = _attend(query, key, value, mask, options)
    if len(layout.prompts) == 1:
        return out[0]
    return torch.cat([prompt[:length] for prompt, length in zip(out, layout.prompt_lengths, strict=True)])


def _attend_texts(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: PackedLayout,
    sliding_window: int | None,
    options: dict[str, Any],
) -> torch.Tensor:
    """Compute the attention of the text tokens, [S, A, D]."""
    if sliding_window is not None and sliding_window >= layout.prefix.shape[1] + layout.texts.shape[1]:
        sliding_window = None
    keys, values = (torch.cat([_expand_prefixes(x, layout), _Pad.apply(x, layout)], dim=1) for x in (key, value))
    if len(query) == len(key):
        query = _Pad.apply(query, layout)
    else:
        query = query[(layout.texts - layout.num_prompt_tokens).clamp(min=0)]
    out = _attend(query, keys, values, layout.mask(sliding_window), options)  # [B, M, A, D]
    return out.flatten(0, 1)[layout.flat]


def _expand_prefixes(x: torch.Tensor, layout: PackedLayout) -> torch.Tensor:
    """Get the prompt's keys (or values) for each row: [N, G, D] -> [B, P, G, D]."""
    if len(layout.prefix) == 1:
        return x[None, : layout.prefix.shape[1]].expand(len(layout.texts), -1, -1, -1)
    return x[layout.prefix][layout.prompt_of_text]


class _Pad(torch.autograd.Function):
    """Pad the text tokens to rows: [N, heads, D] -> [B, M, heads, D].

    Pads contain values of other tokens; no real token sees them, so they have no gradient. The backward pass is a
    gather too, where autograd would add up all B*M tokens.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layout: PackedLayout) -> torch.Tensor:
        ctx.layout = layout
        return x[layout.texts]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        layout = ctx.layout
        text = grad.flatten(0, 1)[layout.flat]
        return torch.cat([text.new_zeros(layout.num_prompt_tokens, *text.shape[1:]), text]), None


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
