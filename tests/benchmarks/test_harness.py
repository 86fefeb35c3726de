"""The grid on one machine, with a stub in place of a run; test_measure.py has real runs."""

import json
import multiprocessing
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from benchmarks import run
from benchmarks.__main__ import main
from benchmarks.harness import execute as execution
from benchmarks.harness.store import RunStore
from benchmarks.harness.suite import load_suite, run_id


STUB = str(Path(__file__).parent / "stub_worker.py")
FORK = multiprocessing.get_context("fork")  # a new interpreter would import for seconds what is here already


@pytest.fixture
def suite(tmp_path):
    def write(kinds=(None,), seeds=3, time_limit_s=60, method="lora"):
        path = tmp_path / "grid.yaml"
        grid = {
            "seeds": list(range(seeds)),
            "examples": 8,
            "time_limit_s": time_limit_s,
            "arguments": {"per_device_train_batch_size": 4},
            "tasks": {"movie_reviews": None, "plot_or_review": None},
            "runs": [{"method": method, "task_type": list(kinds)}],
        }
        path.write_text(yaml.safe_dump(grid))
        return path

    return write


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """Puts the stub in place of a run; returns the names of the runs that it was started for, one for each start."""
    log = tmp_path / "started.txt"
    monkeypatch.setenv("STUB_LOG", str(log))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    monkeypatch.setattr(execution, "WORKER", [sys.executable, STUB])
    return lambda: [line.split()[0] for line in log.read_text().splitlines()] if log.exists() else []


def finished(path):
    """What a grid came to, without times and attempts."""
    return {
        name: (event["status"], event["error"], event["result"]) for name, event in RunStore(path).latest().items()
    }


def test_every_run_has_its_process_and_its_event_and_nothing_runs_twice(suite, stub, tmp_path, capsys):
    path, results = suite(), tmp_path / "runs.jsonl"
    for _ in range(2):
        run.main([str(path), "--results", str(results)])
    ids = [run_id(spec) for spec in load_suite(path)]
    assert stub() == ids
    assert [event["status"] for event in RunStore(results).events()] == ["started", "ok"] * 6
    assert list(finished(results)) == ids
    printed = capsys.readouterr().out
    assert "6 runs, 6 to do" in printed and "6 runs, 0 to do" in printed and "6/6 ok: " in printed
    assert printed.endswith("\n6 ok\n")


def test_each_way_to_end_is_a_row_with_its_reason(suite, stub, tmp_path, capsys):
    path, results = suite(["crash", "memory", "hang", None], seeds=1, time_limit_s=3), tmp_path / "runs.jsonl"
    run.main([str(path), "--results", str(results)])
    ends = [(status, error) for status, error, _ in finished(results).values()]
    assert ends[:4] == ends[4:]
    assert ends[0] == ("failed", "exit status 1: everything is wrong")
    assert "failed: movie_reviews lora 8 examples seed 0  exit status 1: " in capsys.readouterr().out
    machines = [(event["env"] or {}).get("machine") for event in RunStore(results).latest().values()]
    assert machines[:2] == ["the stub's", None]
    assert ends[1][0] == "out_of_memory" and "signal 9" in ends[1][1]
    assert ends[2] == ("timeout", "not done after 3 s")
    assert ends[3] == ("ok", None)


@pytest.mark.parametrize(("method", "kept"), [("lora", True), ("full", False)])
def test_a_whole_model_is_not_kept_however_its_run_ends(suite, stub, tmp_path, method, kept):
    run.main([str(suite(["crash", "hang", None], 1, 3, method)), "--results", str(tmp_path / "runs.jsonl")])
    folders = list((tmp_path / "runs.runs").iterdir())
    assert [(folder / "run" / "weights.safetensors").exists() for folder in folders] == [kept] * 6


@pytest.mark.parametrize(("rerun", "again"), [("never", 0), ("failed", 2), ("always", 4)])
def test_rerun_chooses_what_runs_again(suite, stub, tmp_path, rerun, again):
    path, results = suite(["crash", None], seeds=1), tmp_path / "runs.jsonl"
    run.main([str(path), "--results", str(results)])
    run.main([str(path), "--results", str(results), "--rerun", rerun])
    assert len(stub()) == 4 + again
    attempts = [event["attempt"] for event in RunStore(results).latest().values()]
    assert attempts == {"never": [1, 1, 1, 1], "failed": [2, 1, 2, 1], "always": [2, 2, 2, 2]}[rerun]


def start(arguments, stub_seconds):
    """A harness in a process of its own."""

    def harness():
        os.environ["STUB_SECONDS"] = str(stub_seconds)
        run.main([str(argument) for argument in arguments])

    process = FORK.Process(target=harness)
    process.start()
    return process


