"""The model of a run: loaded, with what its method trains, or as an earlier run has trained it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from transformers import AutoConfig, AutoTokenizer

from ..assets import resolve
from ..config import PromptTuningExtConfig
from ..quantization import load_frozen_backbone
from ..tasks import Task
from ..tasks.families import FAMILIES, Family, family_of


ADAPTERS = {"prompt_tuning", "lora"}
SHORTEST, LONGEST = 20, 100  # virtual tokens by default; recipes/README.md has the measurement


def find_family(record: Mapping[str, Any], task: Task, max_length: int) -> Family:
    """How a task is asked of a run's model. Loads its config and its tokenizer, no weights.

    Args:
        record: The run's method, model and, if it is not to be guessed, `task_type`.
        task: The task.
        max_length: Most tokens of a row, the prompt not counted; the model may have room for fewer.

    Raises:
        ValueError: The method and the kind of model do not go together.
    """
    method, name = record["method"], resolve(record["model_name_or_path"])
    if record["quantization"] and method == "full":
        raise ValueError("Full fine-tuning trains every weight, and quantised ones have no gradient: choose lora.")
    try:
        config = AutoConfig.from_pretrained(name, revision=record["model_revision"])
        tokenizer = AutoTokenizer.from_pretrained(name, revision=record["model_revision"])
    except OSError as error:
        raise ValueError(f"{name} has no model that transformers can read: {error}") from error
    task_type = record["task_type"] or ("SEQ_CLS" if method == "linear_probe" else family_of(config))
    if method == "zero_shot" and task_type == "SEQ_CLS":
        raise ValueError("zero_shot needs a language model: the classification head of this one is new.")
    if method == "prompt_tuning" and task_type == "SEQ_CLS" and getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"{name} classifies nothing but token ids, which a prompt is not: choose --task_type SEQ_2_SEQ_LM or "
            "--method lora."
        )
    if method == "linear_probe" and task_type != "SEQ_CLS":
        raise ValueError(f"linear_probe trains a classification head: --task_type SEQ_CLS, not {task_type}.")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # pads are masked; the family refuses if there is neither
    prompt = prompt_size(record, task, tokenizer, task_type) if method == "prompt_tuning" else 0
    positions = getattr(config.get_text_config(), "max_position_embeddings", None) or tokenizer.model_max_length
    room = min(positions, tokenizer.model_max_length) - prompt
    if room < 1:
        raise ValueError(
            f"--num_virtual_tokens {prompt} leaves no room for text: {name} has {prompt + room} positions. Lower it."
        )
    return FAMILIES[task_type](task, tokenizer, min(max_length, room))


def new_model(family: Family, record: Mapping[str, Any], seed: int) -> Any:
    """Load a run's base model and make what its method trains trainable.

    Args:
        family: The task and its tokenizer.
        record: What the run is.
        seed: Seed of the prompt's initialisation.
    """
    method = record["method"]
    config = adapter_config(family, record, seed) if method in ADAPTERS else None
    model = _base_model(family, record)
    if config is not None:
        config.modules_to_save = _modules_to_save(model, family)
        return get_peft_model(model, config)
    for name, part in model.named_children():
        head = name != model.base_model_prefix
        part.requires_grad_(method == "full" or (method == "linear_probe" and head))
    for name in model.new_modules if method == "linear_probe" else []:
        model.get_submodule(name).requires_grad_(True)
    return model


def trained_model(family: Family, record: Mapping[str, Any], folder: str) -> Any:
    """Load the model of a run that has ended.

    Args:
        family: The task and its tokenizer.
        record: What the run was.
        folder: Its output folder, or the Hub id that it was pushed to.
    """
    if record["method"] in ADAPTERS:
        return PeftModel.from_pretrained(_base_model(family, record), folder)
    if record["method"] == "zero_shot":
        return _base_model(family, record)
    return load_frozen_backbone(folder, task_type=family.task_type)


def adapter_config(family: Family, record: Mapping[str, Any], seed: int) -> LoraConfig | PromptTuningExtConfig:
    """The config of a run's prompt or LoRA.

    By default a prompt begins as the task's label words (Lester et al. 2021, section 3.2) and, for a language model,
    the form of question and answer behind them; recipes/README.md has the measurement. The init TEXT without a text
    is that form alone.
    """
    if record["method"] == "lora":
        return LoraConfig(
            task_type=family.task_type,
            r=record["lora_r"],
            lora_alpha=record["lora_alpha"],
            lora_dropout=record["lora_dropout"],
        )
    words, size = list(family.task.label_words), record["num_virtual_tokens"]
    init, text = record["prompt_tuning_init"], record["prompt_tuning_init_text"]
    kwargs = json.loads(record["prompt_tuning_init_kwargs"] or "{}")
    asks = family.task_type != "SEQ_CLS"  # a head is asked no question
    if init is None:
        init = "CLASS_LABELS" if 0 < len(words) <= size else "SAMPLE_VOCAB"
    if init.upper() == "CLASS_LABELS":
        room = size - len(words)
        if (asks or text) and room > 0 and not kwargs:
            kwargs, text = {"fallback": "TEXT"}, text or question_form(family, room)
        kwargs.setdefault("labels", words)
    elif init.upper() == "TEXT" and asks:
        text = text or question_form(family, size)
    if text and "TEXT" not in {init.upper(), str(kwargs.get("fallback")).upper()}:
        raise ValueError(
            f"--prompt_tuning_init_text has no place in a prompt of {size} tokens that begins by {init} with the "
            f"arguments {kwargs}: add --prompt_tuning_init TEXT, or leave the text out."
        )
    return PromptTuningExtConfig(
        task_type=family.task_type,
        num_virtual_tokens=size,
        prompt_tuning_init=init,
        prompt_tuning_init_kwargs=kwargs,
        prompt_tuning_init_text=text,
        prompt_tuning_init_seed=seed,
        tokenizer_name_or_path=family.tokenizer.name_or_path,
        train_logits="supervised",
    )


def prompt_learning_rate(record: Mapping[str, Any]) -> float:
    """The default for a prompt, by the kind of model; recipes/README.md has the measurements.

    Args:
        record: The run's model.
    """
    config = AutoConfig.from_pretrained(resolve(record["model_name_or_path"]), revision=record["model_revision"])
    return 0.1 if family_of(config) == "SEQ_CLS" else 0.01


def prompt_size(record: Mapping[str, Any], task: Task, tokenizer: Any, task_type: str) -> int:
    """Virtual tokens of a run: by default what the label words and the whole form of the question need.

    A form that is cut to its last tokens shows the last answer alone, and begins with a model that prefers it. The
    length is the same for every init.

    Args:
        record: The run's `num_virtual_tokens`, or None there.
        task: The task.
        tokenizer: The model's.
        task_type: How the model is asked.
    """
    asked = record["num_virtual_tokens"]
    if asked is not None or task_type == "SEQ_CLS":  # a head is asked no question
        return SHORTEST if asked is None else int(asked)
    form = tokenizer(_whole_form(task), add_special_tokens=False)["input_ids"]
    return min(max(len(task.label_words) + len(form), SHORTEST), LONGEST)


def question_form(family: Family, num_tokens: int) -> str:
    """The template with an ellipsis in place of the texts, once for each answer; the last tokens of that."""
    form = _whole_form(family.task)
    ids = family.tokenizer(form, add_special_tokens=False)["input_ids"]
    return form if len(ids) <= num_tokens else str(family.tokenizer.decode(ids[-num_tokens:]))


def _whole_form(task: Task) -> str:
    empty = task.template.format_map(dict.fromkeys(task.columns, "..."))
    return "".join(f"{empty}{word}\n" for word in task.label_words)


def _modules_to_save(model: Any, family: Family) -> list[str] | None:
    """Modules that are trained and saved because the checkpoint lacks them; PEFT itself adds the usual heads."""
    usual = SEQ_CLS_HEAD_NAMES if family.task_type == "SEQ_CLS" else []
    new = [name for name in model.new_modules if name not in usual]
    trunk = model.base_model_prefix
    whole = [name for name in new if name in {"", trunk} or (name.startswith(f"{trunk}.") and _has_parts(model, name))]
    if whole:
        raise ValueError(
            f"{model.name_or_path} lacks weights of {whole[0] or 'the model'} itself, and no adapter can bring them "
            f"without all that it holds: choose a checkpoint of a whole {type(model).__name__}, or --method full."
        )
    return new or None


def _has_parts(model: Any, name: str) -> bool:
    return any(True for _ in model.get_submodule(name).children())


def _base_model(family: Family, record: Mapping[str, Any]) -> Any:
    dtype = record["dtype"]
    if dtype == "auto" and record["method"] == "full":
        dtype = "float32"  # steps of this size vanish in 16 bits
    model: Any = load_frozen_backbone(
        record["model_name_or_path"],
        task_type=family.task_type,
        quantization=record["quantization"],
        dtype=dtype if dtype == "auto" else getattr(torch, dtype),
        revision=record["model_revision"],
        **family.model_options,
        **({} if record["method"] == "full" else _no_dropout(record)),
    )
    # a decoder's head looks for the last token that is no pad
    model.config.get_text_config().pad_token_id = family.tokenizer.pad_token_id
    return model


def _no_dropout(record: Mapping[str, Any]) -> dict[str, Any]:
    """Every dropout of the base model at 0: frozen weights cannot overfit, and the noise reaches the gradient."""
    config = AutoConfig.from_pretrained(resolve(record["model_name_or_path"]), revision=record["model_revision"])
    return {name: 0.0 for name, value in config.to_dict().items() if "drop" in name and isinstance(value, float)}
