"""PEFT's functions that save and load adapters, extended for a prompt behind the text.

Each gets PEFT's own function first. Adapters other than prompts pass through.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from peft import PeftType

from ..config import PromptTuningExtConfig
from ..saved_position import TENSORS, read_task
from .packed import PackedMixin
from .position import is_suffix


_STOCK = TENSORS["prefix"]  # the name that PEFT's functions know


def read_config(from_peft_type: Callable[..., Any], **attributes: Any) -> Any:
    """Build a config from the attributes in a file; the plugin's config for a suffix."""
    task_type = read_task(attributes.get("task_type"))
    if task_type is None or attributes.get("peft_type") != PeftType.PROMPT_TUNING:
        return from_peft_type(**attributes)
    config = PromptTuningExtConfig.from_stock(from_peft_type(**{**attributes, "task_type": task_type}), None)
    config.prompt_position = "suffix"
    return config


def add_adapter(
    add: Callable[..., None], model: Any, adapter_name: str, peft_config: Any, *args: Any, **kw: Any
) -> None:
    """Add an adapter.

    Raises:
        ValueError: A model of stock PEFT would run a suffix as a prefix.
    """
    if is_suffix(peft_config) and not isinstance(model, PackedMixin):
        raise ValueError(
            f"The adapter {adapter_name!r} has its prompt behind the text (prompt_position='suffix'), and "
            f"{type(model).__module__}.{type(model).__name__} would put it in front. Build the model with a "
            "PromptTuningExtConfig for CAUSAL_LM or SEQ_CLS, or load this adapter first, with "
            "PeftModel.from_pretrained; then add the others."
        )
    add(model, adapter_name, peft_config, *args, **kw)


def get_state(
    get: Callable[..., dict[str, Any]],
    model: Any,
    state_dict: Any = None,
    adapter_name: str = "default",
    *args: Any,
    **kwargs: Any,
) -> dict[str, Any]:
    """Get an adapter's tensors for a file; the prompt of a suffix has a name of its own."""
    tensors = get(model, state_dict, adapter_name, *args, **kwargs)
    if not is_suffix(model.peft_config[adapter_name]):
        return tensors
    return {TENSORS["suffix"] if name == _STOCK else name: tensor for name, tensor in tensors.items()}


def set_state(
    set_: Callable[..., Any],
    model: Any,
    peft_model_state_dict: Mapping[str, Any],
    adapter_name: str = "default",
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Load an adapter's tensors from a file.

    Raises:
        ValueError: The saved prompt stands elsewhere than the adapter's.
    """
    config, tensors = model.peft_config.get(adapter_name), peft_model_state_dict
    if config is not None and config.peft_type == PeftType.PROMPT_TUNING:
        tensors = _take_own(adapter_name, "suffix" if is_suffix(config) else "prefix", tensors)
    return set_(model, tensors, adapter_name, *args, **kwargs)


def _take_own(adapter_name: str, position: str, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Give the prompt the name that PEFT knows."""
    wanted = TENSORS[position]
    (other,) = {*TENSORS.values()} - {wanted}
    if other in tensors:
        raise ValueError(
            f"The adapter {adapter_name!r} is a {position} of the text and wants `{wanted}`, but the saved prompt is "
            f"`{other}`: it was trained on the other side of the text. Load it under a name of its own "
            "(model.load_adapter) and without config=; prompt_tuning_init='TRANSFER' can start from its vectors."
        )
    return {_STOCK if name == wanted else name: tensor for name, tensor in tensors.items()}
