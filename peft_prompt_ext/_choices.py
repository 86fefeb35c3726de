"""One out of a list of names: the check, and the hint at the nearest name in its error."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def check_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """Raise `ValueError` unless `value` is one of `choices`; suggests the nearest."""
    choices = list(choices)
    if value not in choices:
        wanted = ", ".join(map(repr, choices))
        raise ValueError(f"{name} ({value!r}) must be one of {wanted}{nearest(str(value), choices)}.")


def nearest(value: str, choices: Iterable[str]) -> str:
    """` (did you mean 'x'?)`, or nothing if no choice is near."""
    close = difflib.get_close_matches(value, list(choices), n=1, cutoff=0.4)
    return f" (did you mean {close[0]!r}?)" if close else ""
