"""Whether a task can use rows: their columns, texts and labels, before anything is trained or scored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .task import HIDDEN, Task


if TYPE_CHECKING:
    from datasets import Dataset


def check_rows(task: Task, split: str, rows: Dataset, labelled: bool = True) -> None:
    """Check that the task can ask every row, and knows every answer.

    Args:
        task: The task.
        split: The split's name, for the error.
        rows: The rows.
        labelled: Whether the rows are to be trained on or scored, so that each needs its label.

    Raises:
        ValueError: A column is missing, a field is empty, a label is none of the task's or is hidden, or a row to be
            scored has no index that the metric needs.
    """
    if not len(rows):
        raise ValueError(f"The split {split!r} of {task.name} is empty: at least one row is needed.")
    for number, row in enumerate(rows):
        try:
            check_row(task, row, labelled)
            if labelled and split in task.validation:
                _check_index(task, row)
        except ValueError as error:
            where = f"Row {number} of the split {split!r} of {task.name}"
            # in a sample the number alone does not find the row in its file
            raise ValueError(f"{where}: {error} The row: {str(row)[:100]}") from error


def check_row(task: Task, row: Mapping[str, Any], labelled: bool = False) -> None:
    """Check that the task can ask a row, and knows its answer.

    Args:
        task: The task.
        row: The row.
        labelled: Whether the row needs its label.

    Raises:
        ValueError: As `check_rows`.
    """
    try:
        prepared = task.prepared(row)
        task.choices_of(prepared)
        empty = [c for c in task.columns if not (task.choices and c == "choice") and prepared[c] is None]
        if empty:
            raise ValueError(f"the field {empty[0]!r} is empty: a text is wanted.")
        if labelled:
            _check_label(task, prepared)
    except KeyError as error:
        raise ValueError(f"there is no column {error}; it has {', '.join(row)}.") from error
    except (AttributeError, IndexError, TypeError) as error:  # from functions of a user's own task
        raise ValueError(f"it cannot be asked: {error}.") from error


def _check_index(task: Task, row: Mapping[str, Any]) -> None:
    wanted, index = task.metric.index, row.get("idx")
    if wanted and not (isinstance(index, dict) and all(isinstance(index.get(name), int) for name in wanted)):
        raise ValueError(f"the column 'idx' must hold an object with the numbers {', '.join(wanted)}; got {index!r}.")


def _check_label(task: Task, prepared: Mapping[str, Any]) -> None:
    if not task.answer and task.label_column not in prepared:
        raise KeyError(task.label_column)
    if task.target(prepared) == HIDDEN:
        raise ValueError("it has no label: a split without labels can be predicted, not trained on or scored.")
