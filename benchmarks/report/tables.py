"""Tables of results in Markdown, for the page and for the READMEs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import pandas as pd

from .load import NAMES, read_lines
from .statistics import Difference, Mean
from .summary import Summary


ENGINE = {
    "stock": "PEFT's prompt tuning",
    "packed": 'this plugin, `train_logits="supervised"`',
    "packed_all": 'this plugin, `train_logits="all"`',
    "lora": "PEFT's LoRA, r 8",
    "full": "full fine-tuning",
    "floor": "floor",
}
GPU_COLUMNS = {
    ("stock", None): "PEFT's prompt tuning",
    ("packed", "varlen"): "this plugin",
    ("packed", "sdpa"): "this plugin, SDPA",
    ("lora", None): "LoRA, r 8",
    ("lora_last", None): "LoRA, head at labels",
    ("full", None): "full",
    ("floor", "varlen"): "frozen model alone",
}


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [list(head), ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def percent(mean: Mean | None) -> str:
    """A score with its interval."""
    if mean is None:
        return "not run"
    interval = f" ± {100 * mean.half:.1f}" if mean.half else ""
    return f"{100 * mean.mean:.1f}{interval} %" + (" (one seed)" if mean.count == 1 else "")


def difference_text(difference: Difference | None) -> str:
    """A difference in points, its interval, and what it means."""
    if difference is None:
        return "not run"
    mean, half = 100 * difference.mean.mean, 100 * (difference.mean.half or 0.0)
    verdict = difference.verdict if difference.verdict == "tied" else f"not decided: {difference.verdict}"
    if difference.is_found:
        verdict = f"{difference.verdict} {'ahead' if mean > 0 else 'behind'}"
    return f"{mean:+.1f} ({mean - half:+.1f} to {mean + half:+.1f}), {verdict}"


def size(count: float) -> str:
    """Bytes for people."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            value = count / factor
            return f"{value:.0f} {unit}" if value >= 10 else f"{value:.1f} {unit}"
    return "not measured" if pd.isna(count) else f"{count:.0f} B"


def seconds(value: float) -> str:
    """Seconds for people; 0 is no training."""
    return "not measured" if pd.isna(value) else f"{value:.0f} s" if value else "none"


def names(items: Sequence[str]) -> str:
    """a, b and c."""
    return " and ".join(filter(None, (", ".join(items[:-1]), *items[-1:])))


COSTS: list[tuple[str, Callable[[float], str], str]] = [
    ("adapter_bytes", size, "stored for a task"),
    ("memory_bytes", size, "memory with the model"),
    ("seconds", seconds, "training"),
    ("latency", "{:.1f} x".format, "scoring, against the bare model"),
]


def on_what(summary: Summary, tasks: Sequence[str] = ()) -> str:
    """The model, the tasks (by default those of the means), their rows, the seeds and the device."""
    tasks = tasks or summary.common
    runs = summary.usable[summary.usable["task"].isin(tasks)]
    rows = runs.groupby("task")["eval_samples"].max()
    which = names([f"{task} ({rows[task]:.0f} rows)" for task in tasks])
    machines = names(sorted({machine.split(" (")[0] for machine in runs["machine"]}))
    shared = " share text and count as one task" if runs.groupby("group")["task"].nunique().max() > 1 else ""
    return (
        f"{summary.model} on a {summary.device.upper()} ({machines}), {summary.examples} training examples, "
        f"seeds {', '.join(map(str, summary.seeds))}; {which}{shared}."
    )


def overview(summary: Summary) -> str:
    """The page's first table: a column for each compared method."""
    columns, lora, rows = summary.compared, summary.best("lora"), []
    groups = summary.usable.groupby("group")["task"].unique().map(sorted)
    learnt = [(group, tasks) for group, tasks in groups.items() if not set(tasks) <= set(summary.at_majority)]
    for group, tasks in sorted(learnt, key=lambda item: not set(item[1]) <= set(summary.common)):
        rows.append([f"score, {group}", *(percent(summary.score(variant, tasks)) for variant in columns)])
        if lora is not None:
            against = [difference_text(summary.difference(v, lora, tasks)) if v != lora else "" for v in columns]
            rows.append(["against LoRA", *against])
    for column, form, what in COSTS:
        rows.append([what, *(form(summary.cost(variant, summary.common, column)) for variant in columns)])
    return table(["", *(f"**{NAMES[summary.method(variant)]}**" for variant in columns)], rows)


