"""From the scores of a split's choices to predictions, and from predictions to a task's official metrics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .task import Task


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
        The keys of the task's metric (for GLUE and SuperGLUE the official ones), fractions; "combined_score" is the
        mean of those that count, where there are several.

    Raises:
        ValueError: There are no rows, not as many predictions as rows, or a row has no label.
    """
    if not len(rows) or len(predicted) != len(rows):
        raise ValueError(f"Every prediction needs a row; got {len(predicted)} predictions and {len(rows)} rows.")
    metric, prepared = task.metric, [task.prepared(row) for row in rows]
    references = [(metric.reference or task.target)(row) for row in prepared]
    if metric.prediction is not None:
        predicted = [metric.prediction(row, answer) for row, answer in zip(prepared, predicted, strict=True)]
    scores = metric.compute(list(predicted), references)
    if metric.counted:
        scores["combined_score"] = sum(scores[name] for name in metric.counted) / len(metric.counted)
    return scores
