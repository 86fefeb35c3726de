"""Which method to pick for what you have, by the rule and the runs of the report.

python -m benchmarks recommend --memory 8GB --tasks 50 --storage 1GB --least_score 0.7
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .harness.store import StoreError
from .report import default_results


if TYPE_CHECKING:
    from .reporting.advice import Advice, Candidate
    from .reporting.evidence import Setting

PREFER = ("time", "memory", "storage", "score")


def main(arguments: list[str]) -> None:
    """Print the advice; the exit status is 1 if nothing fits anywhere."""
    options = _options(arguments)
    from .reporting.advice import RULE, Needs, advise
    from .reporting.evidence import read_evidence
    from .reporting.runs import EvidenceError

    try:
        settings = read_evidence(options.results or default_results()).settings
        settings = [setting for setting in settings if setting.has_results and not setting.is_search]
        _check_tasks(options.task, settings)
    except (StoreError, EvidenceError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None
    needs = Needs(options.memory, options.storage, options.tasks, options.least_score, options.prefer)
    columns = [_columns(setting, options.task) for setting in settings]
    answers = [advise(setting, needs, tasks) for setting, tasks in zip(settings, columns, strict=True) if tasks]
    for advice in answers:
        show(advice)
    print(f"The rule: {RULE}")
    if not any(advice.pick for advice in answers):
        raise SystemExit(1)


def show(advice: Advice) -> None:
    """Print one setting's answer, and one line for each method."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    console = Console()
    columns = ("method", "score", "memory", f"storage, {_tasks(advice.needs.count)}", "training", "so")
    table = Table(*columns, box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))  # a terminal has 80 columns
    for column in table.columns:
        column.overflow = "fold"
    for candidate in advice.candidates:
        is_pick = advice.pick is not None and candidate.variant == advice.pick.variant
        so = "the pick" if is_pick else candidate.excluded
        cells = candidate.variant.label, *_costs(advice, candidate), so
        table.add_row(*cells, style="bold" if is_pick else "")
    console.print(f"\n{advice.setting.title}; tasks: {', '.join(advice.tasks)}", soft_wrap=True, highlight=False)
    console.print(_sentence(advice), soft_wrap=True, highlight=False, style="bold", markup=False)
    console.print(table)


def _costs(advice: Advice, candidate: Candidate) -> list[str]:
    """Score, memory, storage and time."""
    from .reporting.contrasts import score_text
    from .reporting.measures import MISSING, seconds, size

    if candidate.score is None:
        return [MISSING] * 4
    time = MISSING if candidate.time_s is None else seconds(candidate.time_s)
    return [
        score_text(advice.setting, candidate.variant, candidate.score),
        size(candidate.memory_bytes),
        size(candidate.storage_bytes(advice.needs.count)),
        "none" if candidate.variant.method == "zero_shot" else time,
    ]


def _sentence(advice: Advice) -> str:
    """The pick and what it costs."""
    from .reporting.contrasts import score_text
    from .reporting.measures import in_points, seconds, size
    from .reporting.statistics import MIN_SEEDS

    pick = advice.pick
    if pick is None:
        return "Nothing fits: the table says what each method misses."
    time = "no training" if pick.variant.method == "zero_shot" else "training time not measured"
    costs = [
        f"score {score_text(advice.setting, pick.variant, pick.score)}",
        f"{size(pick.memory_bytes)} of memory",
        f"{size(pick.storage_bytes(advice.needs.count))} of storage for {_tasks(advice.needs.count)}",
        f"{seconds(pick.time_s)} of training a task" if pick.time_s else time,
    ]
    behind = pick.comparison and in_points(pick.comparison.difference)
    costs.append(f"{behind} against the best mean" if behind else "the best mean")
    thin = f" The evidence is too thin, fewer than {MIN_SEEDS} seeds: a hint, no advice." if advice.is_thin else ""
    instead = f" The {advice.instead}." if advice.instead else ""
    return f"Pick {pick.variant.label}: {', '.join(costs)}.{instead}{thin}"


def _tasks(count: int) -> str:
    return f"{count} task{'' if count == 1 else 's'}"


def _columns(setting: Setting, names: list[str] | None) -> list[str]:
    """A column may say more than the task's name, where it was scored in several ways."""
    return [task for task in setting.tasks if task.split(", ")[0] in names] if names else list(setting.common)


def _check_tasks(names: Iterable[str] | None, settings: list[Setting]) -> None:
    known = {task.split(", ")[0] for setting in settings for task in setting.tasks}
    if not known:
        raise ValueError("There are no runs to compare, only those of a search for hyper-parameters.")
    if not set(names or ()) <= known:
        from peft_prompt_ext._choices import check_choice  # takes its time, for a good message

        for name in names or ():
            check_choice("--task", name, sorted(known))


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m benchmarks recommend", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--memory", type=_size, help="of the device, such as 8GB: the model and its training")
    parser.add_argument("--tasks", type=_count, default=1, help="how many will be trained: matters to --storage")
    parser.add_argument("--storage", type=_size, help="such as 1GB: the model and what every task stores")
    parser.add_argument("--least_score", type=_score, help="as a fraction: 0.8; the mean of the tasks' main metrics")
    parser.add_argument("--task", nargs="+", help="those like yours; by default those of the report's mean")
    parser.add_argument("--prefer", choices=PREFER, default="time", help="what decides among those that are as good")
    parser.add_argument("--results", nargs="+", type=Path, help="stores; by default those in benchmarks/results")
    return parser.parse_args(arguments)


def _size(text: str) -> int:
    from peft_prompt_ext.memory import parse_bytes

    try:
        return parse_bytes(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"wanted a size such as '8GB' or '24GiB'; got {text!r}") from None


def _count(text: str) -> int:
    return int(_number(text, "a number of tasks, 1 or more", lambda value: value >= 1 and value == int(value)))


def _score(text: str) -> float:
    return _number(text, "a score from 0 to 1, such as 0.8", lambda value: 0 <= value <= 1)


def _number(text: str, wanted: str, allowed: Any) -> float:
    try:
        value = float(text)
        good = allowed(value)
    except (ValueError, OverflowError):
        good = False
    if not good:
        raise argparse.ArgumentTypeError(f"wanted {wanted}; got {text!r}")
    return value
