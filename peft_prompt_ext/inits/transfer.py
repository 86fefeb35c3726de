"""TRANSFER: start from the prompt of another task (SPoT, Vu et al. 2022), or from a weighted mean of several."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from .._choices import check_choice
from .._hub import find_file
from ..prompt_record import FILE_NAME, parse
from ..saved_position import TENSORS
from .base import InitContext, register_init
from .fingerprint import check_saved


LENGTH_POLICIES = ("strict", "truncate_pad", "interpolate")


def _check(
    num_virtual_tokens: int, *, source: Any, weights: Sequence[float] | None, length_policy: str, **_: Any
) -> None:
    sources = _as_list(source)
    if not sources or not all(isinstance(s, (str, Path)) and str(s) for s in sources):
        raise ValueError(f"TRANSFER: source ({source!r}) must be a folder or Hub id, or a list of them.")
    check_choice("TRANSFER: length_policy", length_policy, LENGTH_POLICIES)
    if weights is not None and not _are_weights(weights, len(sources)):
        raise ValueError(
            f"TRANSFER: weights ({weights!r}) must be one number >= 0 for each of the {len(sources)} sources, "
            "with a sum above 0."
        )
    for path in sources:
        if Path(path).is_dir():
            _read_config(str(path))


@register_init("TRANSFER", check=_check)
def transfer(
    ctx: InitContext,
    *,
    source: str | Path | Sequence[str | Path],
    weights: Sequence[float] | None = None,
    length_policy: str = "strict",
    check_base_model: bool = True,
) -> torch.Tensor:
    """Take the prompt of an adapter saved by this plugin or by stock PEFT.

    Args:
        ctx: The context.
        source: Folder or Hub id of a prompt-tuning adapter, or a list of these; several are averaged.
        weights: Weight of each source in the mean, normalised to the sum 1. None: equal weights.
        length_policy: How to fit a source of another length: "strict" raises, "truncate_pad" takes the first P rows
            and fills missing ones with SAMPLE_VOCAB, "interpolate" interpolates linearly along the tokens.
        check_base_model: Raise if the source's base model has another name. Set it to False for two names of one
            model.

    Returns:
        [P, H], float32.

    Raises:
        ValueError: A source is missing, is no prompt-tuning adapter, has another hidden size, base model or length,
            is not finite, or is not in safetensors (pickles are not read).
    """
    prompts = [_load_prompt(ctx, str(path), check_base_model) for path in _as_list(source)]
    fitted = torch.stack([_fit(ctx, prompt, length_policy) for prompt in prompts])  # [sources, P, H]
    share = torch.tensor(weights if weights is not None else [1.0] * len(prompts), dtype=torch.float64)
    share = share / share.sum()
    ctx.record["sources"] = [
        {"source": str(path), "weight": weight, "num_virtual_tokens": len(prompt)}
        for path, weight, prompt in zip(_as_list(source), share.tolist(), prompts, strict=True)
    ]
    ctx.record.pop("slots", None)  # words that were drawn to pad a source mean little in an average
    return (fitted.double() * share[:, None, None]).sum(0).float()


def _as_list(source: Any) -> list[Any]:
    return list(source) if isinstance(source, (list, tuple)) else [source]


def _are_weights(weights: Any, count: int) -> bool:
    if not isinstance(weights, (list, tuple)) or len(weights) != count:
        return False
    numbers = all(isinstance(w, (int, float)) and math.isfinite(w) and w >= 0 for w in weights)
    return numbers and sum(weights) > 0


def _find(source: str, file_name: str) -> Path | None:
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return find_file(source, file_name)
    except LocalEntryNotFoundError as error:
        raise ValueError(
            f"TRANSFER: source ({source!r}) is no folder, and the Hub was not reached: {error}"
        ) from error
    except Exception as error:  # the Hub's client raises many types
        raise ValueError(f"TRANSFER: source ({source!r}) is neither a folder nor on the Hub: {error}") from error


def _read_config(source: str) -> dict[str, Any]:
    path = _find(source, "adapter_config.json")
    if path is None:
        raise ValueError(f"TRANSFER: source ({source!r}) has no adapter_config.json. Give the folder of an adapter.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"TRANSFER: source ({source!r}): {path.name} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"TRANSFER: source ({source!r}): {path.name} is a {type(config).__name__}, not a config.")
    if config.get("peft_type") != "PROMPT_TUNING":
        raise ValueError(
            f"TRANSFER: source ({source!r}) is a {config.get('peft_type')} adapter; only PROMPT_TUNING has a prompt."
        )
    return config


def _load_prompt(ctx: InitContext, source: str, check_base_model: bool) -> torch.Tensor:
    """Read and check one source. Returns its prompt [P of the source, H], float32."""
    config = _read_config(source)
    _check_base_model(ctx, source, config, check_base_model)
    path = _find(source, "adapter_model.safetensors")
    if path is None:
        raise ValueError(
            f"TRANSFER: source ({source!r}) has no adapter_model.safetensors. Other formats are not read, because a "
            "pickle can run code. Load the adapter in PEFT and save it again."
        )
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"TRANSFER: {str(path)!r} is not a valid safetensors file: {error}") from error
    # the vectors of a prefix can start a suffix, and the other way round
    prompt = next((tensors[name] for name in TENSORS.values() if name in tensors), None)
    if prompt is None or prompt.ndim != 2:
        raise ValueError(f"TRANSFER: source ({source!r}) has no `prompt_embeddings` of shape [P, H].")
    if prompt.shape[1] != ctx.token_dim:
        raise ValueError(
            f"TRANSFER: source ({source!r}, base model {config.get('base_model_name_or_path')!r}) has hidden size "
            f"{prompt.shape[1]}; the base model ({ctx.config.base_model_name_or_path!r}) has {ctx.token_dim}."
        )
    # stock PEFT saves two prompts for an encoder-decoder and reads only the first
    prompt = prompt[: config["num_virtual_tokens"]].float()
    if not torch.isfinite(prompt).all():
        raise ValueError(f"TRANSFER: the prompt of source ({source!r}) has NaN or infinite numbers.")
    check_saved(ctx, prompt, _read_fingerprint(source), f"TRANSFER: source ({source!r})")
    return prompt


def _read_fingerprint(source: str) -> Any:
    """The base model's fingerprint in the source's record; None if there is no record, or a broken one."""
    path = _find(source, FILE_NAME)
    return ((parse(path) if path else None) or {}).get("base_model")


def _check_base_model(ctx: InitContext, source: str, config: dict[str, Any], is_wanted: bool) -> None:
    theirs, ours = config.get("base_model_name_or_path"), ctx.config.base_model_name_or_path
    # a Hub id and its local copy end in the same name
    if is_wanted and theirs and ours and Path(theirs).name.lower() != Path(ours).name.lower():
        raise ValueError(
            f"TRANSFER: source ({source!r}) was trained on {theirs!r}; the base model is {ours!r}. If they are the "
            "same model, set prompt_tuning_init_kwargs={..., 'check_base_model': False}."
        )


def _fit(ctx: InitContext, prompt: torch.Tensor, length_policy: str) -> torch.Tensor:
    """Fit a prompt [any, H] to [P, H]."""
    size = ctx.num_virtual_tokens
    if len(prompt) == size:
        return prompt
    if length_policy == "truncate_pad":
        return torch.cat([prompt, ctx.run("SAMPLE_VOCAB")[len(prompt) :]]) if len(prompt) < size else prompt[:size]
    if length_policy == "interpolate":
        columns = prompt.T[None]  # [1, H, any]
        return torch.nn.functional.interpolate(columns, size=size, mode="linear", align_corners=True)[0].T
    raise ValueError(
        f"TRANSFER: a source has {len(prompt)} virtual tokens; num_virtual_tokens is {size}. "
        "Set length_policy='truncate_pad' or 'interpolate'."
    )
