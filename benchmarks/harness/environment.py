"""What a run ran on: machine, versions, code, rows and weights."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


FILE = "environment.json"  # in a run's folder, for one that comes to no result
ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("peft-prompt-ext", "peft", "transformers", "torch", "datasets", "accelerate", "bitsandbytes")
CODE = ("*.py", "*.toml")  # not the store, which grows while runs go on and may be a file of the repository


def code() -> dict[str, Any]:
    """The commit, and whether the code is another than there."""
    commit = _git("rev-parse", "HEAD")
    changes = _git("status", "--porcelain", "--untracked-files=no", "--", *CODE)
    return {"commit": commit, "dirty": bool(changes) if commit else None}


def environment(
    model: str, revision: str | None, device: str, dtype: str, scored: Any, train: Any | None
) -> dict[str, Any]:
    """Machine, versions, and hashes of the scored and trained rows and of the weights (of a Hub model: its commit)."""
    from .machine import machine

    return {
        **machine(device),
        "device": device,
        "dtype": dtype,
        "python": sys.version.split()[0],
        "versions": {package: _version(package) for package in PACKAGES},
        "scored_rows_sha256": _rows_hash(scored),
        "train_rows_sha256": None if train is None else _rows_hash(train),
        "weights_sha256": _weights_hash(model) or revision,
    }


def _rows_hash(rows: Any) -> str:
    """Of rows in any order."""
    lines = sorted(json.dumps(row, sort_keys=True, default=str) for row in rows)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _weights_hash(name: str) -> str | None:
    """Of the files of a local model."""
    from peft_prompt_ext.assets import resolve

    digest, files = hashlib.sha256(), sorted(Path(resolve(name)).glob("*.safetensors"))
    for file in files:
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest() if files else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    try:
        ran = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return None
    return ran.stdout.strip() if ran.returncode == 0 else None
