"""Between the host and a device: the only places where a batch is read off a device, or its indices are put there.

A device works on what it was asked for while the host goes on; reading a number off it makes the host wait for all of
that. So what decides a batch's layout is read once, together, and what is computed from it goes back without waiting.
"""

from __future__ import annotations

import torch


def download(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Tensors of integers or truth values on the host, as int64: one wait for those of a device together."""
    if all(x.device.type == "cpu" for x in tensors):
        return [x.long() for x in tensors]
    together = torch.cat([x.flatten().long() for x in tensors]).cpu()
    parts = together.split([x.numel() for x in tensors])
    return [part.view(x.shape) for part, x in zip(parts, tensors, strict=True)]


def upload(device: torch.device, *tensors: torch.Tensor) -> list[torch.Tensor]:
    """Tensors of the host on a device, in one transfer that nobody waits for."""
    if device.type == "cpu":
        return list(tensors)
    parts = [x.contiguous().flatten().view(torch.uint8) for x in tensors]
    aligned = [torch.nn.functional.pad(x, (0, -len(x) % 8)) for x in parts]  # each begins where an int64 may begin
    together = torch.cat(aligned)
    if device.type == "cuda":
        together = together.pin_memory()
    moved = together.to(device, non_blocking=True).split([len(x) for x in aligned])
    return [data[: len(part)].view(x.dtype).view(x.shape) for data, part, x in zip(moved, parts, tensors, strict=True)]
