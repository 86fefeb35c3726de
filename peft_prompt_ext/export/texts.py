"""The texts that an export is proved on, and the random ones that its head is fitted on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .adapters import Prompt


if TYPE_CHECKING:
    from ..tasks.families import Family


OWN = (
    "a",
    "Yes.",
    "A warm and funny film.",
    "Two wasted hours, and the ending is worse than the beginning.",
    "The committee met on Tuesday; nothing was decided.",
    "my parcel never came, and nobody answers the phone",
    "3 + 4 = 7",
    "Why did the water boil over?",
    "It was not bad at all.",
    "Zürich, São Paulo and 東京 are cities.",
    "She said that he had left. He said that she had.",
    "THE PRICE IS $12.50 (TAX INCLUDED)",
    "No one in the audience laughed, except at the end.",
    "def add(a, b): return a + b",
    "Rain in the morning, sun in the afternoon, and snow on the hills above the town by night.",
    "Is the first sentence true if the second one is?",
)
LENGTH = 32  # text tokens of a random row
FIT_TOKENS, TOKENS_PER_SIZE = 2048, 8  # of the fit: at least so many, and so many for each hidden unit
TEST_TOKENS = 2048  # that the fit is tested on
BATCH = 8


def read_texts(path: str | Path) -> list[str]:
    """Read the lines of a file, empty ones left out.

    Raises:
        ValueError: It has none.
    """
    lines = [line for line in Path(path).read_text(encoding="utf-8").split("\n") if line.strip()]
    if not lines:
        raise ValueError(f"{path} has no texts: write one a line, or leave --texts out.")
    return lines


def fill(lines: Sequence[str], family: Family | None) -> list[str]:
    """Make of each line a text as a client sends it, the prompt left out.

    Args:
        lines: A line stands in every column of the task's template; a JSON object gives the columns. Without a task
            a line is the text itself.
        family: How the task is asked; None without a task.

    Raises:
        ValueError: An object lacks a column.
    """
    return [line if family is None else _fill_one(line, family) for line in lines]


def _fill_one(line: str, family: Family) -> str:
    task = family.task
    try:
        row = json.loads(line) if line.lstrip().startswith("{") else None
    except json.JSONDecodeError as error:
        raise ValueError(f"{line[:60]!r} begins as a JSON object and is none: {error}.") from error
    try:
        row = dict.fromkeys(task.columns, line) if row is None else task.prepared(row)
        return "".join(family.texts_of(row))
    except KeyError as error:
        raise ValueError(
            f"A row of {task.name} has the columns {', '.join(task.columns)}; {line[:60]!r} lacks {error}."
        ) from error


def random_batches(
    prompts: Sequence[Prompt], ids: dict[str, list[int]], words: int, tokens: int, seed: int
) -> list[torch.Tensor]:
    """Draw rows of random tokens, each prompt around as many of them as no prompt.

    Args:
        prompts: The prompts.
        ids: The ids of their tokens.
        words: Tokens to draw from: those below it.
        tokens: How many to draw.
        seed: Of the draw.

    Returns:
        Batches of ids [BATCH, T].
    """
    generator = torch.Generator().manual_seed(seed)
    kinds = [None, *prompts]
    batches = []
    for number in range(-(-tokens // (BATCH * LENGTH))):
        text = torch.randint(words, (BATCH, LENGTH), generator=generator)
        prompt = kinds[number % len(kinds)]
        if prompt is None:
            batches.append(text)
            continue
        soft = torch.tensor(ids[prompt.name]).expand(BATCH, -1)
        place = 0 if prompt.position == "prefix" else LENGTH // 2
        batches.append(torch.cat([text[:, :place], soft, text[:, place:]], dim=1))
    return batches


def check_lengths(config: Any, prompt: Prompt, rows: Sequence[Sequence[int]], more: int) -> None:
    """Raise ValueError if a text, its prompt and `more` tokens behind do not fit the model's positions."""
    room = getattr(config, "max_position_embeddings", None)
    longest = max(map(len, rows), default=0) + len(prompt.vectors) + more
    if room is not None and longest > room:
        raise ValueError(
            f"A text of {longest} tokens (the prompt {prompt.name!r} and {more} new ones included) was to be tried, "
            f"and the model has {room} positions: give shorter ones with --texts."
        )
