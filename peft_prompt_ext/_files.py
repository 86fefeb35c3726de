"""Files that are replaced whole, so that a process that is killed leaves the old file and not half of a new one."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def write_whole(path: Path, text: str) -> None:
    """Write a text file in UTF-8 and put it in place of the old one in a single step.

    Raises:
        OSError: The file could not be written; the old one is still there.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def write_json(path: Path, value: Any, *, ensure_ascii: bool = True) -> None:
    """Write a value as indented JSON; see [`write_whole`]."""
    write_whole(path, json.dumps(value, indent=2, ensure_ascii=ensure_ascii) + "\n")
