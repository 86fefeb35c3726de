"""prompt_init.json: what a prompt was initialised from, written beside the adapter for a person to read.

It also holds the plugin's own config fields, which adapter_config.json must not: stock PEFT warns about unknown keys.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .config import PromptTuningExtConfig


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
)
_LONGEST_LIST = 1000


def write(folder: str | Path, config: PromptTuningExtConfig) -> None:
    """Write the record of one adapter into its folder; the file is replaced whole, so a kill leaves the old one."""
    from . import __version__

    record = {
        **{name: getattr(config, name) for name in FIELDS},
        "prompt_tuning_init_text": config.prompt_tuning_init_text,
        "base_model_name_or_path": config.base_model_name_or_path,
        "peft_prompt_ext_version": __version__,
        **(config.init_record or {}),
        **({} if config.base_fingerprint is None else {"base_model": config.base_fingerprint}),
    }
    path = Path(folder) / FILE_NAME
    partial = path.with_name(f"{FILE_NAME}.{os.getpid()}.partial")
    partial.write_text(json.dumps(_plain(record), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(path)


def read(name: str, *, subfolder: str | None = None, **hub_kwargs: Any) -> dict[str, Any] | None:
    """Read the record of a saved adapter.

    Args:
        name: Folder or Hub id.
        subfolder: Folder inside it.
        **hub_kwargs: Passed to `huggingface_hub.hf_hub_download`; arguments it does not know are ignored.

    Returns:
        The record; None: the adapter was not saved by this plugin. A broken record is a warning and an empty one.
    """
    path = _find(name, subfolder, hub_kwargs)
    if path is None:
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        record = None
    if not isinstance(record, dict):
        warnings.warn(f"{path} is not whole: how this prompt began is lost, the prompt is not.", stacklevel=2)
        return {}
    return record


def _find(name: str, subfolder: str | None, hub_kwargs: Mapping[str, Any]) -> Path | None:
    if Path(name).is_dir():
        path = Path(name, subfolder or "", FILE_NAME)
        return path if path.is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    known = {k: v for k, v in hub_kwargs.items() if k in {"revision", "cache_dir", "token", "local_files_only"}}
    try:
        return Path(hf_hub_download(name, FILE_NAME, subfolder=subfolder, **known))
    except EntryNotFoundError:
        return None


def _plain(value: Any) -> Any:
    """`value` as JSON can hold it; what is too large or has no JSON form is described instead."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, (list, tuple)) and len(value) <= _LONGEST_LIST:
        return [_plain(v) for v in value]
    size = f" of {len(value)}" if hasattr(value, "__len__") else ""
    return f"<{type(value).__name__}{size}>"
