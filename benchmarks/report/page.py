"""The page: RESULTS.md from the tables, HTML from RESULTS.md, and the tables between markers in the READMEs."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from . import tables
from .load import NAMES
from .statistics import Difference
from .summary import Summary


ROOT = Path(__file__).parents[2]
README_FILES = ("README.md", "recipes/README.md", "benchmarks/README.md", "peft_prompt_ext/shared_prefix/README.md")
README_TABLES: dict[str, Callable[[Summary], str]] = {
    "headline": tables.headline,
    "tasks": tables.tasks,
    "bits": tables.bits,
    "engine_cpu": lambda summary: tables.engine_cpu(),
    "engine_gpu": lambda summary: tables.engine_gpu(),
    "mixed": lambda summary: tables.mixed(),
}
_MARKED = re.compile(r"(<!-- results: (\w+) -->\n).*?(<!-- /results -->)", re.DOTALL)


def filled(text: str, summary: Summary) -> str:
    """A README with its tables as the results have them now.

    Raises:
        ValueError: A marker names a table that does not exist.
    """

    def fill(found: re.Match[str]) -> str:
        if found[2] not in README_TABLES:
            raise ValueError(f"There is no table of results {found[2]!r}; there are {', '.join(README_TABLES)}.")
        return f"{found[1]}{README_TABLES[found[2]](summary)}\n{found[3]}"

    return _MARKED.sub(fill, text)


def old_readmes(summary: Summary) -> dict[Path, str]:
    """The READMEs whose tables are old, each with its new text."""
    found = {}
    for name in README_FILES:
        path = ROOT / name
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        if (new := filled(text, summary)) != text:
            found[path] = new
    return found


def markdown(summary: Summary, pictures: str, engine: bool) -> str:
    """The page as Markdown.

    Args:
        summary: What it speaks of.
        pictures: The folder of the pictures, as it is to stand in the text.
        engine: Whether to add the project's own measurements of the engine.
    """
    prompt, lora = summary.best("prompt_tuning"), summary.best("lora")
    inits = [variant for variant in summary.variants("prompt_tuning", whole=True) if summary.score(variant, summary.common)]
    parts = [
        "# Prompt tuning, LoRA or full fine-tuning?",
        headline(summary),
        f"![Score by task and method with 95 % intervals]({pictures}/scores.svg)",
        tables.overview(summary),
        f"{tables.on_what(summary)} ± and brackets: 95 % intervals over the seeds. Training is the time of the steps, "
        "measured interleaved: compare times within this table only. Prompt tuning is the init that was run on the "
        f"most tasks: {prompt}.",
        *_when(summary),
        "## What was not measured",
        *_not_measured(summary),
        _fold("Task by task", tables.tasks(summary)),
        _fold("Inits of the prompt", tables.variants_table(summary, inits, prompt), _outliers(summary)),
        _fold("The base model in 4 bits", tables.bits(summary)),
        _fold("Score over seconds of training", f"![Score over seconds]({pictures}/curves.svg)"),
        *(_engine() if engine else []),
        _fold("Runs by method", tables.runs_table(summary), _words(summary)),
    ]
    del lora
    return "\n\n".join(parts) + "\n"


def _fold(title: str, *parts: str) -> str:
    return "\n\n".join(["<details>", f"<summary>{title}</summary>", *filter(None, parts), "</details>"]).replace(
        "<details>\n\n<summary>", "<details>\n<summary>"
    )


def headline(summary: Summary) -> str:
    """What was found, and on what."""
    sentences = []
    prompt, lora = summary.best("prompt_tuning"), summary.best("lora")
    means = [f"{NAMES[method]} {tables.percent(summary.score(v, summary.common))}" for v, method in _compared(summary)]
    where = _group(summary, summary.common)
    difference = prompt and lora and summary.difference(prompt, lora, summary.common)
    if not difference:
        sentences.append(f"On {where}: {', '.join(means)}.")
    elif difference.verdict == "tied":
        sentences.append(f"**On {where} prompt tuning and LoRA are tied, so costs decide: {_costs(summary)}.**")
    else:
        sentences.append(f"**On {where} prompt tuning is {_ahead(difference)} LoRA.**")
    for task in [task for task in summary.tasks if task not in {*summary.common, *summary.at_majority}]:
        other = prompt and lora and summary.difference(prompt, lora, [task])
        if other:
            word = "tied with" if other.verdict == "tied" else _ahead(other)
            sentences.append(f"On {task} prompt tuning is {word} LoRA.")
    if summary.at_majority:
        sentences.append(f"On {tables.names(summary.at_majority)} no method clearly beats the majority class.")
    rows = summary.usable.drop_duplicates(["task", "eval_samples"])["eval_samples"].sum()
    return (
        f"{' '.join(sentences)} ({summary.model}, {summary.examples} training examples, {rows:.0f} scored rows, "
        f"{len(summary.seeds)} seeds, {summary.device.upper()}.)"
    )


def _compared(summary: Summary) -> list[tuple[str, str]]:
    return [(variant, summary.of(variant, summary.tasks)["method"].iloc[0]) for variant in summary.compared]


def _group(summary: Summary, tasks: list[str]) -> str:
    groups = summary.usable.loc[summary.usable["task"].isin(tasks), "group"].unique().tolist()
    return tables.names(sorted(groups))


def _ahead(difference: Difference) -> str:
    points = 100 * difference.mean.mean
    side = "ahead of" if points > 0 else "behind"
    if difference.is_found:
        return f"{difference.verdict} {side} ({points:+.1f} points)"
    return f"{points:+.1f} points {side} (not decided: {difference.verdict})"


def _costs(summary: Summary) -> str:
    """What prompt tuning and LoRA cost, in words."""
    pair, tasks = [summary.best("prompt_tuning"), summary.best("lora")], summary.common
    stored, memory, time = (
        [summary.cost(variant, tasks, column) for variant in pair if variant is not None]
        for column in ("adapter_bytes", "memory_bytes", "seconds")
    )
    return (
        f"{tables.size(stored[0])} a task against {tables.size(stored[1])}, {tables.size(memory[0])} of memory against "
        f"{tables.size(memory[1])}, {tables.seconds(time[0])} of training against {tables.seconds(time[1])}"
    )


def _when(summary: Summary) -> list[str]:
    """When to take prompt tuning and when not."""
    prompt, lora, common = summary.best("prompt_tuning"), summary.best("lora"), summary.common
    if prompt is None or lora is None:
        return []
    stored = [tables.size(summary.cost(variant, common, "adapter_bytes")) for variant in (prompt, lora)]
    take = [f"many tasks share one model: a task is {stored[0]}, not {stored[1]}"]
    leave = [f"there is one task and room for {stored[1]}: LoRA is not worse, and any server takes it"]
    for task in summary.tasks:
        difference = summary.difference(prompt, lora, [task])
        if difference is not None and difference.is_found and task not in summary.at_majority:
            side = take if difference.mean.mean > 0 else leave
            points = f"{100 * abs(difference.mean.mean):.1f} points"
            side.append(f"the task is like {task}: {'prompt tuning' if side is take else 'LoRA'} is ahead by {points}")
    memory = [summary.cost(variant, common, "memory_bytes") for variant in (prompt, lora)]
    if memory[0] < memory[1]:
        take.append(f"memory is short: {tables.size(memory[0])} with the model, LoRA {tables.size(memory[1])}")
    parts = []
    for title, reasons in (("Take prompt tuning when", take), ("Do not take it when", leave)):
        parts += [f"**{title}**", "\n".join(f"- {reason}." for reason in reasons)]
    return parts


def _not_measured(summary: Summary) -> list[str]:
    missing = []
    for variant in summary.compared:
        tasks = [task for task in summary.tasks if task not in summary.tasks_of(variant)]
        missing += [f"- {variant} on {tables.names(tasks)}."] if tasks else []
    other = "- Other models, devices and numbers of examples" + (
        f" ({summary.elsewhere} runs of a search for learning rates or of other settings are in the store)."
        if summary.elsewhere
        else "."
    )
    return ["\n".join([*missing, other, "- Encoders: see `recipes/README.md` for single runs."])]


def _outliers(summary: Summary) -> str:
    """Seeds that ended far below the others, by name."""
    lines = [
        f"Seed {row.seed} of {row.variant} on {row.task} ended {100 * row.below:.1f} points below its median seed "
        f"({100 * row.score:.1f} %, untrained {100 * row.score_before:.1f} %)."
        for row in summary.outliers().itertuples()
    ]
    return " ".join(lines)


def _engine() -> list[str]:
    """The project's own measurements of the engine."""
    return [
        _fold(
            "A training step",
            "SmolLM2-135M in fp32, 16 reviews, two AVX2 cores; the floor is the frozen model over the real tokens:",
            tables.engine_cpu(),
            "One NVIDIA H200, Llamas with random weights, 16 rows (long: 256 to 512 tokens), 100 virtual tokens:",
            tables.engine_gpu(),
        ),
        _fold("Mixed-task batches", "One batch of many tasks beside a batch a task, forward only:", tables.mixed()),
    ]


