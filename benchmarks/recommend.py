"""Which method to take for what you have, from the same results as the report.

    python -m benchmarks recommend --memory 8GB --tasks 50 --storage 1GB --least_score 0.7

Left out is what was not measured, does not fit, or is clearly or probably behind the best mean. Of the tied rest the
least time (or what --prefer names) decides; costs within a tenth count as equal. Then, of one task, LoRA is taken,
because inference servers load it, and of several what costs less.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from .harness.store import StoreError


SAME_COST = 1.1  # less is within what a machine differs from day to day
COLUMNS = {"time": "seconds", "memory": "memory_bytes", "storage": "adapter_bytes"}


def main(arguments: list[str]) -> None:
    """Print the answer; the exit status is 1 if there is nothing to take."""
    options = _options(arguments)
    from .report.command import read

    lines, fits = answer(read(options.results), options)
    try:
        print("\n".join(lines if options.all else lines[:10]), flush=True)
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if not fits:
        raise SystemExit(1)


def answer(summary: Any, options: argparse.Namespace) -> tuple[list[str], bool]:
    """The lines of the answer, the pick first, and whether there is one; a task that no run has is a StoreError."""
    from .report.tables import COSTS, difference_text, names, on_what, percent

    tasks = sorted(set(options.task or summary.common))
    if unknown := sorted(set(tasks) - set(summary.tasks)):
        from peft_prompt_ext._choices import nearest  # takes its time, for a good message

        hint = nearest(unknown[0], summary.tasks)
        raise StoreError(f"--task: {unknown[0]!r} has no runs{hint}; {names(summary.tasks)} have some.")
    where = f"Speaks of {on_what(summary, tasks)}"
    unlearnt = [task for task in tasks if task in summary.at_majority]
    nothing = f"No method clearly beats the majority class on {names(unlearnt)} with this model"
    if unlearnt == tasks:
        return [f"{nothing}; take a larger model.", where], False
    scores = {variant: summary.score(variant, tasks) for variant in summary.variants()}
    reasons = {variant: _obstacle(summary, variant, scores[variant], tasks, options) for variant in scores}
    left = [variant for variant, reason in reasons.items() if not reason]
    best = max(left, key=lambda variant: scores[variant].mean, default=None)  # type: ignore[union-attr]
    for variant in left if best else []:
        difference = summary.difference(variant, best, tasks)
        if variant != best and (difference is None or difference.verdict != "tied"):
            reasons[variant] = f"{difference_text(difference)}, against {best}"
    tied = [variant for variant in left if not reasons[variant]]
    pick, dearer = _cheapest(summary, tied, tasks, options) if tied else (None, {})
    others = [f"{variant}: {reason}." for variant, reason in reasons.items() if reason]
    if pick is None:
        return ["Nothing fits.", where, *others], False

    def costs(variant: str) -> str:
        texts = [f"{form(summary.cost(variant, tasks, column))} {what}" for column, form, what in COSTS[:3]]
        return f"{percent(scores[variant])}, {', '.join(texts)}"

    first = "the best mean" if pick == best else f"tied with {best}, the best mean"
    lines = [f"Take {pick}: {costs(pick)}; {first}.", where]
    lines += [f"{nothing}."] if unlearnt else []
    lines += [f"{variant}: tied; not picked because {dearer[variant]}: {costs(variant)}." for variant in dearer]
    return [*lines, *others], True


def _obstacle(summary: Any, variant: str, score: Any, tasks: list[str], options: argparse.Namespace) -> str:
    """Which need a variant does not meet."""
    from .report.statistics import MIN_SEEDS
    from .report.tables import percent, size

    if score is None or score.count < min(MIN_SEEDS, len(summary.seeds)):
        return "not run on all tasks" if score is None else f"only {score.count} seeds"
    memory, once, each = (summary.cost(variant, tasks, f"{what}_bytes") for what in ("memory", "weights", "adapter"))
    storage = options.tasks * each + (summary.method(variant) != "full") * once  # full keeps a model for each
    for count, limit, what in ((memory, options.memory, "memory"), (storage, options.storage, "storage")):
        if limit is not None and count > limit:
            return f"needs {size(count)} of {what}"
    return f"scores {percent(score)}" if score.mean < options.least_score else ""


def _cheapest(summary: Any, variants: list[str], tasks: list[str], options: Any) -> tuple[str, dict[str, str]]:
    """By the costs that are known of all, then the most tasks, then the highest mean; and why not each other one."""
    dearer, prefer = {}, options.prefer
    for name in [] if prefer == "score" else [prefer, *(name for name in COLUMNS if name != prefer)]:
        served = [variant for variant in variants if summary.method(variant) == "lora"]
        if name != prefer and options.tasks == 1 and served:
            why = "for one task LoRA is as good, and inference servers load it"
            dearer |= {variant: why for variant in variants if variant not in served}
            variants = served
        costs = {variant: summary.cost(variant, tasks, COLUMNS[name]) for variant in variants}
        if all(cost == cost for cost in costs.values()):  # none is NaN
            least = SAME_COST * min(costs.values())
            dearer |= {variant: f"it takes more {name}" for variant in variants if costs[variant] > least}
            variants = [variant for variant in variants if variant not in dearer]
    counts = prefer != "score"
    pick = max(variants, key=lambda v: (counts * len(summary.tasks_of(v)), summary.score(v, tasks).mean))  # type: ignore[union-attr]
    why = "it was run on fewer tasks, or has no higher mean"
    return pick, dearer | {variant: why for variant in variants if variant != pick}


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m benchmarks recommend", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--memory", type=_size, help="of the device, such as 8GB: the model and its training")
    parser.add_argument("--tasks", type=int, default=1, help="how many will be trained: for --storage, and a tie")
    parser.add_argument("--storage", type=_size, help="such as 1GB: the model and what every task stores")
    parser.add_argument("--least_score", type=float, default=0.0, help="such as 0.8: the mean of the main metrics")
    parser.add_argument("--task", nargs="+", help="those like yours; by default those of the report's means")
    parser.add_argument("--prefer", choices=[*COLUMNS, "score"], default="time", help="what decides a tie")
    parser.add_argument("--results", nargs="+", type=Path, help="stores; by default those in benchmarks/results")
    parser.add_argument("--all", action="store_true", help="a line for every method")
    options = parser.parse_args(arguments)
    if options.tasks < 1:
        parser.error(f"--tasks: wanted a number of tasks, 1 or more; got {options.tasks}")
    if not 0 <= options.least_score <= 1:
        parser.error(f"--least_score: wanted a score from 0 to 1, such as 0.8; got {options.least_score}")
    return options


def _size(text: str) -> int:
    from peft_prompt_ext.cli import to_bytes

    return to_bytes(text)
