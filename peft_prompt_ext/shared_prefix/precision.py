"""The precision of a model, and the relative error that rounding causes."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ..devices import device_of


class Tolerance(NamedTuple):
    """Largest relative errors from rounding; wrong attention causes far larger ones.

    Attributes:
        float32: In float32 or float64.
        reduced: In float32 with rounded matrix products (TF32 on a GPU, bfloat16 on a CPU).
        low: In float16, in bfloat16, under autocast or with quantised weights.
    """

    float32: float
    reduced: float
    low: float

    def of(self, device: torch.device, dtype: torch.dtype, low: bool = False) -> float:
        """Get the tolerance for a dtype on a device, or the low one."""
        if low or dtype.itemsize < 4:
            return self.low
        return self.reduced if dtype == torch.float32 and rounds_products(device.type) else self.float32


def precision(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Get the precision of computations with a tensor: device, dtype, autocast's dtype or False, rounded products."""
    kind = tensor.device.type
    autocast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
    return tensor.device, tensor.dtype, autocast, rounds_products(kind)


def precision_of(module: Any) -> tuple[Any, ...]:
    """Get the precision of a module's weight on the device that the module computes on."""
    return precision(module.weight.new_empty(0, device=device_of(module)))


def rounds_products(device_type: str) -> bool:
    """Whether float32 matrix products are rounded, as `torch.set_float32_matmul_precision` allows."""
    backend: Any = torch.backends.cuda if device_type == "cuda" else torch.backends.mkldnn
    backends: Any = torch.backends
    own = backend.matmul.fp32_precision
    return (backends.fp32_precision if own == "none" else own) not in {"none", "ieee"}
