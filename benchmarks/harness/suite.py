"""A suite: a grid of runs, written as YAML.

    seeds: [0, 1, 2]
    budgets: [{examples: 560}, {seconds: 120}]      # how long a run trains
    time_limit_s: 3600                              # then a run is ended
    arguments: {model_name_or_path: smollm2-135m}   # flags of recipes/train.py for every run
    tasks:
      sst2: {data: glue/sst2, max_seq_length: 64}   # data: a folder below --data_dir; else flags for this task
      rte: {data: glue/rte, source: {task: mnli, data: glue/mnli, num_virtual_tokens: 46}}  # for TRANSFER: as long
    runs:
      - {method: lora, quantization: [null, nf4], learning_rate: 0.001}   # a list means one run for each value
      - {method: full, budgets: [{examples: 560}]}                        # in place of the suite's

Seeds change slowest, so that a grid that is half done has whole seeds.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from itertools import product
from pathlib import Path
from typing import Any, TypedDict


METHODS = ("prompt_tuning", "lora", "full", "linear_probe", "zero_shot")
BUDGETS = ("examples", "seconds")
TIME_LIMIT_S = 3600.0
_SUITE_KEYS = ("seeds", "budgets", "time_limit_s", "arguments", "tasks", "runs")
_SPEC_FLAGS = {"init": "prompt_tuning_init", "quantization": "quantization", "task_type": "task_type"}
# what the harness sets itself
_TAKEN = {
    "task_name",
    "data_dir",
    "method",
    "seed",
    "max_steps",
    "num_train_epochs",
    "output_dir",
    *_SPEC_FLAGS.values(),
}


class Spec(TypedDict):
    """What decides a run's result; its hash is the run's id."""

    task: str
    data: str | None  # folder below --data_dir, or None for a task that brings its rows
    method: str
    init: str | None  # of a prompt; None: the recipe's
    source: dict[str, Any] | None  # task and data that the prompt of the init TRANSFER is trained on before
    quantization: str | None
    task_type: str | None  # None: what the checkpoint is made for
    # {"examples": rows}, or {"seconds": s, "steps": n} and "source_steps", see pace.py; the rows are then drawn
    budget: dict[str, float]
    seed: int
    arguments: dict[str, Any]  # further flags of recipes/train.py


class SuiteError(ValueError):
    """A suite that cannot be run."""


def run_id(spec: Spec) -> str:
    """The run's name: 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()[:16]


def load_suites(paths: Iterable[str | Path]) -> tuple[list[Spec], float]:
    """Read suites; a run that is in several is there once.

    Returns:
        The runs, and the longest of the suites' time limits in seconds.

    Raises:
        SuiteError: A suite is wrong, or two have one name.
    """
    paths = [Path(path) for path in paths]
    names = [path.stem for path in paths]
    double = sorted({name for name in names if names.count(name) > 1})
    if double:
        raise SuiteError(f"Two suites have the name {double[0]!r} ({', '.join(map(str, paths))}): rename one file.")
    specs = {run_id(spec): spec for path in paths for spec in load_suite(path)}
    return list(specs.values()), max(float(_read(path).get("time_limit_s", TIME_LIMIT_S)) for path in paths)


def load_suite(path: str | Path) -> list[Spec]:
    """Read and check one suite.

    Raises:
        SuiteError: An unknown key, task, method, init or flag, or a value of the wrong kind.
    """
    path = Path(path)
    suite = _read(path)
    try:
        return list(_expand(suite))
    except (ValueError, TypeError) as error:
        raise SuiteError(f"{path}: {error}") from None