def headline(summary: Summary) -> str:
    """Prompt tuning, LoRA, full fine-tuning and zero-shot: score and costs."""
    rows = []
    for variant in summary.compared:
        costs = [form(summary.cost(variant, summary.common, column)) for column, form, _ in COSTS[:3]]
        rows.append([variant, percent(summary.score(variant, summary.common)), *costs])
    return f"{table(['method', 'score', *(what for _, _, what in COSTS[:3])], rows)}\n\n{on_what(summary)}"


def tasks(summary: Summary) -> str:
    """Prompt tuning beside LoRA, task by task."""
    prompt, lora = summary.best("prompt_tuning"), summary.best("lora")
    rows = []
    for task in summary.tasks if prompt and lora else []:
        runs = summary.of(prompt, [task])
        learnt = "no method clearly beats the majority class" if task in summary.at_majority else ""
        difference = learnt or difference_text(summary.difference(prompt, lora, [task]))
        scores = [_seeds(summary.of(variant, [task])) for variant in (prompt, lora)]
        count = f"{runs['eval_samples'].max():.0f}" if len(runs) else "not run"
        rows.append([task, count, *scores, difference])
    return table(["task", "scored rows", f"{prompt}, by seed", "LoRA, by seed", "prompt - LoRA"], rows)


def _seeds(runs: pd.DataFrame) -> str:
    scores = runs.sort_values("seed")["score"]
    return ", ".join(f"{100 * score:.1f}" for score in scores) + f": {100 * scores.mean():.1f} %"


def inits(summary: Summary, variants: Sequence[str]) -> str:
    """Score and costs of prompts, and the difference to the best one."""
    best, common, rows = summary.best("prompt_tuning"), summary.common, []
    for variant in variants:
        against = difference_text(summary.difference(variant, best, common)) if best and variant != best else ""
        before = f"{100 * summary.of(variant, common)['score_before'].mean():.1f} %"
        time = seconds(summary.cost(variant, common, "seconds"))
        rows.append([variant, before, percent(summary.score(variant, common)), against, time])
    return table(["method", "untrained", "score", f"against {best}", "training"], rows)


def bits(summary: Summary) -> str:
    """What a quantised base model costs and saves."""
    older = read_lines("backbones_cpu.jsonl")  # movie_reviews alone
    rows = []
    for variant in (v for method in ("prompt_tuning", "lora") for v in _precisions(summary, method)):
        runs, best = summary.of(variant, summary.common), summary.best(summary.method(variant))
        precision = runs["quantization"].fillna("float32").iloc[0]
        same = (older["method"] == runs["method"].iloc[0]) & (older["precision"] == precision)
        over = [*runs["score_over_other"].dropna(), *older.loc[same, "accuracy_on_other"]]
        weights, memory = runs["weights_bytes"].max(), summary.cost(variant, summary.common, "memory_bytes")
        against = "" if variant == best else difference_text(summary.difference(variant, best, summary.common))
        costs = [size(weights), size(memory - weights), seconds(summary.cost(variant, summary.common, "seconds"))]
        moved = ", ".join(f"{100 * score:.1f}" for score in over) or "not run"
        rows.append([variant, *costs, percent(summary.score(variant, summary.common)), against, moved])
    head = ["method", "weights", "memory above", "training", "score", "against full precision"]
    return table([*head, "over the other precision, by seed"], rows)


def _precisions(summary: Summary, method: str) -> list[str]:
    """The best variant of a method, and those that differ from it in the precision of the base model alone."""
    best = summary.best(method)
    runs = summary.usable.fillna({"init": ""})
    inits = runs.loc[runs["variant"] == best, "init"].unique()
    alike = runs[(runs["method"] == method) & runs["init"].isin(inits) & runs["task"].isin(summary.common)]
    return sorted(alike["variant"].unique(), key=lambda variant: variant != best)


