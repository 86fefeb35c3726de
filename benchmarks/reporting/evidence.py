"""What the stores hold, as plain data: runs, and the settings in which runs can be compared with each other.

A setting is one model on one kind of device with one budget of training. In it a run is an entry of a table: its row
is a variant (method, init, quantization), its column a task, and its seed one of the values behind the entry.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import median_low
from typing import Any

from ..harness.suite import budget_of
from .runs import EvidenceError, Pace, Run, Store, read_stores
from .statistics import MIN_SEEDS, interval


METHODS = {
    "prompt_tuning": "Prompt tuning",
    "lora": "LoRA",
    "full": "Full fine-tuning",
    "linear_probe": "Linear probe",
    "zero_shot": "Zero-shot",
}
INITS = ("RANDOM", "SAMPLE_VOCAB", "CLASS_LABELS", "TEXT", "TRANSFER")
UNSET = "default"
SCORED_ON = ("data", "held_out_samples", "max_eval_samples", "sample_seed")  # decide which rows are scored


@dataclass(frozen=True)
class Variant:
    """A row of a table.

    Attributes:
        method, init, quantization: As in a spec.
        extras: Further flags, where runs of this method differ in them.
    """

    method: str
    init: str | None
    quantization: str | None
    extras: tuple[tuple[str, str], ...] = ()

    @property
    def label(self) -> str:
        """Its name, for people."""
        parts = [METHODS.get(self.method, self.method), self.init, self.quantization]
        return ", ".join([*filter(None, parts), *(f"{name}={value}" for name, value in self.extras)])

    @property
    def order(self) -> tuple[Any, ...]:
        """Sorts rows: methods, then full precision first, then inits."""
        methods, inits = list(METHODS), [None, *INITS]
        method = methods.index(self.method) if self.method in methods else len(methods)
        init = inits.index(self.init) if self.init in inits else len(inits)
        extras = tuple((name, _number(value), value) for name, value in self.extras)
        return method, self.quantization or "", init, self.init or "", extras


def kind(variant: Variant) -> Variant:
    """The same, whatever its further flags."""
    return replace(variant, extras=())


@dataclass(frozen=True)
class Setting:
    """Runs that can be compared: one model, one kind of device, one budget.

    Attributes:
        unit: What the budget counts: "examples" or "seconds".
        is_search: Whether the rows scored were held out of train, to choose hyper-parameters.
        cells: Every run, by task and variant, in the order of the seeds.
    """

    model: str
    device: str
    unit: str
    amount: float
    is_search: bool
    cells: Mapping[tuple[str, Variant], tuple[Run, ...]]

    @property
    def title(self) -> str:
        """Its name, for people."""
        budget = f"{self.amount:,.10g} examples" if self.unit == "examples" else f"{self.amount:,.10g} s of training"
        return f"{self.model} on {self.device}, {budget}"

    @cached_property
    def tasks(self) -> tuple[str, ...]:
        """The columns, in the order of their names."""
        return tuple(sorted({task for task, _ in self.cells}))

    @cached_property
    def common(self) -> tuple[str, ...]:
        """The tasks that means are taken over: those that more than half of the variants were run on.

        Those with fewer than `MIN_SEEDS` seeds of most variants, as while a grid is still growing, only if all have
        fewer; those at chance only if all are.
        """
        run_on = Counter(task for task, _ in self.cells)
        often = tuple(task for task in self.tasks if 2 * run_on[task] > len(self.variants)) or self.tasks
        enough = tuple(task for task in often if self._seeds_of(task) >= MIN_SEEDS) or often
        return tuple(task for task in enough if task not in self.at_chance) or enough

    @cached_property
    def at_chance(self) -> tuple[str, ...]:
        """Tasks on which no method's interval is above `majority`: what methods differ by there is noise."""
        return tuple(
            task
            for task in self.tasks
            if (level := self.majority(task)) is not None
            and not any(self._is_above(task, variant, level) for variant in self.variants)
        )

    def _is_above(self, task: str, variant: Variant, level: float) -> bool:
        scores = [run.result["score"] for run in self.runs(task, variant)]
        return (
            bool(scores) and variant.method != "zero_shot" and (s := interval(scores)).mean - (s.half or 0.0) > level
        )

    def majority(self, task: str) -> float | None:
        """Accuracy of always giving the most common label; None where another metric is the main one, or unknown."""
        results = [run.result for variant in self.variants for run in self.runs(task, variant)]
        known = [result["majority"] for result in results if result.get("majority") is not None]
        return known[0] if known and {result["main_metric"] for result in results} == {"accuracy"} else None

    def _seeds_of(self, task: str) -> int:
        """How many most of what was trained on a task has; what is ahead or fails does not decide."""
        trained = [
            runs for (name, variant), runs in self.cells.items() if name == task and variant.method != "zero_shot"
        ]
        return median_low([len({run.seed for run in runs if run.counts}) for runs in trained] or [0])

    @property
    def columns(self) -> dict[str, tuple[str, ...]]:
        """Each task, and the mean that methods are compared by."""
        return {**{task: (task,) for task in self.tasks}, self.common_title: self.common}

    @property
    def common_title(self) -> str:
        """The name of the mean."""
        if len(self.common) == 1:
            return self.common[0]
        return f"mean of {len(self.tasks)} tasks" if self.common == self.tasks else f"mean of {', '.join(self.common)}"

    @cached_property
    def variants(self) -> tuple[Variant, ...]:
        """The rows, in the order of methods and inits."""
        return tuple(sorted({variant for _, variant in self.cells}, key=lambda variant: variant.order))

    def runs(self, task: str, variant: Variant) -> tuple[Run, ...]:
        """The runs of an entry that count."""
        return tuple(run for run in self.cells.get((task, variant), ()) if run.counts)

    def timed(self, task: str, variant: Variant) -> tuple[Run, ...]:
        """Those whose seconds of training can be compared.

        A virtual machine is now faster and now slower. Where steps of a task were timed in turns, seconds are those of
        the steps at that pace, and runs of kinds that were not timed are left out; else they are as measured.
        """
        if task in self._paced:
            return tuple(run.at_pace() for run in self.runs(task, variant) if run.has_pace and run.result["steps"])
        return self.at_rest(task, variant)

    def at_rest(self, task: str, variant: Variant) -> tuple[Run, ...]:
        """Those that had the machine that ran most for themselves: what was measured of them is not disturbed."""
        return tuple(run for run in self.runs(task, variant) if self.is_at_rest(run))

    def is_at_rest(self, run: Run) -> bool:
        """Whether it had the machine that ran most of this setting for itself."""
        return not run.disturbed and run.machine == self.machine

    @cached_property
    def _paced(self) -> frozenset[str]:
        """Tasks of which steps were timed in turns."""
        return frozenset(task for (task, _), runs in self.cells.items() if any(run.has_pace for run in runs))

    @property
    def has_pace(self) -> bool:
        """Whether steps of any of its tasks were timed in turns."""
        return bool(self._paced)

    @cached_property
    def machine(self) -> tuple[str, str]:
        """Name and instruction set of the machine that ran most."""
        counts = Counter(run.machine for runs in self.cells.values() for run in runs if run.counts)
        return min(counts, key=lambda machine: (-counts[machine], machine), default=("None", "None"))

    @property
    def has_results(self) -> bool:
        """Whether there is more than the untrained model."""
        return any(
            run.counts and (run.spec["method"] != "zero_shot" or not self.amount)
            for runs in self.cells.values()
            for run in runs
        )

    @cached_property
    def seeds(self) -> tuple[int, ...]:
        """Of everything that is drawn: zero-shot has nothing random."""
        cells = [runs for (_, variant), runs in self.cells.items() if variant.method != "zero_shot"]
        return tuple(sorted({run.seed for runs in cells for run in runs}))


