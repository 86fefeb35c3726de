"""Runs in processes of their own, one at a time so that none disturbs another's timings, and their events."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from .machine import FILE, ROOT
from .store import SCHEMA_VERSION, Event, RunStore, wanted
from .suite import Spec, run_id


WHOLE_MODELS = {"full", "linear_probe"}
WORKER = [sys.executable, "-m", "benchmarks.harness.measure"]


class Grid(NamedTuple):
    """Runs that are to be done, and how."""

    specs: Iterable[Spec]
    store: RunStore
    data_dir: str | None  # where the folders of `spec["data"]` lie
    time_limit_s: float  # a run that takes longer is ended
    rerun: str  # see `store.wanted`
    report: Callable[[Spec, Event], None]  # called with each run and its last event

    @property
    def runs(self) -> Path:
        """The folder of all runs: each has one by its id, with its output in `log.txt`."""
        return self.store.path.with_suffix(".runs").resolve()


def execute(
    spec: Spec, runs: Path, data_dir: str | None, time_limit_s: float, worker: list[str], is_known: bool
) -> dict[str, Any]:
    """Run a spec to its end; returns `status`, `error`, `result` and `env` of its event.

    A whole outcome that a killed harness left in the run's folder is taken as it is, unless the store has it
    (`is_known`).
    """
    folder = runs / run_id(spec)
    outcome = folder / "outcome.json"
    if is_known:
        outcome.unlink(missing_ok=True)
    if not outcome.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        _empty(folder)
        (folder / "spec.json").write_text(json.dumps(spec), encoding="utf-8")
        command = [*worker, str(folder / "spec.json"), str(folder), "--parent", str(os.getpid())]
        command += ["--data_dir", str(Path(data_dir).resolve())] if data_dir is not None else []
        failure = _wait(command, folder / "log.txt", time_limit_s)
        if spec["method"] in WHOLE_MODELS:  # hundreds of megabytes of every run would fill the disk
            for path in folder.rglob("*.safetensors"):
                path.unlink()
        if not outcome.is_file():
            return {"result": None, "env": _environment(folder), **failure}
    ended = json.loads(outcome.read_text(encoding="utf-8"))
    return {**ended, "env": ended["env"] or _environment(folder)}


def begin(grid: Grid, spec: Spec, last: Event | None) -> Event:
    """Say in the store that a run starts; returns that event."""
    started = {
        "schema_version": SCHEMA_VERSION,
        "run_id": run_id(spec),
        "attempt": last["attempt"] + 1 if last else 1,
        "status": "started",
        "spec": spec,
        "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
        **dict.fromkeys(("finished_at", "error", "result", "env")),
    }
    grid.store.append(started)
    return started


def end(grid: Grid, started: Event, outcome: dict[str, Any]) -> Event:
    """Say in the store how it ended; the outcome in its folder is not needed any more, the trained adapter stays."""
    ended = {**started, "finished_at": datetime.now(UTC).isoformat(timespec="seconds"), **outcome}
    grid.store.append(ended)
    (grid.runs / started["run_id"] / "outcome.json").unlink(missing_ok=True)
    return ended


def ended_since(event: Event | None, before: Event | None) -> bool:
    """Whether another process has done the run meanwhile."""
    return event is not None and event != before and event["status"] != "started"


def run_local(grid: Grid) -> None:
    """Do every run that is wanted, one after the other, and wait for those that another process does."""
    store, before = grid.store, grid.store.latest()
    left = [spec for spec in grid.specs if wanted(before.get(run_id(spec)), grid.rerun)]
    while left:
        waiting = []
        for spec in left:
            name = run_id(spec)
            with store.claim(name) as mine:
                if not mine:
                    waiting.append(spec)
                    continue
                event = store.latest().get(name)
                if not ended_since(event, before.get(name)):
                    started, is_known = begin(grid, spec, event), store.has_ended(name)
                    limits = grid.runs, grid.data_dir, grid.time_limit_s
                    event = end(grid, started, execute(spec, *limits, WORKER, is_known))
            grid.report(spec, event)  # type: ignore[arg-type]
        if len(waiting) == len(left):
            time.sleep(1.0)
        left = waiting


def _environment(folder: Path) -> dict[str, Any] | None:
    """What a run that came to no result had said it ran on; None if it did not come so far."""
    with suppress(OSError, ValueError):
        return json.loads((folder / FILE).read_text(encoding="utf-8"))
    return None


def _wait(command: list[str], log: Path, time_limit_s: float) -> dict[str, str]:
    """Wait for the process; what an end without an outcome means."""
    with log.open("w", encoding="utf-8") as file:
        try:
            ran = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, timeout=time_limit_s)
        except subprocess.TimeoutExpired:
            return {"status": "timeout", "error": f"not done after {time_limit_s:g} s"}
    if ran.returncode == -9:
        return {"status": "out_of_memory", "error": "killed by signal 9, which Linux sends when memory has run out"}
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return {"status": "failed", "error": f"exit status {ran.returncode}: {lines[-1] if lines else 'no output'}"}


def _empty(folder: Path) -> None:
    """Remove what a torn run has left; the recipe refuses a folder with another run's weights."""
    for part in ("run", "source"):
        shutil.rmtree(folder / part, ignore_errors=True)
    (folder / FILE).unlink(missing_ok=True)
