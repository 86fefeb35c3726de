"""The rows of a task's split: from a user's files, a folder in the Hub's layout, or the task's own loader."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from .files import SUFFIXES, read_file
from .task import Task


if TYPE_CHECKING:
    from datasets import Dataset


def load_split(task: Task, split: str, data_dir: str | None = None, files: Mapping[str, str] | None = None) -> Dataset:
    """Load the rows of one split; `check_rows` says whether the task can use them.

    Args:
        task: The task.
        split: A split's name, such as "train".
        data_dir: Folder with a file SPLIT.jsonl, SPLIT.json or SPLIT.csv for each split, in the Hub's columns.
        files: A file for each split, in place of a folder.

    Returns:
        The rows as they are in the file; `Task.target` gives their labels.

    Raises:
        ValueError: There is no such split, or its file is empty or has a broken line.
    """
    if files is not None:
        return read_file(_file_of(files, split), task.has_text_labels)
    if data_dir is not None:
        return read_file(_in_folder(data_dir, split), task.has_text_labels)
    loader = task.loader or (load_from_hub if task.path else None)
    if loader is not None:
        return loader(task, split)
    raise ValueError(f"The task {task.name!r} has no data of its own: give --data_dir or --train_file.")


def load_from_hub(task: Task, split: str) -> Dataset:
    """Load a split of the task's data set at its revision.

    Raises:
        ValueError: There is no such split, or the Hub could not be reached.
    """
    from datasets import load_dataset

    if split not in task.splits:
        raise ValueError(f"{task.name} has the splits {', '.join(task.splits)}; got {split!r}.")
    try:
        return load_dataset(task.path, task.subset, revision=task.revision, split=split)
    except OSError as error:  # no connection, or no such data set
        raise ValueError(
            f"{task.path} ({task.subset}) could not be had from the Hub: {error}. Connect, or give --data_dir with "
            f"{split}.jsonl in the same columns."
        ) from error


def _file_of(files: Mapping[str, str], split: str) -> Path:
    if split not in files:
        raise ValueError(f"There is no file for the split {split!r}; there is one for {', '.join(files)}.")
    return Path(files[split])


def _in_folder(data_dir: str, split: str) -> Path:
    folder = Path(data_dir)
    for suffix in SUFFIXES:
        if (folder / f"{split}{suffix}").is_file():
            return folder / f"{split}{suffix}"
    found = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    raise ValueError(
        f"{folder} has no {split}.jsonl, {split}.json or {split}.csv; it has {', '.join(found) or 'nothing'}."
    )
