"""The only place that changes PEFT when it is imported: its tables of classes, and `PeftModel.from_pretrained`.

Why it must: `register_peft_method` only takes new members of an enum, and prompt tuning is one already;
`get_peft_model` picks the model class by the task alone; `from_pretrained` raises for every prompt that is to be
trained further, before any class of ours is asked. Everything put in place here defers to PEFT unless the config, or
the saved adapter, is the plugin's.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from typing import Any

from peft import MODEL_TYPE_TO_PEFT_MODEL_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PeftConfig, PeftModel, PeftType

from . import model as models
from .config import PromptTuningExtConfig
from .devices import left_dispatched
from .encoder import PromptEmbedding


_stock: dict[str, Any] = {}  # what was there before; empty while the seam is not active


def activate() -> None:
    """Put the plugin's classes into PEFT's tables. Calling it twice does nothing more."""
    if _stock:
        return
    _stock["tuner"] = PEFT_TYPE_TO_TUNER_MAPPING[PeftType.PROMPT_TUNING]
    _stock["models"] = dict(MODEL_TYPE_TO_PEFT_MODEL_MAPPING)
    _stock["from_pretrained"] = PeftModel.__dict__["from_pretrained"]
    PEFT_TYPE_TO_TUNER_MAPPING[PeftType.PROMPT_TUNING] = PromptEmbedding  # type: ignore[assignment]
    for task_type, stock_class in _stock["models"].items():
        MODEL_TYPE_TO_PEFT_MODEL_MAPPING[task_type] = getattr(models, stock_class.__name__)
    PeftModel.from_pretrained = classmethod(_from_pretrained)  # type: ignore[assignment,method-assign]


def deactivate() -> None:
    """Put PEFT back as it was, and transformers' lookup of attention where a model runs the engine."""
    interface = sys.modules.get("peft_prompt_ext.shared_prefix.interface")
    if interface is not None:
        interface.put_back()
    if not _stock:
        return
    PEFT_TYPE_TO_TUNER_MAPPING[PeftType.PROMPT_TUNING] = _stock["tuner"]
    MODEL_TYPE_TO_PEFT_MODEL_MAPPING.update(_stock["models"])
    PeftModel.from_pretrained = _stock["from_pretrained"]  # type: ignore[method-assign]
    _stock.clear()


def _from_pretrained(
    cls: type[PeftModel],
    model: Any,
    model_id: Any,
    adapter_name: str = "default",
    is_trainable: bool = False,
    config: PeftConfig | None = None,
    *args: Any,
    **kwargs: Any,
) -> PeftModel:
    """PEFT's `from_pretrained`, which also reads the plugin's record and loads a prompt to be trained further."""
    load = _stock["from_pretrained"].__get__(None, cls)
    if config is None:
        config = _saved_by_plugin(str(model_id), kwargs)
    further = is_trainable and _is_prompt_tuning(config, str(model_id), kwargs)
    was_training = getattr(model, "training", False)
    with left_dispatched(model) if isinstance(config, PromptTuningExtConfig) else nullcontext():
        loaded = load(model, model_id, adapter_name, is_trainable and not further, config, *args, **kwargs)
    if not isinstance(loaded, models.PromptTuningMixin) and _is_prompt_tuning(config, str(model_id), kwargs):
        models.check_base(loaded, adapter_name, str(model_id))
    if further:
        loaded.train(was_training)
        models.make_trainable(loaded, adapter_name)
    return loaded


def _hub_kwargs(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in kwargs.items() if k in {"subfolder", "revision", "cache_dir", "token"}}


def _is_prompt_tuning(config: PeftConfig | None, model_id: str, kwargs: dict[str, Any]) -> bool:
    peft_type = config.peft_type if config is not None else PeftConfig._get_peft_type(model_id, **_hub_kwargs(kwargs))
    return peft_type == PeftType.PROMPT_TUNING


def _saved_by_plugin(model_id: str, kwargs: dict[str, Any]) -> PromptTuningExtConfig | None:
    """The config of an adapter that this plugin saved; None for every other adapter."""
    if not _is_prompt_tuning(None, model_id, kwargs):
        return None
    config = PromptTuningExtConfig.from_pretrained(model_id, **_hub_kwargs(kwargs))
    return None if config.init_record is None else config
