"""The model of a run: new, with what its method trains, or loaded from the run's folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from transformers import AutoConfig, AutoTokenizer

from ..assets import resolve
from ..quantization import load_frozen_backbone
from ..tasks import Task
from ..tasks.families import FAMILIES, Family, family_of
from .methods import METHODS, get_method
from .prompts import prompt_size


def find_family(settings: Mapping[str, Any], task: Task, max_length: int) -> Family:
    """Choose how a task is asked of a run's model. Loads the model's config and tokenizer, no weights.

    Args:
        settings: The run's method, model and, if it is not to be guessed, `task_type`.
        task: The task.
        max_length: Most tokens of a row, the prompt not counted; the model may have room for fewer.

    Raises:
        ValueError: The method and the kind of model do not go together, or there is no such model.
    """
    method, name = get_method(settings["method"]), resolve(settings["model_name_or_path"])
    method.check(settings["quantization"])
    try:
        config = AutoConfig.from_pretrained(name, revision=settings["model_revision"])
        tokenizer = AutoTokenizer.from_pretrained(name, revision=settings["model_revision"])
    except OSError as error:
        raise ValueError(f"{name} has no model that transformers can read: {error}") from error
    family = FAMILIES[settings["task_type"] or method.default_task_type or family_of(config)]
    method.check_task_type(family.task_type)
    behind = settings.get("prompt_position") == "suffix"  # older runs have no such setting
    if behind and (family.task_type == "SEQ_2_SEQ_LM" or family_of(config) != "CAUSAL_LM"):
        raise ValueError(
            f"--prompt_position suffix needs a decoder, whose text does not see the prompt behind it; {name} is an "
            f"encoder{'-decoder' if getattr(config, 'is_encoder_decoder', False) else ''}. Leave it out."
        )
    if method.has_prompt and not family.asks_question and getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"{name} with a classification head takes token ids only, and a prompt is none: choose --task_type "
            "SEQ_2_SEQ_LM or --method lora."
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # pads are masked; the family refuses if there is neither
    prompt = prompt_size(settings, task, tokenizer, family.asks_question) if method.has_prompt else 0
    room = _positions(config, tokenizer) - prompt
    if room < 1:
        raise ValueError(
            f"--num_virtual_tokens {prompt} leaves no room for text: {name} has {prompt + room} positions. Lower it."
        )
    return family(task, tokenizer, min(max_length, room), behind)


def _positions(config: Any, tokenizer: Any) -> int:
    positions = getattr(config.get_text_config(), "max_position_embeddings", None) or tokenizer.model_max_length
    return min(positions, tokenizer.model_max_length)


def default_rate(settings: Mapping[str, Any]) -> float | None:
    """AdamW's default learning rate of a run's method on its model; loads the model's config."""
    config = AutoConfig.from_pretrained(resolve(settings["model_name_or_path"]), revision=settings["model_revision"])
    return METHODS[settings["method"]].rate(is_encoder=family_of(config) == "SEQ_CLS")


def new_model(family: Family, settings: Mapping[str, Any], seed: int) -> Any:
    """Load a run's base model and make what its method trains trainable.

    Args:
        family: The task and its tokenizer.
        settings: The run's.
        seed: Seed of the prompt's initialisation.

    Raises:
        ValueError: The init cannot work, or the checkpoint lacks weights that the method cannot bring.
    """
    method = METHODS[settings["method"]]
    config = method.adapter_config(family, settings, seed) if method.adapter_config else None
    model = _base_model(family, settings)
    if config is not None:
        config.modules_to_save = _modules_to_save(model, family)
        return get_peft_model(model, config)
    for name, part in model.named_children():
        is_head = name != model.base_model_prefix
        part.requires_grad_(method.trains == "model" or (method.trains == "head" and is_head))
    for name in model.new_modules if method.trains == "head" else []:
        model.get_submodule(name).requires_grad_(True)
    return model


def trained_model(family: Family, settings: Mapping[str, Any], folder: str) -> Any:
    """Load the model of a run that has ended.

    Args:
        family: The task and its tokenizer.
        settings: The run's.
        folder: Its output folder, or the Hub id that it was pushed to.
    """
    stores = METHODS[settings["method"]].stores
    if stores == "adapter":
        return PeftModel.from_pretrained(_base_model(family, settings), folder)
    if stores == "nothing":
        return _base_model(family, settings)
    return load_frozen_backbone(folder, task_type=family.task_type)


def _base_model(family: Family, settings: Mapping[str, Any]) -> Any:
    method, dtype = METHODS[settings["method"]], settings["dtype"]
    if dtype == "auto" and method.dtype is not None:
        dtype = method.dtype
    model: Any = load_frozen_backbone(
        settings["model_name_or_path"],
        task_type=family.task_type,
        quantization=settings["quantization"],
        dtype=dtype if dtype == "auto" else getattr(torch, dtype),
        revision=settings["model_revision"],
        **family.model_options,
        **({} if method.keeps_dropout else _no_dropout(settings)),
    )
    # a decoder's head looks for the last token that is no pad
    model.config.get_text_config().pad_token_id = family.tokenizer.pad_token_id
    return model


def _no_dropout(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Every dropout of the base model at 0: frozen weights cannot overfit, and the noise reaches the gradient."""
    config = AutoConfig.from_pretrained(resolve(settings["model_name_or_path"]), revision=settings["model_revision"])
    return {name: 0.0 for name, value in config.to_dict().items() if "drop" in name and isinstance(value, float)}


def _modules_to_save(model: Any, family: Family) -> list[str] | None:
    """Modules that are trained and saved because the checkpoint lacks them; PEFT itself adds the usual heads."""
    usual = SEQ_CLS_HEAD_NAMES if family.task_type == "SEQ_CLS" else []
    new = [name for name in model.new_modules if name not in usual]
    inner = model.base_model_prefix
    whole = [name for name in new if name in {"", inner} or (name.startswith(f"{inner}.") and _has_parts(model, name))]
    if whole:
        raise ValueError(
            f"{model.name_or_path} lacks weights of {whole[0] or 'the model'} itself, and an adapter would have to "
            f"save that module whole: choose a checkpoint of a whole {type(model).__name__}, or --method full."
        )
    return new or None


def _has_parts(model: Any, name: str) -> bool:
    return any(True for _ in model.get_submodule(name).children())
