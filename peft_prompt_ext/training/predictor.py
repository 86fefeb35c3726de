"""Answers to new rows from the folder of a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from ..tasks import Task
from ..tasks.checks import check_row
from ..tasks.families import Family
from ..tasks.scoring import predictions, probabilities
from .folder import read_settings
from .models import find_family, trained_model


class Predictor:
    """Labels with probabilities for rows of a task.

    Args:
        model: The model, its adapter on it.
        family: How rows are asked of it.

    Example:
    ```py
    >>> predictor = Predictor.from_pretrained("outputs/sst2")
    >>> next(predictor.predict([{"sentence": "a warm and funny film"}]))
    ```
    """

    def __init__(self, model: Any, family: Family) -> None:
        self.model = model.eval()
        self.family = family

    @classmethod
    def from_pretrained(cls, folder: str, device: str | None = None) -> Predictor:
        """Load the folder of a run.

        Args:
            folder: Its output folder, or the Hub id that it was pushed to.
            device: Where to run; by default a GPU if there is one. Not for a quantised base model.

        Raises:
            ValueError: The folder holds no run, or a device was given to a quantised model.
        """
        settings = read_settings(folder)
        check_device(folder, settings, device)
        family = saved_family(settings)
        return cls(place(trained_model(family, settings, folder), settings, device), family)

    def predict(self, rows: Sequence[Mapping[str, Any]], batch_size: int = 32) -> Iterator[dict[str, Any]]:
        """Answer rows, in their order.

        Args:
            rows: Rows with the task's text columns; a label is not read.
            batch_size: Rows at a time; the answers do not depend on it.

        Yields:
            `label`, `probability` and `probabilities` (by label) of each row; for a regression `value`.

        Raises:
            ValueError: The task cannot ask a row; raised before the first answer.
        """
        check_asked(self.family.task, rows)
        for start in range(0, len(rows), batch_size):
            yield from self._answer(rows[start : start + batch_size])

    def _answer(self, rows: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
        scores = rate(self.model, self.family, [self.family.encode(row) for row in rows])
        yield from name_answers(self.family.task, rows, scores)


def check_asked(task: Task, rows: Sequence[Mapping[str, Any]]) -> None:
    """Raise ValueError if a task cannot ask a row."""
    for number, row in enumerate(rows):
        try:
            check_row(task, row)
        except ValueError as error:
            raise ValueError(f"Row {number} for {task.name}: {error}") from error


def saved_family(settings: Mapping[str, Any]) -> Family:
    """How rows are asked of a run's model, from the settings in its folder."""
    return find_family(settings, Task.from_dict(settings["task"]), settings["max_length"])


def check_device(folder: str, settings: Mapping[str, Any], device: str | None) -> None:
    """Raise ValueError if a device was given to a quantised model."""
    if device and settings["quantization"]:  # its weights are packed for the device that they are loaded to
        raise ValueError(
            f"The base model of {folder} is quantised ({settings['quantization']}) and goes to the GPU if there "
            f"is one, not to {device!r}: leave --device out. CUDA_VISIBLE_DEVICES chooses the GPU, or hides it."
        )


def place(model: Any, settings: Mapping[str, Any], device: str | None) -> Any:
    """Move a model to a device, by default a GPU if there is one; a quantised one stays."""
    if settings["quantization"] is not None:
        return model
    return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def rate(model: Any, family: Family, encoded: Sequence[Mapping[str, Any]], **options: Any) -> Any:
    """Scores of encoded rows, a NumPy array [B, C].

    Args:
        model: The model.
        family: Batches and scores the rows.
        encoded: The rows.
        **options: Further entries of the batch.
    """
    device = next(model.parameters()).device
    batch = {name: value.to(device) for name, value in family.collate_choices(encoded).items()}
    with torch.inference_mode():
        return family.score(model, {**batch, **options}).cpu().numpy()


def name_answers(task: Task, rows: Sequence[Mapping[str, Any]], scores: Any) -> Iterator[dict[str, Any]]:
    """The answers to rows from their scores; see `Predictor.predict`."""
    choices = [task.choices_of(task.prepared(row)) for row in rows]
    counts = [len(row) for row in choices]
    answers = predictions(task, scores, counts)
    if task.is_regression:
        yield from ({"value": value} for value in answers)
        return
    for row, answer, shares in zip(choices, answers, probabilities(scores, counts), strict=True):
        names = list(task.names) or [choice.strip() for choice in row]
        by_name = dict(zip(names, map(float, shares), strict=True))
        yield {"label": names[int(answer)], "probability": float(shares[int(answer)]), "probabilities": by_name}
