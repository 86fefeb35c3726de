"""Which ways of decoding are right behind a prompt, and what a view of the base model needs for them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import wraps
from typing import Any

import torch

from .feed import cache_of


def check_mode(view: Any, config: Any, kwargs: Mapping[str, Any]) -> None:
    """Raise a NotImplementedError for a way of decoding that is not known to be right behind a prompt."""
    from transformers import GenerationMixin, QuantizedCache, StaticCache
    from transformers.generation import GenerationMode

    mode = config.get_generation_mode(kwargs.get("assistant_model"))
    known = {"greedy_search", "sample", "beam_search", "beam_sample", "assisted_generation"}
    assisted = mode == GenerationMode.ASSISTED_GENERATION
    outputs = config.return_dict_in_generate and (config.output_hidden_states or config.output_attentions)
    own = getattr(view.generate, "__func__", None) is not GenerationMixin.generate
    stored = cache_of(kwargs)
    fixed = isinstance(stored, StaticCache | QuantizedCache) or config.cache_implementation not in {
        None,
        "dynamic",
        "offloaded",
    }
    refused = {
        f"the generate that {type(view).__name__} has of its own": own,
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
        f"assisted decoding of {type(view).__name__}, which keeps states": assisted and view._is_stateful,
        "assisted decoding and a static or quantized cache": assisted and fixed,
        "output_hidden_states and output_attentions of assisted decoding": assisted and outputs,
        f"the states that {type(view).__name__} keeps outside of a cache of transformers (use_cache=False works)": (
            config.use_cache and not view._supports_default_dynamic_cache()
        ),
    }
    for what, asked in refused.items():
        if asked:
            raise NotImplementedError(
                f"generate behind a prompt is not known to be right with {what}. Greedy and sampled decoding, beam "
                "search, assisted decoding with an assistant_model and prompt lookup are."
            )


def make_room(view: Any, virtual: int) -> None:
    """Let a view make caches that have room for the virtual tokens."""
    make = view._prepare_cache_for_generation

    @wraps(make)
    def with_room(
        generation_config: Any, model_kwargs: Any, generation_mode: Any, batch_size: int, max_cache_length: int
    ) -> Any:
        try:
            return make(generation_config, model_kwargs, generation_mode, batch_size, max_cache_length + virtual)
        except (ImportError, ValueError) as error:
            name = generation_config.cache_implementation
            raise ValueError(f"cache_implementation={name!r} cannot be made here: {error}") from error

    view._prepare_cache_for_generation = with_room


def allow_candidates(view: Any) -> None:
    """Let a view take candidates for assisted decoding only from where they do not depend on its own lengths."""
    get = view._get_candidate_generator

    @wraps(get)
    def known(*args: Any, **kwargs: Any) -> Any:
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
                f"Assisted decoding with {type(candidates).__name__} is not known to be right behind a prompt. An "
                "assistant_model with a language modelling head of its own is, and so is prompt lookup."
            )
        return candidates

    view._get_candidate_generator = known