def engine_cpu(summary: Summary) -> str:
    """A training step on the CPU: medians over all turns of the machine with most lines."""
    lines = read_lines("speed_cpu.jsonl")
    lines = lines[~lines["gradient_checkpointing"]]
    batch = lines.query("text == 'short' and batch_size == 16 and precision == 'float32'")
    batch = batch[batch["machine"] == batch["machine"].mode()[0]]
    steps = batch.explode("step_time_s").groupby(["method", "num_virtual_tokens"])["step_time_s"].median()
    peaks = batch.groupby(["method", "num_virtual_tokens"])["peak_memory_bytes"].max()

    def ratio(values: pd.Series, key: tuple[str, int], other: tuple[str, int]) -> str:
        return f"{values[key] / values[other]:.2f}" if other in values else "-"

    rows = []
    for method, virtual in sorted(steps.index, key=lambda key: (list(ENGINE).index(key[0]), key[1])):
        key, stock = (method, virtual), ("stock", virtual)
        times = [ratio(steps, key, other) for other in (stock, ("lora", 0), ("floor", 0))]
        memory = [f"{peaks[key] / 2**30:.2f} GiB", ratio(peaks, key, stock)]
        rows.append([ENGINE[method], str(virtual or ""), f"{steps[key]:.2f} s", *times, *memory])
    head = ["method", "virtual tokens", "step", "x PEFT's", "x LoRA's", "x floor"]
    return table([*head, "peak memory above the model", "x PEFT's"], rows)


def engine_gpu(summary: Summary) -> str:
    """A training step on the GPU at 100 virtual tokens: of each cell the last run that has it.

    The first of the runs had other code for attention.
    """
    lines = read_lines("gpu.jsonl").dropna(subset=["peak_memory_bytes"])
    lines = lines[lines["num_virtual_tokens"].isin([0, 100]) & lines["code"].str.startswith("attention in one call")]
    lines = lines.assign(attention=lines["attention"].where(lines["attention"].notna(), None))
    kinds = {tuple(key): None for key in lines[["model", "precision", "text"]].itertuples(index=False)}
    rows = []
    for model, precision, text in sorted(kinds, key=lambda key: (key[2], key[0], key[1])):
        same = lines.query("model == @model and precision == @precision and text == @text")
        cells = [_gpu_cell(same, *column) for column in GPU_COLUMNS]
        rows.append([f"{model.rsplit('-', 1)[1].upper()}, {precision.replace('bfloat16', 'bf16')}, {text}", *cells])
    return table(["model and rows", *GPU_COLUMNS.values()], rows)


def _gpu_cell(lines: pd.DataFrame, method: str, attention: str | None) -> str:
    same = lines[lines["method"] == method]
    same = same[same["attention"] == attention] if attention else same[same["attention"].isna()]
    same = same[same["run"] == same["run"].max()]
    if same.empty:
        return ""
    step, peak = same.explode("step_time_s")["step_time_s"].median(), same["peak_memory_bytes"].max()
    return f"{1e3 * step:.0f} ms, {peak / 2**30:.1f} GiB"


def mixed(summary: Summary) -> str:
    """One batch of many tasks beside a batch for each."""
    lines = read_lines("mixed_cpu.jsonl")
    rows = []
    for line in lines.to_dict("records"):
        together, apart = (pd.Series(line[f"{name}_time_s"]).median() for name in ("mixed", "single"))
        path = {"stock": "PEFT's path", "packed": "this plugin"}[line["single_path"]]
        kinds = [f"{line['tasks']} x {line['rows_per_task']} rows", f"{line['logits']} logits", path, line["machine"]]
        rows.append([*kinds, f"{together:.2f} s", f"{apart:.2f} s", f"{apart / together:.1f} x"])
    return table(["batch", "logits of", "single batches by", "machine", "one batch", "a batch a task", "faster"], rows)


def runs_by_task(summary: Summary) -> str:
    """The scores by seed, and the runs that did not end well."""
    ended = summary.runs.drop_duplicates("run_id")
    cells = ended.groupby(["variant", "task"]).apply(_cell).unstack(fill_value="")
    return table(["method", *cells.columns], ([variant, *row] for variant, row in cells.iterrows()))


def _cell(runs: pd.DataFrame) -> str:
    bad = [f"seed {row.seed}: {row.status}, {row.error}" for row in runs[runs["status"] != "ok"].itertuples()]
    good = [f"{100 * score:.1f}" for score in runs.sort_values("seed")["score"].dropna()]
    return "; ".join(filter(None, [", ".join(good), *bad]))


FOR_READMES: dict[str, Callable[[Summary], str]] = {
    table.__name__: table for table in (headline, tasks, bits, engine_cpu, engine_gpu, mixed)
}
