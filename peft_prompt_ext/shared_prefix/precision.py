"""In what precision a model computes, and which relative error its rounding explains."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ..devices import device_of


class Tolerance(NamedTuple):
    """Relative errors that rounding explains; a token that sees what it should not is far beyond.

    Attributes:
        float32: In float32 or float64.
        reduced: In float32 whose matrix products are rounded (TF32 on a GPU, bfloat16 on a CPU).
        low: In float16, bfloat16, under autocast or over quantised weights.
    """

    float32: float
    reduced: float
    low: float

    def of(self, device: torch.device, dtype: torch.dtype, low: bool = False) -> float:
        """The one for numbers of a dtype on a device, or the low one."""
        if low or dtype.itemsize < 4:
            return self.low
        return self.reduced if dtype == torch.float32 and rounds_products(device.type) else self.float32


def precision(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Where and how a model works on a tensor: device, dtype, autocast's dtype or False, whether products round."""
    kind = tensor.device.type
    autocast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
    return tensor.device, tensor.dtype, autocast, rounds_products(kind)


def precision_of(module: Any) -> tuple[Any, ...]:
    """The same for the weight of a module, wherever it computes if the weight is kept elsewhere."""
    return precision(module.weight.new_empty(0, device=device_of(module)))


def rounds_products(device_type: str) -> bool:
    """Whether matrix products in float32 are computed in less, as `torch.set_float32_matmul_precision` allows."""
    backend: Any = torch.backends.cuda if device_type == "cuda" else torch.backends.mkldnn
    every: Any = torch.backends
    own = backend.matmul.fp32_precision
    return (every.fp32_precision if own == "none" else own) not in {"none", "ieee"}
