"""Trained prompts as they lie in adapter folders, checked before any weight of a base model is read.

Shapes: P virtual tokens, H hidden size of the word embeddings.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .._hub import find_file
from ..assets import resolve
from ..config import PromptTuningExtConfig
from ..saved_position import TENSORS


WEIGHTS = "adapter_model.safetensors"
_NAME = re.compile(r"[A-Za-z0-9_.-]+")


@dataclass(frozen=True)
class Prompt:
    """One trained prompt.

    Attributes:
        name: What a client calls it.
        folder: The adapter's folder, or its Hub id.
        position: "prefix" or "suffix".
        vectors: [P, H], as they were saved.
        base_model: Name or folder of its base model.
        revision: Commit of the base model on the Hub.
        settings: Settings of the run that trained it; None for an adapter that no run of this package trained.
    """

    name: str
    folder: str
    position: str
    vectors: torch.Tensor
    base_model: str
    revision: str | None
    settings: dict[str, Any] | None

    @property
    def tokens(self) -> list[str]:
        """The names of its P tokens."""
        return [f"<|prompt:{self.name}:{number}|>" for number in range(len(self.vectors))]

    @property
    def marker(self) -> str:
        """Its tokens as one string."""
        return "".join(self.tokens)

    def around(self, in_front: str, behind: str) -> tuple[str, str]:
        """What stands in front of a text and behind it: the marker outside of what is there."""
        return (self.marker + in_front, behind) if self.position == "prefix" else (in_front, behind + self.marker)


def read_prompts(adapters: Sequence[str], base_model: str | None = None) -> list[Prompt]:
    """Read the prompts of adapters, and check that one checkpoint can hold them.

    Args:
        adapters: Folders or Hub ids, or "NAME=FOLDER". By default a prompt has its task's name, else its folder's.
        base_model: The base model, in place of the one that each adapter names.

    Raises:
        ValueError: An adapter is none, is not prompt tuning for CAUSAL_LM, has other tensors than its prompt or a
            value that is no number, or was trained over fewer bits without `base_model`; two have one name, or two
            base models.
    """
    if not adapters:
        raise ValueError("An export needs at least one adapter; got none. Give the folders of trained prompts.")
    prompts = [_read(adapter, base_model) for adapter in adapters]
    first = prompts[0]
    for number, prompt in enumerate(prompts):
        for other in prompts[:number]:
            if other.name == prompt.name:
                raise ValueError(
                    f"{other.folder} and {prompt.folder} are both called {prompt.name!r}, and a client chooses by "
                    f"name. Name one of them: {prompt.name}-2={prompt.folder}"
                )
        if (prompt.base_model, prompt.revision) != (first.base_model, first.revision):
            raise ValueError(
                f"One checkpoint has one base model, but {first.folder} was trained on {_base_of(first)} and "
                f"{prompt.folder} on {_base_of(prompt)}. Export them apart, or give --base_model if they are the same."
            )
    return prompts


def _base_of(prompt: Prompt) -> str:
    return f"{prompt.base_model!r}{f' at {prompt.revision}' if prompt.revision else ''}"


def _read(adapter: str, base_model: str | None) -> Prompt:
    given, _, folder = adapter.rpartition("=")
    if Path(adapter).exists():  # a folder whose name has the sign
        given, folder = "", adapter
    config, settings = _read_config(folder), _read_json(folder, "recipe.json")
    name = given or (settings or {}).get("task", {}).get("name") or Path(folder).resolve().name
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"{name!r} names the tokens of {folder}, so it has letters, digits, '_', '-' and '.' alone. "
            f"Name it: short-name={folder}"
        )
    base, revision = config.base_model_name_or_path, config.revision
    if settings is not None:
        base, revision = settings["model_name_or_path"], settings["model_revision"]
        _check_bits(folder, settings, base_model)
    if base_model is not None:
        base, revision = base_model, None
    if not base:
        raise ValueError(f"{folder} does not say which base model it was trained on: give --base_model.")
    base = resolve(base)
    if Path(base).is_dir():  # one folder has several paths, and no commits
        base, revision = str(Path(base).resolve()), None
    return Prompt(
        name=name,
        folder=folder,
        position=config.prompt_position,
        vectors=_read_vectors(folder, config),
        base_model=base,
        revision=None if revision == "main" else revision,
        settings=settings,
    )


def _read_config(folder: str) -> PromptTuningExtConfig:
    from huggingface_hub.errors import HFValidationError

    try:
        saved = _read_json(folder, "adapter_config.json")
    except (OSError, HFValidationError) as error:
        raise ValueError(
            f"{folder} is no folder, and the Hub has no such adapter, or is not reached: {error}"
        ) from error
    if saved is None:
        raise ValueError(f"{folder} holds no adapter_config.json: give the folder of a trained prompt.")
    kind = saved.get("peft_type")
    if kind != "PROMPT_TUNING":
        raise ValueError(
            f"{folder} is a {kind} adapter, and only prompt tuning (PROMPT_TUNING) is vectors that can become tokens. "
            "merge_and_unload() of PEFT makes a plain checkpoint of a LoRA."
        )
    config = PromptTuningExtConfig.from_pretrained(folder)
    task_type = str(getattr(config.task_type, "value", config.task_type))
    if task_type != "CAUSAL_LM":
        raise ValueError(
            f"{folder} was trained for {task_type}, and an exported prompt answers in tokens: train it with "
            "--task_type CAUSAL_LM."
        )
    return config


def _check_bits(folder: str, settings: dict[str, Any], base_model: str | None) -> None:
    if settings.get("quantization") and base_model is None:
        raise ValueError(
            f"{folder} was trained over {settings['quantization']} weights, and a checkpoint holds full ones, with "
            f"which it answers a little differently. If that is wanted, say so: --base_model "
            f"{settings['model_name_or_path']}"
        )


def _read_vectors(folder: str, config: PromptTuningExtConfig) -> torch.Tensor:
    """Read the vectors [P, H] of an adapter."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = find_file(folder, WEIGHTS)
    if path is None:
        raise ValueError(f"{folder} holds no {WEIGHTS}: save the adapter with PEFT's save_pretrained.")
    try:
        tensors, wanted = load_file(path), TENSORS[config.prompt_position]
    except SafetensorError as error:
        raise ValueError(f"{path} is no whole safetensors file ({error}): save the adapter again.") from error
    if set(tensors) != {wanted}:
        raise ValueError(
            f"{path} holds {', '.join(sorted(tensors)) or 'nothing'}; wanted {wanted} alone. A prompt that was "
            "trained together with other weights cannot become tokens."
        )
    vectors = tensors[wanted]
    if vectors.dim() != 2 or len(vectors) != config.num_virtual_tokens:
        raise ValueError(
            f"{path} has vectors of shape {list(vectors.shape)}; wanted {config.num_virtual_tokens} of them, as "
            "adapter_config.json says. Save the adapter again."
        )
    wrong = (~torch.isfinite(vectors)).any(1).nonzero()[:, 0].tolist()
    if wrong:
        raise ValueError(
            f"{path} has NaN or infinite values in the virtual tokens {wrong}: the training failed. Train it again, "
            "with a lower learning rate."
        )
    return vectors


def _read_json(folder: str, name: str) -> dict[str, Any] | None:
    path = find_file(folder, name)
    return None if path is None else json.loads(path.read_text(encoding="utf-8"))
