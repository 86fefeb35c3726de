"""From a command line, with a config file below it, to the arguments of a run."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from .._choices import nearest
from .arguments import DEFAULTS, DataArguments, MethodArguments, ModelArguments
from .methods import METHODS


if TYPE_CHECKING:
    from transformers import TrainingArguments


Arguments = tuple[ModelArguments, DataArguments, MethodArguments, "TrainingArguments"]


def parse(argv: list[str]) -> Arguments:
    """Turn the command line into arguments; the entries of a --config file stand before it.

    Raises:
        ValueError: The config file is not one, or a flag is not known; suggests the nearest.
        SystemExit: A flag has a value that it cannot have.
    """
    from transformers import HfArgumentParser, TrainingArguments

    argv = with_config([_use_underscores(item) for item in argv])
    # argparse takes "-1=bad" for a flag, unless a space is in it
    argv = [f" {item}" if re.match(r"-\d", item) else item for item in argv]
    method = _flag(argv, "--method") or MethodArguments.method
    kinds: Any = (ModelArguments, DataArguments, MethodArguments, TrainingArguments)
    usage = "peft-prompt-ext train [flags]; --help lists them"
    parser = HfArgumentParser(kinds, allow_abbrev=False, usage=usage)  # an abbreviation would hide a misspelt flag
    # the parser itself refuses an unknown method
    defaults = METHODS[method].training_defaults if method in METHODS else {}
    parser.set_defaults(**DEFAULTS, **defaults)
    task = _flag(argv, "--task_name") or "own_data"
    parser.set_defaults(output_dir=f"outputs/{task}-{method}")
    if not any(_asks(argv, name) for name in ("--do_train", "--do_eval", "--do_predict")):
        parser.set_defaults(do_train=True, do_eval=True)
    *arguments, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    if unknown:
        known = [flag for action in parser._actions for flag in action.option_strings if "-" not in flag[2:]]
        raise ValueError(_explain(unknown, known))
    return cast("Arguments", tuple(arguments))


def _explain(unknown: list[str], known: list[str]) -> str:
    flags = [item.partition("=")[0] for item in unknown if item.startswith("--")]
    if not flags:
        return f"{' '.join(unknown)!r} belongs to no flag. `peft-prompt-ext train --help` lists the flags."
    hints = ", ".join(f"{flag}{nearest(flag, known)}" for flag in flags)
    return f"There is no flag {hints}. `peft-prompt-ext train --help` lists the flags."


def with_config(argv: list[str]) -> list[str]:
    """Put the entries of the --config file before the other arguments, so that those win."""
    path = _flag(argv, "--config")
    if path is None:
        return argv
    import yaml

    if not Path(path).is_file():
        raise ValueError(f"--config: there is no file {path}.")
    try:
        entries = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from None
    if not isinstance(entries, dict):
        raise ValueError(f"{path} must hold `name: value` lines, got {type(entries).__name__}.")
    flags: list[str] = []
    for name, value in entries.items():
        values = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
        flags += [f"--{name}", *map(str, values)] if value is not None else []
    place = next(i for i, item in enumerate(argv) if item.partition("=")[0] == "--config")
    rest = argv[:place] + argv[place + (1 if "=" in argv[place] else 2) :]
    return flags + rest


def _use_underscores(item: str) -> str:
    """Write a flag as the config file does: --task-name is --task_name."""
    name, equals, value = item.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value if name.startswith("--") else item


def _flag(argv: list[str], name: str) -> str | None:
    """The last value of a flag."""
    values = [value for flag, value in pairwise(argv) if flag == name]
    values += [item.partition("=")[2] for item in argv if item.startswith(f"{name}=")]
    return values[-1] if values else None


def _asks(argv: list[str], name: str) -> bool:
    """Whether a flag is there and is not switched off."""
    there = any(item.partition("=")[0] == name for item in argv)
    return there and str(_flag(argv, name)).lower() not in {"false", "f", "no", "n", "0"}
