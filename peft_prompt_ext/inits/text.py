"""TEXT: the token embeddings of PEFT's own field `prompt_tuning_init_text`."""

from __future__ import annotations

import warnings

import torch

from .._choices import check_choice
from .base import InitContext, register_init


FILLS = ("repeat", "sample_vocab")


def _check(num_virtual_tokens: int, *, fill: str) -> None:
    check_choice("TEXT: fill", fill, FILLS)


def _check_text(text: str | None, **_: object) -> None:
    if not (isinstance(text, str) and text.strip()):
        raise ValueError(
            f"prompt_tuning_init_text ({text!r}) must be a text with words when prompt_tuning_init is 'TEXT' or falls "
            "back to it."
        )


@register_init("TEXT", check=_check, check_text=_check_text)
def text(ctx: InitContext, *, fill: str = "repeat") -> torch.Tensor:
    """Initialise slot i with token i of `prompt_tuning_init_text`, without BOS or EOS.

    Args:
        ctx: The context.
        fill: How to fill the slots after a short text: "repeat" the text (as in PEFT) or "sample_vocab".

    Returns:
        [P, H], float32.

    Raises:
        ValueError: The text has no tokens.

    Warns:
        UserWarning: The text is longer than the prompt and was cut.
    """
    tokenizer, size = ctx.require_tokenizer(), ctx.num_virtual_tokens
    init_text = ctx.config.prompt_tuning_init_text or ""
    ids = ctx.tokenize(init_text)
    if not ids:
        raise ValueError(f"prompt_tuning_init_text ({init_text!r}) has no tokens. Give a text with words.")
    if len(ids) > size:
        warnings.warn(
            f"prompt_tuning_init_text has {len(ids)} tokens, more than num_virtual_tokens={size}; cut off: "
            f"{tokenizer.decode(ids[size:])!r}.",
            stacklevel=2,
        )
        ids = ids[:size]
    if fill == "repeat":
        ids = (ids * -(-size // len(ids)))[:size]
        rows = ctx.embed(ids)
    else:
        rows = ctx.run("SAMPLE_VOCAB") if len(ids) < size else torch.empty(size, ctx.token_dim)
        rows[: len(ids)] = ctx.embed(ids)
    filled = ctx.record.get("slots", [])[len(ids) :]
    ctx.record["slots"] = [{"token_ids": [i], "text": tokenizer.decode([i])} for i in ids] + filled
    return rows
