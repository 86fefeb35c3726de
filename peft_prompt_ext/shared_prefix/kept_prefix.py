"""Computes prompt keys and values for inference, where a prompt is a constant.

Shapes: P virtual tokens, H hidden size.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from . import forward
from .layout import pack
from .packed_pass import KeptPrefix, KeysValues, PackedPass


@torch.no_grad()
def keep_prefix(base_model: Any, prompt: torch.Tensor) -> KeptPrefix:
    """Run a prompt [P, H] alone through the base model, without its head."""
    prompt = prompt.clone()
    return KeptPrefix(prompt, _prefill(base_model.base_model, prompt)[1], partial(_compute_logits, base_model, prompt))


def _compute_logits(base_model: Any, prompt: torch.Tensor) -> torch.Tensor:
    return _prefill(base_model, prompt)[0].logits[0]


def _prefill(model: Any, prompt: torch.Tensor) -> tuple[Any, KeysValues]:
    keys_values: KeysValues = {}
    packed = PackedPass(pack(torch.ones(0, 0), (len(prompt),)), keys_values=keys_values)
    return forward.run(model, prompt[None], packed), keys_values
