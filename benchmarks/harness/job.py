"""A run as `recipes/train.py`'s own job, with the steps that its budget allows."""

from __future__ import annotations

import statistics
import time
from itertools import islice
from typing import TYPE_CHECKING

from .suite import Spec, train_arguments


if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from recipes.train import Job


TIMED_STEPS = 10  # before a run whose budget is seconds


def prepare(spec: Spec, folder: Path, data_dir: str | None, extra: Iterable[str] = ()) -> Job:
    """The job of a run, its model loaded.

    Args:
        spec: The run. If its budget is seconds, the job has one step until `fit_budget`.
        folder: Where it writes what it trains.
        data_dir: Where the folders of `spec["data"]` lie.
        extra: More flags of `recipes/train.py`.
    """
    from recipes import train as recipe

    fixed = ["--output_dir", str(folder), "--save_strategy", "no", "--disable_tqdm", "true", "--do_eval", "true"]
    if spec["method"] != "zero_shot":
        fixed += ["--do_train", "true"]
        if "seconds" in spec["budget"]:
            fixed += ["--max_steps", "1"]  # how many they are is known once a step has been timed
    return recipe.prepare(*recipe.parse([*train_arguments(spec, data_dir), *fixed, *extra]))


def fit_budget(job: Job, spec: Spec) -> None:
    """Set how many steps fit into the seconds, from the times of some; the learning rate's schedule has to know.

    Batches that are grouped by length come longest first, a group at a time; so they are from all over a group.
    """
    if "seconds" not in spec["budget"]:
        return
    import torch

    trainer, times = job.trainer, []
    model = trainer.model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0)  # takes its time and changes nothing
    loader = trainer.get_train_dataloader()
    group = max(1, min(len(loader) // 4, 50))  # as transformers' LengthGroupedSampler takes them
    batches = list(islice(loader, 0, group, -(-group // TIMED_STEPS)))
    for batch in (batches[0], *batches):  # the first step of all allocates its buffers
        start = time.perf_counter()
        trainer.compute_loss(model, trainer._prepare_inputs(batch)).backward()
        optimizer.step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
        model.zero_grad()
    step_s = statistics.fmean(times[1:]) * trainer.args.gradient_accumulation_steps
    trainer.args.max_steps = max(1, int(spec["budget"]["seconds"] / step_s))
