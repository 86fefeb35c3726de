"""What a method costs, and how numbers are written: `None` is always "not measured"."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from .comparisons import Comparison
from .evidence import Setting, Variant
from .runs import Run
from .statistics import Interval


MISSING = "not measured"
NO_TIMES = "no times that can be compared"
Result = Mapping[str, Any]


def points(value: float) -> str:
    """A fraction as a score: 0.8301 is 83.0."""
    return f"{100 * value:.1f}"


def signed(value: float) -> str:
    """A difference of scores, in points."""
    return f"{100 * value:+.1f}".replace("-0.0", "+0.0")


def plus_minus(score: Interval) -> str:
    """A score with its interval."""
    return points(score.mean) + ("" if score.half is None else f" ± {points(score.half)}")


def signed_interval(difference: Interval) -> str:
    """A difference of scores with its interval."""
    if difference.half is None:
        return f"{signed(difference.mean)} (one seed)"
    low, high = difference.mean - difference.half, difference.mean + difference.half
    return f"{signed(difference.mean)} ({signed(low)} to {signed(high)})"


def in_points(difference: Interval) -> str:
    """The same in a sentence."""
    if difference.half is None:
        return f"{signed(difference.mean)} points (one seed)"
    return signed_interval(difference).replace(" (", " points (", 1)


def p_value(p: float | None) -> str:
    """The chance of a test."""
    if p is None:
        return "not tested"
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def p_values(comparison: Comparison) -> str:
    """Both tests."""
    return f"seeds {p_value(comparison.p_seeds)}, rows {p_value(comparison.p_rows)}"


def size(count: float) -> str:
    """Bytes, in powers of 1000."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if abs(count) >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count:.0f} B"


def seconds(value: float) -> str:
    """Seconds, three digits or more."""
    return f"{value:,.0f} s" if abs(value) >= 100 else f"{value:.1f} s" if abs(value) >= 10 else f"{value:.2f} s"


def loss(value: float) -> str:
    """A difference of losses."""
    return f"{value:+.3f}".replace("-0.000", "+0.000")


def whole(value: float) -> str:
    """A count."""
    return f"{value:,.0f}"


@dataclass(frozen=True)
class Measure:
    """One number of a run.

    Attributes:
        title: The head of its column.
        value: From the result; None where it was not measured.
        show: For people.
        fold: Over seeds and tasks.
        is_time: Whether it is of the seconds of training, see `Setting.timed`.
        of_rest: Whether other programs on the machine disturb it.
        of_training: Whether a run without training has none.
    """

    title: str
    value: Callable[[Result], float | None]
    show: Callable[[float], str]
    fold: Callable[[Sequence[float]], float] = fmean
    is_time: bool = False
    of_rest: bool = False
    of_training: bool = True


def entry(name: str) -> Callable[[Result], float | None]:
    """The value of one key."""
    return lambda result: result[name]


def _ratio(result: Result) -> float | None:
    bare = result["bare_inference_time_s"]
    return result["inference_time_s"] / bare if bare and result["inference_time_s"] is not None else None


def _forgetting(result: Result) -> float | None:
    losses = result["unrelated_loss"], result["bare_unrelated_loss"]
    return None if None in losses else losses[0] - losses[1]


def _memory(result: Result) -> float:
    return result["weights_bytes"] + result["peak_memory_bytes"]


def _all_seconds(result: Result) -> float:
    return result["train_time_s"] + (result["source_time_s"] or 0.0)


