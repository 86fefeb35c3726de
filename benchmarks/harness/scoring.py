"""What is measured of a model that stands still: scores, and the time of a batch."""

import json
import statistics
from collections import Counter
from contextlib import nullcontext
from typing import Any, NamedTuple

from .machine import clock


CURVE_SAMPLES = 128  # rows of a score on the way: on all of them the scoring would take longer than the training
INFERENCE_BATCH_SIZE = 32


class Scores(NamedTuple):
    """Scores of one model."""

    metrics: dict[str, float]  # on all scored rows
    on_curve: float  # main metric on the curve's rows
    correct: str | None  # see `measure.Result`


def scored_rows(job: Any) -> tuple[Any, Any]:
    """Encoded rows and rows of the first validation split."""
    split = job.trainer.family.task.validation[0]
    return job.encoded[split], job.splits[split]


def curve_rows(count: int) -> list[int]:
    """Which of the scored rows the points of a learning curve are of."""
    some = min(count, CURVE_SAMPLES)
    return [number * count // some for number in range(some)]


def score_on_the_way(job: Any) -> None:
    """Let evaluations while it trains score the curve's rows."""
    from peft_prompt_ext.training.trainer import task_metrics

    encoded, shown = (split.select(curve_rows(len(split))) for split in scored_rows(job))
    job.trainer.eval_dataset, job.trainer.compute_metrics = encoded, task_metrics(job.trainer.family, shown)


def score(job: Any) -> Scores:
    """Score the model as it is."""
    from transformers.trainer_utils import EvalPrediction

    from peft_prompt_ext.tasks.scoring import predictions
    from peft_prompt_ext.training.trainer import task_metrics

    trainer, task = job.trainer, job.trainer.family.task
    encoded, rows = scored_rows(job)
    trainer.compute_metrics = task_metrics(trainer.family, rows)
    output = trainer.predict(encoded, metric_key_prefix="eval")
    some = curve_rows(len(rows))
    of_some = EvalPrediction(output.predictions[some], output.label_ids[some])
    on_curve = task_metrics(trainer.family, rows.select(some))(of_some)[task.main_metric]
    if task.is_regression:
        return Scores(output.metrics, on_curve, None)
    counts = [len(task.choices_of(task.prepared(row))) for row in rows]
    right = [a == b for a, b in zip(predictions(task, output.predictions, counts), encoded["target"], strict=True)]
    order = sorted(range(len(rows)), key=lambda i: json.dumps(rows[i], sort_keys=True, default=str))
    return Scores(output.metrics, on_curve, "".join("1" if right[i] else "0" for i in order))


def majority(job: Any) -> float | None:
    """Share of the scored rows that have the most common label; None for a regression."""
    if job.trainer.family.task.is_regression:
        return None
    labels = Counter(map(str, scored_rows(job)[0]["target"]))
    return max(labels.values()) / labels.total()


def inference_times(job: Any) -> dict[str, float]:
    """The entries of a `Result` about scoring one batch with the adapter and without: medians, interleaved."""
    import torch

    trainer, family = job.trainer, job.trainer.family
    model, encoded = trainer.model.eval(), scored_rows(job)[0]
    middle = max(0, (len(encoded) - INFERENCE_BATCH_SIZE) // 2)  # rows are sorted by length
    rows = encoded.select(range(middle, min(middle + INFERENCE_BATCH_SIZE, len(encoded))))
    batch = trainer._prepare_inputs(family.collate_choices(list(rows)))
    config, bare = getattr(model, "active_peft_config", None), (model, nullcontext)
    if config is not None:
        bare = (model.get_base_model(), nullcontext) if config.is_prompt_learning else (model, model.disable_adapter)
    times: dict[str, list[float]] = {"inference_time_s": [], "bare_inference_time_s": []}
    with torch.no_grad():
        for name, (candidate, context) in list(zip(times, ((model, nullcontext), bare), strict=True)) * 4:
            with context():
                start = clock()
                family.score(candidate, batch)
                times[name].append(clock() - start)
    medians = {name: statistics.median(values[1:]) for name, values in times.items()}
    return {**medians, "inference_batch_size": INFERENCE_BATCH_SIZE}
