"""Detects changes of a model that make kept prefixes invalid."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from operator import attrgetter, call, is_, itemgetter
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module


# attributes of every module; of these, only the named ones affect a forward pass
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_OF_EVERY_MODULE = set(vars(nn.Module())) - {"training", "_modules", "_parameters", "_buffers", *_HOOKS}
_version = attrgetter("_version")


class Watch:
    """The state of a model at one time.

    Detected changes:

    - added or removed modules, parameters, buffers and hooks;
    - new values of attributes of modules and their configs, also inside a dict or list;
    - writes to tensors.

    Writes through `.data` or raw pointers (some optimizers) are not detected, so kept prefixes have to be dropped when
    training or evaluation begins.

    Attributes:
        constant: Whether the model gives the same output for the same input: no module is in training mode or has
            unknown hooks or a replaced forward, and no weights are gathered for a pass.
    """

    @torch.compiler.disable
    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        self._dicts: list[dict[str, Any]] = [vars(module) for module in modules]
        self._getters = [itemgetter(*(d.keys() - _OF_EVERY_MODULE)) for d in self._dicts]
        attributes = chain.from_iterable(map(call, self._getters, self._dicts))
        unique = {id(value): value for value in attributes}.values()
        # unique, because many modules share a config
        maps = [vars(value) for value in unique if hasattr(value, "to_dict") and hasattr(value, "__dict__")]
        maps += [value for value in unique if isinstance(value, dict)]
        lists = [value for value in unique if isinstance(value, list)]
        self._maps, self._lists = list(filter(None, maps)), list(filter(None, lists))
        self._empty = [value for value in (*maps, *lists) if not value]
        self._seen = list(self._list_values())
        tensors = {id(value): value for value in self._seen if isinstance(value, torch.Tensor)}
        self._tensors = list(tensors.values())
        self._rewritten: list[tuple[torch.Tensor, torch.Tensor]] = []
        try:
            self._written, has_versions = self._list_writes(), True
        except RuntimeError:  # tensors from inference mode have no version
            self._written, has_versions = [], False
        self.constant = has_versions and not (
            any(module.training for module in modules)
            or any(_may_change_output(d) for d in self._dicts)
            or torch_module._global_forward_hooks
            or torch_module._global_forward_pre_hooks
            or is_sharded(modules, self._tensors)
        )

    @torch.compiler.disable
    def expect(self) -> None:
        """Accept the writes since then as those of every pass (rotary embeddings); compare these tensors by value."""
        written = [tensor._version != version for tensor, version in zip(self._tensors, self._written, strict=False)]
        if any(written):
            pairs = list(zip(self._tensors, written, strict=True))
            self._rewritten += [(tensor, tensor.clone()) for tensor, is_written in pairs if is_written]
            self._tensors = [tensor for tensor, is_written in pairs if not is_written]
            self._written = self._list_writes()

    @torch.compiler.disable
    def holds(self) -> bool:
        """Whether the model has not changed."""
        try:
            return (
                not any(self._empty)
                and all(map(is_, self._list_values(), self._seen))
                and (not self.constant or self._list_writes() == self._written)
                and all(torch.equal(tensor, then) for tensor, then in self._rewritten)
            )
        except (KeyError, RuntimeError):  # an attribute was removed; a tensor has no version
            return False

    def _list_values(self) -> Iterator[Any]:
        """List everything that is compared by identity."""
        return chain(
            chain.from_iterable(map(call, self._getters, self._dicts)),
            map(len, self._dicts),  # detects new attributes; small integers are unique objects
            chain.from_iterable(map(dict.values, self._maps)),
            chain.from_iterable(self._lists),
            (Watch,),  # marks the end, so that another number of values is detected
        )

    def _list_writes(self) -> list[int]:
        return [*map(_version, self._tensors), *map(torch.Tensor.data_ptr, self._tensors)]


def has_hooks(module: dict[str, Any]) -> bool:
    """Whether a module, given as its attributes, has hooks that may change its output, such as NEFTune's noise."""
    return not all(map(_keeps_values, chain.from_iterable(module[name].values() for name in _HOOKS)))


def _keeps_values(hook: Any) -> bool:
    if getattr(hook, "__module__", None) == "transformers.utils.output_capturing":
        return True
    # gradient checkpointing: the hook of transformers and PEFT only has the embeddings require gradients
    return getattr(hook, "__name__", "").startswith("make_inputs_require_grad")


def _may_change_output(module: dict[str, Any]) -> bool:
    """Whether a module has hooks or a replaced forward that may change its output."""
    if has_hooks(module):
        return True
    if "forward" not in module:
        return False
    from accelerate.hooks import AlignDevicesHook

    hook = module.get("_hf_hook")  # accelerate wraps the forward
    return not isinstance(hook, AlignDevicesHook) or hook.offload


def is_sharded(modules: Iterable[nn.Module], tensors: Iterable[torch.Tensor]) -> bool:
    """Whether weights are gathered for each pass (FSDP, ZeRO-3), so that all processes have to run the same passes."""
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.tensor import DTensor

    return any(isinstance(tensor, DTensor) or hasattr(tensor, "ds_id") for tensor in tensors) or any(
        isinstance(module, FullyShardedDataParallel) for module in modules
    )
