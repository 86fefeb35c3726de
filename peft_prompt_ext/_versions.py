"""The supported range of the libraries this package plugs into, and the check that is run at import."""

from __future__ import annotations

from importlib.metadata import version

from packaging.specifiers import SpecifierSet


# The seam rests on internals of PEFT and of transformers' Trainer, so their ranges are the ones the tests ran on.
# pyproject.toml states the same ranges; a test compares the two.
SUPPORTED = {"peft": ">=0.21,<0.22", "transformers": ">=5.23,<6", "torch": ">=2.13,<3"}


def check_versions(supported: dict[str, str] = SUPPORTED) -> None:
    """Compare the installed libraries with the supported ranges.

    Args:
        supported: Distribution name -> PEP 440 range.

    Raises:
        ImportError: A library is outside its range; the message names what is installed, the range, and the command.
    """
    for name, wanted in supported.items():
        found = version(name)
        # a local build tag (2.13.0+cpu) and pre-releases count as the release they are made for
        if not SpecifierSet(wanted).contains(found.split("+")[0], prereleases=True):
            raise ImportError(
                f"peft_prompt_ext supports {name}{wanted}, but {name} {found} is installed. "
                f"Run: pip install '{name}{wanted}'"
            )
