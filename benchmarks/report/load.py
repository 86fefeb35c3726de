"""The store as one table: a row for each run, its newest event that has a result."""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from ..harness.step_times import key_of
from ..harness.store import RunStore, StoreError
from ..harness.suite import batch_size, source_spec


RESULTS = Path(__file__).parents[1] / "results"
NAMES = {"prompt_tuning": "prompt tuning", "lora": "LoRA", "full": "full fine-tuning", "linear_probe": "linear probe"}
NAMES["zero_shot"] = "zero-shot"
GROUPS = {"movie_reviews": "sentiment", "sst2": "sentiment"}  # share text: three in four of SST-2's scored sentences
MAJORITY = {"wic": 0.5, "cb": 0.3611, "plot_or_review": 0.4765}  # where runs did not measure the main metric of it
_NUMBERS = ("score", "score_before", "eval_samples", "steps", "train_time_s", "peak_memory_bytes", "weights_bytes")
_NUMBERS += ("adapter_bytes", "inference_time_s", "bare_inference_time_s")
_NOT_OF_A_VARIANT = {"model_name_or_path", "per_device_train_batch_size", "train_sampling_strategy", "max_seq_length"}
_NOT_OF_A_VARIANT |= {"max_eval_samples", "held_out_samples", "num_virtual_tokens", "gradient_checkpointing"}
_NOT_OF_A_VARIANT |= {"prompt_position", "text_cache"}  # the first is in the name, the second changes no result


def stores() -> list[Path]:
    """The project's own stores: the files in `results` whose lines are events."""
    return [path for path in sorted(RESULTS.glob("*.jsonl")) if b'"schema_version"' in path.read_bytes()[:200]]


def read_lines(name: str) -> pd.DataFrame:
    """A file of the folder `results` whose lines are not events."""
    return pd.read_json(RESULTS / name, lines=True)


def load_runs(paths: Iterable[Path], step_times: Iterable[Path] = ()) -> pd.DataFrame:
    """Read stores, a run that is in several once, and files of interleaved steps (see `harness.step_times`)."""
    rows = [json.loads(line) for path in step_times for line in path.read_text(encoding="utf-8").splitlines()]
    step_s = {key_of(row["kind"]): row["step_s"] for row in rows}
    events = []
    for path in paths:
        if not path.is_file():
            raise StoreError(f"There is no results file {path}.")
        events += RunStore(path).events()
    events = [event for event in events if set(event["spec"]["budget"]) == {"examples"}]
    if not events:
        raise StoreError("There is no run to report.")
    frame = pd.DataFrame([_row(event, step_s) for event in events])
    frame["rank"] = frame["status"].map({"started": 0, "ok": 2}).fillna(1)  # a rerun that fails loses no result
    newest = frame.sort_values(["rank", "started_at"], kind="stable").drop_duplicates("run_id", keep="last")
    return _with_variants(newest.sort_index().reset_index(drop=True))


def _row(event: dict[str, Any], step_s: dict[str, float]) -> dict[str, Any]:
    spec, env, result = event["spec"], event["env"] or {}, event["result"] or {}
    arguments = spec["arguments"]
    numbers = {name: result.get(name) for name in _NUMBERS} if event["status"] == "ok" else {}
    wrong = [name for name, value in numbers.items() if type(value) not in (int, float) or not math.isfinite(value)]
    row = {name: event[name] for name in ("run_id", "status", "error", "started_at")}
    row |= {name: spec[name] for name in ("task", "method", "init", "quantization", "seed")}
    if wrong:
        row |= {"status": "unusable", "error": f"{wrong[0]} is no finite number"}
        result = {}
    row |= {name: result.get(name) for name in (*_NUMBERS, "correct", "curve", "score_over_other")}
    majority = result.get("majority") if result.get("main_metric") == "accuracy" else None
    memory = [result.get(name) for name in ("weights_bytes", *(["peak_memory_bytes"] if result.get("steps") else []))]
    return row | {
        "model": arguments.get("model_name_or_path", "the recipe's default"),
        "examples": None if spec["method"] == "zero_shot" else spec["budget"]["examples"],
        "is_search": "held_out_samples" in arguments,
        "group": GROUPS.get(spec["task"], spec["task"]),
        "is_suffix": arguments.get("prompt_position") == "suffix",
        "extras": {name: value for name, value in arguments.items() if name not in _NOT_OF_A_VARIANT},
        "device": env.get("device"),
        "machine": f"{env.get('machine')} {env.get('capability')}",
        "scored_rows": f"{env.get('scored_rows_sha256')} {env.get('weights_sha256')}",
        "majority": MAJORITY.get(spec["task"]) if majority is None else majority,
        "memory_bytes": sum(memory) if result else None,
        "latency": _latency(spec["method"], result),
        "seconds": _seconds(spec, step_s),
    }


def _latency(method: str, result: dict[str, Any]) -> float | None:
    """Scoring a batch with the adapter over scoring it without, both measured interleaved."""
    if method not in {"prompt_tuning", "lora"}:
        return 1.0
    return result["inference_time_s"] / result["bare_inference_time_s"] if result else None


def _seconds(spec: dict[str, Any], step_s: dict[str, float]) -> float:
    """Seconds of training from interleaved steps, with those of a TRANSFER's source; NaN if they were not measured."""
    if spec["method"] == "zero_shot":
        return 0.0
    trained = [one for one in (spec, source_spec(spec)) if one is not None]  # type: ignore[arg-type]
    steps = spec["budget"]["examples"] // batch_size(spec)  # type: ignore[arg-type]
    return sum(steps * (step_s.get(key_of(one)) or math.nan) for one in trained)


def _with_variants(runs: pd.DataFrame) -> pd.DataFrame:
    """Add `variant`: method, init and precision, and the flags in which variants differ that have all three alike."""
    behind = runs["is_suffix"].map({True: "suffix"})
    parts = [runs["method"].map(NAMES), behind, runs["init"], runs["quantization"]]
    name = pd.concat(parts, axis=1).apply(lambda row: ", ".join(row.dropna()), axis=1)
    for _, same in runs.groupby([name, "task", "is_search"]):
        for flag in sorted({flag for extras in same["extras"] for flag in extras}):
            values = same["extras"].map(lambda extras, flag=flag: f", {flag} {extras.get(flag)}")
            name.loc[same.index] += values if values.nunique() > 1 else ""
    return runs.assign(variant=name)
