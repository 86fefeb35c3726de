"""What a training step of each run of a suite takes, interleaved: a step of every kind of run, then the next of each.

A virtual machine is faster at one hour and slower at another, so runs that trained one after the other cannot be
compared by their own seconds. `python -m benchmarks speed --suite SUITE.yaml` writes one line for each kind.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .environment import code
from .job import prepare
from .suite import Spec, source_spec


if TYPE_CHECKING:
    from recipes.train import Job


TIMED_STEPS = 36  # of each kind: one step differs from the next by a quarter
_NOT_OF_A_STEP = {"learning_rate", "max_eval_samples"}  # flags that change no step's time


def kind_of(spec: Mapping[str, Any]) -> dict[str, Any]:
    """A run whose steps take as long as those of a spec: no init, seed or learning rate changes them.

    The number of examples does where rows are grouped by length: the batches of a short run have more pads.
    """
    arguments = {name: value for name, value in spec["arguments"].items() if name not in _NOT_OF_A_STEP}
    kind = {**spec, "init": None, "source": None, "seed": 0, "arguments": arguments}
    kind.pop("scored_over", None)
    return kind


def key_of(spec: Mapping[str, Any]) -> str:
    """The kind of a spec as text, which can be compared."""
    return json.dumps(kind_of(spec), sort_keys=True)


def kinds_of(specs: Iterable[Spec]) -> list[Spec]:
    """Every kind of run of a grid, those of the sources of a TRANSFER too."""
    trained = [spec for spec in specs if spec["method"] != "zero_shot"]
    sources = [source for spec in trained if (source := source_spec(spec)) is not None]
    return list({key_of(spec): kind_of(spec) for spec in (*trained, *sources)}.values())  # type: ignore[arg-type]


def time_suite(specs: Iterable[Spec], data_dir: str | None) -> Iterator[dict[str, Any]]:
    """Time the kinds of a grid, task by task; see `time_steps`."""
    kinds = kinds_of(specs)
    for task in dict.fromkeys(kind["task"] for kind in kinds):
        yield from time_steps([kind for kind in kinds if kind["task"] == task], data_dir)


def time_steps(kinds: Sequence[Spec], data_dir: str | None) -> list[dict[str, Any]]:
    """Steps of several kinds of run, interleaved.

    Args:
        kinds: See `kind_of`.
        data_dir: Where the folders of `spec["data"]` lie.

    Returns:
        For each kind: itself, the mean seconds of a step (None with an `error` if it failed), each step's, the share
        of the machine's CPU time that other programs used meanwhile, and on what they were taken.
    """
    from tempfile import TemporaryDirectory

    from .machine import OtherPrograms, machine

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
