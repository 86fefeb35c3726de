"""The object that a forward pass over a packed batch passes to each layer's attention.

Shapes: G key-value heads, D head size, V words, n places.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import nn

from .attention.sdpa import packed_attention
from .layout import PackedLayout


if TYPE_CHECKING:
    from .attention.select import AttentionCall


KeysValues = dict[nn.Module, tuple[torch.Tensor, torch.Tensor]]  # by attention module, [1, G, tokens, D] each


class Trunks(Protocol):
    """Keys and values of all trunks of a batch, as constants: then only the branches run."""

    def read(self, places: torch.Tensor) -> torch.Tensor | None:
        """Get the keys and values ready before a pass, and compute the logits [n, V] at places [n] of the trunks.

        Returns:
            None without places.
        """

    def get(self, module: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        """Get an attention module's keys and values, [1, G, tokens of all trunks, D] each."""


@dataclass(eq=False)
class PackedPass:
    """One forward pass.

    Attributes:
        layout: The place of each token.
        attention: The attention function, with the signature of `attention.sdpa.packed_attention`.
        trunks: If given, the trunks are constants, and only the branches' tokens run.
        calls: If given, each layer's attention call is appended.
        keys_values: If given, each layer's keys and values are stored.
    """

    layout: PackedLayout
    attention: Callable[..., torch.Tensor] = packed_attention
    trunks: Trunks | None = None
    calls: list[AttentionCall] | None = None
    keys_values: KeysValues | None = None

    @property
    def first_place(self) -> int:
        """The place of the first token that runs."""
        return 0 if self.trunks is None else self.layout.num_trunk_tokens
