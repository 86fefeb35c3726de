"""Where the pads of a batch stand, and moving them to where a base model takes no notice of them: index maths.

Shapes: B rows, T columns.
"""

from __future__ import annotations

from typing import Any, TypeGuard

import torch


def is_padded(mask: Any) -> TypeGuard[torch.Tensor]:
    """Whether it is a mask [B, T] that has pads."""
    return isinstance(mask, torch.Tensor) and mask.dim() == 2 and not bool(mask.all())


def pads_behind(attention_mask: torch.Tensor) -> bool:
    """Whether every row's real tokens come first, so that nothing has to be moved."""
    real = attention_mask != 0
    return not bool((real[:, 1:] & ~real[:, :-1]).any())


def real_first(attention_mask: torch.Tensor) -> torch.Tensor:
    """Order of the columns, [B, T], that puts each row's real tokens first and keeps their order."""
    return (attention_mask == 0).to(torch.uint8).argsort(dim=1, stable=True)


def real_last(attention_mask: torch.Tensor) -> torch.Tensor:
    """Order of the columns, [B, T], that puts each row's real tokens last and keeps their order."""
    return (attention_mask != 0).to(torch.uint8).argsort(dim=1, stable=True)


def reorder(x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Take the columns of `x` [B, T, ...] in the given order, [B, t]."""
    index = order.reshape(*order.shape, *[1] * (x.dim() - 2)).expand(*order.shape, *x.shape[2:])
    return x.gather(1, index)


def count_real(attention_mask: torch.Tensor) -> torch.Tensor:
    """Number of each real token in its row, [B, T]; pads have 0."""
    return (attention_mask.long().cumsum(1) - 1).clamp(min=0)
