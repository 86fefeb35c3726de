"""The supported range of the libraries this package plugs into, the check at import, and what differs inside it."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from packaging.version import Version


# From this version, up to and without that one: `make test-oldest` and `make test-newest` run the tests on both ends.
# pyproject.toml states the same ranges, and a test compares the two.
SUPPORTED = {"peft": ("0.20", "0.22"), "transformers": ("5.17", "6"), "torch": ("2.11", "3")}


def check_versions(supported: dict[str, tuple[str, str]] = SUPPORTED) -> None:
    """Compare the installed libraries with the supported ranges.

    Args:
        supported: Distribution name -> (first version that works, first version that does not).

    Raises:
        ImportError: Libraries are outside their ranges; the message names what is installed, what is wanted, and the
            command.
    """
    found, wanted = [], []
    for name, (first, end) in supported.items():
        installed = version(name)
        # the release alone: a local build (2.13.0+cpu) or a development version counts as the release it is made for
        if not Version(first) <= Version(Version(installed).base_version) < Version(end):
            found.append(f"{name} {installed}")
            wanted.append(f"{name}>={first},<{end}")
    if found:
        raise ImportError(
            f"peft_prompt_ext supports {' and '.join(wanted)}, but {' and '.join(found)} is installed. "
            f"Run: pip install {' '.join(repr(each) for each in wanted)}"
        )


def checkpoint_activations(model: Any, use_reentrant: bool = False) -> None:
    """Turn a transformers model's gradient checkpointing on.

    Args:
        model: A transformers model, or a PEFT model of one.
        use_reentrant: Which of torch's two ways of checkpointing.
    """
    # transformers has renamed the method: the new name is not there in 5.17, the old one warns in 5.23
    name = "activation_checkpointing_enable"
    enable = getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")
    enable({"use_reentrant": use_reentrant})
