"""Runs as they lie in the stores: the event that tells most of each, where it stands, and whether it can be used."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..harness.pace import kind_id, kind_of, pace_path, read_pace, step_seconds, with_steps
from ..harness.store import RunStore
from ..harness.suite import budget_of, source_spec, steps_of


SPEC_KEYS = ("task", "data", "method", "init", "source", "quantization", "task_type", "budget", "seed", "arguments")
DEFAULT_MODEL = "the recipe's default"
DISTURBED = 0.1  # of the machine's CPU time, used by other programs: more, and a timing says little about the method
_NUMBERS = (
    *("score", "score_before", "loss", "eval_samples", "examples_seen", "tokens_seen", "train_time_s", "steps"),
    *("step_time_s", "tokens_per_s", "peak_memory_bytes", "weights_bytes", "trainable_parameters", "adapter_bytes"),
)
_NUMBERS_OR_NULL = (
    *("source_time_s", "inference_time_s", "bare_inference_time_s", "unrelated_loss", "bare_unrelated_loss"),
    *("energy_j", "other_cpu_share"),
)
_LATER_NUMBERS = ("source_rows", "source_rows_left_out", "majority")  # older stores have none
_TOLD = {"started": 0, "ok": 2}  # how much an event tells; that of a run that ended badly: 1


class EvidenceError(ValueError):
    """Files from which no report can be made."""


@dataclass(frozen=True)
class Store:
    """A file that was read: its name, its hash, its lines, and the numbers of those that are not whole."""

    name: str
    sha256: str
    lines: int
    torn: tuple[int, ...]


@dataclass(frozen=True)
class Pace:
    """Steps of a kind of run that were timed in turns with those of others, and where they stand.

    Attributes:
        row: As it is in the file, see `harness.pace`.
        file, line: Where; lines count from 1.
    """

    row: Mapping[str, Any]
    file: str
    line: int


@dataclass(frozen=True)
class Run:
    """The event that tells most of a run, and where it stands.

    Attributes:
        event: As it is in the store.
        file, line: Where; lines count from 1.
        problem: Why its result cannot be used although the run ended well; "" if it can.
        step_s, source_step_s: Seconds of a step of its kind and of its source's, timed in turns with all others;
            None if that was not done.
    """

    event: Mapping[str, Any]
    file: str
    line: int
    problem: str = ""
    step_s: float | None = None
    source_step_s: float | None = None

    @property
    def run_id(self) -> str:
        """The hash of its spec."""
        return self.event["run_id"]

    @property
    def spec(self) -> Mapping[str, Any]:
        """What was run."""
        return self.event["spec"]

    @property
    def env(self) -> Mapping[str, Any]:
        """Machine, versions, commit and hashes; empty if the run did not come so far."""
        return self.event["env"] or {}

    @property
    def result(self) -> Mapping[str, Any]:
        """What was measured; empty if nothing was."""
        return self.event["result"] or {}

    @property
    def seed(self) -> int:
        """Its seed."""
        return self.spec["seed"]

    @property
    def counts(self) -> bool:
        """Whether it measured something that can be used."""
        return self.event["status"] == "ok" and not self.problem

    @property
    def state(self) -> str:
        """How it ended, for people."""
        if self.problem:
            return "unusable result"
        return {"started": "not ended"}.get(self.event["status"], self.event["status"].replace("_", " "))

    @property
    def model(self) -> str:
        """The base model."""
        return model_of(self.spec)

    @property
    def device(self) -> str | None:
        """The kind: "cpu" or "cuda"; None if the run did not come so far."""
        return self.env.get("device")

    @property
    def machine(self) -> tuple[str, str]:
        """Name and instruction set."""
        return str(self.env.get("machine")), str(self.env.get("capability"))

    @property
    def has_pace(self) -> bool:
        """Whether steps of its kind, and of its source's, were timed in turns."""
        return self.step_s is not None and (self.spec["source"] is None or self.source_step_s is not None)

    def at_pace(self) -> Run:
        """The same run, its seconds those of its steps as they were timed in turns."""
        result, changed = self.result, {"step_time_s": self.step_s}
        changed["train_time_s"] = total = result["steps"] * self.step_s
        changed["tokens_per_s"] = result["tokens_seen"] / total
        changed["curve"] = [
            {**point, "seconds": total * point["seconds"] / result["train_time_s"]}
            for point in result.get("curve") or []
        ]
        source = source_spec(self.spec)
        if source is not None:
            changed["source_time_s"] = steps_of(source) * self.source_step_s
        return replace(self, event={**self.event, "result": {**result, **changed}})

    @property
    def disturbed(self) -> bool:
        """Whether other programs used so much of the machine that its timings are not to be trusted."""
        return (self.result.get("other_cpu_share") or 0.0) > DISTURBED


