"""The prompt that a TRANSFER starts from: trained on rows of the source task that hold nothing of the scored rows.

Two data sets may be drawn from one collection: three in four scored sentences of SST-2 are in the movie reviews.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from .job import prepare, rows_to_score, train
from .suite import Spec, source_spec


SHARED_WORDS = 5  # what is shorter ("a good movie") is in many texts by chance
Row = Mapping[str, Any]


class Source(NamedTuple):
    """A trained prompt, and what it took."""

    folder: str
    watch: Any  # of its training
    left_out: int  # rows of its train split that share text with the scored ones


def train_source(spec: Spec, folder: Path, data_dir: str | None) -> Source | None:
    """Train the prompt that a run starts from, if any, on rows that have nothing of what the target is scored on."""
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


def without_overlap(
    source: Iterable[Row], source_columns: Iterable[str], scored: Iterable[Row], scored_columns: Iterable[str]
) -> list[int]:
    """The source's rows of which no text is in a text of a scored row, nor holds one.

    The texts are in the named columns; case, punctuation and spaces make no difference, and texts of fewer than
    `SHARED_WORDS` words are not looked for. Returns the numbers of the rows that stay, ascending.
    """
    known = sorted({text for row in scored for text in _texts(row, scored_columns)})
    together = "|".join(known)
    long = [text for text in known if len(text.split()) >= SHARED_WORDS]

    def shares(text: str) -> bool:
        return (len(text.split()) >= SHARED_WORDS and text in together) or any(one in text for one in long)

    return [number for number, row in enumerate(source) if not any(map(shares, _texts(row, source_columns)))]


def _texts(row: Row, columns: Iterable[str]) -> Iterator[str]:
    """The words of each, between spaces, so that no word is found within another."""
    for name in columns:
        words = re.findall(r"[^\W_]+", str(row[name]).lower())
        yield f" {' '.join(words)} "
