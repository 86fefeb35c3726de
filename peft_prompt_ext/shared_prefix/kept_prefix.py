"""Prompt keys and values kept for inference, where prompts do not change.

Shapes: P virtual tokens, H hidden size, G key-value heads, D head size, V words.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from . import forward
from .layout import pack
from .packed_pass import PackedPass


KeysValues = dict[nn.Module, tuple[torch.Tensor, torch.Tensor]]  # by attention module, [1, G, P, D]


@dataclass
class KeptPrefix:
    """The keys and values of one prompt in one base model.

    Attributes:
        base_model: The base model.
        prompt: The virtual tokens, [P, H].
        keys_values: Keys and values of every layer.
    """

    base_model: Any
    prompt: torch.Tensor
    keys_values: KeysValues

    @cached_property
    def logits(self) -> torch.Tensor:
        """Logits of the virtual tokens, [P, V]."""
        return _prefill(self.base_model, self.prompt)[0].logits[0]


@torch.no_grad()
def keep_prefix(base_model: Any, prompt: torch.Tensor) -> KeptPrefix:
    """Run a prompt [P, H] alone through the base model, without its head."""
    return KeptPrefix(base_model, prompt.clone(), _prefill(base_model.base_model, prompt)[1])


def _prefill(model: Any, prompt: torch.Tensor) -> tuple[Any, KeysValues]:
    keys_values: KeysValues = {}
    packed = PackedPass(pack(torch.ones(0, 0), (len(prompt),)), keys_values=keys_values)
    return forward.run(model, prompt[None], packed), keys_values