BEFORE = Measure("score before", entry("score_before"), points, of_training=False)
EXAMPLES = Measure("examples seen", entry("examples_seen"), whole)
SOURCE_EXAMPLES = Measure("examples of the source", lambda result: result.get("source_rows"), whole)
TIME = Measure("training", entry("train_time_s"), seconds, is_time=True)
SOURCE_TIME = Measure("training of the source", entry("source_time_s"), seconds, is_time=True)
STEP = Measure("step", entry("step_time_s"), seconds, is_time=True)
TOKENS = Measure("tokens a second", entry("tokens_per_s"), whole, is_time=True)
PEAK = Measure("peak memory above the model", entry("peak_memory_bytes"), size, max)
WEIGHTS = Measure("model in memory", entry("weights_bytes"), size, max, of_training=False)
MEMORY = Measure("memory with the model", _memory, size, max, of_training=False)
PARAMETERS = Measure("trainable parameters", entry("trainable_parameters"), whole, max)
STORED = Measure("bytes to store for a task", entry("adapter_bytes"), size, max, of_training=False)
INFERENCE = Measure(
    "inference time, x bare model", _ratio, lambda value: f"{value:.2f}", of_rest=True, of_training=False
)
FORGETTING = Measure("forgetting (loss on other text)", _forgetting, loss, of_training=False)
ENERGY = Measure("energy", entry("energy_j"), lambda value: f"{value:,.0f} J", of_rest=True)
ALL_TIME = Measure("training with its source", _all_seconds, seconds, is_time=True)
OF_SOURCE = (SOURCE_EXAMPLES, SOURCE_TIME)
NO_ADAPTER = ("full", "linear_probe", "zero_shot")
COSTS = (
    *(BEFORE, EXAMPLES, SOURCE_EXAMPLES, TIME, SOURCE_TIME, STEP, TOKENS),
    *(PEAK, PARAMETERS, STORED, INFERENCE, FORGETTING, ENERGY),
)


def measured(setting: Setting, task: str, variant: Variant, measure: Measure) -> float | None:
    """Over the seeds of one entry, of the runs that tell."""
    runs = _runs_that_tell(setting, task, variant, measure)
    values = [measure.value(run.result) for run in runs if run.result["steps"] or not measure.of_training]
    known = [value for value in values if value is not None]
    return measure.fold(known) if known else None


def _runs_that_tell(setting: Setting, task: str, variant: Variant, measure: Measure) -> tuple[Run, ...]:
    if measure.is_time:
        return setting.timed(task, variant)
    return setting.at_rest(task, variant) if measure.of_rest else setting.runs(task, variant)


def over_tasks(setting: Setting, variant: Variant, tasks: Sequence[str], measure: Measure) -> float | None:
    """Over tasks; None if one of them has none."""
    values = [measured(setting, task, variant, measure) for task in tasks]
    known = [value for value in values if value is not None]
    return measure.fold(known) if known and len(known) == len(values) else None


def written(setting: Setting, task: str, variant: Variant, measure: Measure) -> str:
    """The number for people, or why there is none."""
    if measure is INFERENCE and variant.method in NO_ADAPTER:
        return "no adapter"
    value, runs = measured(setting, task, variant, measure), setting.runs(task, variant)
    if value is not None:
        timed = len(_runs_that_tell(setting, task, variant, measure))
        return measure.show(value) + (f" ({timed} of {len(runs)} runs)" if timed < len(runs) else "")
    if runs and measure.of_training and not any(run.result["steps"] for run in runs):
        return "no training"
    if measure in OF_SOURCE and variant.init != "TRANSFER":
        return "no source"
    has_any = any(measure.value(run.result) is not None for run in runs)
    if not has_any or not (measure.is_time or measure.of_rest):
        return MISSING
    return untimed(setting, task, variant, measure.of_rest)


def untimed(setting: Setting, task: str, variant: Variant, of_rest: bool = False) -> str:
    """Why an entry has no time."""
    runs = setting.runs(task, variant)
    if not runs or (setting.at_rest if of_rest else setting.timed)(task, variant):
        return MISSING
    if any(setting.is_at_rest(run) for run in runs):
        return "not timed in turns"
    if all(run.disturbed for run in runs):
        return "disturbed"
    return "disturbed or on another machine" if any(run.disturbed for run in runs) else "on another machine"
