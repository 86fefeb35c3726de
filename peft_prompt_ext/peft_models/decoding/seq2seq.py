"""Decoding with a prompt in an encoder: `generate`, and calls with a cache."""

from __future__ import annotations

import warnings
from functools import wraps
from typing import Any

import torch

from ..base import PromptTuningMixin
from ..padding import real_first, reorder
from .feed import PromptFeed, find_cache, take_cache
from .held_prompt import HeldPrompt, Place, drop_virtual, get_held, is_same_prompt, set_held


class PromptedEncoderDecoder(PromptTuningMixin):
    """`generate` and calls with a cache, for an encoder-decoder with a prompt in its encoder."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """See PEFT's class.

        Raises:
            ValueError: `past_key_values` comes from another prompt.
        """
        feed, kwargs = PromptFeed(self), self._name_arguments(args, kwargs)
        _check_encoded(take_cache(feed.base_model, kwargs), feed)
        return_dict = kwargs.pop("return_dict", None)
        output = super().forward(return_dict=True, **kwargs)
        _mark_encoded(find_cache(output), feed)
        return output if self._wants_dict(return_dict) else output.to_tuple()

    def generate(self, **kwargs: Any) -> Any:
        """See PEFT's class.

        Raises:
            ValueError: There is no text, or `past_key_values` comes from another prompt.
            NotImplementedError: The base model has its own `generate`, or generates in continuous batches.
        """
        if self._adapters_disabled:
            return self._generate_unprompted(kwargs)
        self._check_token_path(kwargs)
        view: Any = self._view()
        is_bound = getattr(view.generate, "__self__", None) is view
        if not is_bound or kwargs.get("cache_implementation") == "paged":
            raise NotImplementedError(
                "A replaced generate, or cache_implementation='paged', would leave the prompt out. Use the generate "
                "of transformers with another cache."
            )
        feed = PromptFeed(self)
        _check_encoded(take_cache(feed.base_model, kwargs), feed)
        ids, text = kwargs.pop("input_ids", None), kwargs.pop("inputs_embeds", None)
        if (ids is None) == (text is None):
            raise ValueError("generate needs the text: pass either input_ids [B, T] or inputs_embeds [B, T, H].")
        self._adjust_prompt_learning_kwargs(self.active_peft_config, kwargs=kwargs)
        kwargs.pop("task_ids", None)
        if kwargs.pop("encoder_outputs", None) is not None:
            warnings.warn("encoder_outputs are ignored, because they were computed without the prompt.", stacklevel=2)
        text = feed.embed(ids) if text is None else text
        mask = kwargs.pop("attention_mask", None)
        if mask is not None:
            mask = drop_virtual(mask, text.shape[1], len(feed.prompt))
            order = real_first(mask)  # so that no pads are between the prompt and the text
            text, mask = reorder(text, order), mask.gather(1, order)
        _add_decoder_mask(kwargs)
        where = Place(len(feed.prompt), True, 0, text.shape[1], mask)
        prepare: Any = view.prepare_inputs_for_generation

        @wraps(prepare)
        def mark_and_prepare(*args: Any, **inputs: Any) -> dict[str, Any]:
            _mark_encoded(find_cache(inputs), feed)
            return prepare(*args, **inputs)

        view.prepare_inputs_for_generation = mark_and_prepare
        with torch.no_grad():
            kwargs["inputs_embeds"] = feed.put_in(text, where)
        return self._generate(view, kwargs if mask is None else {**kwargs, "attention_mask": where.mask})


def _check_encoded(stored: Any, feed: PromptFeed) -> None:
    held = get_held(stored)
    if held is not None and not is_same_prompt(held, feed.prompt):
        raise ValueError(
            "past_key_values has another prompt than the active one, or the prompt has changed since. Begin with an "
            "empty cache."
        )


def _add_decoder_mask(kwargs: dict[str, Any]) -> None:
    """Add a mask over all decoder ids; without it, `generate` would read the ids in the cache again."""
    stored, ids, mask = find_cache(kwargs), kwargs.get("decoder_input_ids"), kwargs.get("decoder_attention_mask")
    seen = 0 if stored is None else int(stored.get_seq_length())
    if not seen:
        return
    if ids is None or ids.shape[1] <= seen or (mask is not None and mask.shape != ids.shape):
        raise ValueError(
            f"past_key_values has {seen} tokens of the decoder. Pass these and new ones as decoder_input_ids: before "
            "new ones alone, generate would put the token that begins every text."
        )
    if mask is None:
        kwargs["decoder_attention_mask"] = torch.ones_like(ids)


def _mark_encoded(stored: Any, feed: PromptFeed) -> None:
    if stored is not None and get_held(stored) is None:
        set_held(stored, HeldPrompt(feed.prompt.detach().clone()))
