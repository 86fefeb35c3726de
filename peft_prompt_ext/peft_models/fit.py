"""The base model that a prompt was trained on, and whether a loaded prompt fits its base model."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, cast

import torch
from peft import PeftModel

from ..config import PromptTuningExtConfig
from ..inits.base import InitContext
from ..inits.fingerprint import check_saved, fingerprint
from ..quantization import new_modules


def is_covered(path: str, names: Sequence[str]) -> bool:
    """Whether `modules_to_save` includes a module or a parent of it; PEFT compares the ends of paths."""
    parts = path.split(".")
    return any(".".join(parts[: end + 1]).endswith(tuple(names)) for end in range(len(parts)))


def list_names(names: Sequence[str], most: int = 5) -> str:
    """Join the first names and count the others."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _make_context(model: PeftModel, adapter_name: str) -> InitContext:
    config: Any = model.peft_config[adapter_name]
    words: Any = model.word_embeddings
    return InitContext(config=config, word_embeddings=words, generator=torch.Generator())


def remember_base(model: PeftModel, adapter_name: str) -> None:
    """Store the fingerprint of the word embeddings in the prompt's config."""
    config = model.peft_config[adapter_name]
    if isinstance(config, PromptTuningExtConfig):
        config.base_fingerprint = fingerprint(_make_context(model, adapter_name), _model_type(model))


def check_base(model: PeftModel, adapter_name: str, source: str, saved: Any = None) -> None:
    """Warn if a loaded prompt was trained on another base model, or lacks weights for random modules.

    `saved` is the prompt's saved fingerprint, if it has one.
    """
    own, name = getattr(model.peft_config[adapter_name], "modules_to_save", None), f"The prompt of {source!r}"
    prompt = cast(Any, model.prompt_encoder)[adapter_name].embedding.weight.detach()
    check_saved(_make_context(model, adapter_name), prompt, saved, name, _model_type(model))
    missing = [path for path in new_modules(model.base_model, False) if not is_covered(path, own or [])]
    if missing:
        warnings.warn(
            f"{name} has no weights for {list_names(missing)}, and neither has the base model's checkpoint, so they "
            "are random. Train the prompt again, or load the base model that it was trained on.",
            stacklevel=2,
        )


def _model_type(model: PeftModel) -> str | None:
    return getattr(getattr(model.base_model, "config", None), "model_type", None)


def make_trainable(model: PeftModel, adapter_name: str) -> None:
    """Make a loaded prompt and its `modules_to_save` trainable: now if it is active, else in `set_adapter`."""
    model.peft_config[adapter_name].inference_mode = False
    remember_base(model, adapter_name)
    if adapter_name in model.active_adapters:
        model.set_adapter(adapter_name)  # also turns on the gradients of modules_to_save
