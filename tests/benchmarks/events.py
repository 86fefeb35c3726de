"""A small made-up store: events as the harness writes them, and lines of interleaved step times."""

import json
import random

from benchmarks.harness.store import SCHEMA_VERSION
from benchmarks.harness.suite import run_id


ROWS = {"movie_reviews": 40, "sst2": 80, "cb": 24, "rte": 30}
MAJORITY = {"movie_reviews": 0.5, "sst2": 0.55, "cb": None, "rte": 0.6}
# the share of the rows that a method has right, and what it costs: bytes of training, bytes stored, seconds of a step
RIGHT = {"prompt_tuning": 0.83, "lora": 0.83, "full": 0.83, "zero_shot": 0.7}
COSTS = {"prompt_tuning": (700, 46, 1.5), "lora": (900, 1900, 1.4), "full": (2700, 538_000, 2.5)}
COSTS["zero_shot"] = (0, 0, None)
WEIGHTS = 538_000


def spec(task, method, seed, init=None, quantization=None, **arguments):
    arguments = {"model_name_or_path": "tiny", "per_device_train_batch_size": 4, **arguments}
    found = {"task": task, "data": None, "method": method, "init": init, "source": None, "quantization": quantization}
    examples = 0 if method == "zero_shot" else 40
    return {**found, "task_type": None, "budget": {"examples": examples}, "seed": seed, "arguments": arguments}


def event(of, status="ok", right=None, result=None, attempt=1, started_at="2026-01-01T00:00:00+00:00"):
    """How a run ended; by default its rows are right with the chance in RIGHT, drawn from the run's id."""
    draw = random.Random(run_id(of))
    memory, stored, _ = COSTS[of["method"]]
    chance = RIGHT[of["method"]] if right is None else right
    if of["task"] == "rte":
        chance = 0.5
    correct = "".join(str(int(draw.random() < chance)) for _ in range(ROWS[of["task"]]))
    curve = [{"examples": n, "seconds": n / 4.0, "score": 0.6 + n / 400} for n in (0, 20, 40)]
    measured = {"main_metric": "accuracy", "score": correct.count("1") / len(correct), "score_before": 0.6}
    measured |= {"correct": correct, "eval_samples": len(correct), "majority": MAJORITY[of["task"]], "curve": curve}
    measured |= {"train_time_s": 10.0, "steps": of["budget"]["examples"] // 4, "weights_bytes": WEIGHTS * 1000}
    measured |= {"peak_memory_bytes": memory * 1000 + of["seed"], "adapter_bytes": stored * 1000}
    measured |= {"inference_time_s": 1.2, "bare_inference_time_s": 1.0}
    env = {"device": "cpu", "machine": "2 cores", "capability": "AVX2"}
    env |= {"scored_rows_sha256": of["task"], "weights_sha256": "w"}
    made = {"schema_version": SCHEMA_VERSION, "run_id": run_id(of), "attempt": attempt, "status": status, "spec": of}
    made |= {"started_at": started_at, "finished_at": None, "error": None if status == "ok" else "why", "env": env}
    return made | {"result": {**measured, **(result or {})} if status == "ok" else None}


def grid():
    """Prompt tuning and LoRA on four tasks, full fine-tuning and zero-shot on three, three seeds."""
    for task in ROWS:
        for seed in range(3):
            yield event(spec(task, "prompt_tuning", seed, "TEXT"))
            yield event(spec(task, "lora", seed), right=0.99 if task == "cb" else None)
            if task != "cb":
                yield event(spec(task, "full", seed))
        if task != "cb":
            yield event(spec(task, "zero_shot", 0))


def step_times():
    """Lines of `benchmarks speed --suite`."""
    for task in ROWS:
        for method, (_, _, step_s) in COSTS.items():
            if step_s is not None:
                yield {"kind": spec(task, method, 0), "step_s": step_s * (2 if task == "sst2" else 1)}


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path
