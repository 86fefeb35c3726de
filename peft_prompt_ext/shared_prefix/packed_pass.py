"""The object that a forward pass over a packed batch passes to each layer's attention.

Shapes: P virtual tokens, H hidden size, G key-value heads, D head size, V words.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import nn

from .attention.sdpa import packed_attention
from .layout import PackedLayout


if TYPE_CHECKING:
    from .attention.select import AttentionCall


KeysValues = dict[nn.Module, tuple[torch.Tensor, torch.Tensor]]  # by attention module, [1, G, P, D]


@dataclass
class KeptPrefix:
    """The keys and values of one prompt in one base model.

    Attributes:
        prompt: The virtual tokens, [P, H].
        keys_values: Keys and values of every layer.
        compute_logits: Runs the prompt with the head.
    """

    prompt: torch.Tensor
    keys_values: KeysValues
    compute_logits: Callable[[], torch.Tensor]

    @cached_property
    def logits(self) -> torch.Tensor:
        """Logits of the virtual tokens, [P, V]."""
        return self.compute_logits()


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
