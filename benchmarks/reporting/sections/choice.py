"""The first section: which method to pick, and why."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from ..advice import NO_COST, READERS, RULE, Advice, Candidate, advise
from ..contrasts import (
    RATIOS,
    best_of_method,
    best_variant,
    quantized_pairs,
    random_of,
    score_text,
    too_thin,
    versus,
    widest_pair,
)
from ..document import Block, Cell, Heading, Section, Table, Text, cells
from ..evidence import MIN_SEEDS, Evidence, Setting, Variant, kind
from ..measures import MISSING, in_points, p_value, seconds, signed_interval, size
from ..statistics import compare


HIGHEST = "the highest mean"


def choice_section(evidence: Evidence) -> Section:
    """What to pick in each setting, with the evidence line by line."""
    blocks: list[Block] = []
    settings = [setting for setting in evidence.settings if setting.has_results and not setting.is_search]
    for setting in settings:
        elsewhere = {variant for other in settings if other.model == setting.model for variant in other.variants}
        blocks += [Heading(setting.title), *_of_setting(setting, elsewhere)]
    ask = (
        "For your own memory, storage, number of tasks and least score: python -m benchmarks recommend --memory 8GB "
        "--tasks 50 --storage 1GB --least_score 0.8"
    )
    return Section("choice", "Which method to pick", [*blocks, Text(ask), Text(f"The rule: {RULE}")])


def _of_setting(setting: Setting, elsewhere: Iterable[Variant]) -> list[Block]:
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
                    signed_interval(answer.pick.comparison.difference) if answer.pick.comparison else HIGHEST,
                ]
            )
            for reader, answer in answers.items()
        ],
    )
    about = Text(_batches(setting) + _left_out(setting, elsewhere))
    return [*blocks, picks, about, *_questions(setting), _evidence_table(first)]


def _left_out(setting: Setting, elsewhere: Iterable[Variant]) -> str:
    """What the picks do not rest on: tasks, and methods that were run with another budget."""
    tasks = [task for task in setting.tasks if task not in setting.common]
    text = f" Not in it, since too few methods or seeds were run: {', '.join(tasks)}." if tasks else ""
    missing = sorted(set(map(kind, elsewhere)) - set(map(kind, setting.variants)), key=lambda variant: variant.order)
    names = "; ".join(variant.label for variant in missing)
    return text + (f" Not run with this budget, so not among them: {names}." if missing else "")


def _batches(setting: Setting) -> str:
    """Of what batches memory and time are."""
    runs = [run for task in setting.common for variant in setting.variants for run in setting.runs(task, variant)]

    def given(name: str) -> str:
        values = {run.spec["arguments"].get(name) for run in runs if run.result["steps"]}
        return " or ".join(map(str, sorted(values - {None}))) or "the recipe's default"

    hours = "" if setting.has_pace else " (as measured: the machine may have been slower at one hour than at another)"
    return (
        f"Memory and time are of batches of {given('per_device_train_batch_size')} rows and at most "
        f"{given('max_seq_length')} tokens a row. Memory is the model and its training, the most of any "
        f"task and seed, as the bytes to store are; times are means{hours}."
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
        alone = best_variant(setting, tasks, _is_of_one_task)
        prompts = list(dict.fromkeys(filter(None, (prompt, alone))))
        for method in ("lora", "full", "linear_probe", "zero_shot"):
            # what has no usable run of one task can still be compared on the others
            common = tuple(task for task in tasks if _has_runs(setting, task, method))
            other = best_of_method(setting, method, common) if common else None
            pairs = [(of_prompt, other, common) for of_prompt in prompts if other is not None]
            widest = widest_pair(setting, _is_plain_prompt, method)
            if widest is not None and len(widest[2]) > len(common):
                pairs.append(widest)  # else tasks that few methods were run on, and lost, would not be seen
            rows += [_question(setting, *pair) for pair in pairs]
    rows += [_question(setting, quantized, full, tasks) for quantized, full in quantized_pairs(setting)]
    columns = ("method", "against", "tasks", "points", "so", *(measure.title for measure in RATIOS))
    return [*blocks, *([Table("What people ask first", columns, list(map(cells, rows)))] if rows else [])]


def _question(setting: Setting, first: Variant, second: Variant, tasks: Sequence[str]) -> list[str]:
    return [first.label, second.label, ", ".join(tasks), *versus(setting, first, second, tasks)]


def _best_init(setting: Setting, prompt: Variant) -> list[Block]:
    """The best of all, and of those that have seen this task alone."""
    base, inits = random_of(setting, prompt), [v for v in setting.variants if _is_plain_prompt(v)]
    if base is None or len(inits) < 2:
        return []
    texts = [_init_text(setting, prompt, base, _is_plain_prompt)]
    if prompt.init == "TRANSFER":
        alone = best_variant(setting, setting.common, _is_of_one_task)
        runs = [run for task in setting.common for run in setting.runs(task, prompt)]
        sources = dict.fromkeys(f"{run.spec['source']['task']} for {run.spec['task']}" for run in runs)
        texts.append(f"It has been trained on another task before ({', '.join(sources)}), with as much again.")
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
            tests = [HIGHEST, "", ""]
        verdict = candidate.excluded or "the pick for the highest score"
        rows.append(cells([candidate.variant.label, *_costs(advice.setting, candidate), *tests, verdict]))
    columns = ("method", "score", "memory", "to store for a task", "training of a task", "minus the best")
    caption = "The evidence: every method against the highest mean, and the p of both tests"
    return Table(caption, (*columns, "p over seeds", "p over rows", "so"), rows)
