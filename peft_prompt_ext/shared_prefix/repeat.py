"""Selection of tokens, some repeatedly, with gradients that are summed in float32."""

from __future__ import annotations

from typing import Any

import torch


def repeat(x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Select tokens, some repeatedly: [N, ...], [Q] -> [Q, ...]."""
    return _Repeat.apply(x, places)


class _Repeat(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(places)
        ctx.count = len(x)
        return x.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        (places,) = ctx.saved_tensors
        dtype = torch.promote_types(grad.dtype, torch.float32)
        total = grad.new_zeros(ctx.count, *grad.shape[1:], dtype=dtype)
        return total.index_add_(0, places, grad.to(dtype)).to(grad.dtype), None
