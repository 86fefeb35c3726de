"""The grid on this machine, one run after the other, so that none disturbs another's timings."""

from __future__ import annotations

import time

from . import execute as execution
from .execute import Grid
from .store import wanted
from .suite import run_id


def run_local(grid: Grid) -> None:
    """Do every run that is wanted; one that another process does is waited for."""
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
                if not execution.ended_since(event, before.get(name)):
                    started, is_known = execution.begin(grid, spec, event), store.has_ended(name)
                    limits = grid.runs, grid.data_dir, grid.time_limit_s
                    outcome = execution.execute(spec, *limits, execution.WORKER, is_known)
                    event = execution.end(grid, started, outcome)
            grid.report(spec, event)
        if len(waiting) == len(left):
            time.sleep(1.0)
        left = waiting
