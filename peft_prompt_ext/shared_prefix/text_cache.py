"""Keys and values of texts that are kept between batches, within a budget of bytes.

A text's keys and values are one flat tensor of bytes, layer after layer, so that a file or a transfer has one part.

Shapes: G key-value heads, D head size, T tokens of a text.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn

from .packed_pass import KeysValues
from .status import KeptTexts


ALIGNED = 16  # bytes, so that each part can be viewed in its dtype


class Form(NamedTuple):
    """The form of a layer's keys or values, [1, G, T, D].

    Attributes:
        heads: G.
        size: D.
        dtype: The dtype; keys and values may differ under autocast.
    """

    heads: int
    size: int
    dtype: torch.dtype

    def size_of(self, tokens: int) -> int:
        """Bytes for T tokens."""
        return self.heads * self.size * tokens * self.dtype.itemsize


@dataclass
class TextCache:
    """Texts of one model in one state; the texts that come first are kept.

    Attributes:
        budget: The most bytes.
        store: Flat keys and values by a text's key: a dict, or a `text_folder.TextFolder`.
        hits: How often a text was found.
        misses: How often it was not.
        num_bytes: Bytes of the kept texts.
        is_default: Whether the budget is the default one, which may be below one text.
    """

    budget: int
    store: Any = field(default_factory=dict)
    hits: int = 0
    misses: int = 0
    num_bytes: int = 0
    is_default: bool = False
    _forms: list[tuple[nn.Module, list[Form]]] | None = field(default=None, repr=False)

    @property
    def status(self) -> KeptTexts:
        """See `status.KeptTexts`."""
        place = str(getattr(self.store, "folder", "memory"))
        return KeptTexts(self.hits, self.misses, self.num_bytes, self.budget, place)

    def get(self, key: bytes, tokens: int, device: torch.device) -> KeysValues | None:
        """Get the keys and values of a text of T tokens on a device; None if they are not kept."""
        flat = self.store.get(key) if self._forms is not None else None
        if flat is None or len(flat) != self._count_bytes(tokens):
            self.misses += 1
            return None
        self.hits += 1
        return self._unflatten(flat.to(device, non_blocking=True), tokens)

    def check_budget(self, texts: Iterable[KeysValues]) -> None:
        """Raise ValueError if nothing is kept yet and the given budget is below each of the texts."""
        if self.num_bytes or self.is_default:
            return
        sizes = [sum(x.numel() * x.element_size() for pair in text.values() for x in pair) for text in texts]
        if min(sizes) > self.budget:
            raise ValueError(
                f"text_cache_bytes ({self.budget}) is below one text: those of this batch take {min(sizes)} bytes or "
                "more. Raise it, or set text_cache='none'."
            )

    def put(self, key: bytes, keys_values: KeysValues) -> None:
        """Keep a text's keys and values, [1, G, T, D] each, if the budget allows it."""
        forms = [(m, [Form(x.shape[1], x.shape[3], x.dtype) for x in pair]) for m, pair in keys_values.items()]
        if self._forms is None:
            self._forms = forms
        tensors = [tensor for pair in keys_values.values() for tensor in pair]
        sizes = [-(-tensor.numel() * tensor.element_size() // ALIGNED) * ALIGNED for tensor in tensors]
        if self._forms != forms or self.num_bytes + sum(sizes) > self.budget or key in self.store:
            return
        flat = torch.empty(sum(sizes), dtype=torch.uint8, device=tensors[0].device)
        for part, tensor in zip(flat.split(sizes), tensors, strict=True):
            part[: tensor.numel() * tensor.element_size()].view(tensor.dtype).view(tensor.shape).copy_(tensor)
        self.store[key] = flat.cpu()  # one copy for all layers
        if key in self.store:  # a full disk keeps no more
            self.num_bytes += len(flat)

    def _count_bytes(self, tokens: int) -> int:
        forms = (form for _, pair in self._forms or () for form in pair)
        return sum(-(-form.size_of(tokens) // ALIGNED) * ALIGNED for form in forms)

    def _unflatten(self, flat: torch.Tensor, tokens: int) -> KeysValues:
        forms: Any = self._forms
        each = [form for _, pair in forms for form in pair]
        sizes = [-(-form.size_of(tokens) // ALIGNED) * ALIGNED for form in each]
        parts = iter(flat.split(sizes))
        return {
            module: tuple(
                next(parts)[: form.size_of(tokens)].view(form.dtype).view(1, form.heads, tokens, form.size)
                for form in pair
            )
            for module, pair in forms
        }
