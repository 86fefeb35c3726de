"""SAMPLE_VOCAB: the embeddings of tokens drawn from the vocabulary."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import torch

from .base import InitContext, register_init
from .vocabulary import ids_by_frequency, is_text, word_ids


def _check(num_virtual_tokens: int, *, population: int | None, corpus: Iterable[str] | str | Path | None) -> None:
    if population is not None:
        if not isinstance(population, int) or isinstance(population, bool) or population < num_virtual_tokens:
            raise ValueError(
                f"SAMPLE_VOCAB: population ({population!r}) must be a whole number, at least num_virtual_tokens "
                f"({num_virtual_tokens}), because tokens are drawn without replacement."
            )
    elif corpus is not None:
        raise ValueError("SAMPLE_VOCAB: corpus is used only with population. Set population as well.")
    if corpus is not None and not isinstance(corpus, Iterable) and not isinstance(corpus, Path):
        raise ValueError(f"SAMPLE_VOCAB: corpus ({corpus!r}) must be texts or the path of a text file.")
    if isinstance(corpus, (str, Path)) and not Path(corpus).is_file():
        raise ValueError(f"SAMPLE_VOCAB: corpus ({str(corpus)!r}) is not a text file. Give a path or a list of texts.")


@register_init("SAMPLE_VOCAB", check=_check)
def sample_vocab(
    ctx: InitContext, *, population: int | None = None, corpus: Iterable[str] | str | Path | None = None
) -> torch.Tensor:
    """Draw P tokens without replacement and take their embeddings (Lester et al. 2021, section 3.2).

    Special, added, unused and padding tokens, and tokens without visible text, are not drawn.

    Args:
        ctx: The context.
        population: Draw from this number of most frequent tokens (5,000 in the paper); None: from all.
        corpus: Texts, or the path of a text file, in which frequencies are counted; required with `population` if the
            tokenizer's ids are not in order of frequency (WordPiece).

    Returns:
        [P, H], float32.

    Raises:
        ValueError: The vocabulary or `corpus` has fewer than `population` tokens, or fewer than P.
    """
    tokenizer = ctx.tokenizer
    if population is None:
        candidates = word_ids(ctx)
    else:
        ranked = (i for i in ids_by_frequency(ctx, corpus) if is_text(tokenizer, i))
        candidates = list(islice(ranked, population))
        if len(candidates) < population:
            source = "vocabulary" if corpus is None else "corpus"
            raise ValueError(
                f"SAMPLE_VOCAB: population ({population}) is too large: the {source} has {len(candidates)} different "
                "tokens with visible text. Lower population."
            )
    order = torch.randperm(len(candidates), generator=ctx.generator).tolist()
    drawn = (candidates[i] for i in order)
    ids = list(islice((i for i in drawn if is_text(tokenizer, i)), ctx.num_virtual_tokens))
    if len(ids) < ctx.num_virtual_tokens:
        raise ValueError(
            f"SAMPLE_VOCAB: num_virtual_tokens ({ctx.num_virtual_tokens}) is larger than the vocabulary: "
            f"{len(ids)} tokens can be drawn without replacement. Lower num_virtual_tokens."
        )
    ctx.record["slots"] = [{"token_ids": [i], "text": tokenizer.decode([i]) if tokenizer else None} for i in ids]
    return ctx.embed(ids)
