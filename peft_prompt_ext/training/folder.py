"""A run's output folder: what the run is, so that no other one writes into it, and where it can go on.

The record is a dict of plain values: `task` (`Task.to_dict`), `task_type`, `max_length`, `method`,
`model_name_or_path` and every other argument that decides the result.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from datasets import Dataset


logger = logging.getLogger(__name__)

RECORD = "recipe.json"
LENGTHS = ("max_steps", "num_train_epochs")
PEFT_TYPES = {"prompt_tuning": "PROMPT_TUNING", "lora": "LORA"}


def read_record(folder: str | Path) -> dict[str, Any]:
    """Read what a run is.

    Args:
        folder: Its output folder, or the Hub id that it was pushed to.

    Raises:
        ValueError: It holds no run of the recipe.
    """
    from transformers.utils import cached_file

    try:
        found = Path(str(cached_file(str(folder), RECORD)))
    except OSError as error:
        raise ValueError(f"{folder} holds no {RECORD}: give the output folder of recipes/train.py.") from error
    return json.loads(found.read_text(encoding="utf-8"))


def claim(folder: Path, record: Mapping[str, Any], train: bool, resume: str | None) -> str | None:
    """Make an output folder this run's own; nothing is written yet.

    Args:
        folder: The folder; it need not exist.
        record: What the run is.
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
        _check_same(source, record)
        _check_kind(Path(checkpoint), record["method"])
    if has_result(folder) or (folder / "all_results.json").is_file():  # zero_shot leaves nothing but scores
        _check_same(folder, record)
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


def check_continued(folder: Path, record: Mapping[str, Any]) -> None:
    """Check the rows of a run that goes on, and say so if it is to become longer or shorter.

    Args:
        folder: Where its checkpoint lies.
        record: What the run is, `train_rows` and LENGTHS included.

    Raises:
        ValueError: It was begun with other rows.
    """
    _check_same(folder, {"train_rows": record["train_rows"]})
    before = read_record(folder) if (folder / RECORD).is_file() else {}
    for name in LENGTHS:
        if before.get(name, record[name]) != record[name]:
            logger.warning(
                "%s was begun with %s %s, now %s: from here on the schedule is that of the new length, and the losses "
                "are those of neither length alone.",
                *(folder, name, before[name], record[name]),
            )


def rows_digest(rows: Dataset) -> str:
    """Tell rows apart from any others, wherever their file lies."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode())
    return f"{len(rows)} rows, sha256 {digest.hexdigest()[:12]}"


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Replace the record whole."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{RECORD}.partial"
    partial.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    partial.replace(folder / RECORD)


def last_whole_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint whose last file, the Trainer's state, is whole; a kill may have torn the one after it."""
    for path in sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[-1]), reverse=True):
        if _is_whole(path):
            return str(path)
        logger.warning("%s is not whole and is left out.", path)
    return None


def has_result(folder: Path) -> bool:
    """Whether a folder holds anything trained."""
    return has_weights(folder) or any(folder.glob("checkpoint-*"))


def has_weights(folder: Path) -> bool:
    """Whether a folder holds what a run had trained at its end."""
    return any(folder.glob("*.safetensors"))


def trained_weights(folder: Path, checkpoint: str | None) -> str:
    """Where the weights lie that are to be scored.

    Args:
        folder: The run's output folder.
        checkpoint: A checkpoint that was asked for, or None: the end of the run, or the last checkpoint of a run that
            has not come so far.

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
    """A checkpoint may have been copied without the record that lay beside it."""
    path = checkpoint / "adapter_config.json"
    found = json.loads(path.read_text(encoding="utf-8")).get("peft_type") if path.is_file() else None
    wanted = PEFT_TYPES.get(method)
    if found != wanted:
        raise ValueError(
            f"{checkpoint} holds {found or 'a whole model'}; --method {method} goes on from "
            f"{wanted or 'a whole model'}. Choose the checkpoint's method, or another checkpoint."
        )


def _check_same(folder: Path, record: Mapping[str, Any]) -> None:
    if not (folder / RECORD).is_file():
        return
    before = read_record(folder)
    # a record of an earlier version may know less
    different = [name for name in record if name in before and before[name] != record[name]]
    if different:
        changes = ", ".join(f"{name} {_shown(before[name])}, now {_shown(record[name])}" for name in different)
        raise ValueError(f"{folder} holds another run ({changes}). Choose another --output_dir, or give the same.")


def _shown(value: Any) -> str:
    return f"{value['name']} (version {value['version']})" if isinstance(value, dict) else repr(value)
