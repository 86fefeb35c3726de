"""Pictures as SVG to be put into a page: its text colour, its font, no size, no ids that another picture has too.

Colours are Okabe and Ito's, and each variant has a marker or a line of its own, so that colour is never needed. What
matplotlib draws in `TEXT` and `GRID` takes the page's colours, which are others in the dark.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from .evidence import Variant
from .statistics import MIN_SEEDS, Interval


TEXT, GRID = "#010203", "#040506"  # stand for the page's own
IN_PAGE = {TEXT: "currentColor", GRID: "var(--line)"}
INIT_STYLES = {
    None: ("#0072B2", "o"),
    "RANDOM": ("#E69F00", "s"),
    "SAMPLE_VOCAB": ("#56B4E9", "D"),
    "CLASS_LABELS": ("#0072B2", "o"),
    "TEXT": ("#009E73", "^"),
    "TRANSFER": ("#CC79A7", "v"),
}
METHOD_STYLES = {"lora": ("#D55E00", "P"), "full": (TEXT, "X"), "linear_probe": ("#808080", "*")}
SIZE = (5.2, 4.4)  # inches at 72 units: about as wide as a phone, so that 10 units stay legible there
RC = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.8,
    "lines.markersize": 6,
    "legend.frameon": False,
    **{f"{name}color": TEXT for name in ("text.", "axes.edge", "axes.label", "xtick.", "ytick.")},
    "grid.color": GRID,
}


@dataclass(frozen=True)
class Line:
    """A learning curve: at each x the mean, least and greatest score over seeds."""

    variant: Variant
    x: Sequence[float]
    mean: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]


@dataclass(frozen=True)
class Point:
    """A variant's score and what it costs."""

    variant: Variant
    x: float
    score: Interval


def draw_curves(name: str, lines: Sequence[Line], x_label: str, level: float | None) -> str:
    """Scores over examples or seconds; `level` is what the untrained model has, as a dotted line."""

    def draw(axes: Any) -> None:
        for line in lines:
            style = _style(line.variant)
            axes.plot(line.x, [100 * y for y in line.mean], label=line.variant.label, **style)
            band = [[100 * y for y in edge] for edge in (line.low, line.high)]
            axes.fill_between(line.x, *band, color=style["color"], alpha=0.13, linewidth=0)
        if level is not None:
            axes.axhline(100 * level, color=TEXT, linestyle=":", linewidth=1.2, label="Zero-shot")
        axes.set(xlabel=x_label, ylabel="score x 100", xlim=(0, None))

    return _svg(name, draw)


def draw_frontier(
    name: str, points: Sequence[Point], frontier: Sequence[Variant], x_label: str, level: float | None
) -> str:
    """Scores over a cost; a line joins those to which nothing is better in both."""

    def draw(axes: Any) -> None:
        best = sorted((point.x, 100 * point.score.mean) for point in points if point.variant in frontier)
        axes.plot(*zip(*best, strict=True), color=TEXT, linewidth=1, linestyle="--", drawstyle="steps-post", zorder=1)
        for point in points:
            # an interval from two seeds is so wide that nothing else would be seen
            half = 100 * point.score.half if point.score.half and point.score.count >= MIN_SEEDS else None
            style = {**_style(point.variant), "linestyle": "none"}
            axes.errorbar(point.x, 100 * point.score.mean, yerr=half, label=point.variant.label, elinewidth=1, **style)
        if level is not None:
            axes.axhline(100 * level, color=TEXT, linestyle=":", linewidth=1.2, label="Zero-shot")
        if max(point.x for point in points) > 20 * min(point.x for point in points) > 0:
            axes.set_xscale("log")
        axes.set(xlabel=x_label, ylabel="score x 100")

    return _svg(name, draw)


def draw_differences(name: str, rows: Sequence[tuple[Variant, str, Interval]], x_label: str) -> str:
    """Differences with their intervals, one line each; 0 is no difference."""

    def draw(axes: Any) -> None:
        for place, (variant, _, difference) in enumerate(rows):
            half = None if difference.half is None else 100 * difference.half
            style = {**_style(variant), "linestyle": "none"}
            axes.errorbar(100 * difference.mean, -place, xerr=half, elinewidth=1.5, **style)
        axes.axvline(0, color=TEXT, linewidth=1)
        axes.set_yticks([-place for place in range(len(rows))], [label for _, label, _ in rows])
        axes.set(xlabel=x_label, ylim=(0.6 - len(rows), 0.6))

    return _svg(name, draw, height=1.0 + 0.3 * len(rows))


def _style(variant: Variant) -> dict[str, Any]:
    found = METHOD_STYLES.get(variant.method) or INIT_STYLES.get(variant.init) or ("#CC79A7", "h")
    style: dict[str, Any] = {"color": found[0], "marker": found[1]}
    if variant.quantization:
        style |= {"markerfacecolor": "none", "linestyle": "--"}
    return style


def _svg(name: str, draw: Any, height: float = SIZE[1]) -> str:
    with matplotlib.rc_context({**RC, "svg.hashsalt": name}):
        figure = Figure(figsize=(SIZE[0], height), layout="constrained")
        axes = figure.add_subplot()
        draw(axes)
        if axes.get_legend_handles_labels()[0]:
            figure.legend(loc="outside lower center", ncols=2, fontsize=9, handlelength=2.4, columnspacing=1.2)
        buffer = io.StringIO()
        FigureCanvasSVG(figure)
        figure.savefig(
            buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
        )
    return _for_page(buffer.getvalue(), name)


def _for_page(svg: str, name: str) -> str:
    """Without what only a file of its own needs, and with ids that no other picture has."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"| version="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r'<svg( width="[^"]*"| height="[^"]*")+', "<svg", svg, count=1)
    svg = re.sub(r'\bid="([^"]*)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", svg)
    for stand_in, colour in IN_PAGE.items():
        svg = svg.replace(stand_in, colour)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    return re.sub(r"\n\s*", "\n", svg).strip()
