"""Pairs that a reader asks about: the best init, prompt tuning against the rest, 4 bits against full precision."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from .comparisons import by_seed, common_seeds, compare, seed_scores
from .evidence import Setting, Variant
from .measures import ALL_TIME, MEMORY, MISSING, NO_TIMES, STORED, Measure, over_tasks, plus_minus, signed_interval
from .statistics import MIN_SEEDS, Interval, interval


def mean_score(setting: Setting, variant: Variant, tasks: Sequence[str]) -> Interval | None:
    """Over tasks and seeds; None if a task has no run."""
    seeds = common_seeds(setting, (variant,), tasks)
    if not seeds:
        return None
    if variant.method == "zero_shot":
        seeds = seeds[:1]
    return interval(seed_scores(setting, variant, tasks, seeds))


def score_text(setting: Setting, variant: Variant, score: Interval) -> str:
    """A mean with its interval, and over how many seeds where that is not all."""
    if variant.method == "zero_shot":
        return f"{plus_minus(score)} (nothing random)"
    if score.count == 1:
        return f"{plus_minus(score)} (one seed, no interval)"
    return plus_minus(score) + (f" ({score.count} seeds)" if score.count < len(setting.seeds) else "")


def best_variant(
    setting: Setting, tasks: Sequence[str], wanted: Callable[[Variant], bool] = lambda variant: True
) -> Variant | None:
    """The highest mean among those that are wanted and have enough seeds, or among all if none has."""
    scores = {variant: mean_score(setting, variant, tasks) for variant in setting.variants if wanted(variant)}
    known = {variant: score for variant, score in scores.items() if score is not None}
    sure = {variant: score for variant, score in known.items() if _has_enough(variant, score)}
    contest = sure or known
    return max(contest, key=lambda variant: contest[variant].mean, default=None)


def _has_enough(variant: Variant, score: Interval) -> bool:
    return score.count >= MIN_SEEDS or variant.method == "zero_shot"


def rivals(setting: Setting, best: Variant, tasks: Sequence[str]) -> list[Variant]:
    """The best variant of each other method, the highest mean first; those with enough seeds if there are any."""
    methods = dict.fromkeys(variant.method for variant in setting.variants if variant.method != best.method)
    found = [
        best_variant(setting, tasks, lambda variant, method=method: variant.method == method) for method in methods
    ]
    known = {variant: mean_score(setting, variant, tasks) for variant in found if variant is not None}
    sure = {variant: score for variant, score in known.items() if _has_enough(variant, score)}
    return sorted(sure or known, key=lambda variant: -known[variant].mean)


def too_thin(setting: Setting, tasks: Sequence[str], wanted: Callable[[Variant], bool] = lambda variant: True) -> str:
    """Those with a higher mean than `best_variant` that have too few seeds to be it, by name; "" if there are none."""
    best = best_variant(setting, tasks, wanted)
    scores = {variant: mean_score(setting, variant, tasks) for variant in setting.variants if wanted(variant)}
    higher = [v.label for v, score in scores.items() if score is not None and score.mean > scores[best].mean]
    return " and ".join(higher)


def best_of_method(setting: Setting, method: str, tasks: Sequence[str]) -> Variant | None:
    """The best full-precision variant of a method."""
    return best_variant(setting, tasks, lambda variant: variant.method == method and variant.quantization is None)


def widest_pair(
    setting: Setting, wanted: Callable[[Variant], bool], method: str
) -> tuple[Variant, Variant, tuple[str, ...]] | None:
    """One that is wanted and one of a method that share most tasks with enough seeds, and these tasks.

    Tasks at chance say nothing.

    Of several the one with the highest mean, then its highest rival.
    """
    pairs = []
    for first in filter(wanted, setting.variants):
        for second in setting.variants:
            if second.method == method and second.quantization is None:
                both = (first, second)
                known = [task for task in setting.tasks if task not in setting.at_chance]
                tasks = tuple(task for task in known if len(common_seeds(setting, both, [task])) >= MIN_SEEDS)
                if tasks and len(common_seeds(setting, both, tasks)) >= MIN_SEEDS:
                    pairs.append((*both, tasks))

    def rank(pair: tuple[Variant, Variant, tuple[str, ...]]) -> tuple[float, ...]:
        return (len(pair[2]), *(mean_score(setting, variant, pair[2]).mean for variant in pair[:2]))

    return max(pairs, key=rank, default=None)


def random_of(setting: Setting, variant: Variant) -> Variant | None:
    """The prompt that began as random numbers and is like this one in all else."""
    same = Variant("prompt_tuning", "RANDOM", variant.quantization, variant.extras)
    if same in setting.variants:
        return same
    like = [v for v in setting.variants if (v.init, v.quantization) == ("RANDOM", variant.quantization)]
    return like[0] if len(like) == 1 else None


def quantized_pairs(setting: Setting) -> list[tuple[Variant, Variant]]:
    """Each quantised variant with its twin in full precision."""
    twins = [(v, Variant(v.method, v.init, None, v.extras)) for v in setting.variants if v.quantization]
    return [(quantized, full) for quantized, full in twins if full in setting.variants]


RATIOS = (ALL_TIME, MEMORY, STORED)


def versus(setting: Setting, first: Variant, second: Variant, tasks: Sequence[str]) -> list[str]:
    """The difference in score, whether it is one, and the ratios of `RATIOS`."""
    comparison = compare(setting, first, second, tasks)
    if comparison is None:
        return [MISSING, "no seed in common", *[MISSING] * len(RATIOS)]
    ratios = [_ratio(setting, first, second, tasks, measure) for measure in RATIOS]
    return [signed_interval(comparison.difference), comparison.verdict, *ratios]


def _ratio(setting: Setting, first: Variant, second: Variant, tasks: Sequence[str], measure: Measure) -> str:
    if second.method == "zero_shot" and measure is not MEMORY:
        return "-"
    values = [over_tasks(setting, variant, tasks, measure) for variant in (first, second)]
    if measure.is_time:
        pairs = _pairs(setting, first, second, tasks, measure)
        if not pairs:
            return NO_TIMES
        values = np.mean(pairs, axis=0).tolist()
    if None in values or not values[1]:
        return MISSING
    ratio = values[0] / values[1]
    if ratio < 0.001:
        return f"1/{1 / ratio:,.0f}"
    return f"{ratio:.0f} x" if ratio >= 10 else f"{ratio:.2f} x" if ratio >= 0.1 else f"{ratio:.2g} x"


def paired_difference(
    setting: Setting, first: Variant, second: Variant, tasks: Sequence[str], measure: Measure
) -> Interval | None:
    """Of a measure, by seed; a mean over tasks; None if no seed has both.

    Times are those that can be compared.
    """
    pairs = _pairs(setting, first, second, tasks, measure)
    return interval([one - other for one, other in pairs]) if pairs else None


def _pairs(
    setting: Setting, first: Variant, second: Variant, tasks: Sequence[str], measure: Measure
) -> list[tuple[float, float]]:
    """A measure of both, for each seed that has it for every task; a mean over tasks."""
    per_task = []
    for task in tasks:
        sides = [by_seed(setting, task, variant, measure.is_time) for variant in (first, second)]
        values = [{seed: measure.value(run.result) for seed, run in side.items()} for side in sides]
        both = {seed: (value, values[1].get(seed)) for seed, value in values[0].items()}
        per_task.append({seed: pair for seed, pair in both.items() if None not in pair})
    seeds = sorted(set.intersection(*map(set, per_task)))
    return [tuple(np.mean([of_task[seed] for of_task in per_task], axis=0)) for seed in seeds]