@dataclass(frozen=True)
class Evidence:
    """Everything that a report is made from."""

    stores: tuple[Store, ...]
    runs: tuple[Run, ...]
    settings: tuple[Setting, ...]
    paces: tuple[Pace, ...]


def read_evidence(paths: Iterable[str | Path]) -> Evidence:
    """Read stores and put their runs together.

    Raises:
        EvidenceError: A file is missing, or there is no run that counts.
        StoreError: A file is no store, or from a newer version.
    """
    stores, runs, paces = read_stores(paths)
    if not stores:
        raise EvidenceError("There is nothing to report: no results file was given, and the project has none.")
    names = ", ".join(store.name for store in stores)
    if not runs:
        raise EvidenceError(f"There is nothing to report: {names} holds no run. Run a suite first.")
    if not any(run.counts for run in runs):
        states = ", ".join(f"{count} {state}" for state, count in Counter(run.state for run in runs).items())
        raise EvidenceError(f"There is nothing to report: no run of {names} ended well ({states}).")
    ordered = tuple(sorted(runs, key=_order))
    return Evidence(stores, ordered, tuple(_settings(ordered)), paces)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.inf


def _order(run: Run) -> tuple[Any, ...]:
    budget = budget_of(run.spec)
    return _is_search(run), _variant(run).order, budget, run.spec["task"], run.seed, run.run_id


