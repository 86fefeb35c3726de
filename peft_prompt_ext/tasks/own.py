"""A task made of a user's own file."""

from __future__ import annotations

from collections.abc import Sequence
from string import Formatter

from .files import read_file
from .task import Task


MOST_LABELS = 50


def own_task(
    train_file: str,
    text_columns: Sequence[str],
    label_column: str,
    label_words: Sequence[str] = (),
    template: str | None = None,
) -> Task:
    """Make a task of a user's own file.

    Args:
        train_file: A CSV, JSON or JSONL file; its labels are the task's.
        text_columns: Columns of the text, in the order in which they are asked.
        label_column: Column of the label.
        label_words: "LABEL=WORD" for each label; by default a label is its own word.
        template: Question to a language model, with columns in braces.

    Returns:
        The task; its labels are texts, numbers too, and its main metric is the accuracy.

    Raises:
        ValueError: A column is missing, a label has no word or is not one, or there are too many labels.
    """
    rows = read_file(train_file, as_texts=True)
    missing = [column for column in (*text_columns, label_column) if column not in rows.column_names]
    if missing or not text_columns:
        raise ValueError(
            f"{train_file} has the columns {', '.join(rows.column_names)}; "
            f"{'there is no ' + ', '.join(map(repr, missing)) if missing else 'which of them are text?'} "
            "Set --text_columns and --label_column."
        )
    labels = sorted({str(label) for label in rows[label_column] if label is not None})
    if not 2 <= len(labels) <= MOST_LABELS:
        raise ValueError(
            f"The column {label_column!r} of {train_file} has {len(labels)} different values; from 2 to "
            f"{MOST_LABELS} classes are wanted. Is it the label column?"
        )
    _check_names(text_columns, template)
    words = _label_words(labels, label_words)
    lines = [f"{column.replace('_', ' ').capitalize()}: {{{column}}}" for column in text_columns]
    heads = tuple(f"{{{column}}}" for column in text_columns)
    return Task(
        name="own_data",
        template=template or "\n".join([*lines, f"{label_column.replace('_', ' ').capitalize()}:"]),
        texts=heads if len(heads) <= 2 else (heads[0], " ".join(heads[1:])),
        label_column=label_column,
        labels=tuple(labels),
        label_words=words,
        label_names=tuple(labels),
    )


def _check_names(text_columns: Sequence[str], template: str | None) -> None:
    """A template names columns in braces, where some characters mean something else."""
    odd = [column for column in text_columns if set(column) & set(".[]{}!:") or column.isdigit()]
    if odd:
        raise ValueError(f"The column {odd[0]!r} cannot stand in a template: rename it, to letters and _.")
    try:
        asked = [name for _, name, _, _ in Formatter().parse(template or "") if name is not None]
    except ValueError as error:
        raise ValueError(f"--template {template!r}: {error}; columns stand in braces, such as {{text}}.") from None
    unknown = [name for name in asked if name not in text_columns]
    if unknown:
        raise ValueError(f"--template asks for {{{unknown[0]}}}; --text_columns has {', '.join(text_columns)}.")


def _label_words(labels: list[str], given: Sequence[str]) -> tuple[str, ...]:
    words: dict[str, str] = {}
    for pair in given:
        label, separator, word = pair.strip().partition("=")
        if not separator or label not in labels:
            raise ValueError(f"label_words are LABEL=WORD with a label out of {', '.join(labels)}; got {pair!r}.")
        words[label] = word
    result = [words.get(label, label) for label in labels]
    for label, word in zip(labels, result, strict=True):
        if not any(character.isalpha() for character in word):
            raise ValueError(
                f"The label {label!r} needs a word that a language model can say: --label_words {label}=WORD ..."
            )
    return tuple(f" {word.strip()}" for word in result)
