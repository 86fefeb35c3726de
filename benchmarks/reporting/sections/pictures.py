"""Learning curves, and scores against costs, as pictures with their numbers in tables."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from statistics import fmean

from ..contrasts import best_of_method, mean_score, score_text
from ..document import Block, Figure, Gallery, Heading, Section, Table, Text, cells
from ..evidence import Evidence, Setting, Variant
from ..figures import Line, Point, draw_curves, draw_frontier
from ..measures import ALL_TIME, MEMORY, MISSING, PARAMETERS, STORED, over_tasks, points, seconds, untimed, whole
from ..runs import Run


AXES = {"examples": "examples seen", "seconds": "seconds of training"}
COSTS = {
    "memory": (MEMORY, 1e6, "memory with the model, MB"),
    "parameters": (PARAMETERS, 1, "trainable parameters"),
    "time": (ALL_TIME, 1, "training of a task with its source, s"),
    "bytes": (STORED, 1e3, "bytes to store for a task, kB"),
}


def curves_section(evidence: Evidence) -> Section:
    """Scores on the way."""
    known = {run.result.get("curve_samples") for run in evidence.runs if run.counts and run.result["steps"]}
    counts = " or ".join(map(str, sorted(known - {None}))) or "rows"
    blocks: list[Block] = [
        Text(
            f"The points of a line are scored on the same {counts} of the task's rows, the tables on all of them: "
            f"{_point_error(known - {None})}Lines are means over seeds; bands reach from the lowest to the highest "
            "seed. Seconds are of training alone, a TRANSFER's source before it included, and a line over seconds is "
            "of the runs that were timed. Dashed lines with open markers are 4-bit; the dotted line is the model "
            "before any training."
        )
    ]
    for setting in evidence.settings:
        if setting.has_results and not setting.is_search:
            found = [block for task in setting.tasks for block in _curves(setting, task)]
            blocks += [Heading(setting.title), *found] if found else []
    return Section("curves", "Learning curves", blocks)


def _point_error(counts: Iterable[int]) -> str:
    """How far a point may be from the score on all rows."""
    errors = [100 * 0.5 / count**0.5 for count in counts]
    return f"one standard error of a point is up to {max(errors):.0f} points of score. " if errors else ""


def costs_section(evidence: Evidence) -> Section:
    """What a point of score costs."""
    blocks: list[Block] = [
        Text(
            "Scores are means of the tasks with 95 % intervals over seeds, where there are three or more. The dashed "
            "line joins the methods to which no other is better in score and in cost, and that are better than no "
            "training, by their means: noise is not in it."
        )
    ]
    for setting in evidence.settings:
        if setting.has_results and not setting.is_search:
            blocks += [Heading(setting.title), *_frontiers(setting)]
    return Section("costs", "Score against cost", blocks)


def _curves(setting: Setting, task: str) -> list[Block]:
    lines = {axis: _lines(setting, task, axis) for axis in AXES}
    prompts = [line.variant for line in lines["examples"] if _is_plain_prompt(line.variant)]
    best = best_of_method(setting, "prompt_tuning", setting.common)
    if best not in prompts:  # not run on this task
        best = best_of_method(setting, "prompt_tuning", [task])
    methods = [v for v in setting.variants if v == best or not _is_plain_prompt(v)]
    wanted = [("methods", axis, methods) for axis in (AXES if setting.unit == "examples" else ["seconds"])]
    if len(prompts) > 1:
        wanted.append(("inits", setting.unit, prompts))
    runs = setting.runs(task, Variant("zero_shot", None, None))
    level = runs[0].result["curve"][0]["score"] if runs and runs[0].result["curve"] else None  # of the same rows
    figures = []
    for kind, axis, variants in wanted:
        shown = [line for line in lines[axis] if line.variant in variants]
        if shown:
            name = figure_id("curve", setting.title, task, kind, axis)
            caption = f"{task}: {kind} over {AXES[axis]}, {setting.title}"
            names = "; ".join(line.variant.label for line in shown)
            description = f"Learning curves of {names}. The numbers are in the table of this task."
            figures.append(Figure(name, caption, description, draw_curves(name, shown, AXES[axis], level)))
    if not figures:
        return []
    times = _time_to_score_table(setting, task)
    return [Gallery(figures), *([times] if times else []), _curve_table(setting, task)]


def _is_plain_prompt(variant: Variant) -> bool:
    return variant.method == "prompt_tuning" and variant.quantization is None


def _lines(setting: Setting, task: str, axis: str) -> list[Line]:
    found = []
    for variant in setting.variants:
        stops = curve((setting.runs if axis == "examples" else setting.timed)(task, variant))
        if len(stops) > 1:
            x = [fmean(point[axis] for point in stop) for stop in stops]
            scores = [[point["score"] for point in stop] for stop in stops]
            found.append(Line(variant, x, *([fold(stop) for stop in scores] for fold in (fmean, min, max))))
    return found


def curve(runs: Sequence[Run]) -> list[list[dict[str, float]]]:
    """The points of all runs that were scored at the same stop: the first, the second, ..., the last.

    The training of a TRANSFER's source comes before the first.
    """
    curves = [
        [
            {**point, "seconds": (run.result["source_time_s"] or 0.0) + point["seconds"]}
            for point in run.result["curve"]
        ]
        for run in runs
        if run.result["curve"]
    ]
    if not curves:
        return []
    count = min(map(len, curves))
    return [[points[stop] for points in curves] for stop in (*range(count - 1), -1)]


def _curve_table(setting: Setting, task: str) -> Table:
    rows = []
    for variant in setting.variants:
        stops, timed = curve(setting.runs(task, variant)), curve(setting.timed(task, variant))
        for number, stop in enumerate(stops if len(stops) > 1 else []):
            scores = [point["score"] for point in stop]
            same = -1 if number == len(stops) - 1 else number  # some runs have more stops than others, and all an end
            times = [point["seconds"] for point in timed[same]] if timed else []
            after = f"{fmean(times):.1f}" if times else untimed(setting, task, variant)
            examples = whole(fmean(point["examples"] for point in stop))
            rows.append([variant.label, examples, after, *(points(f(scores)) for f in (fmean, min, max))])
    columns = ("method", "examples", "seconds", "mean score", "lowest seed", "highest seed")
    return Table(f"Numbers of the curves: {task}, {setting.title}", columns, list(map(cells, rows)), is_folded=True)


def _time_to_score_table(setting: Setting, task: str) -> Table | None:
    """Seconds of training until the curve has been at given scores; None if no curve passes any."""
    trained = {variant: _with_curve(setting.runs(task, variant)) for variant in setting.variants}
    scores = [point["score"] for runs in trained.values() for run in runs for point in run.result["curve"]]
    if not scores:
        return None
    wanted = [step / 20 for step in range(21) if min(scores) < step / 20 <= max(scores)]
    timed = {variant: _with_curve(setting.timed(task, variant)) for variant in trained}
    rows = [
        [variant.label, *(_time_to(score, runs, timed[variant]) for score in wanted)]
        for variant, runs in trained.items()
        if runs
    ]
    columns = ("method", *(points(score) for score in wanted))
    return Table(f"Time to a score: {task}, {setting.title}", columns, list(map(cells, rows))) if wanted else None


def _with_curve(runs: Sequence[Run]) -> list[Run]:
    return [run for run in runs if len(run.result["curve"] or []) > 1]


def _time_to(score: float, runs: Sequence[Run], timed: Sequence[Run]) -> str:
    """With the time of the source, which comes before; only if all came so far, else a mean is of the quick ones."""
    arrived = sum(_first(score, run) is not None for run in runs)
    if arrived < len(runs):
        return f"{arrived} of {len(runs)} seeds" if arrived else "not reached"
    firsts = [after for run in timed if (after := _first(score, run)) is not None]
    if not firsts:
        return "reached, not timed"
    text = seconds(fmean(firsts)) if any(firsts) else "before training"
    return text + (f" ({len(firsts)} of {len(runs)} runs)" if len(firsts) < len(runs) else "")


def _first(score: float, run: Run) -> float | None:
    """Seconds until the run's curve is at a score; None if it never is."""
    found = (point["seconds"] for point in run.result["curve"] if point["score"] >= score)
    after = next(found, None)
    return None if after is None else (run.result["source_time_s"] or 0.0) + after


