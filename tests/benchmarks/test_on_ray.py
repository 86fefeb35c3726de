"""The grid on a local Ray cluster of two nodes, of which one is killed, with a stub in place of a run."""

import sys
import time
from pathlib import Path

import pytest
import yaml

from benchmarks.harness import execute as execution
from benchmarks.harness.execute import Grid, begin
from benchmarks.harness.on_ray import run_on_ray
from benchmarks.harness.store import RunStore
from benchmarks.harness.suite import SuiteError, load_suite, run_id


STUB = Path(__file__).parent / "stub_worker.py"


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    ray = pytest.importorskip("ray", reason="the extra peft-prompt-ext[ray] is not installed")
    from ray.cluster_utils import Cluster

    root = str(Path(__file__).parents[2])
    monkeypatch.setenv("PYTHONPATH", root)
    monkeypatch.setenv("STUB_LOG", str(tmp_path / "started.txt"))
    monkeypatch.setenv("STUB_SECONDS", "1.5")
    monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, runtime_env={"env_vars": {"PYTHONPATH": root}})
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::FutureWarning")
def test_a_grid_finishes_whole_though_a_node_dies(cluster, tmp_path, monkeypatch):
    path, store = tmp_path / "grid.yaml", RunStore(tmp_path / "runs.jsonl")
    tasks, arguments = {"movie_reviews": None, "plot_or_review": None}, {"per_device_train_batch_size": 4}
    grid = {"seeds": [0, 1, 2], "examples": 8, "arguments": arguments, "tasks": tasks, "runs": [{"method": "lora"}]}
    path.write_text(yaml.safe_dump(grid))
    monkeypatch.setattr(execution, "WORKER", [sys.executable, str(STUB)])
    specs, killed = load_suite(path), []
    with pytest.raises(
        SuiteError, match=r"holds 1 CPU, 1 GPU, and no node .* \(they have 1 CPU, 0 GPU; 1 CPU, 0 GPU\)"
    ):
        run_on_ray(Grid(specs, store, None, 60, "never", print), num_cpus=1, num_gpus=1)
    assert store.events() == []

    def report(spec, event):
        if not killed:
            cluster.remove_node(cluster.list_all_nodes()[-1])
            killed.append(time.monotonic())

    def specs_of_which_another_harness_does_one():
        yield from specs[:-1]
        store.append({**begin(other, specs[-1], None), "status": "failed", "error": "by the other"})
        yield specs[-1]

    other = Grid([], RunStore(tmp_path / "other.jsonl"), None, 60, "never", print)
    run_on_ray(Grid(specs_of_which_another_harness_does_one(), store, None, 60, "never", report), num_cpus=1)
    assert [event["status"] for event in store.latest().values()] == ["ok"] * 5 + ["failed"]
    ended = [event["run_id"] for event in store.events() if event["status"] != "started"]
    assert sorted(ended) == sorted(run_id(spec) for spec in specs)
