"""The device that a module computes on, also if accelerate offloads its weights to memory or disk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch


def device_of(module: Any) -> torch.device:
    """Get the device that a module computes on: its weight's, or the one that accelerate's hook loads the weight to.

    It is meta for a weight without data and without a hook.
    """
    device = module.weight.device  # not parameters(): a replica of DataParallel has none
    if device.type != "meta":
        return device
    hook = getattr(module, "_hf_hook", None)
    for part in getattr(hook, "hooks", [hook]):  # a SequentialHook has several
        execution_device = getattr(part, "execution_device", None)
        if execution_device is not None:
            return torch.device(execution_device)
    return device


def load_offloaded(model: Any, names: Sequence[str]) -> None:
    """Load offloaded modules that will be trained: weights that a hook loads for one pass get no gradient."""
    for name, module in model.named_modules():
        hook = getattr(module, "_hf_hook", None)
        is_named = any(f".{wanted}." in f".{name}." for wanted in names)
        if not is_named or hook is None or not any(weight.is_meta for weight in module.parameters(recurse=False)):
            continue
        from accelerate.hooks import remove_hook_from_module

        hook.pre_forward(module)
        weights = {key: weight.detach().clone() for key, weight in module.named_parameters(recurse=False)}
        remove_hook_from_module(module)
        for key, weight in weights.items():
            setattr(module, key, torch.nn.Parameter(weight))


@contextmanager
def keep_dispatched(model: Any) -> Iterator[None]:
    """Keep PEFT from dispatching an offloaded model again; a prompt needs no extra memory."""
    device_map = model.__dict__.pop("hf_device_map", None)
    try:
        yield
    finally:
        if device_map is not None:
            model.hf_device_map = device_map
