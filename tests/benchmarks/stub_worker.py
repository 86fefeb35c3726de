"""Stands in for a run: `python stub_worker.py SPEC.json FOLDER --parent PID`; spec["task_type"] says how it ends."""

import json
import os
import sys
import time
from pathlib import Path

from benchmarks.harness.machine import FILE
from benchmarks.harness.measure import die_with, write_outcome


def main():
    die_with(int(sys.argv[sys.argv.index("--parent") + 1]))
    spec, folder = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    what = spec["task_type"]
    with Path(os.environ["STUB_LOG"]).open("a") as file:
        file.write(f"{folder.name} {os.getpid()}\n")
    (folder / "run").mkdir(exist_ok=True)
    (folder / "run" / "weights.safetensors").write_text("many")
    time.sleep(float(os.environ.get("STUB_SECONDS", "0")))
    if what == "crash":
        (folder / FILE).write_text(json.dumps({"machine": "the stub's"}))
        sys.exit("everything is wrong")
    if what == "memory":
        os.kill(os.getpid(), 9)
    if what == "hang":
        time.sleep(600)
    write_outcome(
        folder, {"status": "ok", "error": None, "result": result(spec), "env": {"commit": "none", "device": "cpu"}}
    )


def result(spec):
    """Numbers that depend on the run alone."""
    score = (sum(json.dumps(spec).encode()) % 100) / 100
    return {"main_metric": "accuracy", "score_before": 0.5, "score": score, "train_time_s": 1.0}


if __name__ == "__main__":
    main()
