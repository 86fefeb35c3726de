"""Tables of results in Markdown, for the page and for the READMEs."""

from collections.abc import Callable, Iterable, Sequence

import pandas as pd

from ..harness.steps import METHODS
from .load import NAMES, read_lines
from .statistics import FOUND, Difference, Mean
from .summary import Summary


KINDS = {"tasks": "tasks", "rows_per_task": "rows a task", "text": "tokens", "num_virtual_tokens": "virtual tokens"}
KINDS |= {"logits": "logits", "single_path": "path of single batches", "precision": "precision", "machine": "machine"}
PATHS = {"stock": "PEFT's path", "packed": "this plugin"}
WAYS = {
    "mixed": "one batch",
    "single": "a batch a task",
    "suffix": "suffixes",
    "prefix": "prefixes",
    "lora": "LoRA, r 8",
}


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *rows])


def percent(mean: Mean | None) -> str:
    """A score with its interval."""
    if mean is None:
        return "not run"
    half = f" ± {100 * mean.half:.1f}" if mean.half else ""
    return f"{100 * mean.mean:.1f}{half} %{' (one seed)' if mean.count == 1 else ''}"


def difference_text(difference: Difference | None) -> str:
    """A difference in points, its interval, and what it means."""
    if difference is None:
        return "not run"
    mean, half = 100 * difference.mean.mean, 100 * (difference.mean.half or 0.0)
    verdict = difference.verdict if difference.verdict == "tied" else f"not decided: {difference.verdict}"
    if difference.verdict in FOUND:
        verdict = f"{difference.verdict} {'ahead' if mean > 0 else 'behind'}"
    return f"{mean:+.1f} ({mean - half:+.1f} to {mean + half:+.1f}), {verdict}"


def size(count: float) -> str:
    """Bytes for people."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.{0 if count >= 10 * factor else 1}f} {unit}"
    return "not measured" if pd.isna(count) else f"{count:.0f} B"


def seconds(value: float) -> str:
    """Seconds for people; 0 is no training."""
    return "not measured" if pd.isna(value) else f"{value:.0f} s" if value else "none"


def names(items: Sequence[str]) -> str:
    """a, b and c."""
    return " and ".join(filter(None, (", ".join(items[:-1]), *items[-1:])))


ROUNDED = {"smollm2-135m": " (the Hub's weights rounded to 4 bits, computed in fp32)"}
COSTS: list[tuple[str, Callable[[float], str], str]] = [
    ("adapter_bytes", size, "stored for a task"),
    ("memory_bytes", size, "peak memory, model included"),
    ("seconds", seconds, "training"),
    ("latency", "{:.1f} x".format, "scoring, against the bare model"),
]


def on_what(summary: Summary, tasks: Sequence[str] = ()) -> str:
    """The model, the tasks (by default those of the means), their rows, the seeds and the device."""
    runs = summary.usable[summary.usable["task"].isin(tasks or summary.common)]
    which = names([f"{task} ({rows:.0f} rows)" for task, rows in runs.groupby("task")["eval_samples"].max().items()])
    machines = names(sorted({machine.split(" (")[0] for machine in runs["machine"]}))
    shared = " share text and count as one task" if runs.groupby("group")["task"].nunique().max() > 1 else ""
    where = f"{summary.model}{ROUNDED.get(summary.model, '')} on a {summary.device.upper()} ({machines})"
    return f"{where}, {examples(summary)}, seeds {', '.join(map(str, summary.seeds))}; {which}{shared}."


def examples(summary: Summary) -> str:
    """How long a run trains."""
    steps = summary.usable.loc[summary.usable["examples"].notna(), "steps"].mode()[0]
    return f"{summary.examples} examples ({steps:.0f} steps of {summary.examples / steps:.0f})"


def stored(summary: Summary, variant: str) -> str:
    """The fewest and the most bytes that a task stores: a prompt is as long as its question needs."""
    least, most = map(size, summary.of(variant, summary.tasks)["adapter_bytes"].agg(["min", "max"]))
    return most if least == most else f"{least} to {most}"


def overview(summary: Summary) -> str:
    """The page's first table: a column for each compared method."""
    columns, lora, rows = summary.compared, summary.best("lora"), []
    groups = summary.usable.groupby("group")["task"].unique().map(sorted)
    learnt = [(group, tasks) for group, tasks in groups.items() if not set(tasks) <= set(summary.at_majority)]
    for group, tasks in sorted(learnt, key=lambda item: not set(item[1]) <= set(summary.common)):
        rows.append([f"score, {group}", *(percent(summary.score(variant, tasks)) for variant in columns)])
        if lora is not None:
            rows.append(["against LoRA", *(_against(summary, variant, lora, tasks) for variant in columns)])
    rows.append([COSTS[0][2], *(stored(summary, variant) for variant in columns)])
    for column, form, what in COSTS[1:]:
        rows.append([what, *(form(summary.cost(variant, summary.common, column)) for variant in columns)])
    return table(["", *(f"**{NAMES[summary.method(variant)]}**" for variant in columns)], rows)