def train_arguments(spec: Spec, data_dir: str | Path | None) -> list[str]:
    """The command line of recipes/train.py that trains what the run trains.

    Args:
        spec: The run.
        data_dir: Where the folders of `spec["data"]` lie.
    """
    flags: dict[str, Any] = {"task_name": spec["task"], "method": spec["method"], "seed": spec["seed"]}
    if spec["data"] is not None:
        flags["data_dir"] = f"{data_dir}/{spec['data']}"
    flags |= {flag: spec[name] for name, flag in _SPEC_FLAGS.items() if spec[name] is not None}  # type: ignore[literal-required]
    if spec["method"] != "zero_shot" and (steps := steps_of(spec)) is not None:
        flags["max_steps"] = steps
        if "seconds" in spec["budget"]:
            # grouped by length, a group's longest rows come first: those of a short run are of whole groups only if
            # they are all that it has
            flags |= {"max_train_samples": steps * batch_size(spec), "sample_seed": spec["seed"]}
    flags |= {name: value for name, value in spec["arguments"].items() if value is not None}
    line: list[str] = []
    for name, value in flags.items():
        values = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
        line += [f"--{name}", *map(str, values)]
    return line


def budget_of(spec: Mapping[str, Any]) -> tuple[str, float]:
    """What a budget counts, examples or seconds, and how many."""
    unit = next(name for name in BUDGETS if name in spec["budget"])
    return unit, spec["budget"][unit]


def steps_of(spec: Spec) -> int | None:
    """Steps that the budget buys; None for seconds of which nobody has said how many."""
    if "examples" in spec["budget"]:
        return int(spec["budget"]["examples"]) // batch_size(spec)
    steps = spec["budget"].get("steps")
    return None if steps is None else int(steps)


def batch_size(spec: Spec) -> int:
    """Rows of one step of the optimizer."""
    arguments = spec["arguments"]
    return int(arguments["per_device_train_batch_size"]) * int(arguments.get("gradient_accumulation_steps", 1))


def source_spec(spec: Spec) -> Spec | None:
    """The run that trains the prompt which a TRANSFER starts from, at the same budget and seed."""
    source = spec["source"]
    if source is None:
        return None
    arguments = {**spec["arguments"], **{k: v for k, v in source.items() if k not in {"task", "data"}}}
    budget = {name: amount for name, amount in spec["budget"].items() if name != "source_steps"}
    if "source_steps" in spec["budget"]:
        budget["steps"] = spec["budget"]["source_steps"]
    changed = {"data": source.get("data"), "init": None, "source": None, "budget": budget, "arguments": arguments}
    return {**spec, "task": source["task"], **changed}  # type: ignore[return-value, typeddict-item]


def _read(path: Path) -> dict[str, Any]:
    import yaml

    if not path.is_file():
        raise SuiteError(f"There is no suite {path}; the project's are in benchmarks/suites.")
    try:
        suite = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise SuiteError(f"{path} is not YAML: {error}") from None
    if not isinstance(suite, dict) or not all(suite.get(key) for key in ("tasks", "runs", "budgets")):
        raise SuiteError(f"{path}: wanted a mapping with tasks, budgets and runs, got {str(suite)[:80]!r}.")
    return suite


def _expand(suite: Mapping[str, Any]) -> Iterator[Spec]:
    from peft_prompt_ext._choices import check_choice
    from peft_prompt_ext.tasks import available_tasks

    for key in suite:
        check_choice("key of a suite", key, _SUITE_KEYS)
    _check_kinds(suite)
    for name in suite["tasks"]:
        check_choice("task", name, available_tasks())
    seen: set[str] = set()
    for seed, (name, of_task), run in product(suite.get("seeds") or [0], suite["tasks"].items(), suite["runs"]):
        run = dict(run)
        for budget in run.pop("budgets", None) or suite["budgets"]:
            for values in _product(run):
                spec = _spec(suite.get("arguments") or {}, name, of_task or {}, values, budget, seed)
                if run_id(spec) not in seen:  # zero_shot is the same at every budget and seed
                    seen.add(run_id(spec))
                    yield spec