def model_of(spec: Mapping[str, Any]) -> str:
    """The base model of a run."""
    return spec["arguments"].get("model_name_or_path") or DEFAULT_MODEL


def result_problem(result: Any) -> str:
    """What makes a result unusable, or ""."""
    if not isinstance(result, dict):
        return f"no result but {result!r}"
    for name in (*_NUMBERS, *_NUMBERS_OR_NULL):
        if name not in result:
            return f"{name} is missing"
        if not (result[name] is None and name in _NUMBERS_OR_NULL) and not _is_number(result[name]):
            return f"{name} is no finite number ({result[name]!r})"
    for name in _LATER_NUMBERS:
        if not (result.get(name) is None or _is_number(result[name])):
            return f"{name} is no finite number ({result[name]!r})"
    for point in result.get("curve") or []:
        if not all(_is_number(point.get(name)) for name in ("examples", "seconds", "score")):
            return f"a point of the curve is not three finite numbers ({point!r})"
    correct = result.get("correct")
    if correct is not None and not re.fullmatch(f"[01]{{{result['eval_samples']}}}", str(correct)):
        return f"correct is not one digit for each of {result['eval_samples']} rows"
    return ""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def read_stores(paths: Iterable[str | Path]) -> tuple[tuple[Store, ...], tuple[Run, ...], tuple[Pace, ...]]:
    """Read stores, and the files beside them of steps that were timed in turns.

    Of a run that is in several of them the one that counts is taken, else the one that started last.
    """
    stores, runs, paces = [], {}, []
    for path in map(Path, paths):
        store, found = _read(path)
        stores.append(store)
        timed = pace_path(path)
        if timed.is_file():
            content = timed.read_bytes()
            stores.append(Store(timed.name, hashlib.sha256(content).hexdigest(), len(content.splitlines()), ()))
        of_file = read_pace(timed)
        paces += [Pace(row, timed.name, row["line"]) for row in of_file.values()]
        for run in (_with_pace(run, step_seconds(of_file)) for run in found):
            known = runs.get(run.run_id)
            if known is None or _rank(run) >= _rank(known):
                runs[run.run_id] = run
    return tuple(stores), tuple(runs.values()), tuple(paces)


def _with_pace(run: Run, step_s: Mapping[str, float | None]) -> Run:
    """With the steps that were timed for its store; what was given others for its seconds does not count."""
    source = source_spec(run.spec)
    own, of_source = (spec and step_s.get(kind_id(kind_of(spec))) for spec in (run.spec, source))
    unit, amount = budget_of(run.spec)
    wanted = with_steps([{**run.spec, "budget": {unit: amount}}], step_s)[0]["budget"]
    problem = run.problem
    if run.counts and "steps" in wanted and wanted != run.spec["budget"]:
        problem = f"its budget is {run.spec['budget']}, and {amount:g} seconds are {wanted} by the pace"
    return replace(run, step_s=own, source_step_s=of_source, problem=problem)


def _rank(run: Run) -> tuple[bool, str]:
    return run.counts, str(run.event["started_at"])


def _read(path: Path) -> tuple[Store, list[Run]]:
    if not path.is_file():
        raise EvidenceError(f"There is no results file {path}.")
    latest: dict[str, Mapping[str, Any]] = {}
    for event in RunStore(path).events():
        known = latest.get(event["run_id"], event)
        if _TOLD.get(event["status"], 1) >= _TOLD.get(known["status"], 1):  # a rerun that is killed loses no result
            latest[event["run_id"]] = event
    content = path.read_bytes()
    where, torn = _line_numbers(content)
    runs = []
    for run_id, event in latest.items():
        line = where[run_id, event["attempt"], event["status"]]
        missing = [key for key in SPEC_KEYS if key not in event["spec"]]
        if missing or not event["spec"]["budget"]:
            raise EvidenceError(f"{path}, line {line}: the spec of a run has no {', '.join(missing) or 'budget'}.")
        problem = result_problem(event["result"]) if event["status"] == "ok" else ""
        runs.append(Run(event, path.name, line, problem))
    return Store(path.name, hashlib.sha256(content).hexdigest(), len(content.splitlines()), torn), runs


def _line_numbers(content: bytes) -> tuple[dict[tuple[str, int, str], int], tuple[int, ...]]:
    """Where each event stands, by run id, attempt and status; and the numbers of torn lines."""
    where, torn = {}, []
    for number, line in enumerate(content.split(b"\n"), start=1):
        if line.strip():
            try:
                event = json.loads(line)
            except ValueError:
                torn.append(number)
            else:
                where[event["run_id"], event["attempt"], event["status"]] = number
    return where, tuple(torn)
