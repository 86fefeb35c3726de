"""Where a module computes, also where accelerate keeps its weights elsewhere (in memory, on a disk) between passes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch


def device_of(module: Any) -> torch.device:
    """Device that a module computes on: its weights', or the one that accelerate's hook brings them to.

    The device of weights that have no data, and no hook that would bring them, is meta.
    """
    device = module.weight.device  # a replica of DataParallel has no parameters
    if device.type != "meta":
        return device
    hook = getattr(module, "_hf_hook", None)
    for one in getattr(hook, "hooks", [hook]):  # a SequentialHook has several
        brings_to = getattr(one, "execution_device", None)
        if brings_to is not None:
            return torch.device(brings_to)
    return device


def bring_back(model: Any, names: Sequence[str]) -> None:
    """Give offloaded heads that are to be trained their weights for good: those of a single pass get no gradient."""
    for name, module in model.named_modules():
        hook = getattr(module, "_hf_hook", None)
        named = any(f".{wanted}." in f".{name}." for wanted in names)
        if not named or hook is None or not any(weight.is_meta for weight in module.parameters(recurse=False)):
            continue
        from accelerate.hooks import remove_hook_from_module

        hook.pre_forward(module)
        weights = {key: weight.detach().clone() for key, weight in module.named_parameters(recurse=False)}
        remove_hook_from_module(module)
        for key, weight in weights.items():
            setattr(module, key, torch.nn.Parameter(weight))


@contextmanager
def left_dispatched(model: Any) -> Iterator[None]:
    """Keep PEFT from taking an offloaded model apart and dispatching it anew: beside it a prompt needs no room."""
    device_map = model.__dict__.pop("hf_device_map", None)
    try:
        yield
    finally:
        if device_map is not None:
            model.hf_device_map = device_map
