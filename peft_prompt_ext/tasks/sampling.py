"""Rows drawn with a seed: to train on, to score, and to hold out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .checks import check_rows
from .task import Task


if TYPE_CHECKING:
    from datasets import Dataset


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
