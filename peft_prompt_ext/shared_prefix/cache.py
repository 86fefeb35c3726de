"""What a prompt leaves to the texts behind it: in inference it is a constant, computed once and kept.

Shapes: P virtual tokens, H hidden size, G key-value heads, D head size, V words.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .layout import pack


KeysValues = dict[nn.Module, tuple[torch.Tensor, torch.Tensor]]  # of each attention module, [1, G, P, D]


@dataclass
class PromptState:
    """One prompt in one base model.

    Attributes:
        prompt: The virtual tokens that it was computed from, [P, H].
        keys_values: Keys and values of every layer.
    """

    base_model: Any
    prompt: torch.Tensor
    keys_values: KeysValues

    @cached_property
    def logits(self) -> torch.Tensor:
        """What a language modelling head makes of the virtual tokens, [P, V]; computed when it is asked for."""
        return _prefill(self.base_model, self.prompt)[0].logits[0]


@torch.no_grad()
def prompt_state(base_model: Any, prompt: torch.Tensor) -> PromptState:
    """Run a prompt [P, H] alone through the base model, without its head."""
    return PromptState(base_model, prompt.clone(), _prefill(base_model.base_model, prompt)[1])


def _prefill(model: Any, prompt: torch.Tensor) -> tuple[Any, KeysValues]:
    from .forward import run

    layout = pack(prompt.new_ones(0, 0), (len(prompt),))
    layout.recorded = {}
    return run(model, prompt[None], layout), layout.recorded


def fingerprint(base_model: Any, prompt: torch.Tensor) -> Any:
    """What has to stay as it is for a state to stay right, beside the prompt's values; None if nobody can tell.

    What writes through raw pointers or `.data` (some optimizers, merging of adapters) changes weights unseen by it:
    states are to be dropped where training or evaluation begins.
    """
    if _is_sharded(base_model) or any(parameter.is_meta for parameter in base_model.parameters()):
        return None  # offloaded weights are copied anew for each pass
    try:
        weights = tuple((parameter.data_ptr(), parameter._version) for parameter in base_model.parameters())
    except RuntimeError:  # made in inference mode
        return None
    tuners = (module for module in base_model.modules() if isinstance(module, BaseTunerLayer))
    adapters = tuple((t.disable_adapters, *t.active_adapters, "merged", *t.merged_adapters) for t in tuners)
    return precision(prompt), weights, adapters


def precision(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Where and in what precision a model works on a tensor: device, dtype, autocast's dtype or False."""
    kind = tensor.device.type
    return tensor.device, tensor.dtype, torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)


def _is_sharded(base_model: Any) -> bool:
    """Whether weights are gathered for each pass (FSDP, ZeRO-3): every process has to make the same passes then."""
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.tensor import DTensor

    sharded = (isinstance(p, DTensor) or hasattr(p, "ds_id") for p in base_model.parameters())
    return any(sharded) or any(isinstance(module, FullyShardedDataParallel) for module in base_model.modules())
