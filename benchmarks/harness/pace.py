"""How long a step of each method takes, timed in turns: what a budget of seconds buys, and what one of examples costs.

A virtual machine is faster at one hour and slower at another, and not for every kind of work alike, so what a method
is given must not depend on when it runs. One process holds a run of every kind of a task and takes a step of each in
turn:

    python -m benchmarks.harness.pace KINDS.json OUTPUT.json [--data_dir DIR]

The steps that fit are part of a run's spec. What is timed later, for a suite that has grown, is timed beside a kind
that was there before, and brought to the speed that the machine had then.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .environment import ROOT, code
from .job import prepare
from .store import StoreError
from .suite import Spec, source_spec


if TYPE_CHECKING:
    from peft_prompt_ext.training.run import Job


TIMED_STEPS = 36  # of each kind: one differs from the next by a quarter
WORKER = [sys.executable, "-m", "benchmarks.harness.pace"]
_NOT_OF_A_STEP = {"learning_rate", "max_eval_samples"}  # flags that change no step's time


class PaceError(RuntimeError):
    """Steps that could not be timed."""


def kind_of(spec: Spec) -> Spec:
    """A run whose steps take as long as those of a spec: no init, seed or learning rate changes them.

    A budget does, where rows are grouped by length: the groups of a short run have more pads. How many steps seconds
    buy is not known before they are timed, so those are of a run of `TIMED_STEPS`.
    """
    arguments = {name: value for name, value in spec["arguments"].items() if name not in _NOT_OF_A_STEP}
    return {
        **spec,
        "init": None,
        "source": None,
        "seed": 0,
        "budget": spec["budget"] if "examples" in spec["budget"] else {"seconds": 1, "steps": TIMED_STEPS},
        "arguments": arguments,
    }


def kind_id(kind: Spec) -> str:
    """Its name: 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(kind, sort_keys=True).encode()).hexdigest()[:16]


def length_of(kind: Spec) -> str:
    """How long the run is whose steps are timed, for people."""
    unit = "examples" if "examples" in kind["budget"] else "steps"
    return f"{kind['budget'][unit]:,.10g} {unit}"


def kinds_of(specs: Iterable[Spec]) -> dict[str, Spec]:
    """What has to be timed for a grid in which a budget is seconds, with the sources of a TRANSFER, by name."""
    specs = list(specs)
    if not any("seconds" in spec["budget"] for spec in specs):
        return {}
    wanted = [spec for spec in specs if spec["method"] != "zero_shot"]
    sources = [source for spec in wanted if (source := source_spec(spec)) is not None]
    kinds = [kind_of(spec) for spec in (*wanted, *sources)]
    return {kind_id(kind): kind for kind in kinds}


def with_steps(specs: Iterable[Spec], step_s: Mapping[str, float | None]) -> list[Spec]:
    """The runs, with the steps that their seconds buy; those of which nothing was timed are as they were.

    Args:
        specs: The grid.
        step_s: Seconds of a step by the name of its kind; None: its timing failed.
    """
    return [_with_steps(spec, step_s) for spec in specs]


def _with_steps(spec: Spec, step_s: Mapping[str, float | None]) -> Spec:
    source = source_spec(spec)
    needed = {"steps": spec, **({} if source is None else {"source_steps": source})}
    names = {name: kind_id(kind_of(of)) for name, of in needed.items()}
    timed = {name: step_s.get(kind) for name, kind in names.items()}
    if "seconds" not in spec["budget"] or None in timed.values():
        return spec
    seconds = spec["budget"]["seconds"]
    return {**spec, "budget": {"seconds": seconds, **{name: max(1, int(seconds / s)) for name, s in timed.items()}}}


def pace_path(results: Path) -> Path:
    """The file beside a store of runs."""
    return results.with_suffix(".pace.jsonl")


def read_pace(path: Path) -> dict[str, dict[str, Any]]:
    """What has been timed, by the name of the kind, and the number of its line.

    The first of several of one kind that was timed counts, since runs were made with it.

    Raises:
        StoreError: A line is JSON, and no row of such a file.
    """
    rows: dict[str, dict[str, Any]] = {}
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError:
            continue  # a kill tore it
        if not isinstance(row, dict) or not {"kind", "step_s"} <= set(row):
            raise StoreError(
                f"{path}, line {number} is not what a step was timed at: {line[:60]!r}. Delete that line."
            )
        name = kind_id(row["kind"])
        if name not in rows or rows[name]["step_s"] is None:
            rows[name] = {**row, "line": number}
    return rows


def step_seconds(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, float | None]:
    """Seconds of a step of each kind; None where it failed."""
    return {name: row["step_s"] for name, row in rows.items()}


def measure_pace(
    kinds: Iterable[Spec],
    path: Path,
    data_dir: str | None,
    time_limit_s: float,
    report: Callable[[Mapping[str, Any]], None] = lambda row: None,
) -> None:
    """Time kinds of run, task by task, and add them to a file.

    Args:
        kinds: See `missing_kinds`.
        path: The file, one row a kind.
        data_dir: Where the folders of `spec["data"]` lie.
        time_limit_s: For each kind; a process that takes longer is ended.
        report: Called with each row.

    Raises:
        PaceError: The process that takes the steps died or took too long, or the kind that others are brought to
            failed.
    """
    missing = list(kinds)
    for task in dict.fromkeys(kind["task"] for kind in missing):
        anchor = next((row for row in read_pace(path).values() if row["step_s"]), None)
        side_by_side = [kind for kind in missing if kind["task"] == task] + ([anchor["kind"]] if anchor else [])
        rows = _timed(side_by_side, path.with_suffix(".log"), data_dir, time_limit_s * len(side_by_side))
        factor = 1.0
        if anchor is not None:
            again = rows.pop()
            if not again["step_s"]:
                raise PaceError(
                    f"the steps of {task} could not be timed: {anchor['kind']['method']} on {anchor['kind']['task']}, "
                    f"beside which they are, failed with {again['error']}; see {path.with_suffix('.log')}"
                )
            factor = anchor["step_s"] / again["step_s"]
        path.parent.mkdir(parents=True, exist_ok=True)
        is_torn = path.is_file() and not path.read_text(encoding="utf-8").endswith("\n")
        with path.open("a", encoding="utf-8") as file:
            file.write("\n" if is_torn else "")  # a kill tore the last line; it must not take this one with it
            for row in rows:
                row["step_s"] = row["step_s"] and row["step_s"] * factor
                file.write(json.dumps({**row, "factor": factor}) + "\n")
            file.flush()
            os.fsync(file.fileno())
        for row in rows:
            report(row)


