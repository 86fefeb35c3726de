"""The grid on a Ray cluster: Ray places runs, and tries one again whose worker or node died.

The project and its packages have to be installed on every node at the same path, and the rows of --data_dir be there.
"""

import logging
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from . import execute as execution
from .execute import Grid
from .machine import ROOT
from .store import wanted
from .suite import SuiteError, run_id


TRIES = 3  # more than one node may die


def run_on_ray(grid: Grid, address: str | None = None, num_cpus: float = 2, num_gpus: float = 0) -> None:
    """Do every run that is wanted and that no other process holds; each holds some cores and GPUs.

    A run starts, for the store, when Ray has it; it may wait for room on the cluster. Without an address the cluster
    is the one that `ray start` has made here, or a new one on this machine.

    Raises:
        SuiteError: Ray is not installed, or no node of the cluster has what a run holds.
    """
    try:
        import ray
    except ImportError as error:
        raise SuiteError("--executor ray needs Ray: pip install 'peft-prompt-ext[ray]'") from error

    if not ray.is_initialized():
        ray.init(address=address, logging_level=logging.WARNING, runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}})
    _check_nodes(ray.nodes(), {"CPU": num_cpus, "GPU": num_gpus})
    remote = ray.remote(num_cpus=num_cpus, num_gpus=num_gpus, max_retries=TRIES)(execution.execute)
    store, before = grid.store, grid.store.latest()
    data_dir = grid.data_dir and str(Path(grid.data_dir).resolve())  # a worker has its own folder
    with ExitStack() as claims:
        under_way = {}
        for spec in grid.specs:
            name = run_id(spec)
            if wanted(before.get(name), grid.rerun) and claims.enter_context(store.claim(name)):
                event = store.latest().get(name)
                if execution.ended_since(event, before.get(name)):
                    grid.report(spec, event)  # type: ignore[arg-type]
                    continue
                started, is_known = execution.begin(grid, spec, event), store.has_ended(name)
                arguments = spec, grid.runs, data_dir, grid.time_limit_s, execution.WORKER, is_known
                under_way[remote.remote(*arguments)] = started
        while under_way:
            done, _ = ray.wait(list(under_way))
            started = under_way.pop(done[0])
            try:
                outcome = ray.get(done[0])
            except ray.exceptions.RayError as error:
                is_memory = isinstance(error, ray.exceptions.OutOfMemoryError)
                status = "out_of_memory" if is_memory else "failed"
                outcome = {"status": status, "error": f"Ray: {error}", "result": None, "env": None}
            grid.report(started["spec"], execution.end(grid, started, outcome))


def _check_nodes(nodes: Iterable[Mapping[str, Any]], wanted: Mapping[str, float]) -> None:
    """Ray would wait for such a node for ever."""
    found = [node["Resources"] for node in nodes if node["Alive"]]
    if not any(all(of_node.get(name, 0) >= count for name, count in wanted.items()) for of_node in found):
        have = "; ".join(", ".join(f"{of_node.get(name, 0):g} {name}" for name in wanted) for of_node in found)
        raise SuiteError(
            f"a run holds {', '.join(f'{count:g} {name}' for name, count in wanted.items())}, and no node of the "
            f"cluster has that much (they have {have}): give --cpus_per_run and --gpus_per_run"
        )