def _against(summary: Summary, variant: str, base: str | None, tasks: Sequence[str]) -> str:
    return "" if base in (None, variant) else difference_text(summary.difference(variant, str(base), tasks))


def headline(summary: Summary) -> str:
    """Prompt tuning, LoRA, full fine-tuning and zero-shot: score and costs."""
    rows = []
    for variant in summary.compared:
        costs = [form(summary.cost(variant, summary.common, column)) for column, form, _ in COSTS[2::-1]]
        rows.append([variant, percent(summary.score(variant, summary.common)), *costs])
    return f"{table(['method', 'score', *(what for _, _, what in COSTS[2::-1])], rows)}\n\n{on_what(summary)}"


def tasks(summary: Summary) -> str:
    """Prompt tuning beside LoRA and prompts behind the text, task by task."""
    pair, rows = [best for method in ("prompt_tuning", "lora") if (best := summary.best(method)) is not None], []
    behind = [variant for variant in summary.variants("prompt_tuning", whole=True) if ", suffix" in variant]
    for task in summary.tasks if len(pair) == 2 else []:
        runs = [summary.of(variant, [task]) for variant in (*pair, *behind)]
        means = [f"{_cell(of_one)}: {100 * of_one['score'].mean():.1f} %" if len(of_one) else "" for of_one in runs]
        learnt = "no method clearly beats the majority class" if task in summary.at_majority else ""
        count = f"{summary.usable.loc[summary.usable['task'] == task, 'eval_samples'].max():.0f}"
        differences = [_against(summary, *two, [task]) for two in (pair, *((variant, pair[0]) for variant in behind))]
        rows.append([task, count, *means, learnt or differences[0], *differences[1:]])
    head = ["task", "scored rows", *(f"{variant}, by seed" for variant in (*pair, *behind)), "prompt - LoRA"]
    return table([*head, *("suffix - prefix" for _ in behind)], rows)


def inits(summary: Summary, variants: Sequence[str]) -> str:
    """Score and costs of prompts, and the difference to the best one."""
    best, common, rows = summary.best("prompt_tuning"), summary.common, []
    for variant in variants:
        before = f"{100 * summary.of(variant, common)['score_before'].mean():.1f} %"
        score, against = percent(summary.score(variant, common)), _against(summary, variant, best, common)
        rows.append([variant, before, score, against, seconds(summary.cost(variant, common, "seconds"))])
    return table(["method", "untrained", "score", f"against {best}", "training"], rows)


def bits(summary: Summary) -> str:
    """What a quantised base model costs and saves."""
    older, common, rows = read_lines("backbones_cpu.jsonl"), summary.common, []  # the file: movie_reviews alone
    for variant in (v for method in ("prompt_tuning", "lora") for v in summary.precisions(method)):
        runs, best = summary.of(variant, common), summary.best(summary.method(variant))
        precision = runs["quantization"].fillna("float32").iloc[0]
        same = (older["method"] == runs["method"].iloc[0]) & (older["precision"] == precision)
        over = [*runs["score_over_other"].dropna(), *older.loc[same, "accuracy_on_other"]]
        weights, memory = runs["weights_bytes"].max(), summary.cost(variant, common, "memory_bytes")
        costs = [size(weights), size(memory - weights), seconds(summary.cost(variant, common, "seconds"))]
        scores = [percent(summary.score(variant, common)), _against(summary, variant, best, common)]
        rows.append([variant, *costs, *scores, ", ".join(f"{100 * score:.1f}" for score in over) or "not run"])
    head = ["method", "weights", "peak memory above the weights", "training", "score", "against fp32"]
    return table([*head, "movie_reviews scored in the other precision, by seed"], rows)


def engine_cpu(summary: Summary) -> str:
    """A training step on the CPU: medians over all turns of the machine with most lines."""
    wanted = "not gradient_checkpointing and precision == 'float32' and text == 'short' and batch_size == 16"
    batch = read_lines("speed_cpu.jsonl").query(wanted)
    caption = "SmolLM2-135M in fp32, 16 reviews (8 to 54 tokens), two AVX2 cores; the frozen model alone has no pads"
    return f"{caption}:\n\n{step_table(batch[batch['machine'] == batch['machine'].mode()[0]])}"


