"""Whether anything has changed in a model that decides what a prompt leaves to the texts behind it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from operator import attrgetter, call, is_, itemgetter
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module


# what every module has; of that only these make a pass what it is
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_OF_EVERY_MODULE = set(vars(nn.Module())) - {"training", "_modules", "_parameters", "_buffers", *_HOOKS}
_version = attrgetter("_version")


class Watch:
    """A model as it was at one time.

    Seen are modules, parameters, buffers and hooks that come or go, attributes of modules and of their configs that
    are set (scales of adapters, training mode), also inside a dict or list, and writes to tensors. What writes to
    tensors through `.data` or raw pointers (some optimizers) is not: states are to be dropped where training or
    evaluation begins.

    Attributes:
        constant: The model computes the same of the same input, as far as anybody can tell: no module is in training
            mode, none has hooks or a forward of its own that may do anything, and no weights are gathered for a pass.
    """

    @torch.compiler.disable
    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        self._dicts: list[dict[str, Any]] = [vars(module) for module in modules]
        self._getters = [itemgetter(*(d.keys() - _OF_EVERY_MODULE)) for d in self._dicts]
        attributes = chain.from_iterable(map(call, self._getters, self._dicts))
        unique = {id(value): value for value in attributes}.values()
        # a config is shared by many modules
        maps = [vars(value) for value in unique if hasattr(value, "to_dict") and hasattr(value, "__dict__")]
        maps += [value for value in unique if isinstance(value, dict)]
        lists = [value for value in unique if isinstance(value, list)]
        self._maps, self._lists = list(filter(None, maps)), list(filter(None, lists))
        self._empty = [value for value in (*maps, *lists) if not value]
        self._seen = list(self._values())
        tensors = {id(value): value for value in self._seen if isinstance(value, torch.Tensor)}
        self._tensors = list(tensors.values())
        self._rewritten: list[tuple[torch.Tensor, torch.Tensor]] = []
        try:
            self._written, known = self._writes(), True
        except RuntimeError:  # tensors that were made in inference mode have no version
            self._written, known = [], False
        self.constant = known and not (
            any(module.training for module in modules)
            or any(_may_change_a_pass(d) for d in self._dicts)
            or torch_module._global_forward_hooks
            or torch_module._global_forward_pre_hooks
            or _is_sharded(modules, self._tensors)
        )

    @torch.compiler.disable
    def expect(self) -> None:
        """Take what a pass has written since as what every pass writes (rotary positions); it counts by its values."""
        written = [tensor._version != version for tensor, version in zip(self._tensors, self._written, strict=False)]
        if any(written):
            pairs = list(zip(self._tensors, written, strict=True))
            self._rewritten += [(tensor, tensor.clone()) for tensor, is_written in pairs if is_written]
            self._tensors = [tensor for tensor, is_written in pairs if not is_written]
            self._written = self._writes()

    @torch.compiler.disable
    def holds(self) -> bool:
        """Whether nothing has changed since."""
        try:
            return (
                not any(self._empty)
                and all(map(is_, self._values(), self._seen))
                and (not self.constant or self._writes() == self._written)
                and all(torch.equal(tensor, then) for tensor, then in self._rewritten)
            )
        except (KeyError, RuntimeError):  # an attribute is gone; a tensor has no version
            return False

    def _values(self) -> Iterator[Any]:
        """Everything that is compared by identity."""
        return chain(
            chain.from_iterable(map(call, self._getters, self._dicts)),
            map(len, self._dicts),  # an attribute more; small numbers are the same object everywhere
            chain.from_iterable(map(dict.values, self._maps)),
            chain.from_iterable(self._lists),
            (Watch,),  # more values, or fewer, do not have it at the same place
        )

    def _writes(self) -> list[int]:
        return [*map(_version, self._tensors), *map(torch.Tensor.data_ptr, self._tensors)]


def _may_change_a_pass(module: dict[str, Any]) -> bool:
    """Whether a module has hooks, or a forward of its own, that are not known to leave its result alone."""
    hooks = chain.from_iterable(module[name].values() for name in _HOOKS)
    if any(getattr(hook, "__module__", None) != "transformers.utils.output_capturing" for hook in hooks):
        return True
    if "forward" not in module:
        return False
    from accelerate.hooks import AlignDevicesHook

    hook = module.get("_hf_hook")  # of accelerate, which wraps the forward
    return not isinstance(hook, AlignDevicesHook) or hook.offload


def _is_sharded(modules: Iterable[nn.Module], tensors: Iterable[torch.Tensor]) -> bool:
    """Whether weights are gathered for each pass (FSDP, ZeRO-3): every process has to make the same passes then."""
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.tensor import DTensor

    return any(isinstance(tensor, DTensor) or hasattr(tensor, "ds_id") for tensor in tensors) or any(
        isinstance(module, FullyShardedDataParallel) for module in modules
    )
