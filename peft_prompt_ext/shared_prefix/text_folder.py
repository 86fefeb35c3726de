"""Keys and values of texts in files, which later processes use too.

A file holds what a text says, so only the user can read it. Files are whole or absent: they are written beside their
place and then moved there, so that a full disk, a killed process or a second process leaves no half of one.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import secrets
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from ..assets import cache_dir


logger = logging.getLogger(__name__)

TENSOR = "keys_values"
OLD = 3600.0  # seconds after which the part of a file is that of a dead process


class TextFolder:
    """Texts of one model in one state.

    Args:
        root: The folder of all models; by default one in the user's cache.
        digest: A hash of all that decides keys and values, which names the model's folder.

    Raises:
        ValueError: The folder cannot be written, or belongs to another user.
    """

    def __init__(self, root: str | Path | None, digest: str) -> None:
        self.folder = Path(root or default_root(), digest)
        self._is_full = False
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.folder.chmod(0o700)
            for path in self.folder.glob("*.partial"):
                if time.time() - path.stat().st_mtime > OLD:
                    path.unlink(missing_ok=True)
        except OSError as error:
            raise ValueError(
                f"text_cache_dir: {self.folder} cannot be used as the user's own folder ({error}). Choose a folder "
                "that you can write, or text_cache='memory'."
            ) from None
        if not os.access(self.folder, os.W_OK | os.X_OK):
            raise ValueError(f"text_cache_dir: {self.folder} cannot be written. Choose another folder.")
        files = list(list_files(self.folder.parent))
        self.num_bytes = sum(map(_size, files))
        logger.info(
            "Texts are kept in %s: %d files, %.1f MB. `peft-prompt-ext texts --clear` deletes them.",
            self.folder.parent,
            len(files),
            self.num_bytes / 1e6,
        )

    def limit(self, budget: int) -> None:
        """Delete texts of other models and states, the oldest first, until they take half of a budget of bytes."""
        others = sorted((p for p in list_files(self.folder.parent) if p.parent != self.folder), key=_time)
        taken = sum(map(_size, others))
        for path in others:
            if taken <= budget // 2:
                return
            taken, self.num_bytes = taken - _size(path), self.num_bytes - _size(path)
            path.unlink(missing_ok=True)

    def get(self, key: bytes) -> torch.Tensor | None:
        """Read a text's bytes; None if there is no whole file."""
        path = self._path(key)
        try:
            return load_file(path)[TENSOR]
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError, KeyError) as error:
            logger.warning("%s is broken and is written again: %s", path, error)
            path.unlink(missing_ok=True)
            return None

    def __contains__(self, key: bytes) -> bool:
        return self._path(key).is_file()

    def __setitem__(self, key: bytes, flat: torch.Tensor) -> None:
        if self._is_full:
            return
        path = self._path(key)
        partial = path.with_name(f"{path.name}.{secrets.token_hex(8)}.partial")
        try:
            self.folder.mkdir(0o700, parents=True, exist_ok=True)  # where the texts were deleted meanwhile
            with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
                file.write(save({TENSOR: flat}))
            partial.replace(path)
        except OSError as error:
            self._is_full = True
            partial.unlink(missing_ok=True)
            logger.warning("No more texts are kept in %s: %s", self.folder, error)

    def _path(self, key: bytes) -> Path:
        return self.folder / f"{hashlib.sha256(key).hexdigest()}.safetensors"


def default_root() -> Path:
    """Give the folder of all kept texts in the user's cache."""
    return cache_dir() / "texts"


def list_files(root: str | Path | None = None) -> Iterator[Path]:
    """List the files of kept texts in a folder, by default in the user's cache."""
    for folder in sorted(Path(root or default_root()).glob("*")):
        if re.fullmatch("[0-9a-f]{64}", folder.name):
            yield from sorted([*folder.glob("*.safetensors"), *folder.glob("*.partial")])


def clear_text_cache(root: str | Path | None = None) -> int:
    """Delete the texts that `text_cache="disk"` has kept in a folder, by default in the user's cache.

    Returns:
        The number of bytes that are free again.
    """
    freed, folders = 0, set()
    for path in list_files(root):
        freed += _size(path)
        folders.add(path.parent)
        path.unlink(missing_ok=True)
    for folder in folders:
        with suppress(OSError):  # another process writes there
            folder.rmdir()
    return freed


def _time(path: Path) -> float:
    with suppress(OSError):
        return path.stat().st_mtime
    return 0.0


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # another process deleted it
        return 0
