"""How sure a number is: intervals over seeds, and tests of paired differences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import fft, stats


ALPHA = 0.05
LEVEL = 0.95
MIN_SEEDS = 3  # with fewer, an interval over seeds says next to nothing


@dataclass(frozen=True)
class Interval:
    """A mean over `count` seeds, and half the width of its 95 % interval; None for one seed."""

    mean: float
    half: float | None
    count: int


def interval(values: Sequence[float]) -> Interval:
    """Mean and 95 % interval by Student's t."""
    count = len(values)
    half = None
    if count > 1:
        half = float(stats.t.ppf((1 + LEVEL) / 2, count - 1) * np.std(values, ddof=1) / count**0.5)
    return Interval(float(np.mean(values)), half, count)


def seed_test(first: Sequence[float], second: Sequence[float]) -> float | None:
    """The paired t-test's p, two-sided; None for fewer than `MIN_SEEDS` pairs, or if all differ by the same."""
    if len(first) < MIN_SEEDS:
        return None
    differences = np.subtract(first, second)
    if np.ptp(differences) < 1e-12:  # t is infinite, which three scores of a few rows can be by chance, or 0 / 0
        return 1.0 if abs(differences[0]) < 1e-12 else None
    return float(stats.ttest_rel(first, second).pvalue)


def row_test(differences: Sequence[int]) -> float:
    """P of a sum at least as far from 0 if each difference had either sign, two-sided and exact.

    Args:
        differences: Of each row, how many more seeds the one variant had right than the other, times its weight.
    """
    sizes, counts = np.unique(np.abs(differences), return_counts=True)
    length = fft.next_fast_len(2 * int(sizes @ counts) + 1, real=True)
    places = np.arange(length // 2 + 1)
    transformed = np.ones(len(places))  # the characteristic function of the sum of signed differences
    for size, count in zip(sizes.tolist(), counts.tolist(), strict=True):
        transformed *= np.cos(2 * np.pi * (places * size % length) / length) ** count
    chances = fft.irfft(transformed, length)  # of 0, 1, 2, ..., -2, -1
    sums = np.minimum(np.arange(length), length - np.arange(length))
    far = float(chances[sums >= abs(np.sum(differences))].sum())
    return min(1.0, max(0.0, round(far, 12)))  # digits behind are the transform's
