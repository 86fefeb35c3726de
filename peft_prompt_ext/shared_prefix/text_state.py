"""The state of a model that decides the keys and values of texts, and the cache that belongs to it."""

from __future__ import annotations

import hashlib
import shutil
from importlib.metadata import version
from itertools import chain
from typing import Any

import psutil
import torch
from torch import nn

from .text_cache import TextCache
from .text_folder import TextFolder
from .watch import Watch


SHARE = 4  # by default a quarter of the free memory (or disk) is used
FORMAT = 1  # of the files; a new number when their content changes


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
    """Compute two checksums of each row of each weight: of its bits, and of its values by their place."""
    sums = []
    for weight in backbone.parameters():
        if weight.numel() and not weight.is_meta:
            table = weight.detach().reshape(len(weight) if weight.dim() > 1 else 1, -1)
            places = torch.rand(table.shape[1], generator=torch.Generator().manual_seed(0)).to(table.device)
            sums += [torch.hash_tensor(table, dim=1).cpu().view(torch.int64), table.float() @ places]
    return sums


def cache_options(config: Any) -> tuple[Any, ...]:
    """The options of a config that decide its cache of texts."""
    return config.text_cache, config.text_cache_bytes, config.text_cache_dir


def make_cache(backbone: nn.Module, computation: str, config: Any) -> TextCache:
    """Make the cache of texts that a config asks for.

    Args:
        backbone: The model that runs the texts.
        computation: The name of the device, the precision and the attention.
        config: The adapter's config.

    Raises:
        ValueError: The folder cannot be used.
    """
    budget, is_default = config.text_cache_bytes, config.text_cache_bytes is None
    if config.text_cache == "memory":
        free = psutil.virtual_memory().available
        return TextCache(free // SHARE if is_default else budget, is_default=is_default)
    if getattr(backbone.config, "quantization_config", None) is not None:
        raise ValueError("text_cache='disk' is not for quantised weights. Set text_cache='memory'.")
    store = TextFolder(config.text_cache_dir, _hash_model(backbone, computation))
    free = shutil.disk_usage(store.folder).free
    budget = store.num_bytes + free // SHARE if is_default else budget
    store.limit(budget)
    return TextCache(budget, store, num_bytes=store.num_bytes, is_default=is_default)


def _hash_model(backbone: nn.Module, computation: str) -> str:
    """Hash everything that decides the keys and values of a text: also weights, options of modules and versions."""
    digest = hashlib.sha256()
    versions = [f"{name} {version(name)}" for name in ("torch", "transformers", "peft")]
    config: Any = backbone.config
    for value in (FORMAT, versions, computation, config.to_json_string()):
        digest.update(repr(value).encode())
    for name, module in backbone.named_modules():
        plain = {key: value for key, value in vars(module).items() if _is_plain(value) and key != "training"}
        digest.update(f"{name} {type(module).__module__}.{type(module).__qualname__} {sorted(plain.items())}".encode())
    for name, tensor in chain(backbone.named_parameters(), backbone.named_buffers()):
        whole = tensor.detach().contiguous()
        digest.update(f"{name} {whole.dtype} {tuple(whole.shape)}".encode())
        digest.update(whole.cpu().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_is_plain, (*value, *value.values())))
    if isinstance(value, (list, tuple, set)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))
