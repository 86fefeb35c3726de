"""ENDING: the tokens of a question's last words in the last slots; a fallback scheme fills the slots before them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from .base import InitContext, get_scheme, register_init


def _plain(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The fallback's arguments as its own scheme turns them into plain values."""
    fallback, given = kwargs.get("fallback"), kwargs.get("fallback_kwargs")
    if not isinstance(fallback, str) or not isinstance(given, Mapping):
        return kwargs
    return {**kwargs, "fallback_kwargs": get_scheme(fallback).to_plain(dict(given))}


def _check(
    num_virtual_tokens: int, *, ending: str, fallback: str, fallback_kwargs: Mapping[str, Any] | None, **_: Any
) -> None:
    if not isinstance(ending, str) or not ending:
        raise ValueError(f"ENDING: ending ({ending!r}) must be a text, such as '\\nSentiment:'.")
    if not isinstance(fallback, str):
        raise ValueError(f"ENDING: fallback ({fallback!r}) must be the name of a scheme.")
    if not isinstance(fallback_kwargs, (Mapping, type(None))):
        raise ValueError(f"ENDING: fallback_kwargs ({fallback_kwargs!r}) must be a dict.")
    if fallback.upper() == "ENDING":
        raise ValueError("ENDING: fallback ('ENDING') must be another scheme.")
    get_scheme(fallback).validate(fallback.upper(), num_virtual_tokens, fallback_kwargs or {})


def _check_text(text: str | None, *, fallback: str, fallback_kwargs: Mapping[str, Any] | None, **_: Any) -> None:
    get_scheme(fallback).validate_text(text, fallback_kwargs or {})


@register_init("ENDING", check=_check, check_text=_check_text, plain=_plain)
def ending(
    ctx: InitContext,
    *,
    ending: str,
    fallback: str = "SAMPLE_VOCAB",
    fallback_kwargs: Mapping[str, Any] | None = None,
) -> torch.Tensor:
    """Fill the last slots with the tokens of `ending`, for a prompt that stands between a text and its answer.

    The text is tokenised as written, without special tokens.

    Args:
        ctx: The context.
        ending: What a question says behind its text, such as " Sentiment:".
        fallback: Scheme that fills the other slots, as if they were the whole prompt.
        fallback_kwargs: Arguments of that scheme.

    Returns:
        [P, H], float32.

    Raises:
        ValueError: The ending has no tokens or more than P, or the other slots are too few for the fallback.
    """
    ids = ctx.tokenize(ending)
    room = ctx.num_virtual_tokens - len(ids)
    if not ids:
        raise ValueError(f"ENDING: ending ({ending!r}) has no tokens. Give a text that the tokenizer knows.")
    if room < 0:
        raise ValueError(
            f"ENDING: ending ({ending!r}) has {len(ids)} tokens; num_virtual_tokens is {ctx.num_virtual_tokens}. "
            f"Raise num_virtual_tokens to {len(ids)} or more."
        )
    rows = ctx.embed(ids)
    if room:
        rows = torch.cat([_fill(ctx, room, fallback, fallback_kwargs or {}), rows])
    tokenizer = ctx.require_tokenizer()
    filled = ctx.record.get("slots") or [{"fallback": fallback.upper()} for _ in range(room)]
    ctx.record["slots"] = filled + [{"token_ids": [i], "text": tokenizer.decode([i])} for i in ids]
    return rows


def _fill(ctx: InitContext, room: int, fallback: str, kwargs: Mapping[str, Any]) -> torch.Tensor:
    """Run the fallback for a prompt of `room` tokens, [room, H]."""
    get_scheme(fallback).validate(fallback.upper(), room, kwargs)
    config = copy.copy(ctx.config)
    config.num_virtual_tokens = room
    return replace(ctx, config=config).run(fallback, kwargs)
