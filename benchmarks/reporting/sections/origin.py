"""Where every number comes from: failures, runs with their commands, machines, and what was not measured."""

from __future__ import annotations

import json
import shlex
from collections.abc import Container, Iterable, Mapping
from itertools import product
from typing import Any

from ...harness.pace import length_of
from ...harness.suite import budget_of, run_id, source_spec, train_arguments
from ..document import Block, Bullets, Cell, Section, Table, Text, cells
from ..evidence import INITS, METHODS, Evidence, Variant
from ..measures import COSTS, MISSING, OF_SOURCE, points, seconds
from ..runs import DISTURBED, Pace, Run, model_of
from ..statistics import interval
from .engine import SpeedRow


def failures_section(evidence: Evidence, speed: list[SpeedRow]) -> Section:
    """What did not end well, and lines that could not be read."""
    rows = []
    for run in evidence.runs:
        if not run.counts:
            reason = run.problem or run.event["error"] or "no reason is in the store"
            if run.event["status"] == "started":
                reason = f"started at {run.event['started_at']}, not ended"
            rows.append([_name(run), run.spec["task"], str(run.seed), _budget(run), run.state, reason, _where(run)])
    for failed in speed:
        if "error" in failed.row:
            what = f"speed of {failed.row['method']}, {failed.row['num_virtual_tokens']} virtual tokens"
            where = f"{failed.file}:{failed.line}"
            rows.append([what, "-", str(failed.row.get("seed", "-")), "-", "failed", str(failed.row["error"]), where])
    torn = [
        f"{store.name}: line {number} is not whole (a kill tore it) and was left out."
        for store in evidence.stores
        for number in store.torn
    ]
    blocks: list[Block] = [Text("Every run ended well.")]
    if rows:
        columns = ("method", "task", "seed", "budget", "state", "reason", "line")
        blocks = [Table("Runs without a usable result", columns, list(map(cells, rows)))]
    return Section("failures", "Failures", [*blocks, *([Bullets(torn)] if torn else [])])


def runs_section(evidence: Evidence) -> Section:
    """Every run, what was typed for it, and on what it ran."""
    environments = {key: f"E{number}" for number, key in enumerate(_environments(evidence), start=1)}
    explanation = (
        "DATA_DIR is the folder that the suite's data lie in. At equal seconds the number of steps is given: what "
        "the seconds buy by a timing of all methods in turns. A TRANSFER's source was "
        "trained without rows that share text with the scored ones. Disturbed: other programs used more than "
        f"{100 * DISTURBED:.0f} % of the machine's CPU time while the run trained; inference and energy are not "
        "taken from it."
    )
    runs = Table(
        "Runs",
        (
            "run",
            "method",
            "task",
            "seed",
            "budget",
            "score",
            "training",
            "attempt",
            "line",
            "environment",
        ),
        [cells([*_run_texts(run), environments.get(_environment(run), "unknown")]) for run in evidence.runs],
        [f"run-{run.run_id}" for run in evidence.runs],
    )
    commands = Table(
        "The command behind every run",
        ("run", "command"),
        [cells([run.run_id, Cell(command(run), is_code=True)]) for run in evidence.runs],
    )
    machines = Table(
        "Environments",
        ("name", "device", "machine", "Python", "packages", "commit"),
        [cells([name, *_environment_texts(json.loads(key))]) for key, name in environments.items()],
    )
    blocks: list[Block] = [Text(explanation), runs, commands, machines, *_paces(evidence), _hashes(evidence)]
    return Section("runs", "Every run, its line and its command", blocks)


def _paces(evidence: Evidence) -> list[Block]:
    """The steps that were timed in turns."""
    if not evidence.paces:
        return []
    explanation = (
        "The pace: seconds of a step of each kind of run, ± 95 % over the steps, whose batches differ in length. The "
        "steps are spread over those of a run of so many examples, or, for seconds, of a run of so many steps. Each "
        "task is a timing of its own, in which one kind of an earlier one is timed again; the factor brings that one "
        "to its first time, and is in the seconds."
    )
    rows = [_pace_texts(pace) for pace in evidence.paces]
    columns = ("method", "task", "run of", "a step", "steps", "factor", "other programs", "machine", "commit", "line")
    return [Text(explanation), Table("Steps timed in turns", columns, list(map(cells, rows)))]