def _words(summary: Summary) -> str:
    return (
        "Clearly: the interval over the seeds excludes 0, and so does a permutation test over the scored rows "
        "(p < 0.05). Probably: one of the two. Tied: neither. Nothing is corrected for the number of comparisons. "
        f"All {summary.runs['run_id'].nunique()} runs, with settings, versions and machine, are the lines of "
        "`benchmarks/results`."
    )


def html(text: str, folder: Path, style: str) -> str:
    """One file: the Markdown as HTML with its pictures in it.

    Args:
        text: The page.
        folder: Where its pictures' paths begin.
        style: CSS.
    """
    from markdown_it import MarkdownIt

    body = MarkdownIt("commonmark", {"html": True}).enable("table").render(text)
    body = re.sub(r'<p><img src="([^"]+)" alt="([^"]*)" /></p>', lambda found: _inline(folder / found[1], found[2]), body)
    body = re.sub(r"(<table>.*?</table>)", r'<div class="scroll" tabindex="0">\1</div>', body, flags=re.DOTALL)
    title = re.sub(r"<.*?>", "", body.split("</h1>")[0])
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1"><title>{title}</title>'
    return f'<!doctype html>\n<html lang="en"><head>{head}<style>\n{style}</style></head>\n<body><main>\n{body}</main></body></html>\n'


def _inline(path: Path, label: str) -> str:
    svg = path.read_text(encoding="utf-8").replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
    return f"<figure>{svg}</figure>"
