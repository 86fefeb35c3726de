"""RANDOM: PEFT's default, N(0, 1) at any scale of the embeddings; for comparison."""

from __future__ import annotations

import torch

from .base import InitContext, register_init


@register_init("RANDOM")
def random(ctx: InitContext) -> torch.Tensor:
    """Draw every number from N(0, 1), as `torch.nn.Embedding` and stock PEFT do.

    Returns:
        [P, H], float32.
    """
    shape = (ctx.num_virtual_tokens, ctx.token_dim)
    # Rounded from float64, so that a seed gives the same bits: float32 logarithms differ between processors.
    return torch.randn(shape, generator=ctx.generator, dtype=torch.float64).float()
