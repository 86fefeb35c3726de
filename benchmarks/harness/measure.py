"""One run in this process: `recipes/train.py`'s own code, with a watch on it.

    python -m benchmarks.harness.measure SPEC.json FOLDER [--data_dir DIR]

FOLDER/outcome.json says how it ended: `status`, `error`, `result` and `env` of the run's event.
"""

import argparse
import ctypes
import json
import math
import os
import signal
import sys
from pathlib import Path
from typing import Any, TypedDict

from . import scoring
from .job import load_over, prepare, train
from .source import train_source
from .suite import Spec


NO_METRICS = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second", "eval_loss", "eval_model_prep")
CURVE_POINTS = 3  # scores taken while a run trains


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
    peak_memory_bytes: int  # of training, above the loaded model
    weights_bytes: int  # of the loaded model
    trainable_parameters: int
    adapter_bytes: int  # what has to be kept for one task
    inference_time_s: float  # one scored batch, median
    bare_inference_time_s: float  # the same with the adapter off
    inference_batch_size: int
    score_over_other: float | None  # over the base model in the precision `scored_over`


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
    try:
        result, env = measure(spec, options.folder, options.data_dir)
    except Exception as error:
        status, why = "out_of_memory" if _is_out_of_memory(error) else "failed", f"{type(error).__name__}: {error}"
        write_outcome(options.folder, {"status": status, "error": why, "result": None, "env": None})
        raise
    write_outcome(options.folder, {"status": "ok", "error": None, "result": result, "env": env})


def write_outcome(folder: Path, outcome: dict[str, Any]) -> None:
    """Write it whole or not at all."""
    partial = folder / "outcome.json.partial"
    partial.write_text(json.dumps(outcome), encoding="utf-8")
    partial.replace(folder / "outcome.json")


def measure(spec: Spec, folder: Path, data_dir: str | None) -> tuple[Result, dict[str, Any]]:
    """Train, score and measure what a spec asks for; what it trains is written below the folder."""
    from transformers import set_seed

    from .machine import FILE, code, environment, touch
    from .watch import Watch

    now = code()  # as it was when the run began, whatever is checked out meanwhile
    source = train_source(spec, folder, data_dir)
    extra = () if source is None else ("--prompt_tuning_init_kwargs", json.dumps({"source": source.folder}))
    job = prepare(spec, folder / "run", data_dir, extra)
    trainer = job.trainer
    trainer.args.include_num_input_tokens_seen = "non_padding"
    touch(trainer.model)
    base = getattr(trainer.model, "get_base_model", lambda: trainer.model)()
    dtype, revision = str(base.dtype), getattr(trainer.model.config, "_commit_hash", None)
    kind = revision, trainer.args.device.type, dtype.removeprefix("torch.")
    rows = scoring.scored_rows(job)[1], job.splits.get("train")
    env = now | environment(job.settings["model_name_or_path"], *kind, *rows)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FILE).write_text(json.dumps(env), encoding="utf-8")
    weights, before = base.get_memory_footprint(), scoring.score(job)
    after = before
    set_seed(spec["seed"])
    watch = Watch(job, before.on_curve)
    if trainer.args.do_train:
        trainer.args.eval_strategy = "steps"
        trainer.args.eval_steps = max(1, -(-trainer.args.max_steps // (CURVE_POINTS + 1)))
        scoring.score_on_the_way(job)
        trainer.add_callback(watch)
        train(job)
        trainer.remove_callback(watch)
        after = scoring.score(job)
        watch.point(after.on_curve)
    main_key, scored = f"eval_{trainer.family.task.main_metric}", len(scoring.scored_rows(job)[1])
    trainable = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad) if trainer.args.do_train else 0
    result: Result = {
        "main_metric": trainer.family.task.main_metric,
        "score": after.metrics[main_key],
        "score_before": before.metrics[main_key],
        "metrics_all": {k.removeprefix("eval_"): v for k, v in after.metrics.items() if not k.startswith(NO_METRICS)},
        "loss": after.metrics["eval_loss"],
        "correct": after.correct,
        "eval_samples": scored,
        "majority": scoring.majority(job),
        "curve": watch.curve,
        "curve_samples": len(scoring.curve_rows(scored)),
        **watch.totals(),
        "source_time_s": source and source.watch.train_time_s,
        "source_rows": source and source.watch.examples,
        "source_rows_left_out": source and source.left_out,
        "weights_bytes": weights,
        "trainable_parameters": trainable,
        "adapter_bytes": _stored_bytes(job, spec["method"]),
        **scoring.inference_times(job),
        "score_over_other": None,
    }
    if "scored_over" in spec:
        load_over(job, spec["scored_over"])
        result["score_over_other"] = scoring.score(job).metrics[main_key]
    numbers = {f"metrics_all.{name}": value for name, value in result["metrics_all"].items()} | result
    numbers["curve"] = sum(point["score"] for point in watch.curve)
    infinite = [name for name, value in numbers.items() if isinstance(value, float) and not math.isfinite(value)]
    if infinite:
        raise ValueError(f"{', '.join(infinite)}: not finite. The training diverged; a lower learning_rate may help.")
    return result, env


def _stored_bytes(job: Any, method: str) -> int:
    """What one task has to keep: the adapter's file, the whole model, the head, or nothing."""
    if method == "linear_probe":
        return sum(p.numel() * p.element_size() for p in job.trainer.model.parameters() if p.requires_grad)
    return sum(path.stat().st_size for path in Path(job.trainer.args.output_dir).glob("*.safetensors"))


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
