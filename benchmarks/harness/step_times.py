"""What a training step of each run of a suite takes, interleaved: a step of every kind of run, then the next of each.

A virtual machine is faster at one hour and slower at another, so runs that trained one after the other cannot be
compared by their own seconds. `python -m benchmarks speed --suite SUITE.yaml` writes one line for each kind.
"""

import json
import statistics
from collections.abc import Iterable, Iterator, Mapping
from itertools import cycle
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from .job import prepare
from .machine import clock, code, machine
from .suite import Spec, source_spec


TIMED_STEPS = 36  # of each kind: one step differs from the next by a quarter
_NOT_OF_A_STEP = {"learning_rate", "max_eval_samples"}  # flags that change no step's time


def key_of(spec: Mapping[str, Any]) -> str:
    """The kind of a run: no init, seed or learning rate changes what its steps take.

    The number of examples does where rows are grouped by length: the batches of a short run have more pads.
    """
    arguments = {name: value for name, value in spec["arguments"].items() if name not in _NOT_OF_A_STEP}
    kind = {**spec, "init": None, "source": None, "seed": 0, "arguments": arguments}
    kind.pop("scored_over", None)
    return json.dumps(kind, sort_keys=True)


def kinds_of(specs: Iterable[Spec]) -> list[Spec]:
    """Every kind of run of a grid, those of the sources of a TRANSFER too."""
    trained = [spec for spec in specs if spec["method"] != "zero_shot"]
    sources = [source for spec in trained if (source := source_spec(spec)) is not None]
    return [json.loads(key) for key in dict.fromkeys(map(key_of, (*trained, *sources)))]


def time_suite(specs: Iterable[Spec], data_dir: str | None) -> Iterator[dict[str, Any]]:
    """Time the kinds of a grid, task by task: a line for each, `step_s` is None with an `error` if it failed."""
    kinds = kinds_of(specs)
    for task in dict.fromkeys(kind["task"] for kind in kinds):
        with TemporaryDirectory() as folder:
            yield from _time_steps([kind for kind in kinds if kind["task"] == task], Path(folder), data_dir)


def _time_steps(kinds: list[Spec], folder: Path, data_dir: str | None) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [{"kind": kind, "step_s": None, "steps_s": [], "error": None} for kind in kinds]
    now, clocks, device = code(), [], "cpu"
    for number, row in enumerate(rows):
        try:
            job = prepare(row["kind"], folder / str(number), data_dir)
            clocks.append((row, _steps(job)))
            next(clocks[-1][1])  # the first step of all allocates its buffers
            device = job.trainer.args.device.type
        except (Exception, SystemExit) as error:  # a wrong flag exits
            row["error"] = f"{type(error).__name__}: {error}"
    for row, steps in clocks * TIMED_STEPS:
        if row["error"] is None:
            row["steps_s"].append(next(steps))
    for row in rows:
        row["step_s"] = statistics.fmean(row["steps_s"]) if row["steps_s"] else None
        row |= {**now, "device": device, **machine(device)}
    return rows


def _steps(job: Any) -> Iterator[float]:
    """Seconds of one step of the optimizer after the other, over batches that are spread over those of the run."""
    import torch

    trainer = job.trainer
    trainer.args.learning_rate = 0.0
    model, optimizer = trainer.accelerator.prepare_model(trainer.model.train()), trainer.create_optimizer()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    batches = list(trainer.get_train_dataloader())[: trainer.args.max_steps]
    for number in cycle(range(TIMED_STEPS)):
        start = clock()
        batch = trainer._prepare_inputs(batches[number * len(batches) // TIMED_STEPS])
        trainer.compute_loss(model, batch).backward()
        torch.nn.utils.clip_grad_norm_(trained, trainer.args.max_grad_norm or float("inf"))
        optimizer.step()
        model.zero_grad()
        yield clock() - start
