"""Files of an adapter in a folder or on the Hub, and the keyword arguments that the Hub's client takes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


DOWNLOAD_ARGUMENTS = ("revision", "cache_dir", "token", "local_files_only")


def hub_arguments(kwargs: Mapping[str, Any], *others: str) -> dict[str, Any]:
    """Select the arguments that choose a version on the Hub and how it is downloaded.

    Args:
        kwargs: Any keyword arguments.
        *others: Further names to select, such as "subfolder".
    """
    return {name: kwargs[name] for name in (*DOWNLOAD_ARGUMENTS, *others) if name in kwargs}


def find_file(name: str, file_name: str, subfolder: str | None = None, **hub_kwargs: Any) -> Path | None:
    """Find a file of an adapter; it is downloaded if the adapter is on the Hub.

    Args:
        name: Folder or Hub id.
        file_name: The file.
        subfolder: Folder inside it.
        **hub_kwargs: Passed to `huggingface_hub.hf_hub_download`; arguments that it does not know are ignored.

    Returns:
        Its path, or None if the folder or the repository has no such file.

    Raises:
        huggingface_hub.errors.LocalEntryNotFoundError: The Hub could not be reached.
        Exception: What else the Hub's client raises, for example for a name that is no Hub id.
    """
    if Path(name).is_dir():
        path = Path(name, subfolder or "", file_name)
        return path if path.is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(name, file_name, subfolder=subfolder, **hub_arguments(hub_kwargs)))
    except LocalEntryNotFoundError:  # a subclass of the next one: no network
        raise
    except EntryNotFoundError:
        return None
