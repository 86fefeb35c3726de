"""Pictures as SVG files that follow the reader's dark or light theme and are legible on a telephone.

Each method has a marker of its own. What matplotlib draws in `TEXT` and `GRID` becomes a variable of the picture.
"""

import io
import re
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from .load import NAMES
from .summary import Summary


TEXT, GRID = "#010203", "#040506"  # stand for the theme's
STYLES = {"prompt_tuning": ("#1f86cc", "o"), "lora": ("#D55E00", "D"), "full": ("#009E73", "s")}
STYLES["zero_shot"] = (TEXT, "x")
WIDTH = 5.2  # inches at 72 units: about as wide as a telephone, so that 10 units stay legible there
THEME = "svg{--ink:#1b1b1b;--line:#d5d5d5}@media(prefers-color-scheme:dark){svg{--ink:#e8e6e3;--line:#4a4f57}}"
RC = {"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10, "axes.titlesize": 10, "grid.color": GRID}
RC |= dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False)
RC |= {f"{name}color": TEXT for name in ("text.", "axes.edge", "axes.label", "xtick.", "ytick.")}


@matplotlib.rc_context(RC)
def scores(summary: Summary) -> str:
    """Scores with intervals; tasks on which no method clearly beats the majority class are shaded."""
    tasks = sorted(summary.tasks, key=lambda task: (task in summary.at_majority, task not in summary.common, task))
    figure = Figure(figsize=(WIDTH, 0.9 + 0.5 * len(tasks)), layout="constrained")
    axes = figure.add_subplot()
    for number, variant in enumerate(summary.compared):
        method = summary.method(variant)
        color, marker = STYLES[method]
        means = {place: summary.score(variant, [task]) for place, task in enumerate(tasks)}
        found = {place: mean for place, mean in means.items() if mean is not None}
        places = [place + 0.17 * (number - 1.5) for place in found]
        points = [(100 * mean.mean, 100 * (mean.half or 0.0)) for mean in found.values()]
        style = {"fmt": marker, "color": color, "label": NAMES[method], "markersize": 5, "elinewidth": 1.2}
        axes.errorbar([x for x, _ in points], places, xerr=[half for _, half in points], **style)
    for place, task in enumerate(tasks):
        level = summary.usable.loc[summary.usable["task"] == task, "majority"].max()
        if pd.notna(level):
            axes.plot([100 * level] * 2, [place - 0.42, place + 0.42], color=TEXT, linestyle=":", linewidth=1.2)
        if task in summary.at_majority:
            axes.axhspan(place - 0.5, place + 0.5, color=GRID, alpha=0.45, linewidth=0)
    axes.set_yticks(range(len(tasks)), tasks)
    axes.set(xlabel="score, % (dotted: majority class; bars: 95 % interval)", ylim=(len(tasks) - 0.5, -0.5))
    axes.grid(axis="x", linewidth=0.6)
    figure.legend(loc="outside upper center", ncols=4, fontsize=9, handletextpad=0.1, columnspacing=0.9)
    return _svg(figure, "scores")


@matplotlib.rc_context(RC)
def curves(summary: Summary) -> str:
    """Scores on the way over the seconds that the steps take interleaved: means over seeds."""
    figure = Figure(figsize=(WIDTH, 2.6), layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, len(summary.common), sharey=True))
    for axes, task in zip(panels, summary.common, strict=True):
        for variant in summary.compared:
            runs = summary.of(variant, [task])
            line = _curve(runs)
            color, marker = STYLES[runs["method"].iloc[0]]
            if runs["method"].iloc[0] == "zero_shot":
                axes.axhline(100 * runs["score"].mean(), color=TEXT, linestyle=":", linewidth=1.2, label="zero-shot")
            elif line is not None:
                label = variant.split(",")[0]
                axes.plot(line.index, 100 * line, color=color, marker=marker, markersize=4, label=label)
        axes.set(title=task, xlabel="seconds of training")
        axes.grid(linewidth=0.6)
    panels[0].set_ylabel("score, %")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, fontsize=9, columnspacing=0.9)
    return _svg(figure, "curves")


def _curve(runs: pd.DataFrame) -> pd.Series | None:
    """Mean score at each point; None where the steps were not measured interleaved."""
    runs = runs[runs["train_time_s"] > 0]
    if runs.empty or runs["seconds"].isna().any():
        return None
    curves = runs.explode("curve").dropna(subset="curve")
    points = pd.json_normalize(curves["curve"]).set_index(curves.index)
    points = points.assign(part=points["seconds"] / curves["train_time_s"], number=points.groupby(level=0).cumcount())
    means = points.groupby("number")[["part", "score"]].mean()
    return means.set_index(means["part"] * runs["seconds"].mean())["score"]


def _svg(figure: Any, name: str) -> str:
    """Without the date, with ids that no other picture has, and the theme's colours."""
    buffer = io.StringIO()
    metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata=metadata)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="([^"]*)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = svg.replace(TEXT, "var(--ink)").replace(GRID, "var(--line)")
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px; font-family: system-ui, sans-serif", svg)
    svg = re.sub(r'<style type="text/css">', f'<style type="text/css">{THEME}', svg, count=1)
    return re.sub(r"\n\s*", "\n", svg).strip() + "\n"
