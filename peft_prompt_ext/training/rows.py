"""The task and the rows of a run: found, loaded, sampled, checked and encoded."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from ..tasks import Task, available_tasks, get_task
from ..tasks.checks import check_rows
from ..tasks.data import load_split
from ..tasks.own import own_task
from ..tasks.sampling import few_shot, hold_out, sample, sample_to_score
from .arguments import DataArguments


if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import TrainingArguments

    from ..tasks.families import Family


logger = logging.getLogger(__name__)

OWN_DATA: dict[str, Any] = {"text_columns": [], "label_column": "label", "label_words": [], "template": None}


def find_task(data_args: DataArguments) -> Task:
    """The named task, or one made of the user's own file.

    Raises:
        ValueError: There is neither, the name is not known, or flags for own data came with a named task.
    """
    if data_args.task_name:
        own = [f"--{name}" for name in OWN_DATA if getattr(data_args, name) != OWN_DATA[name]]
        if own:
            raise ValueError(f"{', '.join(own)}: for your own data alone; {data_args.task_name} brings its own.")
        return get_task(data_args.task_name)
    if not data_args.train_file:
        raise ValueError(f"Give --task_name ({', '.join(available_tasks())}) or --train_file with your own data.")
    return own_task(
        data_args.train_file,
        data_args.text_columns,
        data_args.label_column,
        data_args.label_words,
        data_args.template,
    )


def load_splits(task: Task, data_args: DataArguments, args: TrainingArguments) -> dict[str, Dataset]:
    """Load the rows of every split that the run reads, sampled as asked, and check them.

    Raises:
        ValueError: There is no such split or file, or the task cannot use a row.
    """
    scored = list(task.validation) if args.do_eval or args.eval_strategy != "no" else []
    held_out = data_args.held_out_samples
    splits: dict[str, Dataset] = {}
    if args.do_train or held_out:
        rows = load(task, "train", data_args, args)
        if held_out:
            rows, splits[task.validation[0]] = hold_out(task, rows, held_out, data_args.sample_seed)
            scored = []
        if data_args.num_shots:
            rows = few_shot(task, rows, data_args.num_shots, data_args.sample_seed)
        splits["train"] = sample(rows, data_args.max_train_samples, data_args.sample_seed)
    for split in scored:
        rows = load(task, split, data_args, args)
        splits[split] = sample_to_score(task, rows, data_args.max_eval_samples, seed=0)
    if args.do_predict:
        for split in ["test"] if data_args.test_file else unlabelled(task.splits):
            rows = load(task, split, data_args, args)
            splits[split] = rows.select(range(min(data_args.max_predict_samples or len(rows), len(rows))))
    for split, rows in splits.items():
        check_rows(task, split, rows, labelled=split not in unlabelled(splits))
    return splits


def unlabelled(splits: Iterable[str]) -> list[str]:
    """The splits to predict, whose names begin with "test"; mnli has two."""
    return [split for split in splits if split.startswith("test")]


def load(task: Task, split: str, data_args: DataArguments, args: TrainingArguments) -> Dataset:
    """Load all rows of one split; the main process reads them first."""
    files_of = {"train": data_args.train_file, task.validation[0]: data_args.validation_file}
    given = {name: path for name, path in {**files_of, "test": data_args.test_file}.items() if path}
    files = given if split in given or not (data_args.task_name or data_args.data_dir) else None
    if files is not None and split not in files:
        others = ", --held_out_samples or --do_train true alone" if split == task.validation[0] else ""
        raise ValueError(f"There is no file for the split {split!r}: add --{split}_file{others}.")
    with args.main_process_first(desc=f"reading {split}"):
        return load_split(task, split, data_args.data_dir, files)


def encode(family: Family, rows: Dataset, split: str, args: TrainingArguments) -> Dataset:
    """Tokenize every row, and log how many were cut."""
    with args.main_process_first(desc=f"encoding {split}"):
        encoded = rows.map(family.encode, remove_columns=rows.column_names, desc=f"Encoding {split}")
    cut = sum(encoded["truncated"])
    if cut:
        logger.info(
            "%d of %d rows of %s were cut to %d tokens (in %s).",
            cut,
            len(rows),
            split,
            family.max_length,
            ", ".join(family.task.truncate or family.task.columns),
        )
    return encoded


def sort_by_length(rows: Dataset, encoded: Dataset) -> tuple[Dataset, Dataset]:
    """Put rows of like length together: less padding, the same score."""
    lengths = encoded["length"]
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    return rows.select(order), encoded.select(order)
