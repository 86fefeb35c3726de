"""A suite: a grid of runs, written as YAML.

    seeds: [0, 1, 2]
    examples: [560]                                 # how many rows a run trains on; one run for each number
    time_limit_s: 3600                              # then a run is ended
    arguments: {model_name_or_path: smollm2-135m}   # flags of recipes/train.py for every run
    tasks:
      sst2: {data: glue/sst2, max_seq_length: 64}   # data: a folder below --data_dir; else flags for this task
      rte: {data: glue/rte, source: {task: mnli, data: glue/mnli, num_virtual_tokens: 46}}  # for TRANSFER: as long
    runs:
      - {method: lora, quantization: [null, nf4], learning_rate: 0.001}   # a list means one run for each value
      - {method: full, examples: [80]}                                    # in place of the suite's
      - {method: prompt_tuning, quantization: nf4, scored_over: float32}  # also scored over this base model

Seeds change slowest, so that a grid that is half done has whole seeds.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from itertools import product
from pathlib import Path
from typing import Any, NotRequired, TypedDict


METHODS = ("prompt_tuning", "lora", "full", "linear_probe", "zero_shot")
PRECISIONS = ("float32", "bfloat16", "nf4", "fp4", "int8")
QUANTIZATIONS = PRECISIONS[2:]
TIME_LIMIT_S = 3600.0
_SUITE_KEYS = ("seeds", "examples", "time_limit_s", "arguments", "tasks", "runs")
_SPEC_FLAGS = {"init": "prompt_tuning_init", "quantization": "quantization", "task_type": "task_type"}
_TAKEN = {"task_name", "data_dir", "method", "seed", "max_steps", "num_train_epochs", "output_dir"}  # the harness sets
_TAKEN |= {*_SPEC_FLAGS.values()}


class Spec(TypedDict):
    """What decides a run's result; its hash is the run's id."""

    task: str
    data: str | None  # folder below --data_dir, or None for a task that brings its rows
    method: str
    init: str | None  # of a prompt; None: the recipe's
    source: dict[str, Any] | None  # task and data that the prompt of the init TRANSFER is trained on before
    quantization: str | None
    task_type: str | None  # None: what the checkpoint is made for
    budget: dict[str, int]  # {"examples": rows that it trains on}
    seed: int
    arguments: dict[str, Any]  # further flags of recipes/train.py
    scored_over: NotRequired[str]  # precision of another base model that the trained adapter is also scored over


class SuiteError(ValueError):
    """A suite that cannot be run."""


def run_id(spec: Mapping[str, Any]) -> str:
    """The run's name: 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()[:16]


def load_suites(paths: Iterable[str | Path], data_dir: str | None) -> tuple[list[Spec], float]:
    """Read suites: the runs, each once, and the longest time limit in seconds.

    A suite that cannot be run, or whose folders of `data` are not below `data_dir`, is a SuiteError.
    """
    paths = [Path(path) for path in paths]
    specs = {run_id(spec): spec for path in paths for spec in load_suite(path)}
    folders = {part.get("data") for spec in specs.values() for part in (spec, spec["source"] or {})}
    for folder in sorted(folders - {None}):
        if data_dir is None or not Path(data_dir, folder).is_dir():
            raise SuiteError(f"give --data_dir, a folder that must hold {folder}; got {data_dir}")
    return list(specs.values()), max(float(_read(path).get("time_limit_s", TIME_LIMIT_S)) for path in paths)


def load_suite(path: str | Path) -> list[Spec]:
    """Read one suite; an unknown name or a value of the wrong kind is a SuiteError."""
    suite = _read(Path(path))
    try:
        return list(_expand(suite))
    except (ValueError, TypeError) as error:
        raise SuiteError(f"{path}: {error}") from None


def train_arguments(spec: Spec, data_dir: str | Path | None) -> list[str]:
    """The command line of recipes/train.py that trains what the run trains, its data in folders below `data_dir`."""
    flags: dict[str, Any] = {"task_name": spec["task"], "method": spec["method"], "seed": spec["seed"]}
    if spec["data"] is not None:
        flags["data_dir"] = f"{data_dir}/{spec['data']}"
    flags |= {flag: spec[name] for name, flag in _SPEC_FLAGS.items() if spec[name] is not None}  # type: ignore[literal-required]
    if spec["method"] != "zero_shot":
        flags["max_steps"] = spec["budget"]["examples"] // batch_size(spec)
    flags |= {name: value for name, value in spec["arguments"].items() if value is not None}
    line: list[str] = []
    for name, value in flags.items():
        values = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
        line += [f"--{name}", *map(str, values)]
    return line


def batch_size(spec: Spec) -> int:
    """Rows of one step of the optimizer."""
    arguments = spec["arguments"]
    return int(arguments["per_device_train_batch_size"]) * int(arguments.get("gradient_accumulation_steps", 1))


def source_spec(spec: Spec) -> Spec | None:
    """The run that trains the prompt which a TRANSFER starts from, on as many examples and with the same seed."""
    source = spec["source"]
    if source is None:
        return None
    arguments = {**spec["arguments"], **{k: v for k, v in source.items() if k not in {"task", "data"}}}
    changed = {"data": source.get("data"), "init": None, "source": None, "arguments": arguments}
    return {**spec, "task": source["task"], **changed}  # type: ignore[return-value, typeddict-item]


