"""RANDOM: PEFT's own default, N(0, 1) whatever the scale of the embeddings. Here to compare with."""

from __future__ import annotations

import torch

from .base import InitContext, register_init


@register_init("RANDOM")
def random(ctx: InitContext) -> torch.Tensor:
    """Draw every number from N(0, 1), as `torch.nn.Embedding` and so stock PEFT does.

    Returns:
        [P, H], float32.
    """
    shape = (ctx.num_virtual_tokens, ctx.token_dim)
    # Rounded from float64: the last bit of a float32 logarithm differs between processors, and the seed must not.
    return torch.randn(shape, generator=ctx.generator, dtype=torch.float64).float()
