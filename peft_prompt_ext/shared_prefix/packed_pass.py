"""The object that a forward pass over a packed batch passes to each layer's attention."""

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
        layout: The place of each token.
        attention: The attention function, with the signature of `attention.sdpa.packed_attention`.
        kept_prefixes: The kept prefix of each prompt with tokens, in order; then only text tokens run.
        calls: If given, each layer's attention call is appended.
        keys_values: If given, each layer's keys and values are stored.
    """

    layout: PackedLayout
    attention: Callable[..., torch.Tensor] = packed_attention
    kept_prefixes: list[KeptPrefix] | None = None
    calls: list[AttentionCall] | None = None
    keys_values: KeysValues | None = None
