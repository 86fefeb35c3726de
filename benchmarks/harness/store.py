"""The run store: append-only JSON lines, one event a line.

An event says that a run started, or how it ended. Times of the clock are UTC in ISO form; units are in the key.

    schema_version  int
    run_id          str, the hash of the spec
    attempt         int from 1
    status          one of STATUSES
    spec            what was run, see suite.Spec
    started_at, finished_at     str; finished_at is None while the run goes on
    error           str or None: why the run did not end well
    result          dict or None: what was measured, see measure.Result
    env             dict or None: machine, dtype, versions, commit, hashes of the data and the weights

The state of a run is its newest event; the report takes the one with a result, which no failed rerun replaces.
"""

import fcntl
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1
STATUSES = ("started", "ok", "failed", "out_of_memory", "timeout")
RERUN = ("never", "failed", "always")
_KEYS = ("schema_version", "run_id", "attempt", "status", "spec", "started_at", "finished_at")
_KEYS += ("error", "result", "env")

Event = dict[str, Any]


class StoreError(ValueError):
    """A store that cannot be read."""


class RunStore:
    """Events in one file, which need not exist."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._named: set[int] = set()  # torn lines

    def append(self, event: Event) -> None:
        """Write one event whole, behind all others, and onto the disk; a wrong key and NaN are a ValueError."""
        if set(event) != set(_KEYS):
            raise ValueError(f"an event has the keys {sorted(_KEYS)}, got {sorted(event)}")
        line = json.dumps(event, allow_nan=False).encode() + b"\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)  # a long write may be split, and another process's fall in between
            size = os.fstat(handle).st_size
            if size and os.pread(handle, 1, size - 1) != b"\n":
                line = b"\n" + line  # a kill tore the last line; it must not take this one with it
            _write_whole(handle, line, size)
            os.fsync(handle)
        finally:
            os.close(handle)

    def events(self) -> list[Event]:
        """Read every whole line; a torn one is left out with a warning, and what is no event is a StoreError."""
        if self.path.is_dir():
            raise StoreError(f"{self.path} is a folder: name a file, it need not exist.")
        if not self.path.is_file():
            return []
        lines = enumerate(self.path.read_bytes().split(b"\n"), start=1)
        events = (self._event(line, number) for number, line in lines if line.strip())
        return [event for event in events if event is not None]

    def latest(self) -> dict[str, Event]:
        """The newest event of each run, by run id, in the order of their first."""
        return {event["run_id"]: event for event in self.events()}

    def has_ended(self, run_id: str) -> bool:
        """Whether any attempt of a run came to an end, however the newest one stands."""
        return any(event["run_id"] == run_id and event["status"] != "started" for event in self.events())

    @contextmanager
    def claim(self, run_id: str) -> Iterator[bool]:
        """Hold a run against every other process on this store, until this process dies; yields whether it is held."""
        folder = self.path.with_suffix(".locks")
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / run_id).open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
            else:
                yield True

    def _event(self, line: bytes, number: int) -> Event | None:
        where = f"{self.path}, line {number}"
        try:
            event = json.loads(line)
        except ValueError:
            if number not in self._named:  # a store is read before and after every run
                logger.warning("%s is not whole (a kill or a full disk tore it) and is left out.", where)
            self._named.add(number)
            return None
        version = event.get("schema_version") if isinstance(event, dict) else None
        if not isinstance(version, int):
            raise StoreError(f"{where}: wanted an event with a schema_version, got {line[:80]!r}.")
        if version > SCHEMA_VERSION:
            known = f"this program reads up to {SCHEMA_VERSION}: update it."
            raise StoreError(f"{where} is of schema version {version}, and {known}")
        missing = [key for key in _KEYS if key not in event]
        if missing or event["status"] not in STATUSES:
            raise StoreError(f"{where}: an event without {missing or 'a known status'}: {event.get('status')!r}.")
        return event


def wanted(event: Event | None, rerun: str) -> bool:
    """Whether a run, by its newest event, is to be done: one that has not ended, one that "failed", or "always"."""
    if event is None or event["status"] == "started" or rerun == "always":
        return True
    return rerun == "failed" and event["status"] != "ok"


def _write_whole(handle: int, line: bytes, size: int) -> None:
    """Write, or leave the file as it was: a full disk must not leave half a line."""
    try:
        while line:
            line = line[os.write(handle, line) :]
    except OSError:
        os.ftruncate(handle, size)
        raise
