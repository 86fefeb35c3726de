"""Adds packed attention to models of transformers, by a wrapper of `AttentionInterface.get_interface`.

A model looks up its attention function there in every layer and pass, with its own function for "eager". The wrapper
calls that function unless the arguments have a packed pass. The config's attention name and the registry do not
change, because models branch on the name.

The wrapper is in use while a packed pass exists. Gradient checkpointing, which looks up the attention again in the
backward pass, holds a reference to its pass until then.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .. import _seam
from .attention.select import AttentionCall
from .packed_pass import PackedPass


KEYWORD = "shared_prefix_pass"
IMPLEMENTATIONS = ("sdpa", "eager")
# an empty mask: code that reads it instead of the layout fails by its shape
MASK_SHAPE = (1, 1, 0, 0)
# arguments that do not change the attention weights
_HARMLESS = {
    "cache_position",  # there is no cache
    "output_attentions",
    "output_hidden_states",
    "position_ids",  # applied to keys and queries already
    "return_dict",
    "use_cache",
    "logits_to_keep",  # for the head
}

_in_use: weakref.WeakSet[Any] = weakref.WeakSet()
_first_positions: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
_own_lookup: Callable[..., Any] = AttentionInterface.get_interface


class NotPackable(Exception):
    """A packed batch would not give this model's results; the message has the reason."""


def attach(base_model: Any) -> None:
    """Enable packed batches in the model's attention.

    Raises:
        NotPackable: The model's attention implementation is not supported.
    """
    for name, _ in get_attention(base_model):
        if name not in IMPLEMENTATIONS:
            raise NotPackable(f"attn_implementation is {name!r}; load the model with attn_implementation='sdpa'")
    global _own_lookup
    if not _seam.is_replaced(AttentionInterface, "get_interface"):
        _own_lookup = AttentionInterface.get_interface
        _seam.replace(AttentionInterface, "get_interface", _get_interface)


def get_attention(base_model: Any) -> tuple[tuple[Any, Any], ...]:
    """Get the name and the registered function of the attention, for the model and for its text part."""
    configs = base_model.config, base_model.config.get_text_config(decoder=True)
    return tuple((c._attn_implementation, ALL_ATTENTION_FUNCTIONS.get(c._attn_implementation)) for c in configs)


def make_arguments(model: Any, packed: PackedPass, embeds: torch.Tensor) -> dict[str, Any]:
    """Make the arguments of a model's forward for a packed pass."""
    _in_use.add(packed)
    if model not in _first_positions:
        _first_positions[model] = _find_first_position(model)
    positions = packed.layout.to(embeds.device).position_ids[:, -embeds.shape[1] :]
    return {
        KEYWORD: packed,
        "attention_mask": embeds.new_zeros(MASK_SHAPE),  # models pass on a mask of four dimensions unchanged
        "position_ids": positions + first if (first := _first_positions[model]) else positions,
    }


def _find_first_position(model: Any) -> int:
    """Find the position of a row's first token; RoBERTa counts from padding_idx + 1."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return int(module.padding_idx) + 1
    return 0


class Observer:
    """Observes the attention calls of a model's own forward pass, without changing them.

    Args:
        observe: Called in each layer with the arguments of its attention.
    """

    def __init__(self, observe: Callable[..., None]) -> None:
        self.observe = observe

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments of the model's forward."""
        _in_use.add(self)
        return {KEYWORD: self}


def _get_interface(self: AttentionInterface, attn_implementation: Any, default: Any) -> Any:
    """See transformers."""
    function = _own_lookup(self, attn_implementation, default)
    if attn_implementation not in IMPLEMENTATIONS or not (torch.compiler.is_compiling() or _in_use):
        return function
    return partial(_attention, function)


def _attention(function: Any, *args: Any, **kwargs: Any) -> Any:
    packed = kwargs.pop(KEYWORD, None)
    if packed is None:
        return function(*args, **kwargs)
    if isinstance(packed, Observer):
        packed.observe(*args, **kwargs)
        return function(*args, **kwargs)
    return _attend(packed, *args, **kwargs), None


def _attend(
    packed: PackedPass,
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """Compute a layer's attention, [1, N, A, D].

    Raises:
        NotPackable: Packed attention does not support the layer's call.
    """
    if attention_mask is not None and attention_mask.shape != MASK_SHAPE:
        raise NotPackable(f"it makes an attention mask of its own, {list(attention_mask.shape)}")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise NotPackable("its attention is not causal: the prompt sees the text")
    options: dict[str, Any] = {
        name: kwargs.pop(name) for name in ("scaling", "sliding_window", "softcap") if name in kwargs
    }
    if kwargs.get("s_aux") is not None:
        options["sinks"] = kwargs.pop("s_aux")
    given = (name for name, value in kwargs.items() if value is not None and value is not False)
    unknown = sorted(set(given) - _HARMLESS)
    if unknown:
        raise NotPackable(f"it passes {', '.join(unknown)} to its attention")
    if packed.keys_values is not None:
        if module in packed.keys_values:
            raise NotPackable("it runs an attention layer twice")
        packed.keys_values[module] = key, value
    kept = None if packed.trunks is None else packed.trunks.get(module)
    if packed.calls is not None:
        tensors = tuple((x.shape[1], x.shape[3], x.dtype) for x in (query, key, value))
        packed.calls.append(AttentionCall(query.device, tensors, tuple(sorted(options.items()))))
    dropout = dropout if module.training else 0.0
    if kept is not None:
        options["kept"] = kept
    return packed.attention(query, key, value, packed.layout.to(query.device), dropout=dropout, **options)
