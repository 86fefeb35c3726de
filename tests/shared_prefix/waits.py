"""Counts on a CPU how often a program would wait for a device.

What came with the model or the batch, or was computed from it, counts as lying on a device, until it goes through
`transfer.download`. Whatever has to know such numbers on the host is a wait.
"""

import weakref
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from peft_prompt_ext.shared_prefix import transfer


# operations with a result, or a shape, that depends on values
READING = {
    "_local_scalar_dense",
    "nonzero",
    "nonzero_numpy",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "masked_select",
    "is_nonzero",
    "equal",
    "bincount",
}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}


class Waits(TorchDispatchMode):
    """Attributes: `places`, the name of the operation at each wait."""

    def __init__(self, tensors):
        super().__init__()
        self.places, self.on_device = [], {}
        for tensor in tensors:
            self.mark(tensor)

    def mark(self, tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in self.on_device:
            self.on_device[storage._cdata] = True
            weakref.finalize(storage, self.on_device.pop, storage._cdata, None)

    def holds(self, tensor):
        return tensor.untyped_storage()._cdata in self.on_device

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [x for x in tree_leaves((args, kwargs or {})) if isinstance(x, torch.Tensor)]
        on_device = any(self.holds(x) for x in tensors)
        name = func.overloadpacket.__name__
        masks = [x for x in tree_leaves(args[1:2]) if isinstance(x, torch.Tensor) and x.dtype == torch.bool]
        sizeless = name == "repeat_interleave" and (kwargs or {}).get("output_size") is None
        if on_device and (name in READING or sizeless or (name in INDEXING and masks)):
            self.places.append(name)
        out = func(*args, **(kwargs or {}))
        if on_device:
            for x in tree_leaves(out):
                if isinstance(x, torch.Tensor):
                    self.mark(x)
        return out


@contextmanager
def counting(model, batch):
    """Yields the list of waits in the block."""
    waits = Waits([*model.parameters(), *model.buffers(), *batch.values()])

    def download(*tensors):
        if any(waits.holds(x) for x in tensors):
            waits.places.append("download")
        with torch.utils._python_dispatch._disable_current_modes():
            return [x.detach().clone().long() for x in tensors]

    def upload(device, *tensors):
        copies = [x.clone() for x in tensors]
        for copy in copies:
            waits.mark(copy)
        return copies

    def forbid(name):
        def read(tensor, *args):
            if waits.holds(tensor):
                waits.places.append(name)
            with torch.utils._python_dispatch._disable_current_modes():
                return original[name](tensor, *args)

        return read

    original = {name: getattr(torch.Tensor, name) for name in ("tolist", "numpy", "cpu")}
    modules = [module for module in _modules() if hasattr(module, "download") or hasattr(module, "upload")]
    patches = [patch.object(module, "download", download) for module in modules if hasattr(module, "download")]
    patches += [patch.object(module, "upload", upload) for module in modules if hasattr(module, "upload")]
    patches += [patch.object(torch.Tensor, name, forbid(name)) for name in original]
    for each in patches:
        each.start()
    try:
        with waits:
            yield waits.places
    finally:
        for each in patches:
            each.stop()


def _modules():
    from peft_prompt_ext.peft_models import packed
    from peft_prompt_ext.shared_prefix import forward, layout
    from peft_prompt_ext.shared_prefix.attention import varlen

    return transfer, forward, layout, packed, varlen
