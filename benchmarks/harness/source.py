"""The prompt that a TRANSFER starts from: trained on the source task, on rows that are not scored later."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from .job import prepare, rows_to_score, train
from .overlap import without_overlap
from .suite import Spec, source_spec


if TYPE_CHECKING:
    from .watch import Watch


class Source(NamedTuple):
    """A trained prompt, and what it took."""

    folder: str
    watch: Watch  # of its training
    left_out: int  # rows of its train split that share text with the scored ones


def train_source(spec: Spec, folder: Path, data_dir: str | None) -> Source | None:
    """Train the prompt that a run starts from, if any, on rows that have nothing of what the target is scored on.

    Raises:
        ValueError: No row of the source is left.
    """
    source = source_spec(spec)
    if source is None:
        return None
    from .watch import Watch

    target, scored = rows_to_score(spec, folder / "run", data_dir)
    job = prepare(source, folder / "source", data_dir)
    trainer, rows = job.trainer, job.splits["train"]
    task = trainer.family.task
    kept = without_overlap(map(task.prepared, rows), task.columns, map(target.prepared, scored), target.columns)
    if not kept:
        raise ValueError(f"every row of {source['task']} shares text with the rows that {spec['task']} is scored on")
    trainer.train_dataset = job.encoded["train"].select(kept)
    watch = Watch(job, None)
    trainer.add_callback(watch)
    train(job)
    return Source(str(folder / "source"), watch, len(rows) - len(kept))
