"""The first section: which method to pick, and why."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from ...harness.pace import TIMED_STEPS
from ..advice import READERS, RULE, Advice, Candidate, advise
from ..comparisons import compare
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
from ..evidence import Evidence, Setting, Variant, kind
from ..measures import (
    BEFORE,
    MISSING,
    in_points,
    over_tasks,
    p_value,
    points,
    seconds,
    signed,
    signed_interval,
    size,
)
from ..statistics import MIN_SEEDS


HIGHEST = "the highest mean"
TESTS = (
    "Two tests tell methods apart. Over seeds: would models of other seeds differ in the same way? Over rows: would "
    "these models on other rows? A difference is larger than the noise if both say so (p < 0.05), not clear if one "
    "does, and within the noise if neither does. nf4: the model's weights are in 4 bits."
)
LEFT_OUT = (
    "The advice leaves out what either test finds worse. Nothing is corrected for the number of methods: of ten that "
    "are as good as the best, one may well be left out by chance."
)
PADS = (
    f" How many steps the seconds buy was timed over the batches of a run of {TIMED_STEPS} steps: where rows are "
    "grouped by length, those have more pads than a longer run's and fewer than a shorter one's. Prompt tuning "
    "computes none, so beside it LoRA, full fine-tuning and a probe have some per cent too few steps where they have "
    "more than that, and too many where they have less."
)
COLUMNS = ("score", "memory", "to store for a task", "training of a task", "against the highest mean (95 %)")


def choice_section(evidence: Evidence) -> Section:
    """What to pick in each setting, with the evidence line by line."""
    blocks: list[Block] = [Text(TESTS)]
    settings = [setting for setting in evidence.settings if setting.has_results and not setting.is_search]
    for setting in settings:
        elsewhere = {variant for other in settings if other.model == setting.model for variant in other.variants}
        blocks += [Heading(setting.title), *_of_setting(setting, elsewhere)]
    ask = (
        "For your own memory, storage, number of tasks and least score: python -m benchmarks recommend --memory 8GB "
        "--tasks 50 --storage 1GB --least_score 0.7"
    )
    return Section("choice", "Which method to pick", [*blocks, Text(ask), Text(f"The rule: {RULE}")])


def _of_setting(setting: Setting, elsewhere: Iterable[Variant]) -> list[Block]:
    tasks = ", ".join(setting.common)
    answers = {reader: advise(setting, needs) for reader, needs in READERS.items()}
    first = next(iter(answers.values()))
    if first.pick is None:
        return [Text(f"Nothing has a usable run for each of the tasks {tasks} yet, so there is nothing to pick.")]
    blocks: list[Block] = []
    if first.is_thin:
        blocks.append(
            Text(f"The evidence is too thin for advice: fewer than {MIN_SEEDS} seeds. What follows is a hint.")
        )
        answers = dict([next(iter(answers.items()))])  # the others would only say the same
    picks = Table(
        f"What to pick ({tasks}; the score is the mean of the tasks' main metrics x 100)",
        ("if", "pick", *COLUMNS, "as good within the noise, but"),
        _picks(setting, answers),
    )
    about = Text(_batches(setting) + _left_out(setting, elsewhere))
    return [*blocks, picks, about, *_questions(setting), _evidence_table(first), Text(LEFT_OUT)]


def _picks(setting: Setting, answers: Mapping[str, Advice]) -> list[list[Cell]]:
    """A line for each answer; what readers of several kinds are told is there once."""
    readers: dict[tuple[str, ...], list[str]] = {}
    for reader, answer in answers.items():
        pick = answer.pick
        behind = signed_interval(pick.comparison.difference) if pick.comparison else HIGHEST
        others = "; ".join(f"{other.variant.label} ({other.but})" for other in answer.candidates if other.but)
        line = pick.variant.label, *_costs(setting, pick), behind, others or "nothing"
        readers.setdefault(line, []).append(f"{reader} ({answer.instead})" if answer.instead else reader)
    return [cells(["; ".join(who), Cell(label, is_bold=True), *others]) for (label, *others), who in readers.items()]


def _left_out(setting: Setting, elsewhere: Iterable[Variant]) -> str:
    """What the picks do not rest on: tasks, and methods that were run with another budget."""
    tasks = [task for task in setting.tasks if task not in setting.common]
    few = [task for task in tasks if task not in setting.at_chance]
    text = f" Not in the mean, since too few methods or seeds were run: {', '.join(few)}." if few else ""
    chance = [f"{task} ({points(setting.majority(task))})" for task in setting.at_chance]
    if chance:
        where = "Not in the mean" if set(setting.at_chance) <= set(tasks) else "In the mean for want of others"
        why = "since no method's interval is above always giving the most common label there"
        text += f" {where}, {why}: {', '.join(chance)}."
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
        f"{given('max_seq_length')} tokens a row. Memory (the model and its training) and bytes are the largest of "
        f"the tasks and seeds, seconds their means{hours}."
        f"{PADS if setting.has_pace and setting.unit == 'seconds' else ''}"
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
    ratios = (f"{measure.title}, ratio" for measure in RATIOS)
    columns = ("method", "against", "by task", "score difference (95 %)", "verdict", *ratios)
    return [*blocks, *([Table("What people ask first", columns, list(map(cells, rows)))] if rows else [])]


def _question(setting: Setting, first: Variant, second: Variant, tasks: Sequence[str]) -> list[str]:
    of_tasks = {task: compare(setting, first, second, [task]) for task in tasks}
    texts = [task if c is None else f"{task} {signed(c.difference.mean)}" for task, c in of_tasks.items()]
    return [first.label, second.label, ", ".join(texts), *versus(setting, first, second, tasks)]


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
        before = over_tasks(setting, prompt, setting.common, BEFORE)
        texts.append(
            f"It was first trained on another task ({', '.join(sources)}) with the same budget, which is in its "
            f"seconds; with that alone, and nothing of the task itself, it scores {points(before)}."
        )
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
    caption = "The evidence: every method against the highest mean, and the p of both tests"
    return Table(caption, ("method", *COLUMNS, "p over seeds", "p over rows", "verdict"), rows)