def alive(process_id):
    try:
        return Path(f"/proc/{process_id}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_grid_that_was_killed_five_times_is_the_same_as_an_undisturbed_one(suite, stub, tmp_path):
    path, undisturbed, killed = suite(["crash", None]), tmp_path / "undisturbed.jsonl", tmp_path / "killed.jsonl"
    run.main([str(path), "--results", str(undisturbed)])
    starts = len(stub())
    draw = random.Random(0)
    for _ in range(5):
        begun = len(stub())
        process = start([path, "--results", killed], stub_seconds=0.3)
        while len(stub()) == begun and process.is_alive():
            time.sleep(0.02)
        time.sleep(draw.uniform(0, 0.6))
        process.kill()
        process.join()
    last = start([path, "--results", killed], stub_seconds=0)
    last.join()
    assert last.exitcode == 0
    assert finished(killed) == finished(undisturbed)
    ended = [event["run_id"] for event in RunStore(killed).events() if event["status"] != "started"]
    assert sorted(ended) == sorted(finished(killed)), "no run that had ended was run again"
    assert len(stub()) - starts <= len(ended) + 5, "a kill costs at most the run that it hit"


def test_a_run_dies_with_its_harness(suite, stub, tmp_path):
    process = start([suite(), "--results", tmp_path / "runs.jsonl"], stub_seconds=60)
    log = Path(os.environ["STUB_LOG"])
    deadline = time.monotonic() + 60
    while not (log.exists() and log.read_text().endswith("\n")) and time.monotonic() < deadline:
        time.sleep(0.05)
    worker = int(log.read_text().split()[1])
    assert alive(worker)
    process.kill()
    process.join()
    deadline = time.monotonic() + 10
    while alive(worker) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(worker)


def test_a_run_whose_harness_is_gone_before_it_could_look_ends_too(suite, stub, tmp_path):
    spec = load_suite(suite(seeds=1))[0]
    (tmp_path / "spec.json").write_text(json.dumps(spec))
    command = [*execution.WORKER, str(tmp_path / "spec.json"), str(tmp_path), "--parent", "1"]
    assert subprocess.run(command).returncode == -9
    assert stub() == []


def test_an_outcome_that_a_killed_harness_had_not_written_down_is_not_measured_again(suite, stub, tmp_path):
    path, results = suite(seeds=1), tmp_path / "runs.jsonl"
    specs = load_suite(path)
    folder = tmp_path / "runs.runs" / run_id(specs[0])
    folder.mkdir(parents=True)
    result = {"main_metric": "f1", "score_before": 0.1, "score": 0.9, "train_time_s": 2.0}
    (folder / "outcome.json").write_text(json.dumps({"status": "ok", "error": None, "result": result, "env": None}))
    run.main([str(path), "--results", str(results)])
    assert stub() == [run_id(specs[1])]
    assert finished(results)[run_id(specs[0])] == ("ok", None, result)
    run.main([str(path), "--results", str(results), "--rerun", "always"])
    assert stub() == [run_id(specs[1]), run_id(specs[0]), run_id(specs[1])], "it is taken once"


@pytest.mark.parametrize("newest", ["ended", "started"])
def test_an_outcome_that_the_store_has_is_not_taken_again(suite, stub, tmp_path, newest):
    """A kill between the store and the outcome's end, or a machine of a cluster, leaves it there."""
    path, results = suite(["crash"], seeds=1), tmp_path / "runs.jsonl"
    run.main([str(path), "--results", str(results)])
    store = RunStore(results)
    for event in store.latest().values():
        if newest == "started":
            store.append({**event, "attempt": 2, "status": "started"})
        (tmp_path / "runs.runs" / event["run_id"] / "outcome.json").write_text(json.dumps({"status": "ok"}))
    run.main([str(path), "--results", str(results), "--rerun", "failed"])
    assert len(stub()) == 4 and [event["status"] for event in store.latest().values()] == ["failed"] * 2


def test_a_dry_run_runs_nothing_and_shows_the_grid(suite, stub, tmp_path, capsys):
    run.main([str(suite()), "--results", str(tmp_path / "runs.jsonl"), "--dry_run"])
    assert stub() == [] and not (tmp_path / "runs.jsonl").exists()
    assert "\n6 not run\n" in capsys.readouterr().out


def test_ray_that_is_not_installed_is_one_clear_error(suite, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SystemExit, match=r"error: --executor ray needs Ray: pip install"):
        main(["run", str(suite()), "--results", str(tmp_path / "runs.jsonl"), "--executor", "ray"])


def test_two_harnesses_share_a_grid(suite, stub, tmp_path):
    path, results = suite(), tmp_path / "runs.jsonl"
    processes = [start([path, "--results", results], stub_seconds=0.5) for _ in range(2)]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert [status for status, _, _ in finished(results).values()] == ["ok"] * 6
    assert sorted(stub()) == sorted(run_id(spec) for spec in load_suite(path))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["none.yaml"], "There is no suite none.yaml"),
        (["{data}"], "give --data_dir"),
        (["{data}", "--data_dir", "{tmp}"], "must hold glue/sst2"),
        (["{grid}", "--results", "{newer}"], "schema version 99"),
        (["{grid}", "--results", "{tmp}"], "is a folder: name a file"),
    ],
)
def test_what_cannot_be_run_is_said_before_anything_runs(suite, stub, tmp_path, arguments, said):
    data, newer = tmp_path / "data.yaml", tmp_path / "newer.jsonl"
    grid = suite()
    data.write_text(grid.read_text().replace("movie_reviews: null", "sst2: {data: glue/sst2}"))
    newer.write_text('{"schema_version": 99}\n')
    names = {"data": data, "grid": grid, "newer": newer, "tmp": tmp_path}
    with pytest.raises(SystemExit, match=said):
        main(["run", *(argument.format(**names) for argument in arguments)])
    assert stub() == []
