"""A user's files of rows: CSV, JSON and JSONL."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from datasets import Dataset


SUFFIXES = {".jsonl": "json", ".json": "json", ".csv": "csv"}


def read_file(path: str | Path, as_texts: bool = False) -> Dataset:
    """Read a CSV, JSON or JSONL file.

    Args:
        path: The file.
        as_texts: Whether every field of a CSV file is a text, "1" too; JSON marks texts itself.

    Returns:
        The rows; an empty field of a CSV file is None, and no other one: "None" or "N/A" may be a label or a text.

    Raises:
        ValueError: There is no such file, it has no rows, or a line of it is broken.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path} must be a file that ends in {', '.join(SUFFIXES)}.")
    if not path.is_file():
        raise ValueError(f"There is no file {path}.")
    if not path.read_bytes().strip():
        raise ValueError(f"{path} is empty: rows were wanted.")
    try:
        options = _csv_options(path, as_texts) if path.suffix == ".csv" else {}
        return load_dataset(SUFFIXES[path.suffix], data_files=str(path), split="train", **options)
    except (DatasetGenerationError, ValueError, OSError) as error:
        if "corresponds to no data" in str(error):
            raise ValueError(f"{path} has no rows: at least one is wanted.") from error
        reason = _broken_line(path) or error.__cause__ or error
        raise ValueError(f"{path} cannot be read: {reason}") from error


def _csv_options(path: Path, as_texts: bool) -> dict[str, Any]:
    """Arguments of the reader that keep it from taking words such as "None" for an empty field."""
    import pandas as pd
    from datasets import Features, Value

    columns = pd.read_csv(path, nrows=0).columns if as_texts else ()
    features = Features({column: Value("string") for column in columns}) if as_texts else None
    return {"keep_default_na": False, "na_values": [""], "features": features}


def _broken_line(path: Path) -> str | None:
    if path.suffix != ".jsonl":
        return None  # the reader of CSV names the line itself
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").split("\n"), 1):
        try:
            if line.strip() and not isinstance(json.loads(line), dict):
                return f"line {number} is not an object: {line[:60]}"
        except json.JSONDecodeError as error:
            return f"line {number} is not JSON ({error}): {line[:60]}"
    return None
