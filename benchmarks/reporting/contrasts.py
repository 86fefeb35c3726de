"""Pairs that a reader asks about: the best init, prompt tuning against the rest, 4 bits against full precision."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .evidence import MIN_SEEDS, Setting, Variant
from .measures import ALL_TIME, MEMORY, MISSING, STORED, Measure, over_tasks, plus_minus, signed_interval
from .statistics import Interval, by_seed, common_seeds, compare, interval, seed_scores


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
    sure = {v: score for v, score in known.items() if score.count >= MIN_SEEDS or v.method == "zero_shot"}
    contest = sure or known
    return max(contest, key=lambda variant: contest[variant].mean, default=None)


def too_thin(setting: Setting, tasks: Sequence[str], wanted: Callable[[Variant], bool] = lambda variant: True) -> str:
    """Those with a higher mean than `best_variant` that have too few seeds to be it, by name; "" if there are none."""
    best = best_variant(setting, tasks, wanted)
    scores = {variant: mean_score(setting, variant, tasks) for variant in setting.variants if wanted(variant)}
    higher = [v.label for v, score in scores.items() if score is not None and score.mean > scores[best].mean]
    return " and ".join(higher)


def best_of_method(setting: Setting, method: str, tasks: Sequence[str]) -> Variant | None:
    """The best full-precision variant of a method."""
    return best_variant(setting, tasks, lambda variant: variant.method == method and variant.quantization is None)


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
    values = [over_tasks(setting, variant, tasks, measure) for variant in (first, second)]
    if second.method == "zero_shot" and measure is not MEMORY:
        return "against nothing"
    if None in values or not values[1]:
        return MISSING
    ratio = values[0] / values[1]
    return f"{ratio:.2f} x" if ratio >= 0.1 else f"{ratio:.3f} x" if ratio >= 0.001 else "less than 0.001 x"


def paired_difference(
    setting: Setting, first: Variant, second: Variant, tasks: Sequence[str], measure: Measure
) -> Interval | None:
    """Of a measure, by seed; a mean over tasks; None if no seed has both.

    Times are those that can be compared.
    """
    per_task = []
    for task in tasks:
        sides = [by_seed(setting, task, variant, measure.is_time) for variant in (first, second)]
        values = [{seed: measure.value(run.result) for seed, run in side.items()} for side in sides]
        per_task.append(
            {s: values[0][s] - values[1][s] for s in values[0] if None not in (values[0][s], values[1].get(s))}
        )
    seeds = sorted(set.intersection(*map(set, per_task)))
    return interval([sum(of_task[seed] for of_task in per_task) / len(tasks) for seed in seeds]) if seeds else None
