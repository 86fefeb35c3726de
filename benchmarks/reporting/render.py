"""The report as HTML and as Markdown, from the same sections."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from .document import Section
from .evidence import Evidence
from .sections.choice import choice_section
from .sections.engine import SpeedRow, engine_section
from .sections.method import facts, method_section
from .sections.origin import failures_section, gaps_section, runs_section
from .sections.pairs import four_bits_section, inits_section
from .sections.pictures import costs_section, curves_section
from .sections.scores import scores_section, search_section


TEMPLATES = Path(__file__).parent / "templates"
TITLE = "Prompt tuning, LoRA or full fine-tuning?"


@dataclass(frozen=True)
class Report:
    """Both forms; they hold the same numbers."""

    html: str
    markdown: str


def build_report(evidence: Evidence, speed: list[SpeedRow], wanted: list[Mapping[str, Any]] | None = None) -> Report:
    """Make the report.

    Args:
        evidence: The runs.
        speed: Rows of `python -m benchmarks speed`.
        wanted: The specs that should have been run; by default the grid that the runs span.
    """
    sections = [section for section in _sections(evidence, speed, wanted) if section is not None]
    content = {"title": TITLE, "facts": facts(evidence), "sections": sections}
    return Report(_render("report.html.j2", content, escape=True), _render("report.md.j2", content, escape=False))


def _sections(
    evidence: Evidence, speed: list[SpeedRow], wanted: list[Mapping[str, Any]] | None
) -> Iterable[Section | None]:
    yield choice_section(evidence)
    yield scores_section(evidence)
    yield curves_section(evidence)
    yield costs_section(evidence)
    yield inits_section(evidence)
    yield four_bits_section(evidence)
    yield engine_section(speed)
    yield search_section(evidence)
    yield failures_section(evidence, speed)
    yield runs_section(evidence)
    yield gaps_section(evidence, wanted)
    yield method_section(evidence)


def _render(name: str, content: dict[str, Any], escape: bool) -> str:
    loader = jinja2.FileSystemLoader(TEMPLATES)
    environment = jinja2.Environment(
        loader=loader, autoescape=escape, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["cell"] = _markdown_cell
    return environment.get_template(name).render(content).rstrip("\n") + "\n"


def _markdown_cell(cell: Any) -> str:
    text = cell.text.replace("|", "\\|").replace("\n", " ")
    if cell.is_code:
        return f"`{text}`"
    return f"**{text}**" if cell.is_bold else text