def missing_kinds(specs: Iterable[Spec], path: Path, again: bool = False) -> list[Spec]:
    """What has to be timed for a grid, and is not in a file.

    Args:
        specs: The grid.
        path: The file.
        again: Whether kinds count as missing whose timing failed.
    """
    known = read_pace(path)
    done = {name for name, row in known.items() if row["step_s"] is not None or not again}
    return [kind for name, kind in kinds_of(specs).items() if name not in done]


def _timed(kinds: Sequence[Spec], log: Path, data_dir: str | None, time_limit_s: float) -> list[dict[str, Any]]:
    """Take steps in a process of its own."""
    log.parent.mkdir(parents=True, exist_ok=True)
    given, told = log.with_suffix(".kinds.json"), log.with_suffix(".steps.json")
    given.write_text(json.dumps(kinds), encoding="utf-8")
    command = [*WORKER, str(given.resolve()), str(told.resolve()), "--parent", str(os.getpid())]
    command += ["--data_dir", str(Path(data_dir).resolve())] if data_dir is not None else []
    with log.open("w", encoding="utf-8") as file:
        try:
            ran = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, timeout=time_limit_s)
        except subprocess.TimeoutExpired:
            why = f"not done after {time_limit_s:g} s"
        else:
            why = f"exit status {ran.returncode}" if ran.returncode else ""
    if why:
        raise PaceError(f"the steps of {kinds[0]['task']} could not be timed ({why}): see {log}")
    rows = json.loads(told.read_text(encoding="utf-8"))
    given.unlink()
    told.unlink()
    return rows


def main() -> None:
    """Time the kinds of one task."""
    from .measure import die_with

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--data_dir")
    parser.add_argument("--parent", type=int, help="the process that waits for it, and without which it ends")
    options = parser.parse_args()
    die_with(options.parent or os.getppid())
    kinds = json.loads(options.kinds.read_text(encoding="utf-8"))
    options.output.write_text(json.dumps(time_steps(kinds, options.data_dir)), encoding="utf-8")


def time_steps(kinds: Sequence[Spec], data_dir: str | None) -> list[dict[str, Any]]:
    """Steps of several kinds of run, taken in turns.

    Args:
        kinds: See `kind_of`.
        data_dir: Where the folders of `spec["data"]` lie.

    Returns:
        For each kind: itself, the mean seconds of a step (None with an `error` if it failed), each step's, the share
        of the machine's CPU time that other programs used meanwhile, and on what they were taken.
    """
    from tempfile import TemporaryDirectory

    from ..machine import OtherPrograms, machine

    now, rows, clocks, device = code(), [], [], "cpu"
    with TemporaryDirectory() as folder:
        for number, kind in enumerate(kinds):
            row: dict[str, Any] = {"kind": kind, "step_s": None, "steps_s": [], "error": None}
            rows.append(row)
            try:
                job = prepare(kind, Path(folder, str(number)), data_dir)
                clock = _steps(job)
                next(clock)  # the first step of all allocates its buffers
            except (Exception, SystemExit) as error:  # a wrong flag exits
                row["error"] = f"{type(error).__name__}: {error}"
            else:
                clocks.append((row, clock))
                device = job.trainer.args.device.type
        others = OtherPrograms()
        others.start()
        for _ in range(TIMED_STEPS):
            for row, clock in clocks:
                row["steps_s"].append(next(clock))
        others.stop()
    for row in rows:
        row["step_s"] = statistics.fmean(row["steps_s"]) if row["steps_s"] else None
        row |= {"other_cpu_share": others.share, **now, "device": device, **machine(device)}
    return rows


def _steps(job: Job) -> Iterator[float]:
    """Seconds of one step of the optimizer after the other, over and over some spread over those of the run."""
    import torch

    from peft_prompt_ext._versions import checkpoint_activations

    trainer = job.trainer
    model = trainer.accelerator.prepare_model(trainer.model.train())  # bf16 and fp16 are there
    if trainer.args.gradient_checkpointing:
        checkpoint_activations(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    trainer.args.learning_rate = 0.0
    optimizer = trainer.create_optimizer()  # the run's own: takes its time and changes nothing
    count, accumulated = trainer.args.max_steps, trainer.args.gradient_accumulation_steps
    batches = list(islice(cycle(trainer.get_train_dataloader()), count * accumulated))
    for step in cycle([i * count // TIMED_STEPS for i in range(TIMED_STEPS)]):
        start = time.perf_counter()
        for batch in batches[step * accumulated : (step + 1) * accumulated]:
            trainer.compute_loss(model, trainer._prepare_inputs(batch)).backward()
        if trainer.args.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(trained, trainer.args.max_grad_norm)
        optimizer.step()
        model.zero_grad()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        yield time.perf_counter() - start


if __name__ == "__main__":
    main()
