"""How the packed attention gets into a transformers model: by name, in transformers' own registries.

A model that has been packed once keeps the name `shared_prefix|sdpa` (or `|eager`). Without a layout among the
keyword arguments it does exactly what `sdpa` (or `eager`) does. The name has to stay, because gradient checkpointing
looks attention up again in the backward pass.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface

from .attention import packed_attention
from .choice import AttentionCall


KEYWORD = "shared_prefix_layout"
_PREFIX = "shared_prefix|"
_OURS = {"scaling", "sliding_window", "softcap"}


class NotPackable(Exception):
    """The packed path cannot give this model's result; the message says why."""


def attached(base_model: Any) -> bool:
    """Whether the model's attention takes a layout."""
    return (base_model.config._attn_implementation or "").startswith(_PREFIX)


def attach(base_model: Any) -> None:
    """Make the model's attention able to take a layout.

    Raises:
        NotPackable: Its attention implementation is one that the packed path does not stand in for.
    """
    config = base_model.config
    # a model that another process packed comes with the name, but this process has yet to register it
    name = (config._attn_implementation or "").removeprefix(_PREFIX)
    if name not in {"sdpa", "eager"}:
        raise NotPackable(f"attn_implementation is {name!r}; load the model with attn_implementation='sdpa'")
    if _PREFIX + name not in AttentionInterface():
        AttentionInterface.register(_PREFIX + name, partial(_attention, implementation=name))
        # the masks of other passes stay those of `name`
        AttentionMaskInterface.register(_PREFIX + name, AttentionMaskInterface()[name])
    if not attached(base_model):
        config._attn_implementation = _PREFIX + name


def detach(base_model: Any) -> None:
    """Give the model's attention its own name back."""
    if attached(base_model):
        base_model.config._attn_implementation = base_model.config._attn_implementation.removeprefix(_PREFIX)


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    implementation: str,
    **kwargs: Any,
) -> tuple[torch.Tensor, Any]:
    layout = kwargs.pop(KEYWORD, None)
    if layout is None:
        # each model's own module holds its eager attention
        eager: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        original = AttentionInterface().get_interface(implementation, eager)
        return original(module, query, key, value, attention_mask, **kwargs)
    if kwargs.get("s_aux") is not None:
        raise NotPackable("its attention has sinks")
    if kwargs.get("position_bias") is not None or kwargs.get("alibi") is not None:
        raise NotPackable("its attention adds a bias to the scores")
    if not (kwargs.get("is_causal", getattr(module, "is_causal", True))):
        raise NotPackable("its attention is not causal: the prompt sees the text")
    if layout.recorded is not None:
        if module in layout.recorded:
            raise NotPackable("it runs an attention layer twice")
        layout.recorded[module] = key, value
    if layout.cached:
        keys, values = zip(*(state.keys_values[module] for state in layout.cached), strict=True)
        key, value = torch.cat([*keys, key], dim=2), torch.cat([*values, value], dim=2)
    options = {key: value for key, value in kwargs.items() if key in _OURS}
    dropout = kwargs.get("dropout", 0.0) if module.training else 0.0
    if layout.calls is not None:
        tensors = tuple((x.shape[1], x.shape[3], x.dtype) for x in (query, key, value))
        layout.calls.append(AttentionCall(query.device, tensors, tuple(sorted(options.items()))))
    attention = layout.attention or packed_attention
    return attention(query, key, value, layout.to(query.device), dropout=dropout, **options), None
