"""Trained prompts served without PEFT and without this package: see README.md. Nothing heavy is imported here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .._choices import check_choice


FORMATS = {"checkpoint": "a plain checkpoint of transformers, the prompts as new tokens"}


def export(
    adapters: Sequence[str], output_dir: str | Path, format: str = "checkpoint", **options: Any
) -> dict[str, Any]:
    """Export trained prompts.

    Args:
        adapters: Adapter folders or Hub ids of one base model, or "NAME=FOLDER".
        output_dir: The folder to write; it must not exist.
        format: One of FORMATS.
        **options: Those of the format: see `checkpoint.export_checkpoint`.

    Returns:
        The export's report.

    Raises:
        ValueError: There is no such format, something cannot be exported, or the proof fails; nothing was written.
    """
    check_choice("format", format, FORMATS)
    from .checkpoint import export_checkpoint

    return export_checkpoint(adapters, output_dir, **options)


__all__ = ["FORMATS", "export"]
