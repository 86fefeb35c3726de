"""The state of a model that decides the keys and values of texts, and the cache that belongs to it."""

from __future__ import annotations

from typing import Any

import psutil
import torch
from torch import nn

from .text_cache import TextCache
from .watch import Watch


SHARE = 4  # by default a quarter of the free memory (or disk) is used


class TextState:
    """The state of a backbone at one time. The backbone is in evaluation mode whenever the state is compared.

    Attributes:
        constant: Whether the backbone gives the same output for the same input.
        is_checked: Whether the weights were compared by value since the last change of the model's mode: a write
            through `.data` has no other trace.
    """

    def __init__(self, backbone: nn.Module, key: Any) -> None:
        self._watch, self._key = Watch(backbone), key
        self.constant, self.is_checked = self._watch.constant, True
        # a state that is not constant has no texts, and shards (FSDP 2) have no checksum
        self._sums = _sum_weights(backbone) if self.constant else []

    def holds(self, backbone: nn.Module, key: Any) -> bool:
        """Whether nothing has changed that decides the keys and values of texts."""
        if key != self._key or not self._watch.holds():
            return False
        if self.constant and not self.is_checked:
            self.is_checked = True
            return all(map(torch.equal, self._sums, _sum_weights(backbone)))
        return True

    def expect(self) -> None:
        """See `Watch.expect`."""
        self._watch.expect()


def _sum_weights(backbone: nn.Module) -> list[torch.Tensor]:
    """Compute a checksum of each row of each weight; the first row is copied, because a checksum has no order."""
    sums = []
    for weight in backbone.parameters():
        if weight.numel() and not weight.is_meta:
            table = weight.detach().reshape(len(weight) if weight.dim() > 1 else 1, -1)
            sums += [torch.hash_tensor(table, dim=1).cpu().view(torch.int64), table[0].clone()]
    return sums


def cache_options(config: Any) -> tuple[Any, ...]:
    """The options of a config that decide its cache of texts."""
    return config.text_cache, config.text_cache_bytes, config.text_cache_dir


def make_cache(state: TextState, config: Any) -> TextCache:
    """Make the cache that a config asks for."""
    budget = config.text_cache_bytes
    return TextCache(psutil.virtual_memory().available // SHARE if budget is None else budget)
