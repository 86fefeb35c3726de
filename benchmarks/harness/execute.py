"""One run in a process of its own, whatever becomes of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from .environment import FILE, ROOT
from .suite import Spec, run_id


WHOLE_MODELS = {"full", "linear_probe"}
WORKER = [sys.executable, "-m", "benchmarks.harness.measure"]


def execute(
    spec: Spec,
    runs: Path,
    data_dir: str | None,
    time_limit_s: float,
    worker: list[str] | None = None,
    is_known: bool = False,
) -> dict[str, Any]:
    """Run a spec to its end.

    A whole outcome that a killed harness left behind is taken as it is, unless the store has it.

    Args:
        spec: The run.
        runs: Folder of all runs; this one's is named by its id, and its output is in `log.txt` there.
        data_dir: Where the folders of `spec["data"]` lie.
        time_limit_s: Then it is ended.
        worker: The command of the process, WORKER by default.
        is_known: Whether the store says how an attempt ended; its outcome may still lie on this machine.

    Returns:
        `status`, `error`, `result` and `env` of the run's event.
    """
    folder = runs.resolve() / run_id(spec)
    outcome = folder / "outcome.json"
    if is_known:
        forget(spec, runs)
    if not outcome.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        _empty(folder)
        (folder / "spec.json").write_text(json.dumps(spec), encoding="utf-8")
        command = [*(worker or WORKER), str(folder / "spec.json"), str(folder), "--parent", str(os.getpid())]
        command += ["--data_dir", str(Path(data_dir).resolve())] if data_dir is not None else []
        failure = _wait(command, folder / "log.txt", time_limit_s)
        if spec["method"] in WHOLE_MODELS:  # hundreds of megabytes of every run would fill the disk
            for path in folder.rglob("*.safetensors"):
                path.unlink()
        if not outcome.is_file():
            return {"result": None, "env": _environment(folder), **failure}
    ended = json.loads(outcome.read_text(encoding="utf-8"))
    return {**ended, "env": ended["env"] or _environment(folder)}


def _environment(folder: Path) -> dict[str, Any] | None:
    """What a run that came to no result had said it ran on; None if it did not come so far."""
    try:
        return json.loads((folder / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def forget(spec: Spec, runs: Path) -> None:
    """Let go of an outcome that the store has; the trained adapter stays."""
    (runs.resolve() / run_id(spec) / "outcome.json").unlink(missing_ok=True)


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
    import shutil

    for part in ("run", "source"):
        shutil.rmtree(folder / part, ignore_errors=True)
    (folder / FILE).unlink(missing_ok=True)
