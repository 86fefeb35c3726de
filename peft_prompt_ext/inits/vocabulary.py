"""The words among the rows of an embedding table, and their order of frequency."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from .base import InitContext


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# Reserved tokens (BERT, Gemma, T5, Llama 3, XGLM) and single bytes (SentencePiece byte fallback).
_UNUSED = re.compile(
    r"\[unused\d+\]|<unused\d+>|▁?<extra_id_\d+>|<\|reserved_special_token_\d+\|>|<?madeupword\d+>?|<0x[0-9A-Fa-f]{2}>"
)


def word_ids(ctx: InitContext) -> list[int]:
    """List the ids of words: no special, added, reserved or padding tokens.

    Without a tokenizer special rows are not known: warns, and excludes the padding row alone.

    Returns:
        Ids in ascending order.
    """
    tokenizer = ctx.tokenizer
    if tokenizer is None:
        warnings.warn(
            f"No tokenizer for the base model ({ctx.config.base_model_name_or_path!r}): tokens are sampled from all "
            f"{ctx.num_embeddings} embedding rows, special tokens included. Set tokenizer_name_or_path.",
            stacklevel=2,
        )
        padding = getattr(ctx.word_embeddings, "padding_idx", None)
        return [i for i in range(ctx.num_embeddings) if i != padding]
    not_words = {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}
    return sorted(i for t, i in tokenizer.get_vocab().items() if i not in not_words and not _UNUSED.fullmatch(t))


def is_text(tokenizer: PreTrainedTokenizerBase | None, token_id: int) -> bool:
    """Whether a token has visible text: more than white space or a part of a UTF-8 character."""
    if tokenizer is None:
        return True
    text = str(tokenizer.decode([token_id])).strip()
    return bool(text) and "\ufffd" not in text and text.isprintable()


def ids_by_frequency(ctx: InitContext, corpus: Iterable[str] | str | Path | None) -> list[int]:
    """List the ids of words, the most frequent first.

    Args:
        ctx: The context.
        corpus: Texts, or the path of a text file, in which ids are counted; only ids that occur are listed. None: the
            order of ids, if the tokenizer's vocabulary is in order of frequency.

    Raises:
        ValueError: There is no tokenizer, or no corpus and the tokenizer's ids are not in order of frequency.
    """
    tokenizer = ctx.require_tokenizer()
    words = word_ids(ctx)
    if corpus is None:
        if not _is_ordered_by_frequency(tokenizer):
            raise ValueError(
                f"SAMPLE_VOCAB: population needs `corpus` with this tokenizer ({type(tokenizer).__name__}): its ids "
                "are not in order of frequency. Give corpus=texts or the path of a text file."
            )
        return words
    counts: Counter[int] = Counter()
    try:
        for batch in _batches(corpus):
            for ids in tokenizer(batch, add_special_tokens=False)["input_ids"]:
                counts.update(ids)
    except (TypeError, UnicodeDecodeError) as error:
        raise ValueError(f"SAMPLE_VOCAB: corpus must be texts, or a text file in UTF-8: {error}") from error
    allowed = set(words)
    # ties in order of id, so that the order of the corpus does not matter
    return [i for i, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0])) if i in allowed]


def _is_ordered_by_frequency(tokenizer: PreTrainedTokenizerBase) -> bool:
    # BPE ids are in the order of merges, Unigram (SentencePiece) ids in the order of likelihood
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return type(getattr(backend, "model", None)).__name__ in {"BPE", "Unigram"}


def _batches(corpus: Iterable[str] | str | Path, size: int = 1000) -> Iterable[list[str]]:
    if isinstance(corpus, (str, Path)):
        with Path(corpus).open(encoding="utf-8") as lines:
            yield from _batches(line.rstrip("\n") for line in lines)
        return
    batch: list[str] = []
    for text in corpus:
        batch.append(text)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
