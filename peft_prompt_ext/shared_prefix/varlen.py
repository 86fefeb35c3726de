"""Attention over a packed sequence by FlashAttention, in two parts: no pads, no masks, no copies of a prompt.

Each text and each prompt is a sequence that attends to itself, causally; each prompt's texts together attend to the
prompt, all of it. The parts are put together by their log-sum-exps. The gradient of each part follows from the result
of both together, so that a log-sum-exp needs none (Dao et al. 2022, FlashAttention, appendix B).

Shapes: N packed tokens, A query heads, G key-value heads, D head size, S text tokens, V of them behind a prompt.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from . import attention
from .layout import PackedLayout


DTYPES = (torch.float16, torch.bfloat16)


def packed_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: PackedLayout,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """See `attention.packed_attention`, which stands in for dropout and for windows that leave something out.

    Raises:
        NotImplementedError: FlashAttention has no such dtype, or no soft-capping.
    """
    if query.dtype not in DTYPES:
        raise NotImplementedError(f"FlashAttention has float16 and bfloat16, not {query.dtype}")
    if softcap is not None:
        raise NotImplementedError("FlashAttention in PyTorch has no soft-capping")
    seen = max(layout.prompt_lengths) + layout.longest_text
    if dropout or (sliding_window is not None and sliding_window < seen):
        return attention.packed_attention(query, key, value, layout, scaling, dropout, sliding_window)
    tokens = (x[0].transpose(0, 1) for x in (query, key, value))  # [N, heads, D]
    return _PackedAttention.apply(*tokens, layout, scaling)[None]


class Part(NamedTuple):
    """Sequences of queries and of keys, lying one behind the other.

    Attributes:
        queries: Where each sequence of queries begins, and where the last one ends, int32.
        keys: The same of the keys.
        longest_query: Tokens of the longest sequence of queries.
        longest_key: The same of the keys.
        causal: The sequences are the same ones, and a token sees none behind it.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    longest_query: int
    longest_key: int
    causal: bool


class _PackedAttention(torch.autograd.Function):
    """[N, A, D], [N, G, D] twice -> [N, A, D]; with queries of the text alone their results, without gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        layout: PackedLayout,
        scaling: float | None,
    ) -> torch.Tensor:
        virtual, missing = layout.num_prompt_tokens, len(key) - len(query)
        own, behind = _parts(layout, text_alone=missing > 0)
        texts = slice(virtual - missing, virtual - missing + layout.num_behind)
        out, lse, state = flash_forward(query, key[missing:], value[missing:], own, scaling)
        states = [state]
        if behind is not None:
            prompt = flash_forward(query[texts], key[:virtual], value[:virtual], behind, scaling)
            states.append(prompt[2])
            both = torch.logaddexp(lse[:, texts], prompt[1])
            parts = (out[texts], lse[:, texts]), prompt[:2]
            merged = sum(part * (own_lse - both).exp().t()[..., None] for part, own_lse in parts)
            out[texts], lse[:, texts] = merged.to(out.dtype), both
        ctx.own, ctx.behind, ctx.texts, ctx.virtual, ctx.states, ctx.scaling = own, behind, texts, virtual, states, scaling
        ctx.save_for_backward(query, key, value, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        texts, prompts = ctx.texts, slice(ctx.virtual)
        grads = flash_backward(grad, query, key, value, out, lse, ctx.own, ctx.states[0], ctx.scaling)
        if ctx.behind is not None:
            results = grad[texts], query[texts], key[prompts], value[prompts], out[texts], lse[:, texts]
            more = flash_backward(*results, ctx.behind, ctx.states[1], ctx.scaling)
            for whole, part, place in zip(grads, more, (texts, prompts, prompts), strict=True):
                whole[place] += part
        return *grads, None, None


def _parts(layout: PackedLayout, text_alone: bool) -> tuple[Part, Part | None]:
    """What attends to itself, and the texts behind prompts, if there are any."""
    kind = "varlen", text_alone
    if kind not in layout.kept:
        virtual, prompts = layout.num_prompt_tokens, len(layout.groups) - 1
        longest = max(layout.prompt_lengths)
        ends = layout.ends[prompts:] - virtual if text_alone else layout.ends
        width = layout.longest_text if text_alone else max(longest, layout.longest_text)
        own, behind = Part(ends, ends, width, width, True), None
        if layout.num_behind:
            behind = Part(layout.groups, layout.ends[: prompts + 1], layout.longest_group, longest, False)
        layout.kept[kind] = own, behind
    return layout.kept[kind]


def flash_forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, part: Part, scaling: float | None
) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """[N, A, D], [L, G, D] twice -> the result [N, A, D], its log-sum-exp [A, N], and what the backward pass needs."""
    sizes = part.queries, part.keys, part.longest_query, part.longest_key
    out, lse, *state, _ = torch.ops.aten._flash_attention_forward(
        query, key, value, *sizes, 0.0, part.causal, False, scale=scaling
    )
    return out, lse, state


def flash_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    part: Part,
    state: Any,
    scaling: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key and value, given the result and the log-sum-exp over *all* keys of a query."""
    sizes = part.queries, part.keys, part.longest_query, part.longest_key
    return torch.ops.aten._flash_attention_backward(
        grad.contiguous(),
        *(query, key, value, out),
        lse.contiguous(),
        *sizes,
        0.0,
        part.causal,
        *state,
        scale=scaling,
    )
