"""How sure a number is: intervals over seeds, and whether two methods can be told apart."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats


ALPHA = 0.05
FOUND = ("probably", "clearly")  # verdicts of which one test, or both, find the difference
MIN_SEEDS = 3  # with fewer, an interval over seeds says next to nothing


class Mean(NamedTuple):
    """A mean over seeds and half the width of its 95 % interval (Student's t), None for one seed."""

    mean: float
    half: float | None
    count: int  # type: ignore[assignment]


class Difference(NamedTuple):
    """One variant minus another: of the scores, over the seeds that both have; and how sure its sign is."""

    mean: Mean
    verdict: str  # "clearly", "probably", "tied" or why it cannot be said


def interval(values: Sequence[float]) -> Mean:
    """The mean of some values, and its interval."""
    count = len(values)
    half = stats.t.ppf(1 - ALPHA / 2, count - 1) * np.std(values, ddof=1) / count**0.5 if count > 1 else None
    return Mean(float(np.mean(values)), None if half is None else float(half), count)


def row_test(first: np.ndarray, second: np.ndarray) -> float:
    """P of a difference at least as large if each row's two answers were swapped at random."""
    differ = first != second  # other rows change nothing
    if not differ.any():
        return 1.0
    rows, how = (first[differ], second[differ]), {"permutation_type": "samples", "vectorized": True, "rng": 0}
    return float(stats.permutation_test(rows, lambda a, b, axis: np.sum(a - b, axis=axis), **how).pvalue)


def scores_by_seed(runs: pd.DataFrame) -> pd.Series:
    """The score of one variant for each seed that every task has, tasks that share text counting as one."""
    table = runs.pivot_table(index="seed", columns=["group", "task"], values="score").dropna()
    return table.T.groupby(level="group").mean().mean()


def compare(first: pd.DataFrame, second: pd.DataFrame) -> Difference | None:
    """Two variants on the same tasks; None if they have no seed in common.

    "clearly": the interval over the seeds and the test over the scored rows agree; "probably": one finds it.
    """
    seeds = scores_by_seed(first).index.intersection(scores_by_seed(second).index)
    if seeds.empty:
        return None
    first, second = (runs[runs["seed"].isin(seeds)] for runs in (first, second))
    mean = interval((scores_by_seed(first) - scores_by_seed(second)).tolist())
    if pd.concat([first, second]).groupby("task")["scored_rows"].nunique().max() > 1:
        return Difference(mean, "scored on other rows or weights")
    if mean.count < MIN_SEEDS:
        return Difference(mean, f"fewer than {MIN_SEEDS} seeds")
    rows = [_right(runs) for runs in (first, second)]
    p_rows = 1.0
    if rows[0] is not None and rows[1] is not None and (rows[0].sum() - rows[1].sum()) * mean.mean > 0:
        p_rows = row_test(*rows)  # where the metric is not accuracy, rows may say the opposite of it
    over_seeds = mean.half is not None and abs(mean.mean) > mean.half > 1e-12
    return Difference(mean, ("tied", *FOUND)[over_seeds + (p_rows < ALPHA)])


def _right(runs: pd.DataFrame) -> np.ndarray | None:
    """For each row how many seeds had it right, weighted so that each group of tasks counts the same."""
    if runs["correct"].isna().any():
        return None
    of_task = runs.groupby("task")["correct"].agg(lambda texts: sum(np.array(list(text), float) for text in texts))
    groups = runs.drop_duplicates("task").set_index("task")["group"]
    share = 1 / groups.map(groups.value_counts())
    return np.concatenate([of_task[task] * share[task] / len(of_task[task]) for task in sorted(of_task.index)])
