"""Rows of a source task that a fair transfer leaves out: they hold text of the rows that are scored.

Two data sets may be drawn from one collection. Of the sentences of SST-2's validation split three in four are in the
movie reviews too, with their labels.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any


SHARED_WORDS = 5  # what is shorter ("a good movie") is in many texts by chance
Row = Mapping[str, Any]


def without_overlap(
    source: Iterable[Row], source_columns: Iterable[str], scored: Iterable[Row], scored_columns: Iterable[str]
) -> list[int]:
    """The source's rows of which no text is in a text of a scored row, nor holds one.

    Case, punctuation and spaces make no difference, and texts of fewer than `SHARED_WORDS` words are not looked for.

    The texts are in the named columns. Returns the numbers of the rows that stay, ascending.
    """
    known = sorted({text for row in scored for text in _texts(row, scored_columns)})
    together = "|".join(known)
    long = [text for text in known if _is_long(text)]

    def shares(text: str) -> bool:
        return (_is_long(text) and text in together) or any(one in text for one in long)

    return [number for number, row in enumerate(source) if not any(map(shares, _texts(row, source_columns)))]


def _texts(row: Row, columns: Iterable[str]) -> Iterator[str]:
    """The words of each, between spaces, so that no word is found within another."""
    for name in columns:
        words = re.findall(r"[^\W_]+", str(row[name]).lower())
        yield f" {' '.join(words)} "


def _is_long(text: str) -> bool:
    return len(text.split()) >= SHARED_WORDS