def _settings(runs: tuple[Run, ...]) -> list[Setting]:
    """Group runs; those without a device or without training belong to each setting that they can be compared in."""
    keys = set()
    devices = {run.device for run in runs if run.device} or {"cpu"}
    for run in runs:
        unit, amount = budget_of(run.spec)
        for device in {run.device} - {None} or devices:
            keys.add((run.model, device, unit, amount, _is_search(run)))
    trained = {(model, device, search) for model, device, _, amount, search in keys if amount}
    keys = {key for key in keys if key[3] or (key[0], key[1], key[4]) not in trained}
    settings = []
    for model, device, unit, amount, search in sorted(keys, key=lambda key: (key[4], *key[:4])):
        members = [
            run
            for run in runs
            if (run.model, _is_search(run)) == (model, search)
            and run.device in {device, None}
            and (run.spec["method"] == "zero_shot" or budget_of(run.spec) == (unit, amount))
        ]
        trained_on = {run.spec["task"] for run in members if run.spec["method"] != "zero_shot"}
        members = [run for run in members if run.spec["task"] in trained_on or not amount]
        settings.append(Setting(model, device, unit, amount, search, _cells(members)))
    return settings


def _is_search(run: Run) -> bool:
    return bool(run.spec["arguments"].get("held_out_samples"))


def _variant(run: Run, extras: tuple[tuple[str, str], ...] = ()) -> Variant:
    return Variant(run.spec["method"], run.spec["init"], run.spec["quantization"], extras)


def _cells(runs: list[Run]) -> dict[tuple[str, Variant], tuple[Run, ...]]:
    def task_of(run: Run) -> str:
        return run.spec["task"]

    def row_of(run: Run) -> tuple[str, Variant]:
        return tasks[run.run_id], _variant(run)

    scored = _differing(runs, task_of, task_of, lambda name: name in SCORED_ON)
    tasks = {run.run_id: ", ".join([task_of(run), *(f"{k}={v}" for k, v in scored[run.run_id])]) for run in runs}
    extras = _differing(runs, row_of, _variant, lambda name: name not in SCORED_ON)
    cells: dict[tuple[str, Variant], list[Run]] = {}
    for run in sorted(runs, key=lambda run: (run.seed, run.run_id)):
        cells.setdefault((tasks[run.run_id], _variant(run, extras[run.run_id])), []).append(run)
    return {key: tuple(members) for key, members in cells.items()}


def _differing(
    runs: list[Run], entry: Callable[[Run], Any], line: Callable[[Run], Any], wanted: Callable[[str], bool]
) -> dict[str, tuple[tuple[str, str], ...]]:
    """The flags of each run, by its id, that differ among runs of one entry of some line: they tell the runs apart."""
    entries: dict[Any, list[dict[str, str]]] = {}
    for run in runs:
        entries.setdefault(entry(run), []).append(flags(run))
    differ: dict[Any, set[str]] = {}
    for run in runs:
        alike = entries[entry(run)]
        names = {name for each in alike for name in each if wanted(name)}
        found = {name for name in names if len({each.get(name, UNSET) for each in alike}) > 1}
        differ.setdefault(line(run), set()).update(found)
    return {
        run.run_id: tuple((name, flags(run).get(name, UNSET)) for name in sorted(differ[line(run)])) for run in runs
    }


def flags(run: Run) -> dict[str, str]:
    """What was set for a run, as text."""
    spec = run.spec
    given = {**spec["arguments"], "data": spec["data"], "task_type": spec["task_type"], "source": spec["source"]}
    return {
        name: value if isinstance(value, str) else json.dumps(value)
        for name, value in given.items()
        if value is not None
    }
