"""Speed and memory of one training step, from the rows of `python -m benchmarks speed`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...speed import METHODS, WHAT, table_lines
from ..document import Block, Bullets, Section, Table, Text, cells
from ..measures import MISSING
from ..runs import EvidenceError


GROUP = ("model", "machine", "text", "batch_size", "precision", "gradient_checkpointing")
COLUMNS = (
    *("method", "virtual tokens", "step", "step, x stock", "step, x LoRA", "step, x floor"),
    *("peak memory above the model", "memory, x stock", "memory, x LoRA"),
)


@dataclass(frozen=True)
class SpeedRow:
    """A line of a speed file, and where it stands."""

    row: dict[str, Any]
    file: str
    line: int


def read_speed(paths: Iterable[str | Path]) -> list[SpeedRow]:
    """Read speed files.

    Raises:
        EvidenceError: A file is missing, or a line is no row of it.
    """
    rows = []
    for path in map(Path, paths):
        if not path.is_file():
            raise EvidenceError(f"There is no speed file {path}.")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if line.strip():
                rows.append(SpeedRow(_row(line, f"{path}, line {number}"), path.name, number))
    return rows


def _row(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError:
        raise EvidenceError(f"{where} is not whole JSON: {line[:60]!r}. Delete or mend that line.") from None
    needed = ("method", "num_virtual_tokens", "text", "batch_size", "precision", "gradient_checkpointing", "model")
    needed += () if "error" in row else ("step_time_s", "peak_memory_bytes")
    missing = [key for key in needed if key not in row]
    if missing or row["method"] not in METHODS:
        raise EvidenceError(f"{where} is no row of `python -m benchmarks speed`: no {missing or 'known method'}.")
    return row


def engine_section(rows: list[SpeedRow]) -> Section:
    """One table for each batch; medians over all turns."""
    if not rows:
        return Section("engine", "The engine: one training step", [Text(f"{MISSING.capitalize()}: no speed file.")])
    groups: dict[tuple[Any, ...], list[SpeedRow]] = {}
    for row in rows:
        groups.setdefault((row.file, *(row.row.get(key) for key in GROUP)), []).append(row)
    blocks: list[Block] = [
        Text(
            "One forward and backward pass of the same batch of movie reviews with one labelled token a row, each "
            "method in a process of its own. Times are medians over all turns; memory is the largest peak. No "
            "optimizer is in either: full fine-tuning's keeps two more numbers for every weight of the model (Adam). "
            "These rows are in no order, so LoRA and full fine-tuning compute pads, which prompt tuning does not; in "
            "the runs of the other sections, where rows are grouped by length, there are few."
        ),
        Bullets([f"{name}: {what}" for name, what in WHAT.items()]),
    ]
    for (file, model, machine, text, batch, precision, checkpointing), group in groups.items():
        lines = table_lines([row.row for row in group])
        extra = ", gradient checkpointing" if checkpointing else ""
        where = f"{file}, lines {', '.join(str(row.line) for row in group)}"
        caption = (
            f"{batch} rows of {text} text, {precision}{extra}: {model} on {machine or 'an unknown machine'} ({where})"
        )
        if lines:
            blocks.append(Table(caption, COLUMNS, list(map(cells, lines))))
    return Section("engine", "The engine: one training step", blocks)