def step_table(lines: pd.DataFrame) -> str:
    """Median step and greatest memory of each method on one batch, and ratios at the same number of virtual tokens."""
    groups = ["method", "num_virtual_tokens"]
    steps = lines.explode("step_time_s").groupby(groups)["step_time_s"].median()
    peaks = lines.groupby(groups)["peak_memory_bytes"].max()

    def ratio(values: pd.Series, key: tuple[str, int], other: tuple[str, int]) -> str:
        return f"{values[key] / values[other]:.2f}" if other in values else "-"

    rows = []
    for key in sorted(steps.index, key=lambda key: (list(METHODS).index(key[0]), key[1])):
        stock = ("stock", key[1])
        times = [ratio(steps, key, other) for other in (stock, ("lora", 0), ("floor", 0))]
        memory = [f"{peaks[key] / 2**30:.2f} GiB", ratio(peaks, key, stock)]
        rows.append([METHODS[key[0]], str(key[1] or ""), f"{steps[key]:.2f} s", *times, *memory])
    head = ["method", "virtual tokens", "step", "step / PEFT's", "step / LoRA's", "step / frozen model"]
    return table([*head, "peak memory above the weights", "memory / PEFT's"], rows)


def suffix(summary: Summary) -> str:
    """A training step with a prompt behind texts of equal length, beside LoRA with its head at labels."""
    lines = read_lines("speed_cpu.jsonl").query("text in ('16', '64', '256', '512') and batch_size == 8")
    keys = ["precision", "method", "num_virtual_tokens", "text"]
    steps = lines.explode("step_time_s").groupby(keys)["step_time_s"].median().unstack()
    peaks = lines.groupby(keys)["peak_memory_bytes"].max().unstack()
    columns, rows = sorted(steps, key=int), []
    for key in sorted(steps.index, key=lambda key: (key[0], list(METHODS).index(key[1]), key[2])):
        ratios = steps.loc[key] / steps.loc[(key[0], "lora_last", 0)]
        times = ["" if pd.isna(ratios[c]) else f"{steps.loc[key, c]:.2f} s, {ratios[c]:.2f}" for c in columns]
        peak = "" if pd.isna(peaks.loc[key, columns[-1]]) else f"{peaks.loc[key, columns[-1]] / 2**30:.2f} GiB"
        rows.append([key[0], METHODS[key[1]], str(key[2] or ""), *times, peak])
    head = ["precision", "method", "virtual tokens", *(f"{c} tokens" for c in columns)]
    caption = f"SmolLM2-135M, 8 rows of equal length, {', '.join(lines['machine'].unique())}; a step, and its ratio to"
    caption += " that of LoRA with its head at labels; kept texts count as memory:"
    return f"{caption}\n\n{table([*head, f'peak memory, {columns[-1]} tokens'], rows)}"


def mixed(summary: Summary) -> str:
    """One batch of many tasks, and a batch for each task."""
    return f"SmolLM2-135M in fp32, no gradients, short reviews:\n\n{ways_table(read_lines('mixed_cpu.jsonl'))}"


def one_text(summary: Summary) -> str:
    """Many tasks over one text."""
    caption = "SmolLM2-135M, no gradients, one row and its next token for each task, the text read for the first time"
    return f"{caption}:\n\n{ways_table(read_lines('one_text_cpu.jsonl'))}"


def ways_table(lines: pd.DataFrame) -> str:
    """Median times of each way to run several tasks, and how many times that of the first way they are."""
    ways = {f"{way}_time_s": name for way, name in WAYS.items()}
    kinds, ways = ({name: head for name, head in heads.items() if name in lines} for heads in (KINDS, ways))
    rows = []
    for line in lines.to_dict("records"):
        first, *others = (pd.Series(line[way]).median() for way in ways)
        times = [f"{first:.2f} s", *(f"{other:.2f} s ({other / first:.1f} x)" for other in others)]
        rows.append([*(PATHS.get(line[name], str(line[name])) for name in kinds), *times])
    return table([*kinds.values(), *ways.values()], rows)


def runs_by_task(summary: Summary) -> str:
    """The scores by seed, and the runs that did not end well."""
    cells = summary.runs.drop_duplicates("run_id").groupby(["variant", "task"]).apply(_cell).unstack(fill_value="")
    return table(["method", *cells.columns], ([variant, *row] for variant, row in cells.iterrows()))


def _cell(runs: pd.DataFrame) -> str:
    bad = [f"seed {row.seed}: {row.status}, {row.error}" for row in runs[runs["status"] != "ok"].itertuples()]
    good = [f"{100 * score:.1f}" for score in runs.sort_values("seed")["score"].dropna()]
    return "; ".join(filter(None, [", ".join(good), *bad]))
