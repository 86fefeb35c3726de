"""What a run writes at its end beside scores: the model card, and predictions of rows without labels."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..tasks.scoring import predictions
from .card import model_card
from .folder import SETTINGS_FILE, read_settings
from .trainer import ChoiceTrainer


if TYPE_CHECKING:
    from datasets import Dataset


SUFFIXES = {"validation_mismatched": "_mm", "test_mismatched": "_mm"}  # GLUE's keys for the second rows of MNLI


def write_card(
    trainer: ChoiceTrainer, settings: Mapping[str, Any], scores: Mapping[str, float], weights: str | None
) -> None:
    """Write the model card of the weights in the output folder, unless there is nothing new to write.

    Args:
        trainer: The run's.
        settings: The run's.
        scores: What evaluation gave, or nothing.
        weights: Folder of the weights that were scored without a training, or None.
    """
    args = trainer.args
    folder = Path(str(args.output_dir))
    if (weights and Path(weights) != folder) or not (args.do_train or scores):
        return
    if weights and (folder / SETTINGS_FILE).is_file():  # those of the training, but for the rows scored now
        settings = {**settings, **read_settings(folder), "held_out_samples": settings["held_out_samples"]}
    model_card(trainer, settings, scores).save(folder / "README.md")


def write_predictions(trainer: ChoiceTrainer, encoded: Dataset, rows: Dataset, suffix: str) -> None:
    """Write predict_results_TASK.txt in run_glue's form: index and prediction, one row a line."""
    task = trainer.family.task
    trainer.compute_metrics = None
    scores: Any = trainer.predict(encoded).predictions
    prepared = [task.prepared(row) for row in rows]
    choices = [task.choices_of(row) for row in prepared]
    predicted: list[Any] = predictions(task, scores, [len(row) for row in choices])
    if not trainer.is_world_process_zero():
        return
    names = [
        f"{answer:.3f}" if task.is_regression else (task.names or [text.strip() for text in row])[answer]
        for answer, row in zip(predicted, choices, strict=True)
    ]
    path = Path(str(trainer.args.output_dir), f"predict_results_{task.name}{suffix}.txt")
    lines = [f"{i}\t{name}" for i, name in enumerate(names)]
    path.write_text("\n".join(["index\tprediction", *lines]) + "\n", encoding="utf-8")
