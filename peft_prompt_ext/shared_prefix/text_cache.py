"""Keys and values of texts that are kept between batches, within a budget of bytes.

A text's keys and values are one flat tensor, layer after layer, so that a file or a transfer has one part.

Shapes: G key-value heads, D head size, T tokens of a text.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import nn

from .packed_pass import KeysValues
from .status import KeptTexts


@dataclass
class TextCache:
    """Texts of one model in one state; the texts that come first are kept.

    Attributes:
        budget: The most bytes.
        store: Flat keys and values by a text's key: a dict, or a `text_folder.TextFolder`.
        hits: How often a text was found.
        misses: How often it was not.
        num_bytes: Bytes of the kept texts.
    """

    budget: int
    store: Any = field(default_factory=dict)
    hits: int = 0
    misses: int = 0
    num_bytes: int = 0
    _shapes: list[tuple[nn.Module, tuple[int, int], tuple[int, int]]] | None = None  # module, (G, D) of each

    @property
    def status(self) -> KeptTexts:
        """See `status.KeptTexts`."""
        place = str(getattr(self.store, "folder", "memory"))
        return KeptTexts(self.hits, self.misses, self.num_bytes, self.budget, place)

    def get(self, key: bytes, device: torch.device) -> KeysValues | None:
        """Get a text's keys and values on a device; None if they are not kept."""
        flat = self.store.get(key) if self._shapes is not None else None
        if flat is None:
            self.misses += 1
            return None
        self.hits += 1
        return self._unflatten(flat.to(device, non_blocking=True))

    def put(self, key: bytes, keys_values: KeysValues) -> None:
        """Keep a text's keys and values, [1, G, T, D] each, if the budget allows it."""
        tensors = [tensor for pair in keys_values.values() for tensor in pair]
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        shapes = [(m, (k.shape[1], k.shape[3]), (v.shape[1], v.shape[3])) for m, (k, v) in keys_values.items()]
        if self._shapes is None:
            self._shapes = shapes
        if self.num_bytes + size > self.budget or len({x.dtype for x in tensors}) != 1 or self._shapes != shapes:
            return
        if key not in self.store:
            self.store[key] = torch.cat([tensor.flatten() for tensor in tensors]).cpu()
            self.num_bytes += size

    def _unflatten(self, flat: torch.Tensor) -> KeysValues:
        shapes: Any = self._shapes
        tokens = len(flat) // sum(prod(shape) for _, *pair in shapes for shape in pair)
        sizes = [prod(shape) * tokens for _, *pair in shapes for shape in pair]
        parts = iter(flat.split(sizes))
        return {
            module: tuple(next(parts).view(1, heads, tokens, size) for heads, size in pair) for module, *pair in shapes
        }
