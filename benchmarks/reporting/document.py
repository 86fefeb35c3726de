"""What a report consists of, before it is HTML or Markdown: both are made of the same blocks and numbers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar


@dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Attributes:
        text: What it says.
        is_bold: Whether it stands out.
        link: The id of the row of a run that is behind it, or "".
        is_code: Whether it is to be typed.
    """

    text: str
    is_bold: bool = False
    link: str = ""
    is_code: bool = False


@dataclass(frozen=True)
class Table:
    """A table; the first cell of a row is its head.

    Attributes:
        caption: What it shows.
        columns: Heads.
        rows: As wide as the heads.
        name: The id of each row's place in HTML, or "" for none.
        is_folded: Whether it is opened only by those who want it.
    """

    kind: ClassVar[str] = "table"
    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    names: Sequence[str] = ()
    is_folded: bool = False


@dataclass(frozen=True)
class Figure:
    """A picture in SVG; `description` says what it shows to those who do not see it."""

    kind: ClassVar[str] = "figure"
    name: str
    caption: str
    description: str
    svg: str


@dataclass(frozen=True)
class Gallery:
    """Pictures side by side, where there is room."""

    kind: ClassVar[str] = "gallery"
    figures: Sequence[Figure]


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    kind: ClassVar[str] = "text"
    text: str


@dataclass(frozen=True)
class Bullets:
    """A list."""

    kind: ClassVar[str] = "bullets"
    items: Sequence[str]


@dataclass(frozen=True)
class Heading:
    """The title of a part of a section."""

    kind: ClassVar[str] = "heading"
    text: str


Block = Table | Figure | Gallery | Text | Bullets | Heading


@dataclass(frozen=True)
class Section:
    """A numbered part of the report."""

    name: str
    title: str
    blocks: list[Block] = field(default_factory=list)


def cells(texts: Iterable[str | Cell]) -> list[Cell]:
    """A row."""
    return [text if isinstance(text, Cell) else Cell(text) for text in texts]
