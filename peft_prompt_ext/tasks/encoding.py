"""A row's texts as tokens that fit the model: where to cut, and what an answer is in tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from string import Formatter
from typing import TYPE_CHECKING, Any

from .task import Task


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def fit(
    task: Task,
    row: Mapping[str, Any],
    encode: Callable[[Mapping[str, Any]], Any],
    tokenizer: PreTrainedTokenizerBase,
    limit: int,
) -> tuple[Any, bool]:
    """Encode a row, cutting the ends of its longest columns until it fits.

    Args:
        task: Says which columns may be cut.
        row: A prepared row.
        encode: Gives what the tokenizer gives for a row, all its texts together.
        tokenizer: The tokenizer that `encode` uses.
        limit: Most tokens.

    Returns:
        What `encode` gave, and whether something was cut.

    Raises:
        ValueError: The rest is still too long.
    """
    encoded = encode(row)
    if len(encoded["input_ids"]) <= limit:
        return encoded, False
    row = dict(row)
    tokens = {name: _tokens(tokenizer, str(row[name])) for name in task.truncate or task.columns if row.get(name)}
    while (excess := len(encoded["input_ids"]) - limit) > 0:
        lengths = {name: len(ids) for name, ids in tokens.items()}
        longest = max(lengths, key=lengths.__getitem__, default=None)
        if longest is None or not lengths[longest]:
            raise ValueError(
                f"A row of {task.name} is {excess} tokens longer than the limit of {limit} with "
                f"{', '.join(lengths) or 'no column'} cut to nothing. Raise --max_seq_length."
            )
        second = max((length for name, length in lengths.items() if name != longest), default=0)
        cut = min(excess, max(lengths[longest] - second, 1))  # down to the next column's length, then in turns
        tokens[longest] = tokens[longest][: lengths[longest] - cut]
        row[longest] = tokenizer.decode(tokens[longest], skip_special_tokens=True)
        encoded = encode(row)
    return encoded, True


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def split_template(template: str) -> tuple[str, str]:
    """Split a template behind its last column.

    Returns:
        The template up to there, with its columns in braces, and the words behind, as a reader sees them.
    """
    ending = ""
    for words, column, _, _ in Formatter().parse(template):
        # the words stand in front of the column
        ending = "" if column is not None else ending + words
    written = ending.replace("{", "{{").replace("}", "}}")
    return template[: len(template) - len(written)], ending


def answer_ids(tokenizer: PreTrainedTokenizerBase, template: str, choices: Sequence[str]) -> list[list[int]]:
    """Token ids of each answer as it stands behind the template's last words.

    Args:
        tokenizer: The tokenizer.
        template: The question; what follows its last column decides how an answer is split.
        choices: The answers.

    Returns:
        The ids. If one answer's tokens open another one's, all of them end with the end of the text, so that the
        short one does not win by its length.

    Raises:
        ValueError: An answer has no tokens, two have the same ones, or one opens another and the tokenizer has no
            end of the text.
    """
    ids = [_behind(tokenizer, split_template(template)[1], choice) for choice in choices]
    for i, choice in enumerate(choices):
        if not ids[i] or all(token == tokenizer.unk_token_id for token in ids[i]):
            raise ValueError(f"The answer {choice!r} has no tokens that the tokenizer knows: choose another word.")
        if ids.index(ids[i]) != i:
            raise ValueError(
                f"The answers {choices[ids.index(ids[i])]!r} and {choice!r} have the same tokens {ids[i]}."
            )
    opens = any(a != b and b[: len(a)] == a for a in ids for b in ids)
    if not opens:
        return ids
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"An answer out of {', '.join(map(repr, choices))} opens another one, and the tokenizer has no end of "
            "the text to tell them apart: choose other words."
        )
    return [[*one, tokenizer.eos_token_id] for one in ids]


def _behind(tokenizer: PreTrainedTokenizerBase, tail: str, choice: str) -> list[int]:
    before, both = _tokens(tokenizer, tail), _tokens(tokenizer, tail + choice)
    if both[: len(before)] == before:
        return both[len(before) :]
    return _tokens(tokenizer, choice)  # the tokenizer joins the two; the answer stands for itself then


def pad(rows: Sequence[Sequence[int]], value: int) -> Any:
    """Rows of different lengths as one tensor [B, T], the padding behind."""
    import torch

    width = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows])
