"""The prompt of a run by default: its length, and what it is initialised from. DEFAULTS.md has the measurements."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ..config import PromptTuningExtConfig
from ..tasks import Task
from ..tasks.encoding import split_template
from ..tasks.families import Family


SHORTEST, LONGEST = 20, 100  # virtual tokens by default
BEFORE_ENDING = 8  # virtual tokens between a text and the question's end, at least
WHOLE = ("ENDING", "TRANSFER")  # inits of a whole prompt behind a text: how it ends is theirs


def prompt_config(family: Family, settings: Mapping[str, Any], seed: int) -> PromptTuningExtConfig:
    """Build the config of a run's prompt.

    By default a prompt is initialised from the task's label words (Lester et al. 2021, section 3.2) and, for a
    language model, from the form of question and answer behind them. The init TEXT without a text is that form alone.
    A prompt behind the text ends as the template does, and the init fills the tokens before, without the form: a form
    between its text and the question misleads the model.

    Args:
        family: The task and its tokenizer.
        settings: The run's.
        seed: Seed of the initialisation.

    Raises:
        ValueError: A text was given and the init does not read one, or the template's end is longer than the prompt.
    """
    size, init = settings["num_virtual_tokens"], settings["prompt_tuning_init"]
    ends = bool(family.ending) and str(init).upper() not in WHOLE
    if ends:
        taken = _count(family.tokenizer, family.ending)
        if taken > size:
            raise ValueError(
                f"--num_virtual_tokens {size}: behind its text the question says {family.ending!r}, which has {taken} "
                f"tokens. Give {taken} or more."
            )
        init, kwargs, text = _choose_init(family, settings, size - taken)
        init, kwargs = "ENDING", {"ending": family.ending, "fallback": init, "fallback_kwargs": kwargs}
    else:
        init, kwargs, text = _choose_init(family, settings, size)
    return PromptTuningExtConfig(
        task_type=family.task_type,
        num_virtual_tokens=size,
        prompt_tuning_init=init,
        prompt_tuning_init_kwargs=kwargs,
        prompt_tuning_init_text=text,
        prompt_tuning_init_seed=seed,
        tokenizer_name_or_path=family.tokenizer.name_or_path,
        train_logits="supervised",
        prompt_position="suffix" if family.prompt_behind else "prefix",
        **text_cache_of(settings),
    )


def _choose_init(family: Family, settings: Mapping[str, Any], size: int) -> tuple[str, dict[str, Any], str | None]:
    """The init of `size` tokens, its arguments, and its text."""
    words = family.task.label_words
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
    return init, kwargs, text


Filled = tuple[dict[str, Any], str | None]


def _fill_labels(family: Family, size: int, kwargs: dict[str, Any], text: str | None) -> Filled:
    """The task's label words; then the question's form, if there is room and the user gave no arguments."""
    words = list(family.task.label_words)
    room = size - len(words)
    has_form = family.asks_question and not family.prompt_behind
    if (has_form or text) and room > 0 and not kwargs:
        kwargs, text = {"fallback": "TEXT"}, text or question_form(family, room)
    return {"labels": words, **kwargs}, text


def _fill_text(family: Family, size: int, kwargs: dict[str, Any], text: str | None) -> Filled:
    return kwargs, text or (question_form(family, size) if family.asks_question else None)


FILLED_IN = {"CLASS_LABELS": _fill_labels, "TEXT": _fill_text}  # arguments that a task can give to an init


def prompt_size(settings: Mapping[str, Any], task: Task, tokenizer: Any, asks_question: bool) -> int:
    """Virtual tokens of a run: by default what the label words and the whole form of the question need.

    A form that is cut to its last tokens holds the last answer alone, and the untrained model then prefers it.
    Behind a text: what the label words and the question's end need. The length is the same for every init.

    Args:
        settings: The run's `num_virtual_tokens`, or None there.
        task: The task.
        tokenizer: The model's.
        asks_question: Whether the model is asked the task's template; see `Family.asks_question`.
    """
    asked = settings["num_virtual_tokens"]
    if asked is not None or not asks_question:
        return SHORTEST if asked is None else int(asked)
    if settings.get("prompt_position") == "suffix":
        ending = _count(tokenizer, split_template(task.template)[1])
        return min(max(BEFORE_ENDING, len(task.label_words)) + ending, LONGEST)
    needed = len(task.label_words) + _count(tokenizer, _whole_form(task))
    return min(max(needed, SHORTEST), LONGEST)


def _count(tokenizer: Any, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


def text_cache_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a prompt's config that say where texts are kept.

    Raises:
        ValueError: The bytes are neither a number nor a size such as 8GB.
    """
    most = settings["text_cache_bytes"]
    if most is not None:
        most = int(most) if most.isdigit() else _parse_bytes(most)
    return {"text_cache": settings["text_cache"], "text_cache_bytes": most}


def _parse_bytes(text: str) -> int:
    from ..memory import parse_bytes

    try:
        return parse_bytes(text)
    except ValueError as error:
        raise ValueError(f"--text_cache_bytes: {error}") from None


def keep_texts(model: Any, settings: Mapping[str, Any]) -> None:
    """Let a model keep texts as the run says; an adapter does not say it, for who loads it may have another disk."""
    for config in getattr(model, "peft_config", {}).values():
        if getattr(config, "prompt_position", "prefix") == "suffix":
            for name, value in text_cache_of(settings).items():
                setattr(config, name, value)


def question_form(family: Family, num_tokens: int) -> str:
    """The template with an ellipsis in place of the texts, once for each answer; the last tokens of that."""
    form = _whole_form(family.task)
    ids = family.tokenizer(form, add_special_tokens=False)["input_ids"]
    return form if len(ids) <= num_tokens else str(family.tokenizer.decode(ids[-num_tokens:]))


def _whole_form(task: Task) -> str:
    empty = task.template.format_map(dict.fromkeys(task.columns, "..."))
    return "".join(f"{empty}{word}\n" for word in task.label_words)
