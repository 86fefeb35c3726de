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


def answer(options: argparse.Namespace) -> None:
    """Answer the rows that were asked for.

    Args:
        options: `folder`, `text`, `file`, `batch_size` and `device`.

    Raises:
        ValueError: The folder holds no run, or the task cannot ask a row.
    """
    predictor = Predictor.from_pretrained(options.folder, options.device)
    task = predictor.family.task
    if options.file:
        rows: list[dict[str, Any]] = read_file(options.file, task.has_text_labels).to_list()
    else:
        rows = parse_lines(task, options.text or [line.rstrip("\n") for line in sys.stdin])
    for row, found in zip(rows, predictor.predict(rows, options.batch_size), strict=True):
        show(task, row, found)


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
    first = str(next((row[column] for column in task.columns if column in row), ""))
    if not sys.stdout.isatty():
        line = json.dumps(found, ensure_ascii=False)
    elif task.is_regression:
        line = f"{found['value']:8.2f}  {first}"
    else:
        line = f"{found['label']:>16} {100 * found['probability']:3.0f} %  {first[:90]}"
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