def _product(run: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    choices = [value if isinstance(value, list) else [value] for value in run.values()]
    for values in product(*choices):
        yield dict(zip(run, values, strict=True))


def _spec(
    common: Mapping[str, Any],
    task: str,
    of_task: Mapping[str, Any],
    run: Mapping[str, Any],
    budget: Mapping[str, float],
    seed: int,
) -> Spec:
    flags = {**common, **of_task, **run}
    method, data, source = flags.pop("method", None), flags.pop("data", None), flags.pop("source", None)
    named = {name: flags.pop(name, None) for name in _SPEC_FLAGS}
    is_transfer = method == "prompt_tuning" and named["init"] == "TRANSFER"
    spec: Spec = {
        "task": task,
        "data": data,
        "method": method,
        "init": named["init"] if method == "prompt_tuning" else None,
        "source": source if is_transfer else None,
        "quantization": named["quantization"],
        "task_type": named["task_type"],
        "budget": {"examples": 0} if method == "zero_shot" else dict(budget),
        "seed": 0 if method == "zero_shot" else seed,
        "arguments": flags,
    }
    _check(spec)
    return spec


def _check_kinds(suite: Mapping[str, Any]) -> None:
    """Lists, mappings and a number where they are wanted."""
    for name in ("seeds", "budgets", "runs"):
        if not isinstance(suite.get(name) or [], list):
            raise ValueError(f"{name}: wanted a list, got {suite[name]!r}")
    _check_mapping("tasks", suite["tasks"])
    _check_mapping("arguments", suite.get("arguments") or {})
    for name, of_task in suite["tasks"].items():
        _check_mapping(f"the task {name}", of_task or {})
        _check_mapping(f"the source of {name}", (of_task or {}).get("source") or {})
    for run in suite["runs"]:
        _check_mapping("a run", run)
    for budget in [*suite["budgets"], *(one for run in suite["runs"] for one in run.get("budgets") or [])]:
        _check_mapping("a budget", budget)
    limit = suite.get("time_limit_s", TIME_LIMIT_S)
    if not _is_number(limit) or limit <= 0:
        raise ValueError(f"time_limit_s: wanted a number of seconds, got {limit!r}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_mapping(what: str, value: Any) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"{what}: wanted a mapping, got {value!r}")


def _check(spec: Spec) -> None:
    from peft_prompt_ext._choices import check_choice
    from peft_prompt_ext.inits import available_inits
    from peft_prompt_ext.tasks import available_tasks

    check_choice("method", spec["method"], METHODS)
    if spec["init"] is not None:
        check_choice("init", spec["init"], available_inits())
    if spec["quantization"] is not None:
        check_choice("quantization", spec["quantization"], ("nf4", "fp4", "int8"))
    for name in spec["arguments"]:
        check_choice("flag", name, _flags() - _TAKEN)
    if (spec["init"] == "TRANSFER") != (spec["source"] is not None):
        raise ValueError(f"the init TRANSFER of {spec['task']} needs `source: {{task: ..., data: ...}}`")
    if spec["source"] is not None:
        check_choice("task of a source", spec["source"].get("task"), available_tasks())
        for name in set(spec["source"]) - {"task", "data"}:
            check_choice("flag of a source", name, _flags() - _TAKEN)
    if not isinstance(spec["seed"], int):
        raise ValueError(f"a seed is a whole number, got {spec['seed']!r}")
    for trained in filter(None, (spec, source_spec(spec))):
        _check_budget(trained)


def _check_budget(spec: Spec) -> None:
    budget = spec["budget"]
    amount = next(iter(budget.values()), None)
    if len(budget) != 1 or set(budget) - set(BUDGETS) or not _is_number(amount):
        raise ValueError(f"a budget is {{examples: N}} or {{seconds: S}}, got {budget}")
    if spec["method"] == "zero_shot":
        return
    if "per_device_train_batch_size" not in spec["arguments"]:
        raise ValueError("arguments need per_device_train_batch_size, which says how many examples a step sees")
    if batch_size(spec) < 1:
        raise ValueError(f"a step has one row or more, got {batch_size(spec)}")
    if amount <= 0 or ("examples" in budget and amount % batch_size(spec)):
        raise ValueError(f"a budget of {budget} is no whole number of steps of {batch_size(spec)} rows")


def _flags() -> set[str]:
    from transformers import TrainingArguments

    from peft_prompt_ext.training.arguments import DataArguments, MethodArguments, ModelArguments

    kinds: tuple[Any, ...] = (ModelArguments, DataArguments, MethodArguments, TrainingArguments)
    return {field.name for kind in kinds for field in fields(kind)}
