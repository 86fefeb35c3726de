"""The page: RESULTS.md from the tables, HTML from RESULTS.md, and the tables between markers in the READMEs."""

import re
from pathlib import Path

from ..gpu.table import engine_gpu
from . import tables
from .load import NAMES
from .statistics import FOUND
from .summary import Summary


ROOT = Path(__file__).parents[2]
READMES = ("README.md", "recipes/README.md", "benchmarks/README.md", "peft_prompt_ext/shared_prefix/README.md")
_MARKED = re.compile(r"(<!-- results: (\w+) -->\n).*?(<!-- /results -->)", re.DOTALL)
CURVES = "![Score over seconds of training](results/curves.svg)\n\nOn the way, 128 rows are scored at most."
WORDS = """Clearly: two tests find the difference, the 95 % interval over the seeds and a permutation test over the \
scored rows (p < 0.05). Probably: one of them does. Tied: neither does. No correction for the number of comparisons."""
PADDED = """LoRA here is padded, with the head at every position. In the comparison above both group rows by length \
and run the head at labels, and there is no lead in time."""
IN_READMES = (tables.headline, tables.tasks, tables.bits, tables.engine_cpu, tables.suffix, tables.one_text)
FOR_READMES = {make.__name__: make for make in (*IN_READMES, engine_gpu, tables.mixed)}
ENGINE = "Mixed-task batches, prompts behind the text: [shared_prefix](../peft_prompt_ext/shared_prefix/README.md)."
STORE = "Every run, with its settings, versions and machine, is a line in `benchmarks/results`{}."
HERE = " (only speed and memory on an H200)", " (encoders: [single runs](../peft_prompt_ext/training/DEFAULTS.md))"


def filled(text: str, summary: Summary) -> str:
    """A README with the tables that the results give now; a marker of an unknown table is a ValueError."""

    def fill(found: re.Match[str]) -> str:
        if found[2] not in FOR_READMES:
            raise ValueError(f"There is no table of results {found[2]!r}; there are {', '.join(FOR_READMES)}.")
        return f"{found[1]}{FOR_READMES[found[2]](summary)}\n{found[3]}"

    return _MARKED.sub(fill, text)


def old_readmes(summary: Summary) -> dict[Path, str]:
    """The READMEs whose tables are old, each with its new text."""
    texts = {path: path.read_text(encoding="utf-8") for name in READMES if (path := ROOT / name).is_file()}
    return {path: new for path, text in texts.items() if (new := filled(text, summary)) != text}


