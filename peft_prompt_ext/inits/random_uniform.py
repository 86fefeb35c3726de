"""RANDOM_UNIFORM: a symmetric uniform range, or the embedding table's mean and standard deviation."""

from __future__ import annotations

import math
from typing import Any

import torch

from .base import InitContext, register_init
from .vocabulary import word_ids


def _check(num_virtual_tokens: int, *, scale: float, **_: Any) -> None:
    if not (isinstance(scale, (int, float)) and math.isfinite(scale) and scale > 0):
        raise ValueError(f"RANDOM_UNIFORM: scale ({scale!r}) must be a number above 0.")


@register_init("RANDOM_UNIFORM", check=_check)
def random_uniform(ctx: InitContext, *, scale: float = 0.5, match_embeddings: bool = False) -> torch.Tensor:
    """Draw every number from U[-scale, scale] (Lester et al. 2021, section 3.2).

    Args:
        ctx: The context.
        scale: Half the width of the range.
        match_embeddings: Draw column h with the mean and standard deviation of the embedding table's column h (over
            words) instead; `scale` is then ignored.

    Returns:
        [P, H], float32.
    """
    unit = 2 * torch.rand((ctx.num_virtual_tokens, ctx.token_dim), generator=ctx.generator, dtype=torch.float64) - 1
    if not match_embeddings:
        return (unit * scale).float()
    table = ctx.embed(word_ids(ctx)).double()  # [n, H]
    # U[-a, a] has standard deviation a / sqrt(3)
    return (table.mean(0) + unit * math.sqrt(3) * table.std(0)).float()
