"""The decoding modes that are supported with a prompt, and the changes of a view that they need."""

from __future__ import annotations

from collections.abc import Mapping
from functools import wraps
from typing import Any

import torch

from .feed import find_cache


def check_mode(view: Any, config: Any, kwargs: Mapping[str, Any]) -> None:
    """Raise NotImplementedError for a decoding mode that is not supported with a prompt."""
    from transformers import GenerationMixin, QuantizedCache, StaticCache
    from transformers.generation import GenerationMode

    mode = config.get_generation_mode(kwargs.get("assistant_model"))
    known = {"greedy_search", "sample", "beam_search", "beam_sample", "assisted_generation"}
    assisted = mode == GenerationMode.ASSISTED_GENERATION
    outputs = config.return_dict_in_generate and (config.output_hidden_states or config.output_attentions)
    has_own_generate = getattr(view.generate, "__func__", None) is not GenerationMixin.generate
    stored = find_cache(kwargs)
    is_fixed = isinstance(stored, StaticCache | QuantizedCache) or config.cache_implementation not in {
        None,
        "dynamic",
        "offloaded",
    }
    refused = {
        f"{type(view).__name__}'s own generate": has_own_generate,
        "custom_generate": kwargs.get("custom_generate") is not None,
        "cache_implementation='paged' (continuous batching)": config.cache_implementation == "paged",
        "offloaded caches without an accelerator": (
            "offloaded" in (config.cache_implementation or "") and not torch.accelerator.is_available()
        ),
        f"{mode.value} decoding": mode.value not in known,
        "use_mtp": assisted and config.use_mtp,
        "assistant_early_exit": assisted and config.assistant_early_exit is not None,
        f"speculation_type={config.speculation_type!r}": config.speculation_type is not None,
        "assisting another model": config.is_assistant,
        f"assisted decoding of {type(view).__name__}, which has states": assisted and view._is_stateful,
        "assisted decoding with a static or quantized cache": assisted and is_fixed,
        "output_hidden_states or output_attentions in assisted decoding": assisted and outputs,
        f"{type(view).__name__}'s states outside a cache of transformers (use_cache=False works)": (
            config.use_cache and not view._supports_default_dynamic_cache()
        ),
    }
    for mode_name, is_wanted in refused.items():
        if is_wanted:
            raise NotImplementedError(
                f"generate with a prompt does not support {mode_name}. Use greedy, sampled or assisted decoding "
                "(assistant_model), beam search or prompt lookup."
            )


def check_suffix(config: Any, seen: int) -> None:
    """Raise NotImplementedError for what is not supported with a prompt behind the text.

    Args:
        config: The config of generation.
        seen: The number of text tokens in the caller's cache.
    """
    refused = {
        f"past_key_values with {seen} text tokens": seen > 0,
        f"prefill_chunk_size ({config.prefill_chunk_size})": config.prefill_chunk_size is not None,
        "token_healing": config.token_healing,
    }
    for name, is_wanted in refused.items():
        if is_wanted:
            raise NotImplementedError(
                f"generate with prompt_position='suffix' does not support {name}: the prompt stands behind the whole "
                "text, which is read at once. Pass the whole text, and leave this out."
            )


def make_room(view: Any, virtual: int) -> None:
    """Make the caches of a view long enough for the virtual tokens."""
    make = view._prepare_cache_for_generation

    @wraps(make)
    def with_room(
        generation_config: Any, model_kwargs: Any, generation_mode: Any, batch_size: int, max_cache_length: int
    ) -> Any:
        try:
            return make(generation_config, model_kwargs, generation_mode, batch_size, max_cache_length + virtual)
        except (ImportError, ValueError) as error:
            name = generation_config.cache_implementation
            raise ValueError(f"The cache of cache_implementation={name!r} could not be created: {error}") from error

    view._prepare_cache_for_generation = with_room


def allow_candidates(view: Any) -> None:
    """Restrict a view to candidate generators for assisted decoding that do not depend on its lengths."""
    get = view._get_candidate_generator

    @wraps(get)
    def get_allowed(*args: Any, **kwargs: Any) -> Any:
        from transformers.generation import candidate_generator as kinds

        candidates = get(*args, **kwargs)
        allowed = {
            kinds.AssistedCandidateGenerator,
            kinds.AssistedCandidateGeneratorDifferentTokenizers,
            kinds.UniversalSpeculativeDecodingGenerator,
            kinds.PromptLookupCandidateGenerator,
        }
        if type(candidates) not in allowed:
            raise NotImplementedError(
                f"Assisted decoding with {type(candidates).__name__} is not supported with a prompt. Use an "
                "assistant_model with its own language modelling head, or prompt lookup."
            )
        return candidates

    view._get_candidate_generator = get_allowed
