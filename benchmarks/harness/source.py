"""The prompt that a TRANSFER starts from: trained on the source task, on rows that are not scored later."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .job import prepare
from .overlap import without_overlap
from .suite import Spec, source_spec, train_arguments


if TYPE_CHECKING:
    from peft_prompt_ext.tasks.task import Task

    from .watch import Watch


class Source(NamedTuple):
    """A trained prompt, and what it took."""

    folder: str
    watch: Watch  # of its training
    left_out: int  # rows of its train split that share text with the scored ones


def train_source(spec: Spec, folder: Path, data_dir: str | None) -> Source | None:
    """Train the prompt that a run starts from, on rows that have nothing of what the target is scored on.

    Args:
        spec: The run; one without a source gives None.
        folder: The run's; the prompt is written below it.
        data_dir: Where the folders of both tasks' data lie.

    Raises:
        ValueError: No row of the source is left.
    """
    source = source_spec(spec)
    if source is None:
        return None
    from peft_prompt_ext.training import run as recipe

    from .watch import Watch

    target, scored = _rows_to_score(spec, folder, data_dir)
    job = prepare(source, folder / "source", data_dir)
    trainer, rows = job.trainer, job.splits["train"]
    task = trainer.family.task
    kept = without_overlap(map(task.prepared, rows), task.columns, map(target.prepared, scored), target.columns)
    if not kept:
        raise ValueError(f"every row of {source['task']} shares text with the rows that {spec['task']} is scored on")
    trainer.train_dataset = job.encoded["train"].select(kept)
    watch = Watch(job, None)
    trainer.add_callback(watch)
    recipe.train(trainer, None)
    return Source(str(folder / "source"), watch, len(rows) - len(kept))


def _rows_to_score(spec: Spec, folder: Path, data_dir: str | None) -> tuple[Task, Any]:
    """The task of a run, and what it will be scored on."""
    from peft_prompt_ext.training import run as recipe

    line = [*train_arguments(spec, data_dir), "--output_dir", str(folder / "run"), "--do_eval", "true"]
    _, data_args, _, args = recipe.parse(line)
    task = recipe.find_task(data_args)
    return task, recipe.load_splits(task, data_args, args)[task.validation[0]]
