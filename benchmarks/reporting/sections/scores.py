"""The tables of scores and of costs, and how hyper-parameters were chosen."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import chain

from ..contrasts import best_variant, mean_score, score_text, too_thin
from ..document import Block, Bullets, Cell, Heading, Section, Table, Text, cells
from ..evidence import MIN_SEEDS, Evidence, Setting, Variant
from ..measures import COSTS, MISSING, OF_SOURCE, in_points, milliseconds, p_values, seconds, whole, written
from ..runs import Run
from ..statistics import compare


def scores_section(evidence: Evidence) -> Section:
    """Per setting: scores of every task, and what each method costs on each."""
    blocks: list[Block] = [
        Text(
            "Mean over seeds ± 95 % interval (Student's t over the seeds), x 100. Bold: the best and what no test "
            "tells from it, where the lead over the best method of another kind is larger than the noise, which is p "
            "< 0.05 in the paired test over seeds and in the one over rows. Runs at equal examples and runs at "
            "equal seconds have tables of their own; zero-shot is the same in both."
        )
    ]
    for setting in evidence.settings:
        if setting.has_results and not setting.is_search:
            blocks += [Heading(setting.title), *_scores(setting), *(_costs(setting, task) for task in setting.tasks)]
    return Section("scores", "Scores and costs", blocks)


def search_section(evidence: Evidence) -> Section | None:
    """What was tried to choose hyper-parameters; None if no store has it."""
    searches = [setting for setting in evidence.settings if setting.is_search and setting.has_results]
    if not searches:
        return None
    blocks: list[Block] = [
        Text("Scored on rows held out of train, never on the rows that the comparison is scored on.")
    ]
    for setting in searches:
        blocks += [Heading(setting.title), _score_table(setting, set(), f"Scores while searching: {setting.title}")]
    return Section("search", "How hyper-parameters were chosen", blocks)


def _scores(setting: Setting) -> list[Block]:
    bold, notes = set(), []
    for name, tasks in setting.columns.items():
        winners, note = leaders(setting, name, tasks)
        bold |= {(tasks, variant) for variant in winners}
        notes.append(note)
    notes += _warnings(setting)
    return [_score_table(setting, bold, f"Scores: {setting.title}"), Bullets(notes)]


def leaders(setting: Setting, name: str, tasks: Sequence[str]) -> tuple[list[Variant], str]:
    """The variants to be set in bold in a column, and a sentence that says why."""
    best = best_variant(setting, tasks)
    rival = best and best_variant(setting, tasks, lambda variant: variant.method != best.method)
    if best is None or rival is None:
        return [], f"{name}: nobody is bold, there are no two kinds of method to compare."
    lead = compare(setting, best, rival, tasks)
    if lead is None:
        return [], f"{name}: nobody is bold, {best.label} and {rival.label} have no seed in common."
    thin = too_thin(setting, tasks)
    if thin:
        few = f"from fewer than {MIN_SEEDS} seeds"
        return [], f"{name}: nobody is bold; a higher mean than {best.label}, but {few}: {thin}."
    what = f"the lead of {best.label} over {rival.label} ({in_points(lead.difference)}; p: {p_values(lead)})"
    if not _leads(setting, best, rival, tasks):
        return [], f"{name}: nobody is bold, {what} is {lead.verdict}."
    same_kind = [variant for variant in setting.variants if variant.method == best.method]
    bold = [v for v in same_kind if _leads(setting, v, rival, tasks) and not _is_worse(setting, v, best, tasks)]
    return bold, f"{name}: {what} is larger than the noise."


def _leads(setting: Setting, variant: Variant, rival: Variant, tasks: Sequence[str]) -> bool:
    comparison = compare(setting, variant, rival, tasks)
    return comparison is not None and comparison.is_larger_than_noise and comparison.difference.mean > 0


def _is_worse(setting: Setting, variant: Variant, best: Variant, tasks: Sequence[str]) -> bool:
    comparison = compare(setting, variant, best, tasks) if variant != best else None
    return comparison is not None and comparison.is_found and comparison.difference.mean < 0


def _score_table(setting: Setting, bold: set[tuple[tuple[str, ...], Variant]], caption: str) -> Table:
    columns = setting.columns
    rows = []
    for variant in setting.variants:
        row = [Cell(variant.label)]
        for tasks in columns.values():
            text = _score(setting, variant, tasks)
            runs = setting.runs(tasks[0], variant) if len(tasks) == 1 else ()
            row.append(Cell(text, (tasks, variant) in bold, runs[0].run_id if runs else ""))
        rows.append(row)
    metrics = {run.result["main_metric"] for runs in setting.cells.values() for run in runs if run.counts}
    named = [name + (_metric(setting, tasks) if len(metrics) > 1 else "") for name, tasks in columns.items()]
    what = f" ({metrics.pop()})" if len(metrics) == 1 else ""
    return Table(caption + what, ("method", *named), rows)


def _metric(setting: Setting, tasks: Sequence[str]) -> str:
    found = {run.result["main_metric"] for v in setting.variants for run in setting.runs(tasks[0], v)}
    return f" ({', '.join(sorted(found))})" if len(tasks) == 1 and found else ""


def _score(setting: Setting, variant: Variant, tasks: Sequence[str]) -> str:
    score = mean_score(setting, variant, tasks)
    if score is None:
        states = {run.state for task in tasks for run in setting.cells.get((task, variant), ()) if not run.counts}
        return ", ".join(sorted(states)) or MISSING
    return score_text(setting, variant, score) + _mark(setting, variant, tasks)


def _mark(setting: Setting, variant: Variant, tasks: Sequence[str]) -> str:
    """At equal seconds a disturbed run has seen fewer examples, so its score is marked too."""
    runs = [run for task in tasks for run in setting.runs(task, variant)]
    return " †" if setting.unit == "seconds" and any(run.disturbed for run in runs) else ""


def _costs(setting: Setting, task: str) -> Table:
    tried = [variant for variant in setting.variants if (task, variant) in setting.cells]
    has_source = any(variant.init == "TRANSFER" for variant in tried)
    costs = [cost for cost in COSTS if cost not in OF_SOURCE or has_source]
    rows = [[variant.label, *(written(setting, task, variant, cost) for cost in costs)] for variant in tried]
    columns = ("method", *(cost.title for cost in costs))
    return Table(f"What it costs: {task}, {setting.title}", columns, list(map(cells, rows)))


def _warnings(setting: Setting) -> list[str]:
    """What makes numbers of this setting less comparable than they look."""
    counted = [run for runs in setting.cells.values() for run in runs if run.counts]
    about = _disturbances(setting, counted), _speeds(setting, counted), _sources(counted), _machines(setting, counted)
    return [*chain.from_iterable(about), *_hashes(setting)]


def _disturbances(setting: Setting, counted: Sequence[Run]) -> list[str]:
    disturbed = sum(run.disturbed for run in counted)
    marked = ", and their scores, which at equal seconds suffer too, are marked †" if setting.unit == "seconds" else ""
    what = f"{disturbed} of {len(counted)} runs shared the machine with other programs"
    return [f"{what}: their timings are left out{marked}."] if disturbed else []


def _speeds(setting: Setting, counted: Sequence[Run]) -> list[str]:
    if setting.unit == "examples" and setting.yardsticks:
        return [
            f"The machine was not always as fast: the same piece of work took {_span(setting.yardsticks)} beside the "
            f"runs. Seconds of training are given as for {milliseconds(setting.yardstick_s)}, the median; as they "
            "were they stand with every run. Runs that did not measure it have no times here if others of a task did."
        ]
    trained = [run for run in counted if run.result["steps"]]
    if setting.unit != "seconds" or not trained:
        return []
    times = sorted(run.result["train_time_s"] for run in trained)
    known = sorted(run.yardstick_s for run in trained if run.yardstick_s)
    text = (
        f"The runs trained for {seconds(times[0])} to {seconds(times[-1])}: how many steps fit is reckoned from some "
        "that are timed before."
    )
    if known:
        text += (
            f" The same piece of work took {_span(known)} beside them: how fast the machine was decides scores too."
        )
    return [text]


def _span(ascending: Sequence[float]) -> str:
    return f"{milliseconds(ascending[0])} to {milliseconds(ascending[-1])}"


def _sources(counted: Sequence[Run]) -> list[str]:
    """What TRANSFER has seen besides."""
    left_out = [run.result.get("source_rows_left_out") for run in counted if run.spec["source"]]
    if not left_out:
        return []
    known = sorted({count for count in left_out if count is not None})
    texts = ["TRANSFER has been trained on rows of its source too."]
    if known:
        counts = ", ".join(map(whole, known))
        texts.append(f"Those that share text with the scored rows were left out ({counts}).")
    if None in left_out:
        texts.append(f"In {left_out.count(None)} of its {len(left_out)} runs nobody looked whether any do.")
    return [" ".join(texts)]


def _machines(setting: Setting, counted: Sequence[Run]) -> list[str]:
    machines = Counter(run.machine for run in counted)
    if len(machines) < 2:
        return []
    names = {machine: f"{machine[0]} ({machine[1]})" for machine in machines}
    counts = ", ".join(f"{names[machine]}: {machines[machine]} runs" for machine in sorted(machines))
    return [f"Runs are from several machines: {counts}. Timings are of {names[setting.machine]} alone."]


def _hashes(setting: Setting) -> list[str]:
    warnings = []
    for task in setting.tasks:
        runs = [run for variant in setting.variants for run in setting.runs(task, variant)]
        for what in ("weights_sha256", "scored_rows_sha256", "train_rows_sha256"):
            if len({run.env.get(what) for run in runs} - {None}) > 1:
                warnings.append(f"{task}: not all runs have the same {what}.")
    return warnings
