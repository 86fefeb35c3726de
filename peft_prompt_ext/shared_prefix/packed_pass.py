"""What a forward pass over a packed batch carries to each layer's attention, beside the layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from .attention.sdpa import packed_attention
from .layout import PackedLayout


if TYPE_CHECKING:
    from .attention.select import AttentionCall
    from .kept_prefix import KeptPrefix, KeysValues


@dataclass(eq=False)
class PackedPass:
    """One forward pass.

    Attributes:
        layout: Where each token belongs.
        attention: Computes attention, with the signature of `attention.sdpa.packed_attention`.
        kept_prefixes: The prompts that have tokens, in order, if their keys and values are kept: then the text tokens
            run alone.
        calls: A list to which each layer's attention call is added, if it is given.
        keys_values: A dictionary in which each layer's keys and values are stored, if it is given.
    """

    layout: PackedLayout
    attention: Callable[..., torch.Tensor] = packed_attention
    kept_prefixes: list[KeptPrefix] | None = None
    calls: list[AttentionCall] | None = None
    keys_values: KeysValues | None = None
