"""The text of `peft-prompt-ext train --help`, made without torch or transformers, which take seconds to import."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from dataclasses import MISSING, Field, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from ..tasks import available_tasks
from .arguments import DEFAULTS, DataArguments, MethodArguments, ModelArguments
from .methods import METHODS, Method


WIDTH, COLUMN = 100, 32  # of the text, and where the flags' explanations begin
EXAMPLES = """\
  peft-prompt-ext train --train_file tickets.csv --text_columns message --label_column team \\
      --held_out_samples 50 --output_dir outputs/tickets
  peft-prompt-ext train --task_name movie_reviews --max_steps 70 --output_dir outputs/movies
  peft-prompt-ext train --task_name rte --data_dir path/to/rte --method lora
  accelerate launch --num_processes 2 -m peft_prompt_ext.cli train --task_name rte"""
START = ("task_name", "train_file", "text_columns", "label_column")
TRAINING = {  # of TrainingArguments, the ones that are used most
    "output_dir DIR": "Where everything is written (default: outputs/TASK-METHOD)",
    "config FILE.yaml": "Values for any of the flags; the command line wins over them",
    "seed N": "Seed of the prompt's initialisation and of the order of the rows (default: 42)",
}
MORE = {
    "max_steps N": "Steps to train; by default three passes over the rows (--num_train_epochs 3)",
    "learning_rate X": "By default the method's, see the table",
    "per_device_train_batch_size N": f"Rows of a step (default: {DEFAULTS['per_device_train_batch_size']})",
    "gradient_accumulation_steps N": "Batches of a step (default: 1)",
    "train_sampling_strategy group_by_length": "Batches of rows of like length: less padding",
    "do_train, --do_eval, --do_predict": "What to do; by default train and score",
    "resume_from_checkpoint true": "Go on from the last whole checkpoint in --output_dir, or name one",
    "report_to NAME": "A tracker such as tensorboard (default: none)",
    "push_to_hub": "Push what was trained, with its card",
    "use_cpu true": "Do not use a GPU",
}


def train_help() -> str:
    """The whole text."""
    data = [f for f in fields(DataArguments) if f.name not in START]
    start = [f for f in fields(DataArguments) if f.name in START]
    parts = [
        "usage: peft-prompt-ext train [--task_name NAME | --train_file FILE --text_columns COLUMN] [flags]",
        "Train and score one task: a named one, or your own file with columns of text and a label.",
        f"Examples:\n{EXAMPLES}",
        _group("Start", [*_lines(DataArguments, start), *_pairs(TRAINING)]),
        f"Tasks:\n{_wrap(', '.join(available_tasks()), 2)}",
        _group("Data", _lines(DataArguments, data)),
        _group("Model", _lines(ModelArguments, fields(ModelArguments))),
        _group("Method", [*_lines(MethodArguments, fields(MethodArguments)), "", *_method_lines()]),
        _group("More", _pairs(MORE)),
        _wrap(
            "Every flag of transformers.TrainingArguments works. Defaults < the method's defaults < --config < the "
            "command line. PEFT_PROMPT_EXT_DEBUG=1 shows where an error comes from.",
            0,
        ),
    ]
    return "\n\n".join(parts)


def _group(title: str, lines: Iterable[str]) -> str:
    return "\n".join([f"{title}:", *lines])


def _pairs(flags: dict[str, str]) -> list[str]:
    return [_line(f"--{flag}", text) for flag, text in flags.items()]


def _lines(kind: type, wanted: Iterable[Field[Any]]) -> list[str]:
    hints = get_type_hints(kind)
    return [_line(f"--{f.name} {_values(f, hints[f.name])}", _text(f)) for f in wanted]


def _text(one: Field[Any]) -> str:
    default = "" if one.default in (None, MISSING) else f" (default: {one.default})"
    return f"{one.metadata['help']}{default}"


def _values(one: Field[Any], hint: Any) -> str:
    """What a flag takes: its choices, or a word for its type."""
    kinds = [kind for kind in (get_args(hint) if get_origin(hint) not in (Literal, list) else (hint,)) if kind]
    kind = kinds[0] if kinds else hint
    choices = one.metadata.get("choices") or (get_args(kind) if get_origin(kind) is Literal else ())
    if choices:
        return "{" + ",".join(choices) + "}"
    if get_origin(kind) is list:
        return "A [B ...]"
    return {int: "N", float: "X"}.get(kind, "TEXT")


def _method_lines() -> list[str]:
    return [
        _line(f"  {method.name}", "; ".join(filter(None, (method.help, _rate(method))))) for method in METHODS.values()
    ]


def _rate(method: Method) -> str:
    plain, encoder = (f"{rate or 0:f}".rstrip("0") for rate in (method.learning_rate, method.encoder_learning_rate))
    if method.learning_rate is None:
        return ""
    return f"learning rate {plain}" + (f" ({encoder} on an encoder)" if method.encoder_learning_rate else "")


def _line(flag: str, text: str) -> str:
    lines = textwrap.wrap(text, WIDTH - COLUMN)
    head = f"  {flag}"
    if len(head) >= COLUMN - 1:
        return "\n".join([head, *(" " * COLUMN + line for line in lines)])
    return "\n".join([head.ljust(COLUMN) + lines[0], *(" " * COLUMN + line for line in lines[1:])])


def _wrap(text: str, indent: int) -> str:
    return textwrap.fill(text, WIDTH, initial_indent=" " * indent, subsequent_indent=" " * indent)
