"""A run as `recipes/train.py`'s own job."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .suite import Spec, steps_of, train_arguments


if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from peft_prompt_ext.training.run import Job


def prepare(spec: Spec, folder: Path, data_dir: str | None, extra: Iterable[str] = ()) -> Job:
    """The job of a run, its model loaded.

    Args:
        spec: The run, its steps known.
        folder: Where it writes what it trains.
        data_dir: Where the folders of `spec["data"]` lie.
        extra: More flags of `recipes/train.py`.

    Raises:
        ValueError: Nobody knows how many steps its seconds buy, for timing a step failed.
    """
    if spec["method"] != "zero_shot" and steps_of(spec) is None:
        raise ValueError("how many steps the seconds buy is not known: timing one failed, see the .pace.jsonl file")
    from peft_prompt_ext.training import run as recipe

    fixed = ["--output_dir", str(folder), "--save_strategy", "no", "--disable_tqdm", "true", "--do_eval", "true"]
    if spec["method"] != "zero_shot":
        fixed += ["--do_train", "true"]
    return recipe.prepare(*recipe.parse([*train_arguments(spec, data_dir), *fixed, *extra]))
