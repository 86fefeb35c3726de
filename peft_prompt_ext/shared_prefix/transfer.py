"""Transfers between the host and a device.

A read from a device makes the host wait for all pending work of the device. So the inputs of a layout are read
together, once for each batch, and its indices are written without waiting. Only this file does either.
"""

from __future__ import annotations

import torch


def download(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Copy integer or bool tensors to the host, as int64, with one wait for all."""
    if all(x.device.type == "cpu" for x in tensors):
        return [x.long() for x in tensors]
    together = torch.cat([x.flatten().long() for x in tensors]).cpu()
    parts = together.split([x.numel() for x in tensors])
    return [part.view(x.shape) for part, x in zip(parts, tensors, strict=True)]


def upload(device: torch.device, *tensors: torch.Tensor) -> list[torch.Tensor]:
    """Copy tensors from the host to a device, in one transfer, without waiting."""
    if device.type == "cpu":
        return list(tensors)
    parts = [x.contiguous().flatten().view(torch.uint8) for x in tensors]
    aligned = [torch.nn.functional.pad(x, (0, -len(x) % 8)) for x in parts]  # to 8 bytes, for int64
    together = torch.cat(aligned)
    if device.type == "cuda":
        together = together.pin_memory()
    copied = together.to(device, non_blocking=True).split([len(x) for x in aligned])
    return [
        data[: len(part)].view(x.dtype).view(x.shape) for data, part, x in zip(copied, parts, tensors, strict=True)
    ]
