"""What a prompt leaves to the texts behind it: in inference it is a constant, computed once and kept.

Shapes: P virtual tokens, H hidden size, G key-value heads, D head size, V words.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from .layout import pack


KeysValues = dict[nn.Module, tuple[torch.Tensor, torch.Tensor]]  # of each attention module, [1, G, P, D]


@dataclass
class PromptState:
    """One prompt in one base model.

    Attributes:
        prompt: The virtual tokens that it was computed from, [P, H].
        keys_values: Keys and values of every layer.
    """

    base_model: Any
    prompt: torch.Tensor
    keys_values: KeysValues

    @cached_property
    def logits(self) -> torch.Tensor:
        """What a language modelling head makes of the virtual tokens, [P, V]; computed when it is asked for."""
        return _prefill(self.base_model, self.prompt)[0].logits[0]


@torch.no_grad()
def prompt_state(base_model: Any, prompt: torch.Tensor) -> PromptState:
    """Run a prompt [P, H] alone through the base model, without its head."""
    return PromptState(base_model, prompt.clone(), _prefill(base_model.base_model, prompt)[1])


def _prefill(model: Any, prompt: torch.Tensor) -> tuple[Any, KeysValues]:
    from .forward import run

    layout = pack(torch.ones(0, 0), (len(prompt),))
    layout.recorded = {}
    return run(model, prompt[None], layout), layout.recorded
