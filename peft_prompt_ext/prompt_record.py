"""prompt_init.json: what a prompt was initialised from, written beside the adapter for a person to read.

It also holds the plugin's own config fields, which adapter_config.json must not: stock PEFT warns about unknown keys.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ._files import write_json
from ._hub import find_file


FILE_NAME = "prompt_init.json"
FIELDS = (
    "prompt_tuning_init",
    "tokenizer_name_or_path",
    "tokenizer_kwargs",
    "prompt_tuning_init_kwargs",
    "prompt_tuning_init_seed",
    "shared_prefix",
    "shared_prefix_probe",
    "train_logits",
    "virtual_columns",
    "prompt_position",
)
_LONGEST_LIST = 1000


def write(folder: str | Path, config: Any) -> None:
    """Write the record of one adapter into its folder; the old file stays if that fails.

    Args:
        folder: The adapter's folder.
        config: Its `PromptTuningExtConfig`.
    """
    from . import __version__

    record = {
        **{name: getattr(config, name) for name in FIELDS},
        "prompt_tuning_init_text": config.prompt_tuning_init_text,
        "base_model_name_or_path": config.base_model_name_or_path,
        "peft_prompt_ext_version": __version__,
        **(config.init_record or {}),
        **({} if config.base_fingerprint is None else {"base_model": config.base_fingerprint}),
    }
    write_json(Path(folder) / FILE_NAME, _to_plain(record), ensure_ascii=False)


def read(name: str, *, subfolder: str | None = None, **hub_kwargs: Any) -> dict[str, Any] | None:
    """Read the record of a saved adapter.

    Args:
        name: Folder or Hub id.
        subfolder: Folder inside it.
        **hub_kwargs: Passed to `huggingface_hub.hf_hub_download`; arguments that it does not know are ignored.

    Returns:
        The record; None if the adapter was not saved by this plugin. A broken record gives a warning and {}.
    """
    path = _find(name, subfolder, hub_kwargs)
    if path is None:
        return None
    record = parse(path)
    if record is None:
        warnings.warn(
            f"{path} is broken: how this prompt was initialised is lost. The prompt itself is whole.", stacklevel=2
        )
        return {}
    return record


def _find(name: str, subfolder: str | None, hub_kwargs: Mapping[str, Any]) -> Path | None:
    if not Path(name).is_dir():
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            return find_file(name, FILE_NAME, subfolder, **hub_kwargs)
        except LocalEntryNotFoundError:  # without a network an adapter of stock PEFT is in the cache, and no record
            return None
    return find_file(name, FILE_NAME, subfolder)


def parse(path: Path) -> dict[str, Any] | None:
    """Read a record's file. Returns None if it holds no JSON object."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def _to_plain(value: Any) -> Any:
    """`value` as JSON can hold it; what is too large or has no JSON form is described instead."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(k): _to_plain(v) for k, v in value.items()}
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, (list, tuple)) and len(value) <= _LONGEST_LIST:
        return [_to_plain(v) for v in value]
    size = f" of {len(value)}" if hasattr(value, "__len__") else ""
    return f"<{type(value).__name__}{size}>"
