"""The tables of scores and of costs, and how hyper-parameters were chosen."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain, product
from statistics import fmean

from ..comparisons import compare
from ..contrasts import best_variant, mean_score, rivals, score_text, too_thin
from ..document import Block, Bullets, Cell, Heading, Section, Table, Text, cells
from ..evidence import UNSET, Evidence, Setting, Variant, flags, kind
from ..measures import (
    COSTS,
    ENERGY,
    INFERENCE,
    MISSING,
    NO_ADAPTER,
    OF_SOURCE,
    in_points,
    measured,
    p_values,
    points,
    seconds,
    whole,
    written,
)
from ..runs import Run
from ..statistics import MIN_SEEDS


def scores_section(evidence: Evidence) -> Section:
    """Per setting: scores of every task, and what each method costs on each."""
    blocks: list[Block] = [
        Text(
            "Mean over seeds ± 95 % interval (Student's t over the seeds), x 100. Bold: the best and what no test "
            "tells from it, where the lead over the best of each other method is larger than the noise, which is p < "
            "0.05 in the paired test over seeds and in the one over rows. Runs at equal examples and runs at equal "
            "seconds have tables of their own; zero-shot is the same in both."
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
        Text(
            "Scored on rows held out of train, never on the rows that the comparison is scored on. Of equal scores "
            "the one with the lower loss is to be taken."
        )
    ]
    for setting in searches:
        others = [s for s in evidence.settings if s.model == setting.model and s.has_results and not s.is_search]
        used = [(variant, run) for s in others for (_, variant), runs in s.cells.items() for run in runs]
        blocks += [Heading(setting.title), _search_table(setting, used)]
        searched = {kind(variant) for variant in setting.variants} | {Variant("zero_shot", None, None)}
        missing = sorted({kind(variant) for variant, _ in used} - searched, key=lambda variant: variant.order)
        names = "; ".join(variant.label for variant in missing)
        blocks += [Text(f"In the comparison, but not searched for: {names}.")] if missing else []
        blocks += [Text(_how_sure(setting, used))]
    return Section("search", "How hyper-parameters were chosen", blocks)


def _how_sure(setting: Setting, used: Sequence[tuple[Variant, Run]]) -> str:
    """What a search of so few runs cannot tell."""
    rates: dict[Variant, list[float]] = {}
    for variant in setting.variants:
        rate = dict(variant.extras).get("learning_rate")
        if rate is not None:
            rates.setdefault(kind(variant), []).append(float(rate))
    taken = {of: {float(flags(run)["learning_rate"]) for v, run in used if kind(v) == of} for of in rates}
    chosen = [of for of, tried in rates.items() if taken[of] & set(tried)]
    edges = sum(bool(taken[of] & {min(rates[of]), max(rates[of])}) for of in chosen)
    tasks = sorted({run.spec["task"] for _, run in used})
    runs = [run for task in setting.tasks for variant in setting.variants for run in setting.runs(task, variant)]
    error = max((r["score"] * (1 - r["score"]) / r["eval_samples"]) ** 0.5 for r in (run.result for run in runs))
    seeds = f"{len(setting.seeds)} seed{'s' * (len(setting.seeds) > 1)}"
    return (
        f"Chosen on {', '.join(setting.tasks)} with {seeds}, and used for {', '.join(tasks)}. One standard error of a "
        f"score is up to {points(error)} points: lesser differences are noise. Of {len(chosen)} learning rates taken "
        f"{edges} are the lowest or the highest that was tried: a better one may lie outside."
    )


def _search_table(setting: Setting, used: Sequence[tuple[Variant, Run]]) -> Table:
    """Scores and losses of what was tried, and which of it the comparison uses."""
    scores = _score_table(setting, set(), f"Scores while searching: {setting.title}")
    rows = []
    for variant, row in zip(setting.variants, scores.rows, strict=True):
        runs = [run for task in setting.tasks for run in setting.runs(task, variant)]
        loss = f"{fmean(run.result['loss'] for run in runs):.3f}" if runs else MISSING
        names = [name for name, _ in variant.extras]
        taken = {tuple(flags(run).get(name, UNSET) for name in names) for v, run in used if kind(v) == kind(variant)}
        is_taken = tuple(value for _, value in variant.extras) in taken
        rows.append([*row, *cells([loss, "yes" if is_taken else ""])])
    return Table(scores.caption, (*scores.columns, "loss", "in the comparison"), rows)


def _scores(setting: Setting) -> list[Block]:
    bold, notes = set(), []
    for name, tasks in setting.columns.items():
        winners, note = leaders(setting, name, tasks)
        bold |= {(tasks, variant) for variant in winners}
        notes.append(note)
    notes += _warnings(setting)
    table = _score_table(setting, bold, f"Scores: {setting.title}")
    return [replace(table, rows=[*table.rows, *_majority_row(setting)]), Bullets(notes)]


def _majority_row(setting: Setting) -> list[list[Cell]]:
    """What a method has to be above to have learnt anything; nothing where it is not known."""
    levels = [[setting.majority(task) for task in tasks] for tasks in setting.columns.values()]
    if all(level is None for of_column in levels for level in of_column):
        return []
    texts = [MISSING if None in of_column else points(fmean(of_column)) for of_column in levels]
    return [cells(["Always the most common label", *texts])]


def leaders(setting: Setting, name: str, tasks: Sequence[str]) -> tuple[list[Variant], str]:
    """The variants to be set in bold in a column, and a sentence that says why."""
    best = best_variant(setting, tasks)
    others = rivals(setting, best, tasks) if best is not None else []
    if not others:
        return [], f"{name}: nobody is bold, there are no two kinds of method to compare."
    rival = next((other for other in others if not _leads(setting, best, other, tasks)), others[0])
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
    leading = [v for v in same_kind if all(_leads(setting, v, other, tasks) for other in others)]
    bold = [variant for variant in leading if not _is_worse(setting, variant, best, tasks)]
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
    return score_text(setting, variant, score)


def _costs(setting: Setting, task: str) -> Table:
    tried = [variant for variant in setting.variants if (task, variant) in setting.cells]
    has_source = any(variant.init == "TRANSFER" for variant in tried)
    costs = [cost for cost in COSTS if cost not in OF_SOURCE or has_source]
    if all(measured(setting, task, variant, ENERGY) is None for variant in tried):
        costs.remove(ENERGY)  # "what was not measured" says so, where no run at all has it
    rows = [[variant.label, *(written(setting, task, variant, cost) for cost in costs)] for variant in tried]
    columns = ("method", *(cost.title for cost in costs))
    return Table(f"What it costs: {task}, {setting.title}", columns, list(map(cells, rows)))


def _warnings(setting: Setting) -> list[str]:
    """What makes numbers of this setting less comparable than they look."""
    counted = [run for runs in setting.cells.values() for run in runs if run.counts]
    about = _disturbances(setting, counted), _speeds(setting, counted), _sources(counted), _machines(setting, counted)
    return [*_few_rows(setting), *chain.from_iterable(about), *_inference_noise(setting), *_hashes(setting)]


def _few_rows(setting: Setting) -> list[str]:
    """What ± does not know, where the metric is a share of rows."""
    widths = {}
    for task in setting.tasks:
        best = best_variant(setting, [task])
        runs = setting.runs(task, best) if best is not None else ()
        if runs and {run.result["main_metric"] for run in runs} == {"accuracy"}:
            score, rows = fmean(run.result["score"] for run in runs), runs[0].result["eval_samples"]
            widths[task] = f"{task} {points(1.96 * (score * (1 - score) / rows) ** 0.5)} ({rows} rows)"
    if not widths:
        return []
    return [
        "± is over the seeds. How few rows were scored is not in it: of the best score that adds ± "
        f"{', '.join(widths.values())}. It moves all methods alike, so differences feel less of it: see p over rows."
    ]


def _disturbances(setting: Setting, counted: Sequence[Run]) -> list[str]:
    disturbed = sum(run.disturbed for run in counted)
    what = f"{disturbed} of {len(counted)} runs shared the machine with other programs"
    return [f"{what}: their timings are left out."] if disturbed else []


def _speeds(setting: Setting, counted: Sequence[Run]) -> list[str]:
    """How seconds of training come about."""
    texts = []
    if setting.has_pace:
        texts.append(
            "A machine is not always as fast. So a step of each method was timed in turns with the others, and "
            "seconds of training are the run's steps at that pace; as they were they stand with every run."
        )
    if setting.unit == "seconds" and counted:
        texts.append(
            "How many steps the seconds buy comes from that pace, and is the same whenever a run is done. As measured "
            f"undisturbed runs took: {'; '.join(_taken(setting)) or 'none was'}. What took longer than others had "
            "more steps than its share."
        )
    return texts


def _taken(setting: Setting) -> list[str]:
    """Seconds of training as measured, by what decides how long a step takes."""
    times: dict[Variant, list[float]] = {}
    for task, variant in setting.cells:
        of_kind = times.setdefault(Variant(variant.method, None, variant.quantization), [])
        of_kind += [run.result["train_time_s"] for run in setting.at_rest(task, variant) if run.result["steps"]]
    return [
        f"{variant.label} {seconds(fmean(found))} ({seconds(min(found))} to {seconds(max(found))}, {len(found)})"
        for variant, found in sorted(times.items(), key=lambda item: item[0].order)
        if found
    ]


def _sources(counted: Sequence[Run]) -> list[str]:
    """What TRANSFER has seen besides."""
    runs = [run for run in counted if run.spec["source"]]
    if not runs:
        return []
    left_out: dict[str, set[int | None]] = {}
    for run in runs:
        pair = f"{run.spec['source']['task']} for {run.spec['task']}"
        left_out.setdefault(pair, set()).add(run.result.get("source_rows_left_out"))
    texts = [f"TRANSFER has been trained on rows of another task too: {', '.join(sorted(left_out))}."]
    known = {pair: sorted(counts - {None}) for pair, counts in sorted(left_out.items()) if counts - {None}}
    if known:
        counts = "; ".join(f"{pair}: {' or '.join(map(whole, found))}" for pair, found in known.items())
        texts.append(f"Those that share text with the scored rows were left out ({counts}).")
    unknown = sum(run.result.get("source_rows_left_out") is None for run in runs)
    if unknown:
        texts.append(f"In {unknown} of its {len(runs)} runs nobody looked whether any do.")
    return [" ".join(texts)]


def _inference_noise(setting: Setting) -> list[str]:
    """What the ratio of inference times is where both are of the same model."""
    same = [variant for variant in setting.variants if variant.method in NO_ADAPTER]
    cells = product(setting.tasks, same)
    ratios = [measured(setting, task, variant, INFERENCE) for task, variant in cells]
    known = sorted(ratio for ratio in ratios if ratio is not None)
    if len(known) < 2:
        return []
    return [
        f"Methods without an adapter had the same model timed twice: one time was {known[0]:.2f} to {known[-1]:.2f} "
        "of the other. Inference times of adapters that differ by as little say nothing."
    ]


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
        drawn = () if setting.unit == "seconds" else ("train_rows_sha256",)  # as many as the seconds buy
        for what in ("weights_sha256", "scored_rows_sha256", *drawn):
            if len({run.env.get(what) for run in runs} - {None}) > 1:
                warnings.append(f"{task}: not all runs have the same {what}.")
    return warnings
