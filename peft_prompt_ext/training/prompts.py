"""The prompt of a run by default: its length, and what it is initialised from. DEFAULTS.md has the measurements."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ..config import PromptTuningExtConfig
from ..tasks import Task
from ..tasks.families import Family


SHORTEST, LONGEST = 20, 100  # virtual tokens by default


def prompt_config(family: Family, settings: Mapping[str, Any], seed: int) -> PromptTuningExtConfig:
    """Build the config of a run's prompt.

    By default a prompt is initialised from the task's label words (Lester et al. 2021, section 3.2) and, for a
    language model, from the form of question and answer behind them. The init TEXT without a text is that form alone.

    Args:
        family: The task and its tokenizer.
        settings: The run's.
        seed: Seed of the initialisation.

    Raises:
        ValueError: A text was given and the init does not read one.
    """
    words, size = list(family.task.label_words), settings["num_virtual_tokens"]
    init, text = settings["prompt_tuning_init"], settings["prompt_tuning_init_text"]
    kwargs = json.loads(settings["prompt_tuning_init_kwargs"] or "{}")
    if init is None:
        init = "CLASS_LABELS" if 0 < len(words) <= size else "SAMPLE_VOCAB"
    fill = FILLED_IN.get(init.upper())
    if fill is not None:
        kwargs, text = fill(family, size, kwargs, text)
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


Filled = tuple[dict[str, Any], str | None]


def _fill_labels(family: Family, size: int, kwargs: dict[str, Any], text: str | None) -> Filled:
    """The task's label words; behind them the question's form, if there is room and the user gave no arguments."""
    words = list(family.task.label_words)
    room = size - len(words)
    if (family.asks_question or text) and room > 0 and not kwargs:
        kwargs, text = {"fallback": "TEXT"}, text or question_form(family, room)
    return {"labels": words, **kwargs}, text


def _fill_text(family: Family, size: int, kwargs: dict[str, Any], text: str | None) -> Filled:
    return kwargs, text or (question_form(family, size) if family.asks_question else None)


FILLED_IN = {"CLASS_LABELS": _fill_labels, "TEXT": _fill_text}  # arguments that a task can give to an init


def prompt_size(settings: Mapping[str, Any], task: Task, tokenizer: Any, asks_question: bool) -> int:
    """Virtual tokens of a run: by default what the label words and the whole form of the question need.

    A form that is cut to its last tokens holds the last answer alone, and the untrained model then prefers it. The
    length is the same for every init.

    Args:
        settings: The run's `num_virtual_tokens`, or None there.
        task: The task.
        tokenizer: The model's.
        asks_question: Whether the model is asked the task's template; see `Family.asks_question`.
    """
    asked = settings["num_virtual_tokens"]
    if asked is not None or not asks_question:
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
