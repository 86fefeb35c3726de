"""The grid on this machine, one run after the other, so that none disturbs another's timings."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from .execute import execute, forget
from .store import SCHEMA_VERSION, Event, RunStore, now, wanted
from .suite import Spec, run_id


Report = Callable[[Spec, Event], None]


def run_local(
    specs: Iterable[Spec],
    store: RunStore,
    runs: Path,
    data_dir: str | None,
    time_limit_s: float,
    rerun: str,
    report: Report,
) -> None:
    """Do every run that is wanted; one that another process does is waited for.

    Args:
        specs: The grid.
        store: Where events go.
        runs: Folder of all runs.
        data_dir: Where the folders of `spec["data"]` lie.
        time_limit_s: A run that takes longer is ended.
        rerun: See `store.wanted`.
        report: Called with each run and its last event.
    """
    before = store.latest()
    left = [spec for spec in specs if wanted(before.get(run_id(spec)), rerun)]
    while left:
        waiting = []
        for spec in left:
            with store.claim(run_id(spec)) as mine:
                if not mine:
                    waiting.append(spec)
                    continue
                event = store.latest().get(run_id(spec))
                if not ended_since(event, before.get(run_id(spec))):
                    event = _attempt(spec, event, store, runs, data_dir, time_limit_s)
            report(spec, event)
        if len(waiting) == len(left):
            time.sleep(1.0)
        left = waiting


def ended_since(event: Event | None, before: Event | None) -> bool:
    """Whether another process has done the run meanwhile."""
    return event is not None and event != before and event["status"] != "started"


def _attempt(
    spec: Spec, last: Event | None, store: RunStore, runs: Path, data_dir: str | None, time_limit_s: float
) -> Event:
    started = begin(spec, last)
    store.append(started)
    ended = end(started, execute(spec, runs, data_dir, time_limit_s, is_known=store.has_ended(run_id(spec))))
    store.append(ended)
    forget(spec, runs)
    return ended


def begin(spec: Spec, last: Event | None) -> Event:
    """The event that says that a run starts."""
    return {
        "schema_version": SCHEMA_VERSION,
        "run_id": run_id(spec),
        "attempt": last["attempt"] + 1 if last else 1,
        "status": "started",
        "spec": spec,
        "started_at": now(),
        "finished_at": None,
        "error": None,
        "result": None,
        "env": None,
    }


def end(started: Event, outcome: dict[str, Any]) -> Event:
    """The event that says how it ended."""
    return {**started, "finished_at": now(), **outcome}
