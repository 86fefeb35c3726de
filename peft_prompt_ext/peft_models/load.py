"""`PeftModel.from_pretrained` that also reads the plugin's record, and loads trainable prompts."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from peft import PeftConfig, PeftModel, PeftType

from .._hub import hub_arguments
from ..config import PromptTuningExtConfig
from ..devices import keep_dispatched
from .base import PromptTuningMixin
from .fit import check_base, make_trainable
from .position import is_suffix


def load(
    from_pretrained: Callable[..., PeftModel],
    model: Any,
    model_id: Any,
    adapter_name: str = "default",
    is_trainable: bool = False,
    config: PeftConfig | None = None,
    *args: Any,
    **kwargs: Any,
) -> PeftModel:
    """Load an adapter with PEFT's own `from_pretrained`, which gets the other arguments."""
    if config is None:
        config = _read_plugin_config(str(model_id), kwargs)
    trains_prompt = is_trainable and _is_prompt_tuning(config, str(model_id), kwargs)
    was_training = getattr(model, "training", False)
    with keep_dispatched(model) if isinstance(config, PromptTuningExtConfig) else nullcontext():
        loaded = from_pretrained(
            model, model_id, adapter_name, is_trainable and not trains_prompt, config, *args, **kwargs
        )
    if not isinstance(loaded, PromptTuningMixin) and _is_prompt_tuning(config, str(model_id), kwargs):
        check_base(loaded, adapter_name, str(model_id))
    if trains_prompt:
        loaded.train(was_training)
        make_trainable(loaded, adapter_name)
    return loaded


def _is_prompt_tuning(config: PeftConfig | None, model_id: str, kwargs: dict[str, Any]) -> bool:
    hub_kwargs = hub_arguments(kwargs, "subfolder")
    peft_type = config.peft_type if config is not None else PeftConfig._get_peft_type(model_id, **hub_kwargs)
    return peft_type == PeftType.PROMPT_TUNING


def _read_plugin_config(model_id: str, kwargs: dict[str, Any]) -> PromptTuningExtConfig | None:
    """Read the config of an adapter that this plugin saved; None for other adapters, which PEFT reads."""
    if not _is_prompt_tuning(None, model_id, kwargs):
        return None
    config = PromptTuningExtConfig.from_pretrained(model_id, **hub_arguments(kwargs, "subfolder"))
    return None if config.init_record is None and not is_suffix(config) else config
