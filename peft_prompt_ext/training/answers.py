"""What `peft-prompt-ext predict` does: rows from the command line, a file or standard input; answers to the screen."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from typing import Any

from ..tasks import Task
from ..tasks.files import read_file
from .predictor import Predictor
from .shared_texts import SharedTextPredictor


def answer(options: argparse.Namespace) -> None:
    """Answer the rows that were asked for.

    Args:
        options: `folders`, `text`, `file`, `batch_size` and `device`.

    Raises:
        ValueError: A folder holds no run, the task cannot ask a row, or several tasks read different texts.
    """
    if len(options.folders) > 1:
        several = SharedTextPredictor.from_pretrained(options.folders, options.device)
        tasks = {name: family.task for name, family in several.families.items()}
        rows = _read_rows(options, list(tasks.values()))
        for row, answers in zip(rows, several.predict(rows, options.batch_size), strict=True):
            show_several(tasks, row, answers)
        return
    predictor = Predictor.from_pretrained(options.folders[0], options.device)
    task = predictor.family.task
    rows = _read_rows(options, [task])
    for row, found in zip(rows, predictor.predict(rows, options.batch_size), strict=True):
        show(task, row, found)


def _read_rows(options: argparse.Namespace, tasks: list[Task]) -> list[dict[str, Any]]:
    if options.file:
        return read_file(options.file, any(task.has_text_labels for task in tasks)).to_list()
    return parse_lines(tasks[0], options.text or [line.rstrip("\n") for line in sys.stdin])


def parse_lines(task: Task, lines: Iterable[str]) -> list[dict[str, Any]]:
    """Turn lines into rows.

    Raises:
        ValueError: A line begins an object that is not JSON, or is a bare text and the task has more than one column.
    """
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            if line.lstrip().startswith("{"):
                raise ValueError(f"Line {number} is not JSON ({error}): {line[:60]!r}.") from error
            row = None
        if not isinstance(row, dict):
            if len(task.columns) != 1:
                raise ValueError(
                    f"A row of {task.name} is a JSON object with {', '.join(task.columns)}; "
                    f"line {number} is {line[:60]!r}."
                )
            row = {task.columns[0]: line}
        rows.append(row)
    return rows


def show(task: Task, row: dict[str, Any], found: dict[str, Any]) -> None:
    """Write one answer: for a person on a terminal, as JSON elsewhere."""
    if not sys.stdout.isatty():
        line = json.dumps(found, ensure_ascii=False)
    elif task.is_regression:
        line = f"{_cell(found)}  {_first_text(task, row)}"
    else:
        line = f"{_cell(found)}  {_first_text(task, row)[:90]}"
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def show_several(tasks: dict[str, Task], row: dict[str, Any], answers: dict[str, dict[str, Any]]) -> None:
    """Write the answers of several tasks to one text: a column each for a person, as one JSON object elsewhere."""
    if not sys.stdout.isatty():
        line = json.dumps(answers, ensure_ascii=False)
    else:
        cells = [f"{name}:{_cell(found)}" for name, found in answers.items()]
        line = "  ".join([*cells, _first_text(next(iter(tasks.values())), row)[:90]])
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _first_text(task: Task, row: dict[str, Any]) -> str:
    return str(next((row[column] for column in task.columns if column in row), ""))


def _cell(found: dict[str, Any]) -> str:
    """An answer in a column of text."""
    if "value" in found:
        return f"{found['value']:8.2f}"
    return f"{found['label']:>16} {100 * found['probability']:3.0f} %"
