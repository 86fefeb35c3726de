import json
import logging
import multiprocessing
import os
import resource

import pytest

from benchmarks.harness.store import SCHEMA_VERSION, RunStore, StoreError, wanted


def event(run_id="a", status="ok", **changes):
    fields = {
        "schema_version": SCHEMA_VERSION,
        "run_id": run_id,
        "attempt": 1,
        "status": status,
        "spec": {"task": "sst2"},
        "started_at": "2026-01-01T00:00:00+00:00",
        "finished_at": None,
        "error": None,
        "result": None,
        "env": None,
    }
    return fields | changes


@pytest.fixture
def store(tmp_path):
    return RunStore(tmp_path / "deep" / "runs.jsonl")


def test_a_store_without_a_file_is_empty(store):
    assert store.events() == []
    assert store.latest() == {}


def test_the_state_of_a_run_is_its_newest_event_and_runs_keep_their_order(store):
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


def test_a_line_of_a_newer_version_is_refused_by_its_number(store):
    store.append(event("a"))
    with store.path.open("a") as file:
        file.write(json.dumps(event("b", schema_version=SCHEMA_VERSION + 1)) + "\n")
    with pytest.raises(StoreError, match=rf"line 2 is of schema version {SCHEMA_VERSION + 1}.*update"):
        store.events()


@pytest.mark.parametrize("line", ["[1, 2]", '{"run_id": "a"}', '"text"'])
def test_a_whole_line_that_is_no_event_is_an_error(store, line):
    store.append(event("a"))
    with store.path.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(StoreError, match="line 2"):
        store.events()


def test_an_event_with_an_unknown_status_or_without_a_key_is_an_error(store):
    store.append(event("a"))
    broken = event("b")
    del broken["attempt"]
    for bad, said in ((broken, "attempt"), (event("b", "done"), "'done'")):
        store.path.write_text(json.dumps(bad) + "\n")
        with pytest.raises(StoreError, match=said):
            store.events()


def test_an_event_that_nobody_could_read_again_is_not_written(store):
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


@pytest.mark.parametrize(
    ("status", "never", "failed"),
    [
        (None, True, True),
        ("started", True, True),
        ("ok", False, False),
        ("failed", False, True),
        ("out_of_memory", False, True),
        ("timeout", False, True),
    ],
)
def test_what_is_run_again(status, never, failed):
    last = event(status=status) if status else None
    assert wanted(last, "never") is never
    assert wanted(last, "failed") is failed
    assert wanted(last, "always")
