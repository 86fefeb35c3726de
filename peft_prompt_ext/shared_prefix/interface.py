"""How the packed attention gets into a transformers model: by the lookup of attention functions.

A model asks `AttentionInterface.get_interface` for its attention in every layer and every pass, and names the
function that "eager" means in its own file. Here a stand-in answers: it calls the very function that was asked for,
unless a packed pass is among the arguments. The config keeps its name and the registry its entries, so the model's own
branches on the name, and everyone who looks a name up or registers another function, see what they saw before.

The stand-in answers while a packed pass is in use. It lives as long as something may still run with it: gradient
checkpointing, which asks for the attention again in the backward pass, holds it until then.
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
# no token is seen through this mask: whatever reads it in place of the layout fails by its shape
MASK_SHAPE = (1, 1, 0, 0)
# arguments that do not change which tokens see each other, or how much
_HARMLESS = {
    "cache_position",  # of a cache, and there is none
    "output_attentions",
    "output_hidden_states",
    "position_ids",  # in the keys and queries already
    "return_dict",
    "use_cache",
    "logits_to_keep",  # the head's
}

_in_use: weakref.WeakSet[Any] = weakref.WeakSet()
_first_positions: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
_own_lookup: Callable[..., Any] = AttentionInterface.get_interface


class NotPackable(Exception):
    """A packed batch cannot give this model's result; the message says why."""


def attach(base_model: Any) -> None:
    """Make the model's attention able to run a packed batch.

    Raises:
        NotPackable: Its attention implementation is one that the packed path does not stand in for.
    """
    for name, _ in attention_of(base_model):
        if name not in IMPLEMENTATIONS:
            raise NotPackable(f"attn_implementation is {name!r}; load the model with attn_implementation='sdpa'")
    global _own_lookup
    if not _seam.is_replaced(AttentionInterface, "get_interface"):
        _own_lookup = AttentionInterface.get_interface
        _seam.replace(AttentionInterface, "get_interface", _get_interface)


def attention_of(base_model: Any) -> tuple[tuple[Any, Any], ...]:
    """Name and registered function of the model's attention, and of its text part's: another one is to be proved."""
    configs = base_model.config, base_model.config.get_text_config(decoder=True)
    return tuple((c._attn_implementation, ALL_ATTENTION_FUNCTIONS.get(c._attn_implementation)) for c in configs)


def arguments(model: Any, packed: PackedPass, embeds: torch.Tensor) -> dict[str, Any]:
    """The arguments by which a packed batch goes through a model to its attention."""
    _in_use.add(packed)
    if model not in _first_positions:
        _first_positions[model] = _first_position(model)
    positions = packed.layout.to(embeds.device).position_ids[:, -embeds.shape[1] :]
    return {
        KEYWORD: packed,
        "attention_mask": embeds.new_zeros(MASK_SHAPE),  # a mask of four dimensions is handed on as it is
        "position_ids": positions + first if (first := _first_positions[model]) else positions,
    }


def _first_position(model: Any) -> int:
    """The position of a row's first token: RoBERTa counts from padding_idx + 1."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return int(module.padding_idx) + 1
    return 0


class Listener:
    """Goes through a model in a packed pass's place, which leaves the model's own attention as it is.

    Args:
        hear: Called in each layer with what its attention gets.
    """

    def __init__(self, hear: Callable[..., None]) -> None:
        self.hear = hear

    @property
    def arguments(self) -> dict[str, Any]:
        """For the model's forward."""
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
    if isinstance(packed, Listener):
        packed.hear(*args, **kwargs)
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
    """Attention of a layer, [1, N, A, D].

    Raises:
        NotPackable: The layer asks for more than the packed attention knows.
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
    asked = (name for name, value in kwargs.items() if value is not None and value is not False)
    unknown = sorted(set(asked) - _HARMLESS)
    if unknown:
        raise NotPackable(f"it hands {', '.join(unknown)} to its attention")
    if packed.keys_values is not None:
        if module in packed.keys_values:
            raise NotPackable("it runs an attention layer twice")
        packed.keys_values[module] = key, value
    if packed.kept_prefixes:
        keys, values = zip(*(prefix.keys_values[module] for prefix in packed.kept_prefixes), strict=True)
        key, value = torch.cat([*keys, key], dim=2), torch.cat([*values, value], dim=2)
    if packed.calls is not None:
        tensors = tuple((x.shape[1], x.shape[3], x.dtype) for x in (query, key, value))
        packed.calls.append(AttentionCall(query.device, tensors, tuple(sorted(options.items()))))
    dropout = dropout if module.training else 0.0
    return packed.attention(query, key, value, packed.layout.to(query.device), dropout=dropout, **options)
