"""Index maths for pads: where they are, and how to move them.

Shapes: B rows, T columns.
"""

from __future__ import annotations

from typing import Any, TypeGuard

import torch


def is_padded(mask: Any) -> TypeGuard[torch.Tensor]:
    """Whether `mask` is a mask [B, T] with pads."""
    return isinstance(mask, torch.Tensor) and mask.dim() == 2 and not bool(mask.all())


def pads_behind(attention_mask: torch.Tensor) -> bool:
    """Whether in every row the real tokens come first."""
    real = attention_mask != 0
    return not bool((real[:, 1:] & ~real[:, :-1]).any())


def real_first(attention_mask: torch.Tensor) -> torch.Tensor:
    """Order of columns, [B, T], that puts each row's real tokens first, in their own order."""
    return (attention_mask == 0).to(torch.uint8).argsort(dim=1, stable=True)


def real_last(attention_mask: torch.Tensor) -> torch.Tensor:
    """Order of columns, [B, T], that puts each row's real tokens last, in their own order."""
    return (attention_mask != 0).to(torch.uint8).argsort(dim=1, stable=True)


def reorder(x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Reorder the columns of `x` [B, T, ...] by `order` [B, t]."""
    index = order.reshape(*order.shape, *[1] * (x.dim() - 2)).expand(*order.shape, *x.shape[2:])
    return x.gather(1, index)


def count_real(attention_mask: torch.Tensor) -> torch.Tensor:
    """Count each row's real tokens from 0, [B, T]; pads before them have 0."""
    return (attention_mask.long().cumsum(1) - 1).clamp(min=0)
