import json
import logging
import multiprocessing
import os
import resource

import pytest

from benchmarks.harness.store import SCHEMA_VERSION, RunStore, StoreError, wanted


def event(run_id="a", status="ok", **changes):
    fields = {"schema_version": SCHEMA_VERSION, "run_id": run_id, "attempt": 1, "status": status, "spec": {}}
    nothing = dict.fromkeys(("started_at", "finished_at", "error", "result", "env"))
    return fields | nothing | changes


@pytest.fixture
def store(tmp_path):
    return RunStore(tmp_path / "deep" / "runs.jsonl")


def test_the_state_of_a_run_is_its_newest_event_and_runs_keep_their_order(store):
    assert store.events() == [], "the file need not exist"
    for run_id, status in [("a", "started"), ("b", "started"), ("a", "failed"), ("b", "ok"), ("a", "ok")]:
        store.append(event(run_id, status))
    assert [(run_id, e["status"]) for run_id, e in store.latest().items()] == [("a", "ok"), ("b", "ok")]
    assert len(store.events()) == 5


def test_a_torn_last_line_is_said_left_out_and_takes_no_other_line_with_it(store, caplog):
    store.append(event("a"))
    whole = store.path.read_bytes()
    store.append(event("b"))
    store.path.write_bytes(store.path.read_bytes()[: len(whole) + 40])
    with caplog.at_level(logging.WARNING):
        assert list(store.latest()) == ["a"]
    assert "line 2 is not whole" in caplog.text
    with caplog.at_level(logging.WARNING):
        store.events()
    assert caplog.text.count("line 2 is not whole") == 1, "a store is read again and again"
    store.append(event("c"))
    assert list(store.latest()) == ["a", "c"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (
            json.dumps(event("b", schema_version=SCHEMA_VERSION + 1)),
            f"is of schema version {SCHEMA_VERSION + 1}.*update",
        ),
        ("[1, 2]", "wanted an event"),
        ('{"run_id": "a"}', "wanted an event"),
        ('"text"', "wanted an event"),
        (json.dumps({name: value for name, value in event("b").items() if name != "attempt"}), "attempt"),
        (json.dumps(event("b", "done")), "'done'"),
    ],
)
def test_a_whole_line_that_is_no_event_is_refused_by_its_number(store, line, said):
    store.append(event("a"))
    with store.path.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(StoreError, match=f"line 2.*{said}"):
        store.events()


def test_an_event_that_could_not_be_read_again_is_not_written(store):
    with pytest.raises(ValueError, match="not JSON compliant"):
        store.append(event(result={"score": float("nan")}))
    with pytest.raises(ValueError, match="keys"):
        store.append({"run_id": "a"})
    assert not store.path.exists()


def test_a_full_disk_leaves_the_store_as_it_was(store):
    store.append(event("a"))
    before = store.path.read_bytes()

    def write_with_little_room(path):
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 50, len(before) + 50))
        try:
            RunStore(path).append(event("b"))
        except OSError:
            os._exit(3)
        os._exit(0)

    process = multiprocessing.get_context("fork").Process(target=write_with_little_room, args=(store.path,))
    process.start()
    process.join()
    assert process.exitcode == 3
    assert store.path.read_bytes() == before


def append_many(path, name, count):
    for number in range(count):
        RunStore(path).append(event(f"{name}{number}", result={"correct": "01" * 50_000}))


def test_two_processes_write_whole_lines_at_once(store):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=append_many, args=(store.path, name, 20)) for name in "ab"]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert sorted(store.latest()) == sorted(f"{name}{number}" for name in "ab" for number in range(20))


def hold(path, held, release):
    with RunStore(path).claim("a") as mine:
        held.put(mine)
        release.get()


def test_a_run_is_held_by_one_process_until_that_dies(store):
    context = multiprocessing.get_context("fork")
    held, release = context.Queue(), context.Queue()
    process = context.Process(target=hold, args=(store.path, held, release))
    process.start()
    assert held.get()
    with store.claim("a") as mine, store.claim("b") as other:
        assert not mine
        assert other
    process.kill()
    process.join()
    with store.claim("a") as mine:
        assert mine


@pytest.mark.parametrize("status", [None, "started", "ok", "failed", "out_of_memory", "timeout"])
def test_what_is_run_again(status):
    last = event(status=status) if status else None
    assert wanted(last, "never") is (status in {None, "started"})
    assert wanted(last, "failed") is (status != "ok")
    assert wanted(last, "always")
