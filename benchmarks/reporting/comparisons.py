"""Whether two variants can be told apart.

They are compared in pairs, because a seed or a row is easy or hard for both. Student's test over the seeds sees how
much training differs from run to run, and the sign-flip test over the scored rows how few rows there are: it asks
about the models that were trained, not about those of other seeds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .evidence import Setting, Variant
from .runs import Run
from .statistics import ALPHA, MIN_SEEDS, Interval, interval, row_test, seed_test


WEIGHTS = 100  # of a row, at least: whole numbers near to 1 over the number of its task's rows


@dataclass(frozen=True)
class Comparison:
    """One variant minus another.

    Attributes:
        difference: Of the scores, over the seeds that both have; a mean over tasks.
        p_seeds, p_rows: Of the two tests; None where one could not be made.
        why_not: The reason then.
        is_of_other_rows: Whether the two were scored on other rows or began with other weights.
    """

    difference: Interval
    p_seeds: float | None
    p_rows: float | None
    why_not: str = ""
    is_of_other_rows: bool = False

    @property
    def is_larger_than_noise(self) -> bool:
        """Whether both tests find the difference, with the same sign."""
        return not self.why_not and all(p is not None and p < ALPHA for p in (self.p_seeds, self.p_rows))

    @property
    def is_found(self) -> bool:
        """Whether any test finds it: then nobody should call the two equal."""
        return any(p is not None and p < ALPHA for p in (self.p_seeds, self.p_rows))

    @property
    def found_over(self) -> str:
        """What the tests that find it are over."""
        tests = {"seeds": self.p_seeds, "rows": self.p_rows}
        return " and ".join(name for name, p in tests.items() if p is not None and p < ALPHA)

    @property
    def verdict(self) -> str:
        """In words."""
        if self.is_larger_than_noise:
            return "larger than the noise"
        if self.why_not:
            return f"not decided ({self.why_not})"
        return f"not clear: the test over {self.found_over} alone finds it" if self.is_found else "within the noise"


def by_seed(setting: Setting, task: str, variant: Variant, is_timed: bool = False) -> dict[int, Run]:
    """The runs of an entry, or those that can be timed; zero-shot has nothing random and stands for every seed."""
    runs = setting.timed(task, variant) if is_timed else setting.runs(task, variant)
    if variant.method == "zero_shot" and runs:
        return {run.seed: run for run in runs} | dict.fromkeys(setting.seeds or (runs[0].seed,), runs[0])
    return {run.seed: run for run in runs}


def common_seeds(setting: Setting, variants: Sequence[Variant], tasks: Sequence[str]) -> list[int]:
    """Seeds that every one of the variants has for every one of the tasks."""
    found = [set(by_seed(setting, task, variant)) for task in tasks for variant in variants]
    return sorted(set.intersection(*found)) if found else []


def seed_scores(setting: Setting, variant: Variant, tasks: Sequence[str], seeds: Sequence[int]) -> list[float]:
    """The mean score over tasks, for each seed."""
    runs = [by_seed(setting, task, variant) for task in tasks]
    return [float(np.mean([of_task[seed].result["score"] for of_task in runs])) for seed in seeds]


def compare(setting: Setting, first: Variant, second: Variant, tasks: Sequence[str]) -> Comparison | None:
    """The first minus the second; None if they have no seed in common."""
    seeds = common_seeds(setting, (first, second), tasks)
    if not seeds:
        return None
    scores = [seed_scores(setting, variant, tasks, seeds) for variant in (first, second)]
    difference = interval(np.subtract(*scores).tolist())
    other = _other_rows(setting, first, second, tasks, seeds)
    if other:
        return Comparison(difference, None, None, other, is_of_other_rows=True)
    p_seeds, p_rows = seed_test(*scores), None
    rows = _row_differences(setting, first, second, tasks, seeds)
    why_not = ""
    if len(seeds) < MIN_SEEDS:
        why_not = f"fewer than {MIN_SEEDS} seeds"
    elif p_seeds is None:
        why_not = "the same difference for every seed"
    elif rows is None:
        why_not = "no answers of single rows"
    elif sum(rows) * difference.mean < 0:  # where the metric is not accuracy
        why_not = "more rows right, a lower score" if sum(rows) > 0 else "fewer rows right, a higher score"
    if rows is not None and sum(rows) * difference.mean >= 0:
        p_rows = row_test(rows)
    return Comparison(difference, p_seeds, p_rows, why_not)


def _other_rows(setting: Setting, first: Variant, second: Variant, tasks: Sequence[str], seeds: Sequence[int]) -> str:
    """In what the runs of the two differ that no method should differ in, or ""."""
    for task in tasks:
        runs = [by_seed(setting, task, variant)[seed] for variant in (first, second) for seed in seeds]
        if len({(run.env.get("scored_rows_sha256"), run.result["eval_samples"]) for run in runs}) > 1:
            return "scored on other rows"
        if len({run.env.get("weights_sha256") for run in runs}) > 1:
            return "other weights of the base model"
    return ""


def _row_differences(
    setting: Setting, first: Variant, second: Variant, tasks: Sequence[str], seeds: Sequence[int]
) -> list[int] | None:
    """The rows of all tasks, so weighted that each task counts the same; None if a run does not tell them."""
    of_tasks: list[np.ndarray] = []
    for task in tasks:
        sides = [[by_seed(setting, task, variant)[seed] for seed in seeds] for variant in (first, second)]
        right = [_right(side) for side in sides]
        if right[0] is None or right[1] is None:
            return None
        of_tasks.append(np.subtract(*right))
    counts = [len(rows) for rows in of_tasks]
    weights = [round(WEIGHTS * max(counts) / count) for count in counts]
    common = math.gcd(*weights)
    return np.concatenate([weight // common * rows for weight, rows in zip(weights, of_tasks, strict=True)]).tolist()


def _right(runs: Sequence[Run]) -> np.ndarray | None:
    """How many of the runs had each row right."""
    answers = [run.result.get("correct") for run in runs]
    if None in answers:
        return None
    return np.sum([[int(digit) for digit in answer] for answer in answers], axis=0)