def _pace_texts(pace: Pace) -> list[str]:
    row, kind = pace.row, pace.row["kind"]
    step, times, factor = f"failed: {row['error']}", row["steps_s"], row["factor"]
    if times:
        half = interval([factor * time for time in times]).half
        step = f"{row['step_s']:.2f}" + (" s" if half is None else f" ± {half:.2f} s")
    what = [Variant(kind["method"], None, kind["quantization"]).label, kind["task"], length_of(kind), step]
    others = MISSING if row.get("other_cpu_share") is None else f"{100 * row['other_cpu_share']:.0f} % of the CPU"
    what += [str(len(times)), f"{factor:.3f}", others]
    return [*what, _machine_text(row), _commit_text(row), f"{pace.file}:{pace.line}"]


def _run_texts(run: Run) -> list[str]:
    score, time = run.state, MISSING
    if run.counts:
        score = points(run.result["score"])
        time = seconds(run.result["train_time_s"]) if run.result["steps"] else "no training"
    time += ", disturbed" if run.disturbed else ""
    what = [run.run_id, _name(run), run.spec["task"], str(run.seed), _budget(run), score, time]
    return [*what, str(run.event["attempt"]), _where(run)]


def gaps_section(evidence: Evidence, wanted: list[Mapping[str, Any]] | None) -> Section:
    """What has no usable run: of a suite, and of the grid that the runs span."""
    wanted_keys = {_key(spec) for spec in wanted or []}
    entries = [*_suite(evidence, wanted or []), *_grid(evidence, wanted_keys)]
    missing = [(key, seed) for *key, seed, counts in entries if not counts]
    seeds: dict[tuple[str, ...], list[int]] = {}
    for (setting, method, task, state), seed in missing:
        seeds.setdefault((setting, method, task, state), []).append(seed)
    tasks: dict[tuple[str, ...], list[str]] = {}
    for (setting, method, task, state), found in seeds.items():
        tasks.setdefault((setting, method, ", ".join(map(str, found)), state), []).append(task)
    rows = [[*key[:2], ", ".join(found), *key[2:]] for key, found in tasks.items()]
    text = "every task with every method and every seed that a setting has"
    suites = "" if wanted is None else "what the suites want, and "
    blocks: list[Block] = [
        Text(f"The grid is {suites}{text}. {len(missing)} of its {len(entries)} entries have no usable run.")
    ]
    if rows:
        columns = ("setting", "method", "tasks", "seeds", "state")
        blocks.append(Table("Without a usable run", columns, list(map(cells, rows))))
    return Section("gaps", "What was not measured", [*blocks, Bullets(_never(evidence))])


def _suite(evidence: Evidence, wanted: list[Mapping[str, Any]]) -> list[tuple[str, str, str, str, int, bool]]:
    """Setting, method, task, state, seed, and whether there is a usable run."""
    done = {run.run_id: run for run in evidence.runs}
    entries = []
    for spec in wanted:
        run = done.get(run_id(spec))
        label = Variant(spec["method"], spec["init"], spec["quantization"]).label
        setting = f"{model_of(spec)}, {_budget_text(spec)}"
        counts = run is not None and run.counts
        entries.append((setting, label, spec["task"], run.state if run else "not run", spec["seed"], counts))
    return entries


def _key(spec: Mapping[str, Any]) -> tuple[Any, ...]:
    """What a suite and the grid of the runs know an entry by, whatever its seed; zero-shot has no budget."""
    budget = None if spec["method"] == "zero_shot" else budget_of(spec)
    return model_of(spec), spec["task"], spec["method"], spec["init"], spec["quantization"], budget


def _grid(evidence: Evidence, wanted: Container[tuple[Any, ...]]) -> list[tuple[str, str, str, str, int, bool]]:
    """The same for everything that the runs of a setting span and that no suite wants."""
    entries = []
    for setting in evidence.settings:
        for task, variant in product(setting.tasks, setting.variants) if not setting.is_search else ():
            budget = None if variant.method == "zero_shot" else (setting.unit, setting.amount)
            if (setting.model, task, variant.method, variant.init, variant.quantization, budget) in wanted:
                continue
            runs = {run.seed: run for run in setting.cells.get((task, variant), ())}
            for seed in (runs or [0]) if variant.method == "zero_shot" else setting.seeds:
                run = runs.get(seed)
                counts = run is not None and run.counts
                state = run.state if run else "not run"
                entries.append((setting.title, variant.label, task, state, seed, counts))
    return entries


