"""CLASS_LABELS: one slot per label, the mean of its token embeddings; a fallback scheme fills the other slots."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from .._choices import check_choice
from .base import InitContext, get_scheme, register_init


POSITIONS = ("first", "last")


def label_names(labels: Any) -> list[str]:
    """Convert an iterable or a `datasets.ClassLabel` to a list of texts.

    Raises:
        ValueError: `labels` is neither.
    """
    names = getattr(labels, "names", labels)
    if isinstance(names, str):
        raise ValueError(f"CLASS_LABELS: labels must be a list of texts, got one text ({names!r}).")
    if not isinstance(names, Iterable):
        raise ValueError(f"CLASS_LABELS: labels must be a list of texts, got {names!r}.")
    return list(names)


def _plain(kwargs: dict[str, Any]) -> dict[str, Any]:
    """A `datasets.ClassLabel`, or labels that can be read only once, as a list of texts."""
    return {**kwargs, "labels": label_names(kwargs["labels"])} if "labels" in kwargs else kwargs


def _check(
    num_virtual_tokens: int,
    *,
    labels: Any,
    position: str,
    fallback: str,
    fallback_kwargs: Mapping[str, Any] | None,
    **_: Any,
) -> None:
    names = label_names(labels)
    if not names:
        raise ValueError("CLASS_LABELS: labels is empty. Give one text per class, e.g. labels=['negative', ...].")
    bad = [name for name in names if not isinstance(name, str) or not name.strip()]
    if bad:
        raise ValueError(f"CLASS_LABELS: every label must be a text with words, got {bad[0]!r}.")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"CLASS_LABELS: labels has {twice[0]!r} more than once. Give each label once.")
    if len(names) > num_virtual_tokens:
        raise ValueError(
            f"CLASS_LABELS: {len(names)} labels need {len(names)} slots; num_virtual_tokens is {num_virtual_tokens}. "
            "Raise num_virtual_tokens or give fewer labels."
        )
    check_choice("CLASS_LABELS: position", position, POSITIONS)
    if not isinstance(fallback, str):
        raise ValueError(f"CLASS_LABELS: fallback ({fallback!r}) must be the name of a scheme.")
    if not isinstance(fallback_kwargs, (Mapping, type(None))):
        raise ValueError(f"CLASS_LABELS: fallback_kwargs ({fallback_kwargs!r}) must be a dict.")
    if fallback.upper() == "CLASS_LABELS":
        raise ValueError("CLASS_LABELS: fallback ('CLASS_LABELS') must be another scheme.")
    get_scheme(fallback).validate(fallback.upper(), num_virtual_tokens, fallback_kwargs or {})


def _check_text(text: str | None, *, fallback: str, fallback_kwargs: Mapping[str, Any] | None, **_: Any) -> None:
    get_scheme(fallback).validate_text(text, fallback_kwargs or {})


@register_init("CLASS_LABELS", check=_check, check_text=_check_text, plain=_plain)
def class_labels(
    ctx: InitContext,
    *,
    labels: Sequence[str],
    position: str = "first",
    repeat: bool = False,
    fallback: str = "SAMPLE_VOCAB",
    fallback_kwargs: Mapping[str, Any] | None = None,
) -> torch.Tensor:
    """Fill slot i with the mean of label i's token embeddings (Lester et al. 2021, section 3.2).

    Labels are tokenised as written. With a byte-level tokenizer, " positive" (inside a sentence) and "positive" are
    different tokens.

    Args:
        ctx: The context.
        labels: Texts of the classes, or a `datasets.ClassLabel`.
        position: Whether the labels take the "first" or the "last" slots.
        repeat: Whether the labels are repeated over the whole prompt; the last repetition may be incomplete.
        fallback: Scheme that fills the slots without a label (in the paper: sampled vocabulary).
        fallback_kwargs: Arguments of that scheme.

    Returns:
        [P, H], float32.

    Raises:
        ValueError: The vocabulary has no token for a label.
    """
    size, names = ctx.num_virtual_tokens, label_names(labels)
    ids = [_tokenize_label(ctx, name) for name in names]
    means = torch.stack([ctx.embed(i).double().mean(0).float() for i in ids])  # [labels, H]
    shift = 0 if position == "first" else -size  # the incomplete repetition is at the other end
    order = [(i + shift) % len(names) for i in range(size)] if repeat else list(range(len(names)))
    if len(order) < size:
        rows = ctx.run(fallback, fallback_kwargs)
    else:
        rows = torch.empty(size, ctx.token_dim)
    start = 0 if position == "first" else size - len(order)
    rows[start : start + len(order)] = means[order]
    slots = ctx.record.get("slots") or [{"fallback": fallback.upper()} for _ in range(size)]
    slots[start : start + len(order)] = [{"label": names[i], "token_ids": ids[i]} for i in order]
    ctx.record["slots"] = slots
    return rows


def _tokenize_label(ctx: InitContext, label: str) -> list[int]:
    ids = ctx.tokenize(label)
    unknown = ctx.require_tokenizer().unk_token_id
    if not ids or all(i == unknown for i in ids):
        raise ValueError(f"CLASS_LABELS: the vocabulary has no token for the label {label!r}. Give words that it has.")
    return ids
