"""From the scores of a split's choices to predictions, and from predictions to a task's official metrics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .base import Task


if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset


def predictions(task: Task, scores: np.ndarray, counts: Sequence[int]) -> list[int] | list[float]:
    """The likeliest choice of each row; for a regression a number.

    Args:
        task: The task.
        scores: Log-likelihoods [N, C], or the numbers [N, 1] of a regression head.
        counts: Number of choices of each row.

    Returns:
        N indices; for a regression the numbers of the head, or the mean of the label words' numbers under their
        probabilities.
    """
    if task.is_regression and scores.shape[1] == 1:
        return scores[:, 0].astype(float).tolist()
    shares = probabilities(scores, counts)
    if task.is_regression:
        return [float(share @ task.values) for share in shares]
    return [int(share.argmax()) for share in shares]


def probabilities(scores: np.ndarray, counts: Sequence[int]) -> list[np.ndarray]:
    """Softmax over each row's own choices, N arrays [C of the row]."""
    from scipy.special import softmax

    return [softmax(row[:count].astype(float)) for row, count in zip(scores, counts, strict=True)]


def evaluate_predictions(task: Task, predicted: Sequence[Any], rows: Dataset) -> dict[str, float]:
    """Compute a task's metrics.

    Args:
        task: The task.
        predicted: What `predictions` gives.
        rows: The rows, with their labels.

    Returns:
        GLUE's or SuperGLUE's official keys, fractions; `combined_score` is the mean of those that count, where there
        are several.
    """
    from .metrics import Classification, Glue, SuperGlue, combined_score

    prepared, subset = [task.prepared(row) for row in rows], task.subset or task.name
    references: list[Any] = [task.target(row) for row in prepared]
    if task.benchmark == "glue":
        metric = Glue(subset)
        if task.is_regression:
            references = [row[task.label_column] for row in prepared]
    elif task.benchmark == "super_glue":
        metric = SuperGlue(subset)
        if subset == "multirc":
            pairs = zip(prepared, predicted, strict=True)
            predicted = [{"idx": row["idx"], "prediction": answer} for row, answer in pairs]
        elif subset == "record":
            pairs = zip(prepared, predicted, strict=True)
            predicted = [{"idx": row["idx"], "prediction_text": row["entities"][answer]} for row, answer in pairs]
            references = [{"idx": row["idx"], "answers": row["answers"]} for row in prepared]
    else:
        metric = Classification()
    scores = metric.compute(predictions=list(predicted), references=references)
    if task.main_metric == "combined_score":
        scores["combined_score"] = combined_score(scores, subset)
    return scores
