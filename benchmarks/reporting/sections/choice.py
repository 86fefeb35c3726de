"""The first section: which method to pick, and why."""

from __future__ import annotations

from collections.abc import Callable

from ..advice import NO_COST, READERS, RULE, Advice, Candidate, advise
from ..contrasts import RATIOS, best_of_method, best_variant, quantized_pairs, random_of, score_text, too_thin, versus
from ..document import Block, Cell, Heading, Section, Table, Text, cells
from ..evidence import MIN_SEEDS, Evidence, Setting, Variant
from ..measures import MISSING, in_points, p_value, seconds, signed_interval, size
from ..statistics import compare


def choice_section(evidence: Evidence) -> Section:
    """What to pick in each setting, with the evidence line by line."""
    blocks: list[Block] = []
    for setting in evidence.settings:
        if setting.has_results and not setting.is_search:
            blocks += [Heading(setting.title), *_of_setting(setting)]
    return Section("choice", "Which method to pick", [*blocks, Text(f"The rule: {RULE}")])


def _of_setting(setting: Setting) -> list[Block]:
    tasks = ", ".join(setting.common)
    readers = {reader: needs for reader, needs in READERS.items() if (needs.first, setting.unit) != NO_COST}
    answers = {reader: advise(setting, needs) for reader, needs in readers.items()}
    first = next(iter(answers.values()))
    if first.pick is None:
        return [Text(f"Nothing has a usable run for each of the tasks {tasks} yet, so there is nothing to pick.")]
    blocks: list[Block] = []
    if first.is_thin:
        blocks.append(
            Text(f"The evidence is too thin for advice: fewer than {MIN_SEEDS} seeds. What follows is a hint.")
        )
    picks = Table(
        f"What to pick ({tasks}; the score is the mean of the tasks' main metrics x 100)",
        ("if", "pick", "score", "memory", "to store for a task", "training of a task", "minus the best"),
        [
            cells(
                [
                    f"{reader} ({answer.instead})" if answer.instead else reader,
                    Cell(answer.pick.variant.label, is_bold=True),
                    *_costs(setting, answer.pick),
                    signed_interval(answer.pick.comparison.difference) if answer.pick.comparison else "is the best",
                ]
            )
            for reader, answer in answers.items()
        ],
    )
    return [*blocks, picks, Text(_batches(setting) + _left_out(setting)), *_questions(setting), _evidence_table(first)]


def _left_out(setting: Setting) -> str:
    """Which tasks the picks do not rest on."""
    tasks = [task for task in setting.tasks if task not in setting.common]
    return f" Not in it, since too few methods or seeds were run: {', '.join(tasks)}." if tasks else ""


def _batches(setting: Setting) -> str:
    """Of what batches memory and time are."""
    runs = [run for task in setting.common for variant in setting.variants for run in setting.runs(task, variant)]

    def given(name: str) -> str:
        values = {run.spec["arguments"].get(name) for run in runs if run.result["steps"]}
        return " or ".join(map(str, sorted(values - {None}))) or "the recipe's default"

    return (
        f"Memory and time are of batches of {given('per_device_train_batch_size')} rows and at most "
        f"{given('max_seq_length')} tokens a row. Memory is the model and its training."
    )


def _costs(setting: Setting, candidate: Candidate) -> list[str]:
    return [
        "no usable run" if candidate.score is None else score_text(setting, candidate.variant, candidate.score),
        MISSING if candidate.memory_bytes is None else size(candidate.memory_bytes),
        MISSING if candidate.stored_bytes is None else size(candidate.stored_bytes),
        _time(candidate),
    ]


def _time(candidate: Candidate) -> str:
    if candidate.variant.method == "zero_shot":
        return "no training"
    return MISSING if candidate.time_s is None else seconds(candidate.time_s)


def _questions(setting: Setting) -> list[Block]:
    """What people ask first."""
    tasks = setting.common
    prompt = best_of_method(setting, "prompt_tuning", tasks)
    rows, blocks = [], []
    if prompt is not None:
        blocks += _best_init(setting, prompt)
        for method in ("lora", "full", "linear_probe", "zero_shot"):
            # what has no usable run of one task can still be compared on the others
            common = tuple(task for task in tasks if _has_runs(setting, task, method))
            other = best_of_method(setting, method, common) if common else None
            if other is not None:
                rows.append([prompt.label, other.label, ", ".join(common), *versus(setting, prompt, other, common)])
    for quantized, full in quantized_pairs(setting):
        rows.append([quantized.label, full.label, ", ".join(tasks), *versus(setting, quantized, full, tasks)])
    columns = ("method", "against", "tasks", "points", "so", *(measure.title for measure in RATIOS))
    return [*blocks, *([Table("What people ask first", columns, list(map(cells, rows)))] if rows else [])]


def _best_init(setting: Setting, prompt: Variant) -> list[Block]:
    """The best of all, and of those that have seen this task alone."""
    base, inits = random_of(setting, prompt), [v for v in setting.variants if _is_plain_prompt(v)]
    if base is None or len(inits) < 2:
        return []
    texts = [_init_text(setting, prompt, base, _is_plain_prompt)]
    if prompt.init == "TRANSFER":
        alone = best_variant(setting, setting.common, _is_of_one_task)
        texts.append("It has been trained on another task before, with as much again.")
        if alone is not None:
            texts.append(_init_text(setting, alone, base, _is_of_one_task, " without another task"))
    return [Text(" ".join(filter(None, texts)))]


def _init_text(
    setting: Setting, best: Variant, base: Variant, wanted: Callable[[Variant], bool], which: str = ""
) -> str:
    """How much better than a random one, or ""."""
    thin = too_thin(setting, setting.common, wanted)
    but = f" A higher mean, but from fewer than {MIN_SEEDS} seeds: {thin}." if thin else ""
    if base == best:
        return f"The best init{which} is RANDOM: no other has a higher mean from as many seeds.{but}"
    against = compare(setting, best, base, setting.common)
    if against is None:
        return ""
    return (
        f"The best init{which} is {best.init}: {in_points(against.difference)} against RANDOM, {against.verdict}.{but}"
    )


def _is_plain_prompt(variant: Variant) -> bool:
    return variant.method == "prompt_tuning" and not variant.quantization


def _is_of_one_task(variant: Variant) -> bool:
    return _is_plain_prompt(variant) and variant.init != "TRANSFER"


def _has_runs(setting: Setting, task: str, method: str) -> bool:
    return any(setting.runs(task, variant) for variant in setting.variants if variant.method == method)


def _evidence_table(advice: Advice) -> Table:
    """Each candidate against the best mean."""
    rows = []
    for candidate in advice.candidates:
        comparison = candidate.comparison
        tests = ["", "", ""]
        if comparison is not None:
            tests = [signed_interval(comparison.difference), p_value(comparison.p_seeds), p_value(comparison.p_rows)]
        elif candidate.variant == advice.pick.variant:
            tests = ["is the best", "", ""]
        verdict = candidate.excluded or "the pick for the highest score"
        rows.append(cells([candidate.variant.label, *_costs(advice.setting, candidate), *tests, verdict]))
    columns = ("method", "score", "memory", "to store for a task", "training of a task", "minus the best")
    caption = "The evidence: every method against the highest mean, and the p of both tests"
    return Table(caption, (*columns, "p over seeds", "p over rows", "so"), rows)
