"""Texts as trunks: they run without gradients and in evaluation mode, unless their keys and values are kept.

Shapes: G key-value heads, D head size, H hidden size, V words, n places.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ..evaluation import evaluation_mode
from . import forward
from .layout import pack_trunks
from .packed_pass import KeysValues, PackedPass
from .text_cache import TextCache
from .transfer import upload


class Texts:
    """The texts of a batch; see `packed_pass.Trunks`.

    Args:
        base_model: A model of transformers with its head.
        attention: The attention function.
        embeds: Embeddings of the tokens of all texts, [tokens, H].
        lengths: The number of tokens of each text.
        cache: Where texts are kept; None: nowhere.
        keys: The key of each text in the cache.
        after: Called after texts ran.
    """

    def __init__(
        self,
        base_model: Any,
        attention: Callable[..., torch.Tensor],
        embeds: torch.Tensor,
        lengths: Sequence[int],
        cache: TextCache | None = None,
        keys: Sequence[bytes] = (),
        after: Callable[[], None] = lambda: None,
    ) -> None:
        self.base_model, self.attention, self.embeds, self.lengths = base_model, attention, embeds, lengths
        self.cache, self.keys, self.after = cache, keys, after
        self._parts: list[KeysValues] = []

    @torch.compiler.disable  # a trace would be of one number of texts and of their lengths
    # inference mode would make tensors that a later training step cannot use
    @torch.inference_mode(False)
    @torch.no_grad()
    def read(self, places: torch.Tensor) -> torch.Tensor | None:
        """See `packed_pass.Trunks`; with places, all texts run again."""
        kept: list[KeysValues | None] = [None] * len(self.lengths)
        if self.cache is not None and not len(places):
            pairs = zip(self.keys, self.lengths, strict=True)
            kept = [self.cache.get(key, tokens, self.embeds.device) for key, tokens in pairs]
        missing = [number for number, text in enumerate(kept) if text is None]
        if not missing:
            self._parts = [text for text in kept if text is not None]
            return None
        whole, logits = self._run(missing, places)
        self.after()
        texts = _split(whole, [self.lengths[number] for number in missing])
        if self.cache is not None:
            self.cache.check_budget(texts)
        for number, text in zip(missing, texts, strict=True):
            kept[number] = text
            if self.cache is not None:
                self.cache.put(self.keys[number], text)
        self._parts = [whole] if len(missing) == len(kept) else [text for text in kept if text is not None]
        return logits

    def get(self, module: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        """See `packed_pass.Trunks`."""
        keys, values = zip(*(text[module] for text in self._parts), strict=True)
        if len(keys) == 1:
            return keys[0], values[0]
        return torch.cat(keys, dim=2), torch.cat(values, dim=2)

    def _run(self, numbers: Sequence[int], places: torch.Tensor) -> tuple[KeysValues, torch.Tensor | None]:
        """Run some texts. Returns their keys and values, [1, G, tokens, D] each, and the logits [n, V] at `places`."""
        embeds = self.embeds.detach()
        if len(numbers) < len(self.lengths):
            parts = embeds.split(list(self.lengths))
            embeds = torch.cat([parts[number] for number in numbers])
        keys_values: KeysValues = {}
        packed = PackedPass(pack_trunks([self.lengths[n] for n in numbers]), self.attention, keys_values=keys_values)
        with evaluation_mode(self.base_model):
            if not len(places):
                forward.run(self.base_model.base_model, embeds[None], packed)
                return keys_values, None
            wanted = upload(embeds.device, places)[0]
            return keys_values, forward.run(self.base_model, embeds[None], packed, logits_to_keep=wanted).logits[0]


def _split(whole: KeysValues, lengths: Sequence[int]) -> list[KeysValues]:
    """Split the keys and values of texts that ran together."""
    texts: list[KeysValues] = [{} for _ in lengths]
    for module, (keys, values) in whole.items():
        parts = zip(keys.split(list(lengths), 2), values.split(list(lengths), 2), strict=True)
        for text, part in zip(texts, parts, strict=True):
            text[module] = part
    return texts