def _read(path: Path) -> dict[str, Any]:
    import yaml

    if not path.is_file():
        raise SuiteError(f"There is no suite {path}; the project's are in benchmarks/suites.")
    try:
        suite = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise SuiteError(f"{path} is not YAML: {error}") from None
    if not isinstance(suite, dict) or not all(suite.get(key) for key in ("tasks", "runs", "examples")):
        raise SuiteError(f"{path}: wanted a mapping with tasks, examples and runs, got {str(suite)[:80]!r}.")
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
        run = {"examples": suite["examples"], **run}
        for values in product(*(value if isinstance(value, list) else [value] for value in run.values())):
            flags = {**(suite.get("arguments") or {}), **(of_task or {}), **dict(zip(run, values, strict=True))}
            spec = _spec(name, flags, seed)
            if run_id(spec) not in seen:  # zero_shot is the same for every number of examples and seed
                seen.add(run_id(spec))
                yield spec


def _spec(task: str, flags: dict[str, Any], seed: int) -> Spec:
    method, examples, scored_over = (flags.pop(name, None) for name in ("method", "examples", "scored_over"))
    data, source = flags.pop("data", None), flags.pop("source", None)
    named = {name: flags.pop(name, None) for name in _SPEC_FLAGS}
    is_prompt, is_trained = method == "prompt_tuning", method != "zero_shot"
    spec: Spec = {
        "task": task,
        "data": data,
        "method": method,
        "init": named["init"] if is_prompt else None,
        "source": source if is_prompt and named["init"] == "TRANSFER" else None,
        "quantization": named["quantization"],
        "task_type": named["task_type"],
        "budget": {"examples": examples if is_trained else 0},
        "seed": seed if is_trained else 0,
        "arguments": flags,
    }
    if scored_over is not None:
        spec["scored_over"] = scored_over
    _check(spec)
    return spec


def _check_kinds(suite: Mapping[str, Any]) -> None:
    for name in ("seeds", "runs"):
        if not isinstance(suite.get(name) or [], list):
            raise ValueError(f"{name}: wanted a list, got {suite[name]!r}")
    mappings = [("tasks", suite["tasks"]), ("arguments", suite.get("arguments") or {})]
    if isinstance(suite["tasks"], dict):
        mappings += [(f"the task {name}", of_task or {}) for name, of_task in suite["tasks"].items()]
    for what, value in [*mappings, *(("a run", run) for run in suite["runs"])]:
        if not isinstance(value, dict):
            raise ValueError(f"{what}: wanted a mapping, got {value!r}")
        if not isinstance(value.get("source") or {}, dict):
            raise ValueError(f"the source of {what}: wanted a mapping, got {value['source']!r}")
    limit = suite.get("time_limit_s", TIME_LIMIT_S)
    if isinstance(limit, bool | str | None) or not 0 < limit < math.inf:
        raise ValueError(f"time_limit_s: wanted a number of seconds, got {limit!r}")


def _check(spec: Spec) -> None:
    from transformers import TrainingArguments

    from peft_prompt_ext._choices import check_choice
    from peft_prompt_ext.inits import available_inits
    from peft_prompt_ext.tasks import available_tasks
    from peft_prompt_ext.training.arguments import DataArguments, MethodArguments, ModelArguments

    kinds: tuple[Any, ...] = (ModelArguments, DataArguments, MethodArguments, TrainingArguments)
    known = {field.name for kind in kinds for field in fields(kind)} - _TAKEN
    check_choice("method", spec["method"], METHODS)
    for name, choices in (("init", available_inits()), ("quantization", QUANTIZATIONS), ("scored_over", PRECISIONS)):
        if spec.get(name) is not None:
            check_choice(name, spec[name], choices)  # type: ignore[literal-required]
    if "scored_over" in spec and spec["method"] not in {"prompt_tuning", "lora"}:
        raise ValueError(f"scored_over: {spec['method']} has no adapter that another base model takes")
    for name in spec["arguments"]:
        check_choice("flag", name, known)
    if (spec["init"] == "TRANSFER") != (spec["source"] is not None):
        raise ValueError(f"the init TRANSFER of {spec['task']} needs `source: {{task: ..., data: ...}}`")
    if spec["source"] is not None:
        check_choice("task of a source", spec["source"].get("task"), available_tasks())
        for name in set(spec["source"]) - {"task", "data"}:
            check_choice("flag of a source", name, known)
    if not isinstance(spec["seed"], int):
        raise ValueError(f"a seed is a whole number, got {spec['seed']!r}")
    for trained in filter(None, (spec, source_spec(spec))) if spec["method"] != "zero_shot" else ():
        if "per_device_train_batch_size" not in trained["arguments"]:
            raise ValueError("arguments need per_device_train_batch_size, which says how many examples a step sees")
        count, rows = trained["budget"]["examples"], batch_size(trained)
        if rows < 1:
            raise ValueError(f"a step has one row or more, got {rows}")
        if type(count) is not int or count < 1 or count % rows:
            raise ValueError(f"examples: {count!r} is no whole number of steps of {rows} rows")