def _frontiers(setting: Setting) -> list[Block]:
    scores = {variant: mean_score(setting, variant, setting.common) for variant in setting.variants}
    untrained = scores.get(Variant("zero_shot", None, None))
    level = untrained.mean if untrained else None
    trained = {v: score for v, score in scores.items() if score is not None and v.method != "zero_shot"}
    figures, on, costs = [], {}, {}
    # at equal seconds all but a TRANSFER stand at one time: the budget
    wanted = {name: cost for name, cost in COSTS.items() if name != "time" or setting.unit != "seconds"}
    for name, (measure, scale, label) in wanted.items():
        costs[name] = {variant: over_tasks(setting, variant, setting.common, measure) for variant in trained}
        known = [Point(v, costs[name][v] / scale, trained[v]) for v in trained if costs[name][v] is not None]
        on[name] = frontier([point for point in known if level is None or point.score.mean > level])
        if len(known) > 1:
            figure, caption = (
                figure_id("cost", setting.title, name),
                f"Score over {label.split(',')[0]}, {setting.title}",
            )
            description = "Points with error bars: " + "; ".join(p.variant.label for p in known) + ". Numbers below."
            svg = draw_frontier(figure, known, on[name], label, level)
            figures.append(Figure(figure, caption, description, svg))
    rows = []
    for variant, score in trained.items():
        values = [costs[name][variant] for name in wanted]
        texts = [
            MISSING if c is None else measure.show(c) for c, (measure, *_) in zip(values, wanted.values(), strict=True)
        ]
        best = ", ".join(name for name in wanted if variant in on[name]) or "none"
        rows.append(cells([variant.label, score_text(setting, variant, score), *texts, best]))
    columns = ("method", "score", *(measure.title for measure, *_ in wanted.values()), "nothing better in")
    table = Table(f"Score against cost: {setting.title}", columns, rows)
    return [Gallery(figures), table] if figures else [table]


def frontier(known: Sequence[Point]) -> list[Variant]:
    """Those to which no other is at least as good in both and better in one."""

    def beats(one: Point, other: Point) -> bool:
        as_good = one.x <= other.x and one.score.mean >= other.score.mean
        return as_good and (one.x < other.x or one.score.mean > other.score.mean)

    return [point.variant for point in known if not any(beats(other, point) for other in known)]


def figure_id(*parts: str) -> str:
    """A name that can stand in HTML."""
    return "-".join(re.sub(r"[^a-z0-9]+", "-", part.lower()).strip("-") for part in parts)
