"""The Trainer of a run: evaluation scores every choice of a row, training weighs every label of a step alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import SequentialSampler
from transformers import Trainer
from transformers.trainer_utils import EvalPrediction

from ..labels import IGNORE_INDEX
from ..tasks.families import Family
from ..tasks.scoring import evaluate_predictions, predictions


class ChoiceTrainer(Trainer):
    """A Trainer whose predictions are log-likelihoods [N, C] of each row's choices, and label ids their targets [N].

    Args:
        *args: As for `transformers.Trainer`.
        family: How rows become batches and choices get scores.
        card: Writes the model card, in place of transformers' own.
        **kwargs: As for `transformers.Trainer`.
    """

    def __init__(self, *args: Any, family: Family, card: Callable[[], None] | None = None, **kwargs: Any) -> None:
        self.family = family
        self.card = card
        kwargs.setdefault("data_collator", family.collate)
        super().__init__(*args, **kwargs)
        self.label_names = ["labels"]
        self.model_accepts_loss_kwargs = True  # labels are counted for `compute_loss`, whatever the model takes

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """See transformers; the share of a batch in the mean over all labels of its step.

        Transformers expects the model to divide by `num_items_in_batch`, and not every model does: heads of
        classification and T5 give the mean of their own batch, and accumulated or distributed ones would add up.
        Without that number every model gives its batch's mean.
        """
        mean, outputs = super().compute_loss(model, inputs, return_outputs=True)
        if num_items_in_batch is None:  # a batch that is a step of its own
            return (mean, outputs) if return_outputs else mean
        share = inputs["labels"].ne(IGNORE_INDEX).sum() / num_items_in_batch
        if self.args.average_tokens_across_devices:
            share = share * self.accelerator.num_processes  # the number is that of all, and gradients are averaged
        loss = mean * share
        return (loss, outputs) if return_outputs else loss

    def evaluate_task(self, encoded: Dataset, rows: Dataset, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Evaluate one split with its task's metrics.

        Args:
            encoded: The rows as `Family.encode` gives them.
            rows: The same rows as the file has them.
            metric_key_prefix: Goes before every metric's name.
        """
        self.compute_metrics = task_metrics(self.family, rows)
        return self.evaluate(encoded, metric_key_prefix=metric_key_prefix)

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """See transformers."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            scores = self.family.score(model, inputs)
        loss = self.family.loss(scores, inputs)
        return (loss, None, None) if prediction_loss_only else (loss, scores, inputs["target"])

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """See transformers."""
        with self._collating_choices():
            return super().get_eval_dataloader(*args, **kwargs)

    def get_test_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """See transformers."""
        with self._collating_choices():
            return super().get_test_dataloader(*args, **kwargs)

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        # group_by_length would shuffle the scored rows too, and metrics pair predictions with rows by their place
        return SequentialSampler(eval_dataset) if self.args.world_size <= 1 else None

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """See transformers; `card` writes scores, init and seed."""
        if self.card is None:
            super().create_model_card(*args, **kwargs)
        elif self.is_world_process_zero():
            self.card()

    @contextmanager
    def _collating_choices(self) -> Iterator[None]:
        collator = self.data_collator
        self.data_collator = self.family.collate_choices
        try:
            yield
        finally:
            self.data_collator = collator


def task_metrics(family: Family, rows: Dataset) -> Callable[[EvalPrediction], dict[str, float]]:
    """`compute_metrics` for one split; its rows hold what a metric needs beside the label."""
    counts = [len(family.task.choices_of(family.task.prepared(row))) for row in rows]

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        scores: Any = prediction.predictions
        return evaluate_predictions(family.task, predictions(family.task, scores, counts), rows)

    return compute
