"""What the init brings, and what 4 bits cost: differences between two runs of the same seed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import product

from ..comparisons import compare
from ..contrasts import best_variant, paired_difference, quantized_pairs, random_of, too_thin
from ..document import Block, Figure, Heading, Section, Table, Text, cells
from ..evidence import Evidence, Setting, Variant
from ..figures import draw_differences
from ..measures import (
    MISSING,
    NO_TIMES,
    PEAK,
    STEP,
    TIME,
    WEIGHTS,
    Measure,
    in_points,
    p_values,
    seconds,
    signed_interval,
    size,
)
from ..statistics import MIN_SEEDS
from .pictures import figure_id


def inits_section(evidence: Evidence) -> Section:
    """Every init minus RANDOM."""
    blocks: list[Block] = [
        Text(
            "Points of score minus those of RANDOM, which is N(0, 1) as in stock PEFT: the mean of the differences "
            "between runs of the same seed, and its 95 % interval."
        )
    ]
    for setting in _compared(evidence):
        pairs = [(variant, base) for variant in setting.variants if (base := _base(setting, variant)) is not None]
        if pairs:
            blocks += [Heading(setting.title), *_inits(setting, pairs)]
        elif sum(variant.method == "prompt_tuning" for variant in setting.variants) > 1:
            blocks += [Heading(setting.title), Text("Not measured: RANDOM, or anything to put beside it.")]
    if len(blocks) == 1:
        blocks.append(Text("Not measured."))
    return Section("inits", "What the initialisation brings", blocks)


def four_bits_section(evidence: Evidence) -> Section:
    """Every quantised variant minus its twin in full precision."""
    blocks: list[Block] = [
        Text(
            "A method over a quantised backbone minus the same over the backbone in full precision: the mean of the "
            "differences between runs of the same seed, and its 95 % interval. Which of the two has the shorter step "
            "depends on the machine: see the engine's tables."
        )
    ]
    for setting in _compared(evidence):
        pairs = quantized_pairs(setting)
        if pairs:
            blocks += [Heading(setting.title), _four_bits(setting, pairs), *_precisions(setting, pairs)]
    if len(blocks) == 1:
        blocks.append(Text("Not measured."))
    return Section("four-bits", "What 4 bits cost", blocks)


def _compared(evidence: Evidence) -> list[Setting]:
    return [setting for setting in evidence.settings if setting.has_results and not setting.is_search]


def _base(setting: Setting, variant: Variant) -> Variant | None:
    """RANDOM, for another init of a prompt."""
    return random_of(setting, variant) if variant.method == "prompt_tuning" and variant.init != "RANDOM" else None


def _inits(setting: Setting, pairs: list[tuple[Variant, Variant]]) -> list[Block]:
    columns = setting.columns
    last = setting.common_title
    compared = {
        name: {variant: compare(setting, variant, base, tasks) for variant, base in pairs}
        for name, tasks in columns.items()
    }
    rows = []
    for variant, _ in pairs:
        row = [MISSING if (c := of[variant]) is None else signed_interval(c.difference) for of in compared.values()]
        total = compared[last][variant]
        verdict = [MISSING] * 2 if total is None else [p_values(total), total.verdict]
        rows.append([variant.label, *row, *verdict])
    table = Table(
        f"Each init minus RANDOM: {setting.title}",
        ("init", *columns, f"p, {last}", f"so, {last}"),
        list(map(cells, rows)),
    )
    drawn = [
        (variant, ", ".join(filter(None, (variant.init, variant.quantization, name))), comparison.difference)
        for name, of in compared.items()
        for variant, comparison in of.items()
        if comparison is not None
    ]
    name, label = figure_id("inits", setting.title), "points of score minus RANDOM's"
    if not drawn:
        return [Text(_best(setting, pairs)), table]
    figure = Figure(
        name,
        f"Each init minus RANDOM, {setting.title}",
        "Differences with 95 % intervals, one line for each init and task. The numbers are in the table.",
        draw_differences(name, drawn, label),
    )
    return [Text(_best(setting, pairs)), table, figure]


def _best(setting: Setting, pairs: list[tuple[Variant, Variant]]) -> str:
    """Which init is best, and by how much, in full precision."""
    plain = {v for pair in pairs for v in pair if v.quantization is None} or {v for pair in pairs for v in pair}
    best = best_variant(setting, setting.common, lambda variant: variant in plain)
    if best is None:
        return "No init has a usable run of every task."
    base = random_of(setting, best)
    thin = too_thin(setting, setting.common, lambda variant: variant in plain)
    but = f" {thin} has a higher one, from fewer than {MIN_SEEDS} seeds." if thin else ""
    if base is None or base == best:
        return f"RANDOM has the highest mean.{but}"
    comparison = compare(setting, best, base, setting.common)
    if comparison is None:
        return f"{best.init} has the highest mean; it has no seed in common with RANDOM.{but}"
    text = f"{best.init} has the highest mean, {in_points(comparison.difference)} against RANDOM: "
    text += f"{comparison.verdict} (p: {p_values(comparison)}).{but}"
    second = best_variant(setting, setting.common, lambda variant: variant in plain - {best, base})
    closest = compare(setting, best, second, setting.common) if second else None
    if closest is not None:
        text += f" Against {second.init} it is {in_points(closest.difference)}: {closest.verdict}."
    return text


def _four_bits(setting: Setting, pairs: list[tuple[Variant, Variant]]) -> Table:
    rows = []
    for quantized, full in pairs:
        for name, tasks in setting.columns.items():
            comparison = compare(setting, quantized, full, tasks)
            score = [MISSING] * 3
            if comparison is not None:
                score = [signed_interval(comparison.difference), p_values(comparison), comparison.verdict]
            costs = [
                _difference(setting, quantized, full, tasks, measure, show)
                for measure, show in ((TIME, seconds), (STEP, seconds), (WEIGHTS, size), (PEAK, size))
            ]
            rows.append(cells([quantized.label, name, *score, *costs]))
    columns = ("method", "task", "score", "p", "so", "training", "step", "model in memory", "peak above the model")
    return Table(f"Quantised minus full precision: {setting.title}", columns, rows)


def _precisions(setting: Setting, pairs: list[tuple[Variant, Variant]]) -> list[Block]:
    """Where seeds of one entry are of models that are not kept alike."""
    found = []
    for quantized, task in product((quantized for quantized, _ in pairs), setting.tasks):
        sizes = Counter(run.result["weights_bytes"] for run in setting.runs(task, quantized))
        if len(sizes) > 1:
            kept = ", ".join(f"{size(held)} in {runs} run{'s' * (runs > 1)}" for held, runs in sorted(sizes.items()))
            found.append(f"{quantized.label}, {task}: {kept}")
    if not found:
        return []
    why = (
        "A quantised model has its other weights in bfloat16, and computes in it, on a CPU that multiplies it itself, "
        "and else in float32. So not all seeds of these are of one model in memory"
    )
    return [Text(f"{why}: {'; '.join(found)}.")]


def _difference(
    setting: Setting,
    first: Variant,
    second: Variant,
    tasks: tuple[str, ...],
    measure: Measure,
    show: Callable[[float], str],
) -> str:
    difference = paired_difference(setting, first, second, tasks, measure)
    if difference is None:
        has_both = measure.is_time and compare(setting, first, second, tasks) is not None
        return NO_TIMES if has_both else MISSING
    middle = _with_sign(difference.mean, show)
    if difference.half is None:
        return f"{middle} (one seed)"
    ends = [_with_sign(difference.mean + side * difference.half, show) for side in (-1, 1)]
    return middle if set(ends) == {middle} else f"{middle} ({' to '.join(ends)})"


def _with_sign(value: float, show: Callable[[float], str]) -> str:
    return ("-" if value < 0 else "+") + show(abs(value))
