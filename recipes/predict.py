"""Answer new rows with what train.py trained: labels with probabilities, one row a line.

    python recipes/predict.py outputs/movie_reviews --text "A warm and funny film."
    python recipes/predict.py outputs/rte --file pairs.jsonl > answers.jsonl
    cat reviews.txt | python recipes/predict.py outputs/movie_reviews

A file is CSV, JSON or JSONL with the task's columns. Lines of standard input are JSON objects, or texts if the task
has one column of text; each line has an answer, an empty one too. Into a file or a pipe the answers are written as
JSON lines.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from peft_prompt_ext.tasks import Task


def main(argv: Sequence[str] | None = None) -> None:
    """Answer the rows; see the module's docstring."""
    options = _options(argv)
    from peft_prompt_ext.assets import AssetError
    from peft_prompt_ext.recipe.predictor import Predictor
    from peft_prompt_ext.tasks.data import read_file

    try:
        predictor = Predictor.from_pretrained(options.folder, options.device)
        task = predictor.family.task
        if options.file:
            rows = read_file(options.file, task.has_text_labels).to_list()
        else:
            rows = parse_lines(task, options.text or [line.rstrip("\n") for line in sys.stdin])
        answers = predictor.predict(rows, options.batch_size)
        for row, answer in zip(rows, answers, strict=True):
            show(task, row, answer)
    except (ValueError, ImportError, AssetError) as error:
        raise SystemExit(f"error: {error}") from None


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="the output folder of train.py, or the Hub id that it was pushed to")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--text", nargs="+", help="texts, or JSON objects with the task's columns")
    source.add_argument("--file", help="a CSV, JSON or JSONL file with the task's columns")
    parser.add_argument("--batch_size", type=int, default=32, help="rows at a time (default: %(default)s)")
    parser.add_argument("--device", help="where to run, if not quantised; by default a GPU if there is one")
    return parser.parse_args(argv)


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


def show(task: Task, row: dict[str, Any], answer: dict[str, Any]) -> None:
    """Print one answer: for a person on a terminal, as JSON elsewhere."""
    if not sys.stdout.isatty():
        print(json.dumps(answer, ensure_ascii=False), flush=True)
    elif task.is_regression:
        print(f"{answer['value']:8.2f}  {row[task.columns[0]]}")
    else:
        first = str(next((row[column] for column in task.columns if column in row), ""))
        print(f"{answer['label']:>16} {100 * answer['probability']:3.0f} %  {first[:90]}")


if __name__ == "__main__":
    main()