def command(run: Run) -> str:
    """What to type to train what the run trained, with the prompt that it started from."""
    lines, extra = [], []
    source = source_spec(run.spec)
    if source is not None:
        lines.append(_line(source, ["--output_dir", "SOURCE"]))
        extra = ["--prompt_tuning_init_kwargs", json.dumps({"source": "SOURCE"})]
    return " && ".join([*lines, _line(run.spec, [*extra, "--output_dir", "OUTPUT"])])


def _line(spec: Any, extra: list[str]) -> str:
    return shlex.join(["python", "recipes/train.py", *train_arguments(spec, "DATA_DIR"), *extra])


def _never(evidence: Evidence) -> list[str]:
    """Whole kinds of things of which there is nothing."""
    counted = [run for run in evidence.runs if run.counts]
    lines = [] if any(run.device == "cuda" for run in counted) else ["A GPU: no run used one."]
    methods = {run.spec["method"] for run in counted}
    lines += [f"{label}: no usable run." for method, label in METHODS.items() if method not in methods]
    inits = {run.spec["init"] for run in counted}
    lines += [f"Prompt tuning, {init}: no usable run." for init in INITS if init not in inits]
    if not any(run.spec["quantization"] in {"nf4", "fp4"} for run in counted):
        lines.append("4 bits: no usable run.")
    for cost in COSTS:
        trained = [run.result for run in counted if run.result["steps"]]
        if cost not in OF_SOURCE and all(cost.value(result) is None for result in trained):
            lines.append(f"{cost.title[0].upper()}{cost.title[1:]}: no run has it.")
    return lines or ["Every kind of number was measured at least once."]


def _hashes(evidence: Evidence) -> Table:
    """Which rows the runs of a task were scored on, and with which weights."""
    found: dict[tuple[str, ...], int] = {}
    for run in evidence.runs:
        if run.counts:
            data, weights = (
                str(run.env.get(name) or "not recorded")[:12] for name in ("scored_rows_sha256", "weights_sha256")
            )
            key = (run.spec["task"], run.model, str(run.result["eval_samples"]), data, weights)
            found[key] = found.get(key, 0) + 1
    rows = [cells([*key, str(count)]) for key, count in sorted(found.items())]
    columns = ("task", "model", "scored rows", "scored rows, sha256", "weights, sha256", "runs")
    return Table("Rows and weights (the first 12 digits of their hashes)", columns, rows)


def _environment(run: Run) -> str:
    keys = (
        *("device", "dtype", "machine", "capability", "threads", "thread_variables"),
        *("python", "versions", "commit", "dirty"),
    )
    return json.dumps({key: run.env.get(key) for key in keys}, sort_keys=True) if run.env else ""


def _environments(evidence: Evidence) -> Iterable[str]:
    return dict.fromkeys(_environment(run) for run in evidence.runs if run.env)


def _environment_texts(env: Mapping[str, Any]) -> list[str]:
    packages = ", ".join(f"{name} {version}" for name, version in (env["versions"] or {}).items() if version)
    return [str(env["device"]), _machine_text(env), str(env["python"]), packages, _commit_text(env)]


def _machine_text(env: Mapping[str, Any]) -> str:
    """With what the model computes in and the threads, which older rows do not tell."""
    told = [str(env["machine"]), str(env["capability"])]
    told += [env["dtype"]] if env.get("dtype") else []
    told += [f"{env['threads']} threads"] if env.get("threads") else []
    return ", ".join([*told, *(f"{name}={value}" for name, value in (env.get("thread_variables") or {}).items())])


def _commit_text(env: Mapping[str, Any]) -> str:
    return f"{env['commit'] or 'unknown'}{' with changes' if env['dirty'] else ''}"


def _name(run: Run) -> str:
    return Variant(run.spec["method"], run.spec["init"], run.spec["quantization"]).label


def _budget(run: Run) -> str:
    return _budget_text(run.spec)


def _budget_text(spec: Mapping[str, Any]) -> str:
    unit, amount = budget_of(spec)
    return f"{amount:,.10g} {'s' if unit == 'seconds' else unit}"


def _where(run: Run) -> str:
    return f"{run.file}:{run.line}"
