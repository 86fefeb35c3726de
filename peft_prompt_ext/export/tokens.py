"""The tokenizer of an exported checkpoint: the prompts' tokens, and the strings that stand around a text.

PEFT's order is `[prompt][BOS][text]`. A tokenizer that adds BOS by itself would give `[BOS][prompt][text]`, so the
exported one adds nothing by itself, and what it used to add is part of the strings.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from .adapters import Prompt


CHAT_VARIABLE = "soft_prompt"


@dataclass(frozen=True)
class Added:
    """What a tokenizer adds to a text by itself, as strings."""

    in_front: str = ""
    behind: str = ""


def check_markers(tokenizer: Any, prompts: Iterable[Prompt]) -> None:
    """Raise ValueError if a prompt's token is in the tokenizer already."""
    known = tokenizer.get_vocab()
    for prompt in prompts:
        taken = [token for token in prompt.tokens if token in known]
        if taken:
            raise ValueError(
                f"{taken[0]!r} of the prompt {prompt.name!r} is a token of {tokenizer.name_or_path} already: name the "
                f"prompt otherwise, another-name={prompt.folder}, or export onto the checkpoint without it."
            )


def added_by(tokenizer: Any) -> Added:
    """Find what a tokenizer adds to a text by itself.

    Raises:
        ValueError: It changes the text's own tokens as well.
    """
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            in_front, behind = whole[:start], whole[start + len(plain) :]
            return Added(*("".join(tokenizer.convert_ids_to_tokens(ids)) for ids in (in_front, behind)))
    raise ValueError(
        f"{tokenizer.name_or_path} encodes 'a' as {whole}, and as {plain} without special tokens: what it adds to a "
        "text cannot be told from the text. Export onto a checkpoint whose tokenizer adds tokens at the ends alone."
    )


def add_prompts(tokenizer: Any, prompts: Sequence[Prompt]) -> dict[str, list[int]]:
    """Add the prompts' tokens to a tokenizer, and let it add nothing to a text by itself.

    Returns:
        The ids of each prompt's tokens, by its name.

    Raises:
        ValueError: It still adds something.
    """
    from tokenizers import AddedToken

    for prompt in prompts:
        tokens = [AddedToken(token, special=True, normalized=False) for token in prompt.tokens]
        tokenizer.add_tokens(tokens, special_tokens=True)
    if added_by(tokenizer) != Added():
        _add_nothing(tokenizer)
    if (rest := added_by(tokenizer)) != Added():
        raise ValueError(
            f"{tokenizer.name_or_path} ({type(tokenizer).__name__}) adds {rest.in_front + rest.behind!r} to every "
            "text and cannot be told not to, so a prompt would not stand where it was trained. Export onto a "
            "checkpoint with a fast tokenizer (tokenizer.json)."
        )
    return {prompt.name: tokenizer.convert_tokens_to_ids(prompt.tokens) for prompt in prompts}


def _add_nothing(tokenizer: Any) -> None:
    from tokenizers.processors import TemplateProcessing

    for flag in ("add_bos_token", "add_eos_token"):  # a tokenizer that has them builds its post-processor from them
        if getattr(tokenizer, flag, False):
            setattr(tokenizer, flag, False)
    if added_by(tokenizer) != Added() and getattr(tokenizer, "backend_tokenizer", None) is not None:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A", pair="$A $B:1")


def add_to_chat(tokenizer: Any, prompts: Sequence[Prompt]) -> bool:
    """Let the chat template put a prompt around the whole chat, by its name in `soft_prompt`.

    Returns:
        Whether the tokenizer has one chat template; without one, or with several, nothing is changed.
    """
    template = tokenizer.chat_template
    if not isinstance(template, str):
        return False
    around = {prompt.name: prompt.around("", "") for prompt in prompts}
    names = ", ".join(around)
    in_front, behind = (json.dumps({name: pair[side] for name, pair in around.items()}) for side in (0, 1))
    tokenizer.chat_template = (
        f"{{%- if {CHAT_VARIABLE} is defined and {CHAT_VARIABLE} not in {in_front} -%}}"
        f"{{{{- raise_exception('{CHAT_VARIABLE} is one of: {names}') -}}}}{{%- endif -%}}"
        f"{{{{- {in_front}[{CHAT_VARIABLE}] if {CHAT_VARIABLE} is defined else '' -}}}}"
        f"{template}"
        f"{{{{- {behind}[{CHAT_VARIABLE}] if {CHAT_VARIABLE} is defined else '' }}}}"
    )
    return True
