"""A run's output folder: its settings, so that no other run writes into it, and the checkpoint where it can go on.

The settings are a dict of plain values, see `settings`; they are saved as recipe.json.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._files import write_json
from .methods import METHODS


if TYPE_CHECKING:
    from datasets import Dataset


logger = logging.getLogger(__name__)

SETTINGS_FILE = "recipe.json"
LENGTHS = ("max_steps", "num_train_epochs")


def read_settings(folder: str | Path) -> dict[str, Any]:
    """Read the settings of a run.

    Args:
        folder: Its output folder, or the Hub id that it was pushed to.

    Raises:
        ValueError: It holds no run.
    """
    from transformers.utils import cached_file

    try:
        found = Path(str(cached_file(str(folder), SETTINGS_FILE)))
    except OSError as error:
        raise ValueError(
            f"{folder} holds no {SETTINGS_FILE}: give the output folder of `peft-prompt-ext train`."
        ) from error
    return json.loads(found.read_text(encoding="utf-8"))


def claim(folder: Path, settings: Mapping[str, Any], train: bool, resume: str | None) -> str | None:
    """Check that an output folder is free for this run, and find where the run goes on. Nothing is written.

    Args:
        folder: The folder; it need not exist.
        settings: The run's.
        train: Whether the run trains.
        resume: None to begin, "true" to go on from the last checkpoint in `folder`, else a checkpoint's path.

    Returns:
        The checkpoint to go on from, or None to begin.

    Raises:
        ValueError: The folder holds another run or a finished one, or the checkpoint is none.
    """
    resuming = resume is not None and resume.lower() not in {"false", "none"}
    checkpoint, source = last_whole_checkpoint(folder) if resuming else None, folder
    if resuming and resume is not None and resume.lower() != "true":
        checkpoint, source = resume, Path(resume).parent
        if not _is_whole(Path(checkpoint)):
            raise ValueError(f"--resume_from_checkpoint: {checkpoint} is no checkpoint of the Trainer.")
        _check_same(source, settings)
        _check_kind(Path(checkpoint), settings["method"])
    if has_result(folder) or (folder / "all_results.json").is_file():  # zero_shot writes scores alone
        _check_same(folder, settings)
    goes_on = resuming and source.resolve() == folder.resolve()
    if train and has_result(folder) and not goes_on:
        raise ValueError(
            f"{folder} holds a run already: add --resume_from_checkpoint true to go on with it, or choose another "
            "--output_dir."
        )
    if train and resuming and checkpoint is None:
        if has_weights(folder):
            raise ValueError(f"{folder} holds a finished run without a checkpoint: choose another --output_dir.")
        logger.warning("%s has no checkpoint to go on from: the run starts at the beginning.", folder)
    return checkpoint


def check_continued(folder: Path, settings: Mapping[str, Any]) -> None:
    """Check the rows of a run that goes on, and warn if it is to become longer or shorter.

    Args:
        folder: Where its checkpoint lies.
        settings: The run's, `train_rows` and LENGTHS included.

    Raises:
        ValueError: It was begun with other rows.
    """
    _check_same(folder, {"train_rows": settings["train_rows"]})
    before = read_settings(folder) if (folder / SETTINGS_FILE).is_file() else {}
    for name in LENGTHS:
        if before.get(name, settings[name]) != settings[name]:
            logger.warning(
                "%s was begun with %s %s, now %s: from here on the schedule is that of the new length, and the losses "
                "are those of neither length alone.",
                *(folder, name, before[name], settings[name]),
            )


def rows_digest(rows: Dataset) -> str:
    """Describe rows by their number and a hash, so that moved files are found equal and other rows are not."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode())
    return f"{len(rows)} rows, sha256 {digest.hexdigest()[:12]}"


def write_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Write the settings of a run into its folder; it need not exist."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / SETTINGS_FILE, settings)


def last_whole_checkpoint(folder: Path) -> str | None:
    """Find the newest checkpoint whose last file, the Trainer's state, is whole: a kill may leave half of one."""
    for path in sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[-1]), reverse=True):
        if _is_whole(path):
            return str(path)
        logger.warning("%s is not whole and is left out.", path)
    return None


def has_result(folder: Path) -> bool:
    """Whether a folder holds anything trained."""
    return has_weights(folder) or any(folder.glob("checkpoint-*"))


def has_weights(folder: Path) -> bool:
    """Whether a folder holds the weights from the end of a run."""
    return any(folder.glob("*.safetensors"))


def trained_weights(folder: Path, checkpoint: str | None) -> str:
    """Find the weights to score.

    Args:
        folder: The run's output folder.
        checkpoint: A checkpoint that was asked for. None: the end of the run, or its last checkpoint if it did not
            end.

    Raises:
        ValueError: There are none.
    """
    found = checkpoint or (str(folder) if has_weights(folder) else last_whole_checkpoint(folder))
    if found is None:
        raise ValueError(f"{folder} holds nothing trained: add --do_train true, or name the --output_dir of a run.")
    return found


def _is_whole(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return False
    return True


def _check_kind(checkpoint: Path, method: str) -> None:
    """Refuse a checkpoint of another method: it may have been copied without the settings that lay beside it."""
    path = checkpoint / "adapter_config.json"
    found = json.loads(path.read_text(encoding="utf-8")).get("peft_type") if path.is_file() else None
    wanted = METHODS[method].peft_type
    if found != wanted:
        raise ValueError(
            f"{checkpoint} holds {found or 'a whole model'}; --method {method} goes on from "
            f"{wanted or 'a whole model'}. Choose the checkpoint's method, or another checkpoint."
        )


def _check_same(folder: Path, settings: Mapping[str, Any]) -> None:
    if not (folder / SETTINGS_FILE).is_file():
        return
    before = read_settings(folder)
    # an earlier version may have saved fewer settings
    different = [name for name in settings if name in before and before[name] != settings[name]]
    if different:
        changes = ", ".join(f"{name} {_describe(before[name])}, now {_describe(settings[name])}" for name in different)
        raise ValueError(f"{folder} holds another run ({changes}). Choose another --output_dir, or give the same.")


def _describe(value: Any) -> str:
    return f"{value['name']} (version {value['version']})" if isinstance(value, dict) else repr(value)
