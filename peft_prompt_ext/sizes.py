"""Sizes of a base model that have several names in transformers: width, layers, heads, positions."""

from __future__ import annotations

from typing import Any

import torch

from .config import PromptTuningExtConfig


def token_dim(config: PromptTuningExtConfig, word_embeddings: torch.nn.Module) -> int:
    """Get the width H of the word embeddings; narrower than the hidden states in some models (ALBERT, ELECTRA).

    Raises:
        ValueError: See [`~peft_prompt_ext.encoder.PromptEmbedding`].
    """
    if getattr(word_embeddings, "num_embeddings", None) is None:
        raise ValueError(
            f"The base model's word embeddings are a {type(word_embeddings).__name__}. Prompt tuning needs a module "
            "like torch.nn.Embedding, with num_embeddings."
        )
    width = getattr(word_embeddings, "embedding_dim", None)  # a sharded weight has no shape
    width = int(word_embeddings.weight.shape[-1] if width is None else width)  # type: ignore[index]
    if config.token_dim and config.token_dim != width:
        raise ValueError(
            f"token_dim is {config.token_dim}; the base model's word embeddings are {width} wide. Leave token_dim "
            "out. A saved prompt of another width belongs to another base model."
        )
    return width


def fill_sizes(config: PromptTuningExtConfig, base_model: Any) -> None:
    """Fill in the sizes that PEFT requires, also where the base model's config has other names for them.

    Prompt tuning uses only the width, which comes from the word embeddings.

    Raises:
        ValueError: The base model has no vocabulary.
    """
    sizes = base_model.config.get_text_config()
    if getattr(sizes, "vocab_size", None) is None:
        raise ValueError(
            f"{type(base_model).__name__} has no vocabulary (its config has no vocab_size). Prompt tuning needs a "
            "transformers model with word embeddings."
        )
    config.token_dim = config.token_dim or 0
    for name, base_name in (("num_layers", "num_hidden_layers"), ("num_attention_heads", "num_attention_heads")):
        value = getattr(config, name) or _read_size(sizes, base_name)
        setattr(config, name, value if isinstance(value, int) else 1)


def _read_size(sizes: Any, name: str) -> Any:
    try:
        return getattr(sizes, name, None)
    except Exception:  # transformers raises its own errors if the size differs between layers
        return None


_TABLES = ("position_embeddings", "position_embedding", "embed_positions", "wpe")


def max_positions(base_model: Any) -> int | None:
    """Get the number of positions of the base model; None: no limit."""
    config = base_model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    # XLNet and DeBERTa v3 mark relative positions in this way
    if (limit is not None and limit <= 0) or getattr(config, "position_biased_input", True) is False:
        return None
    for name, module in base_model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return module.num_embeddings - module.padding_idx - 1  # RoBERTa counts from padding_idx + 1
        if limit is not None and name.rpartition(".")[2] in _TABLES and hasattr(module, "num_embeddings"):
            limit = min(limit, module.num_embeddings)  # a lookup past the end breaks the CUDA context
    return limit
