"""Which method to pick: what fits, then what cannot be told from the best score, then the cheapest of that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from .comparisons import Comparison, common_seeds, compare
from .contrasts import mean_score
from .evidence import Setting, Variant
from .measures import ALL_TIME, MEMORY, STORED, WEIGHTS, over_tasks, points, seconds, signed, size
from .statistics import MIN_SEEDS, Interval


COSTS = ("time", "memory", "storage")
AS_CHEAP = {"time": "as quick", "memory": "as small in memory", "storage": "as small to store"}
SAME_COST = 1.1  # less is within what a machine differs from day to day
RULE = (
    "What has no usable run for every task, needs more memory or storage than there is, or scores less than asked is "
    "left out. Of the rest the best mean score is found, and what either test finds worse than it, or what was not "
    "scored on the same rows and seeds, is left out too. Of what then remains the cheapest is picked; if that cost is "
    "not known of all of it, another decides, and it is said. Costs that differ by less than a tenth count as equal: "
    "then the next that is known of time, memory and storage decides, last the higher mean. Methods with "
    f"fewer than {MIN_SEEDS} seeds are picked only where nothing else is left, and it is said."
)


@dataclass(frozen=True)
class Needs:
    """What a reader has and wants.

    Attributes:
        memory_bytes: Of the device, for the model and its training.
        storage_bytes: For the model and what all tasks store.
        count: How many tasks will be trained.
        least_score: As a fraction, the mean over tasks.
        first: What matters most, one of `COSTS` or "score".
    """

    memory_bytes: int | None = None
    storage_bytes: int | None = None
    count: int = 1
    least_score: float | None = None
    first: str = "time"


READERS = {
    "the highest score, whatever it costs": Needs(first="score"),
    "time is short": Needs(first="time"),
    "memory is short": Needs(first="memory"),
    "many tasks, storage is short": Needs(first="storage"),
}


@dataclass(frozen=True)
class Candidate:
    """One variant, over all tasks that are asked for.

    Attributes:
        score: Mean and interval of the mean over tasks; None if a task has no run.
        seeds: How many of them every task has.
        memory_bytes: The model and its training, the most of all runs.
        stored_bytes: What one task stores.
        weights_bytes: The model, once for all tasks.
        time_s: One task's training, with its source's; None if none can be compared.
        comparison: With the best of those that fit; None for itself.
        excluded: Why it is not picked, or "".
        but: The last part of that, where it is as good as the pick within the noise; else "".
    """

    variant: Variant
    score: Interval | None
    seeds: int
    memory_bytes: float | None
    stored_bytes: float | None
    weights_bytes: float | None
    time_s: float | None
    comparison: Comparison | None = None
    excluded: str = ""
    but: str = ""

    def storage_bytes(self, count: int) -> float:
        """For `count` tasks. Full fine-tuning keeps a whole model for each, the others one for all."""
        once = 0.0 if self.variant.method == "full" else self.weights_bytes or 0.0
        return once + count * (self.stored_bytes or 0.0)

    def cost(self, name: str) -> float | None:
        """One of `COSTS`, in seconds or bytes; None if it was not measured."""
        return {"time": self.time_s, "memory": self.memory_bytes, "storage": self.stored_bytes}[name]


@dataclass(frozen=True)
class Advice:
    """The answer to one reader, for one setting.

    Attributes:
        pick: None if nothing fits.
        candidates: All, with why they are not picked.
        is_thin: Whether the pick has fewer than `MIN_SEEDS` seeds.
        instead: Why something else decided than what the reader puts first, and what; "" if that did.
    """

    setting: Setting
    tasks: tuple[str, ...]
    needs: Needs
    pick: Candidate | None
    candidates: tuple[Candidate, ...]
    is_thin: bool
    instead: str = ""


def advise(setting: Setting, needs: Needs, tasks: Sequence[str] = ()) -> Advice:
    """Pick a variant by `RULE`.

    Args:
        setting: The runs that count.
        needs: What the reader has and wants.
        tasks: Those that matter; those of the setting's mean if empty.
    """
    tasks = tuple(tasks or setting.common)
    candidates = [_limited(_candidate(setting, variant, tasks), needs, tasks, setting) for variant in setting.variants]
    fitting = [candidate for candidate in candidates if not candidate.excluded]
    if not fitting:
        return Advice(setting, tasks, needs, None, tuple(candidates), False)
    sure = [candidate for candidate in fitting if candidate.seeds >= MIN_SEEDS]
    if all(candidate.variant.method == "zero_shot" for candidate in sure):
        sure = [] if len(fitting) > len(sure) else sure  # nothing that was trained has been run often enough
    contest = sure or fitting
    best = max(contest, key=lambda candidate: candidate.score.mean)
    judged = [_judged(setting, candidate, best, bool(sure), tasks) for candidate in candidates]
    left = [candidate for candidate in judged if not candidate.excluded]
    # without enough seeds "cannot be told apart" says nothing, so the best mean it is
    costs = _known_costs(left, needs.first) if sure else []
    pick, dearer = _cheapest(left, costs) if sure else (best, {})
    decides = costs[0] if costs else "score"
    is_other = bool(sure) and decides != needs.first
    instead = f"{needs.first} was not measured for all, so {decides} decides" if is_other else ""
    final = [
        candidate
        if candidate.excluded or candidate.variant == pick.variant
        else _outdone(candidate, costs, dearer, bool(sure), f" ({instead})" if instead else "")
        for candidate in judged
    ]
    return Advice(setting, tasks, needs, pick, tuple(final), not sure, instead)


def _candidate(setting: Setting, variant: Variant, tasks: Sequence[str]) -> Candidate:
    seeds = common_seeds(setting, (variant,), tasks)
    costs = [over_tasks(setting, variant, tasks, measure) for measure in (MEMORY, STORED, WEIGHTS, ALL_TIME)]
    score = mean_score(setting, variant, tasks)
    count = MIN_SEEDS if variant.method == "zero_shot" and seeds else len(seeds)
    return Candidate(variant, score, count, *costs[:3], 0.0 if variant.method == "zero_shot" else costs[3])


def _limited(candidate: Candidate, needs: Needs, tasks: Sequence[str], setting: Setting) -> Candidate:
    """Say which of the needs it does not meet."""
    if candidate.score is None:
        return replace(candidate, excluded=_missing(setting, candidate.variant, tasks))
    reasons = []
    if needs.memory_bytes is not None and candidate.memory_bytes > needs.memory_bytes:
        reasons.append(f"needs {size(candidate.memory_bytes)} of memory, there is {size(needs.memory_bytes)}")
    storage = candidate.storage_bytes(needs.count)
    if needs.storage_bytes is not None and storage > needs.storage_bytes:
        reasons.append(f"{needs.count} tasks take {size(storage)} of storage, there is {size(needs.storage_bytes)}")
    if needs.least_score is not None and candidate.score.mean < needs.least_score:
        reasons.append(f"scores {points(candidate.score.mean)}, at least {points(needs.least_score)} is wanted")
    return replace(candidate, excluded="; ".join(reasons))


def _missing(setting: Setting, variant: Variant, tasks: Sequence[str]) -> str:
    without = [task for task in tasks if not setting.runs(task, variant)]
    if not without:
        return "no seed that every task has"
    states = {run.state for task in without for run in setting.cells.get((task, variant), ())} or {"not run"}
    return f"no usable run of {', '.join(without)} ({', '.join(sorted(states))})"


def _judged(setting: Setting, candidate: Candidate, best: Candidate, is_sure: bool, tasks: Sequence[str]) -> Candidate:
    """Compare with the best, and exclude what is worse, has too few seeds or cannot be compared."""
    if candidate.variant == best.variant or candidate.score is None:
        return candidate
    comparison = compare(setting, candidate.variant, best.variant, tasks)
    excluded, common = candidate.excluded, 0 if comparison is None else comparison.difference.count
    if not excluded and is_sure and candidate.seeds < MIN_SEEDS:
        excluded = f"too thin: {candidate.seeds} of the {MIN_SEEDS} seeds wanted"
    elif not excluded and is_sure and common < MIN_SEEDS:
        excluded = f"not comparable with {best.variant.label}: {common} of the {MIN_SEEDS} seeds wanted in common"
    elif not excluded and comparison is not None and comparison.is_of_other_rows:
        excluded = f"not comparable with {best.variant.label}: {comparison.why_not}"
    elif not excluded and comparison is not None and comparison.is_found and comparison.difference.mean < 0:
        behind = signed(-comparison.difference.mean).lstrip("+")
        alone = "" if comparison.is_larger_than_noise else f", by the test over {comparison.found_over} alone"
        excluded = f"{behind} points below the best mean{alone}"
    return replace(candidate, comparison=comparison, excluded=excluded)


def _known_costs(candidates: Sequence[Candidate], first: str) -> list[str]:
    """The costs that are known of every candidate, in the order in which they decide."""
    if first == "score":
        return []
    ordered = [first, *(name for name in COSTS if name != first)]
    return [name for name in ordered if all(c.cost(name) is not None for c in candidates)]


def _cheapest(candidates: Sequence[Candidate], costs: Sequence[str]) -> tuple[Candidate, dict[Variant, str]]:
    """The best mean of what costs about the least by one cost after the other; and the cost that ruled others out."""
    dearer: dict[Variant, str] = {}
    for cost in costs:
        least = min(candidate.cost(cost) for candidate in candidates)
        dearer |= {c.variant: cost for c in candidates if c.cost(cost) > SAME_COST * least}
        candidates = [candidate for candidate in candidates if candidate.variant not in dearer]
    return max(candidates, key=lambda candidate: candidate.score.mean), dearer


def _outdone(
    candidate: Candidate, costs: Sequence[str], dearer: Mapping[Variant, str], is_sure: bool, instead: str
) -> Candidate:
    """Say why something else is picked although it would do."""
    if not is_sure:
        return replace(candidate, excluded="no higher mean, on thin evidence")
    cost = dearer.get(candidate.variant)
    as_good = "the best mean" if candidate.comparison is None else "as good within the noise"
    as_cheap = " and as cheap" if costs else ""
    but = "no higher mean"
    if cost is not None:
        as_cheap = "" if cost == costs[0] else f" and {AS_CHEAP[costs[0]]}"
        but = _cost_text(candidate, cost)
    excluded = f"{as_good}{as_cheap}, but {'costs more: ' if cost is not None else ''}{but}{instead}"
    return replace(candidate, excluded=excluded, but=but)


def _cost_text(candidate: Candidate, cost: str) -> str:
    """A cost that is known, for people."""
    what = {"time": "of training", "memory": "of memory", "storage": "to store for a task"}
    return f"{(seconds if cost == 'time' else size)(candidate.cost(cost))} {what[cost]}"