def markdown(summary: Summary, is_own: bool) -> str:
    """The page as Markdown, with the project's own measurements of the engine if `is_own`."""
    prompt = summary.best("prompt_tuning")
    inits = [v for v in summary.variants("prompt_tuning", whole=True) if summary.score(v, summary.common)]
    engine = [tables.engine_cpu(summary), PADDED, engine_gpu(summary), ENGINE] if is_own else []
    parts = [
        "# Prompt tuning, LoRA or full fine-tuning?",
        headline(summary),
        "![Score by task and method with 95 % intervals](results/scores.svg)",
        tables.overview(summary),
        WORDS,
        f"{tables.on_what(summary)} A task with fewer rows repeats them. A score is the task's main metric; ± and "
        "brackets are 95 % intervals over the seeds. A prompt is as long as the task's question needs, so its size "
        "differs. Training is the time of the steps, measured interleaved: compare times within this table only. "
        + (f"The prompt is the one that was run on the most tasks: {prompt}. " if prompt else "")
        + STORE.format(f"; {summary.elsewhere} have other settings or are of a search" if summary.elsewhere else ""),
        *_when(summary),
        _not_measured(summary, is_own),
        _fold("Task by task", tables.tasks(summary)),
        _fold("Inits and positions of the prompt", tables.inits(summary, inits), _diverged(summary)) if inits else "",
        _fold("The base model in 4 bits", tables.bits(summary)),
        _fold("Score over seconds of training", CURVES),
        _fold("The engine: training steps", *engine) if engine else "",
        _fold("Runs by method", tables.runs_by_task(summary)),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def _fold(title: str, *parts: str) -> str:
    return "\n\n".join([f"<details>\n<summary>{title}</summary>", *filter(None, parts), "</details>"])


def headline(summary: Summary) -> str:
    """What was found, and on what."""
    prompt, lora, common = summary.best("prompt_tuning"), summary.best("lora"), summary.common
    sentences = []
    where = tables.names(sorted(summary.usable.loc[summary.usable["task"].isin(common), "group"].unique()))
    for place, tasks in [(where, common), *((task, [task]) for task in summary.others)]:
        difference = prompt and lora and summary.difference(prompt, lora, tasks)
        if not difference:
            means = [f"{NAMES[summary.method(v)]} {tables.percent(summary.score(v, tasks))}" for v in summary.compared]
            sentences.append(f"On {place}: {', '.join(means)}.")
        elif difference.verdict == "tied":
            sentences.append(f"On {place} prompt tuning and LoRA are tied, so costs decide: {_costs(summary, tasks)}.")
        else:
            ahead, behind = ("prompt tuning", "LoRA") if difference.mean.mean > 0 else ("LoRA", "prompt tuning")
            how = difference.verdict if difference.verdict in FOUND else "in the mean"
            points = f"{100 * abs(difference.mean.mean):.1f} points"
            sentences.append(f"On {place} {ahead} is {how} ahead of {behind}, by {points}.")
    sentences[0] = f"**{sentences[0]}**"
    if summary.at_majority:
        sentences.append(f"On {tables.names(summary.at_majority)} no method clearly beats the majority class.")
    rows = summary.usable.drop_duplicates(["task", "eval_samples"])["eval_samples"].sum()
    what = f"{summary.model}, {tables.examples(summary)}, {rows:.0f} scored rows"
    return f"{' '.join(sentences)} ({what}, {len(summary.seeds)} seeds, {summary.device.upper()}.)"


def _costs(summary: Summary, tasks: list[str]) -> str:
    """What prompt tuning saves and what LoRA saves, in words."""
    pair, saved = [summary.best(method) for method in ("prompt_tuning", "lora")], {}
    words = "storage for a task", "peak memory", "training time"
    for (column, form, _), what in zip(tables.COSTS, words, strict=False):
        costs = sorted((summary.cost(str(variant), tasks, column), variant) for variant in pair)
        if costs[0][0] < costs[1][0]:  # neither is NaN
            texts = saved.setdefault(NAMES[summary.method(str(costs[0][1]))], [])
            texts.append(f"{what} ({' against '.join(form(cost) for cost, _ in costs)})")
    return ", ".join(f"{name} takes less {tables.names(texts)}" for name, texts in saved.items()) or "they are equal"


def _when(summary: Summary) -> list[str]:
    """When to take prompt tuning and when not."""
    pair, common = [best for method in ("prompt_tuning", "lora") if (best := summary.best(method))], summary.common
    if len(pair) < 2:
        return []
    stored, memory = [tables.stored(summary, v) for v in pair], [summary.cost(v, common, "memory_bytes") for v in pair]
    take = [f"many tasks share one model: a task takes {stored[0]}, with LoRA {stored[1]}"]
    mean, leave = summary.difference(*pair, common), []
    if mean is None or mean.verdict not in FOUND or mean.mean.mean < 0:
        leave = [f"there is one task and room for {stored[1]}: LoRA scores no less, and inference servers load it"]
    if memory[0] < memory[1]:
        take.append("memory is short: a peak of {}, model included; LoRA {}".format(*map(tables.size, memory)))
    for task in summary.others:
        difference = summary.difference(*pair, [task])
        if difference is not None and difference.verdict in FOUND:
            name, side = ("prompt tuning", take) if difference.mean.mean > 0 else ("LoRA", leave)
            by = f"{difference.verdict} ahead, by {100 * abs(difference.mean.mean):.1f} points"
            side.append(f"the task is like {task}: {name} is {by}")
    lists = {"Take prompt tuning when": take, "Do not take it when": leave}
    return [
        f"**{title}**\n\n" + "\n".join(f"- {reason}." for reason in reasons)
        for title, reasons in lists.items()
        if reasons
    ]


def _not_measured(summary: Summary, is_own: bool) -> str:
    left: dict[str, list[str]] = {}
    for variant in dict.fromkeys([*summary.compared, *summary.variants()]):
        if missing := [task for task in summary.tasks if task not in summary.tasks_of(variant)]:
            left.setdefault(tables.names(missing), []).append(variant)
    device, model = HERE if is_own else ("", "")
    lines = [
        *(f"On {tasks}: {'; '.join(variants)}" for tasks, variants in left.items()),
        f"Scores on other devices{device} and of other models{model}",
        "Other numbers of examples and other ranks of LoRA",
    ]
    return "## What was not measured\n\n" + "\n".join(f"- {line}." for line in lines)


def _diverged(summary: Summary) -> str:
    """Seeds that ended below their untrained score, by name."""
    return " ".join(
        f"Seed {row.seed} of {row.variant} diverged on {row.task}: {100 * row.score_before:.1f} % untrained, "
        f"{100 * row.score:.1f} % trained; the median seed has {100 * row.median:.1f} %."
        for row in summary.diverged.itertuples()
    )


def html(text: str, folder: Path) -> str:
    """One file: the Markdown as HTML with its pictures, whose paths begin at a folder, in it."""
    from markdown_it import MarkdownIt

    def inline(found: re.Match[str]) -> str:
        svg = (folder / found[1]).read_text(encoding="utf-8")
        return "<figure>" + svg.replace("<svg ", f'<svg role="img" aria-label="{found[2]}" ', 1) + "</figure>"

    body = MarkdownIt("commonmark", {"html": True}).enable("table").render(text)
    body = re.sub(r"<a href=[^>]*>(.*?)</a>", r"\1", body)  # the file may be anywhere
    body = re.sub(r'<p><img src="([^"]+)" alt="([^"]*)" /></p>', inline, body)
    body = re.sub(r"(<table>.*?</table>)", r'<div class="scroll" tabindex="0">\1</div>', body, flags=re.DOTALL)
    title = re.sub(r"<.*?>", "", body.split("</h1>")[0])
    style = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    meta = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    head = f"<head>{meta}<title>{title}</title><style>\n{style}</style></head>"
    return f'<!doctype html>\n<html lang="en">{head}\n<body><main>\n{body}</main></body></html>\n'
