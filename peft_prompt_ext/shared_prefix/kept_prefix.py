"""Computes prompt keys and values for inference, where a prompt is a constant.

Shapes: P virtual tokens, H hidden size, V words.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import nn

from . import forward
from .layout import pack_trunks
from .packed_pass import KeysValues, PackedPass
from .transfer import upload


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


class KeptPrefixes(list[KeptPrefix]):
    """The kept prefixes of a batch, in the order of its trunks; see `packed_pass.Trunks`."""

    def read(self, places: torch.Tensor) -> torch.Tensor | None:
        """See `packed_pass.Trunks`."""
        if not len(places):
            return None
        virtual = torch.cat([prefix.logits for prefix in self])
        return virtual[upload(virtual.device, places)[0]]

    def get(self, module: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        """See `packed_pass.Trunks`."""
        keys, values = zip(*(prefix.keys_values[module] for prefix in self), strict=True)
        return torch.cat(keys, dim=2), torch.cat(values, dim=2)


@torch.no_grad()
def keep_prefix(base_model: Any, prompt: torch.Tensor) -> KeptPrefix:
    """Run a prompt [P, H] alone through the base model, without its head."""
    prompt = prompt.clone()
    return KeptPrefix(prompt, _prefill(base_model.base_model, prompt)[1], partial(_compute_logits, base_model, prompt))


def _compute_logits(base_model: Any, prompt: torch.Tensor) -> torch.Tensor:
    return _prefill(base_model, prompt)[0].logits[0]


def _prefill(model: Any, prompt: torch.Tensor) -> tuple[Any, KeysValues]:
    keys_values: KeysValues = {}
    packed = PackedPass(pack_trunks([len(prompt)]), keys_values=keys_values)
    return forward.run(model, prompt[None], packed), keys_values
