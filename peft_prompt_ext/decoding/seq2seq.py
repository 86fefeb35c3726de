"""An encoder-decoder whose encoder has a prompt: `generate`, and calls with a cache."""

from __future__ import annotations

import warnings
from functools import wraps
from typing import Any

import torch

from ..padding import real_first, reorder
from .feed import PromptFeed, cache_of, given_cache
from .held_prompt import HeldPrompt, Place, held_by, note, same_prompt, without_virtual
from .view import GuardedGeneration


class PromptedEncoderDecoder(GuardedGeneration):
    """`generate` and calls with a cache, of an encoder-decoder whose encoder has a prompt."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """See PEFT's class.

        Raises:
            ValueError: `past_key_values` comes from another prompt.
        """
        feed, kwargs = PromptFeed(self), self._by_name(args, kwargs)
        _check_encoded(given_cache(feed.base_model, kwargs), feed)
        return_dict = kwargs.pop("return_dict", None)
        output = super().forward(return_dict=True, **kwargs)
        _note_encoded(cache_of(output), feed)
        return output if self._wants_dict(return_dict) else output.to_tuple()

    def generate(self, **kwargs: Any) -> Any:
        """See PEFT's class.

        Raises:
            ValueError: There is no text, or `past_key_values` comes from another prompt.
            NotImplementedError: The base model would generate without the prompt.
        """
        if self._adapters_disabled:
            return self._generate_unprompted(kwargs)
        self._check_token_path(kwargs)
        view: Any = self._view()
        bound = getattr(view.generate, "__self__", None) is view
        if not bound or kwargs.get("cache_implementation") == "paged":
            raise NotImplementedError("This way of generating would leave the prompt out.")
        feed = PromptFeed(self)
        _check_encoded(given_cache(feed.base_model, kwargs), feed)
        ids, text = kwargs.pop("input_ids", None), kwargs.pop("inputs_embeds", None)
        if (ids is None) == (text is None):
            raise ValueError("generate needs the text as input_ids [B, T] or inputs_embeds [B, T, H], one of the two.")
        self._adjust_prompt_learning_kwargs(self.active_peft_config, kwargs=kwargs)
        kwargs.pop("task_ids", None)
        if kwargs.pop("encoder_outputs", None) is not None:
            warnings.warn("encoder_outputs are ignored: they do not have the prompt.", stacklevel=2)
        text = feed.embed(ids) if text is None else text
        mask = kwargs.pop("attention_mask", None)
        if mask is not None:
            mask = without_virtual(mask, text.shape[1], len(feed.prompt))
            order = real_first(mask)  # so that no pad stands between the prompt and the text
            text, mask = reorder(text, order), mask.gather(1, order)
        _tell_read(kwargs)
        where = Place(len(feed.prompt), True, 0, text.shape[1], mask)
        prepare: Any = view.prepare_inputs_for_generation

        @wraps(prepare)
        def noting(*args: Any, **inputs: Any) -> dict[str, Any]:
            _note_encoded(cache_of(inputs), feed)
            return prepare(*args, **inputs)

        view.prepare_inputs_for_generation = noting
        with torch.no_grad():
            kwargs["inputs_embeds"] = feed.put_in(text, where)
        return self._generate(view, kwargs if mask is None else {**kwargs, "attention_mask": where.mask})


def _check_encoded(stored: Any, feed: PromptFeed) -> None:
    held = held_by(stored)
    if held is not None and not same_prompt(held, feed.prompt):
        raise ValueError(
            "past_key_values comes from another prompt than the active one, or the prompt was changed since. Begin "
            "with an empty cache."
        )


def _tell_read(kwargs: dict[str, Any]) -> None:
    """Tell `generate` by a mask that decoder ids include those of a cache; without one it would read them twice."""
    stored, ids, mask = cache_of(kwargs), kwargs.get("decoder_input_ids"), kwargs.get("decoder_attention_mask")
    seen = 0 if stored is None else int(stored.get_seq_length())
    if not seen:
        return
    if ids is None or ids.shape[1] <= seen or (mask is not None and mask.shape != ids.shape):
        raise ValueError(
            f"past_key_values has {seen} tokens of the decoder: give all of them and new ones as decoder_input_ids. "
            "Before the new ones alone generate would put the token that every text begins with."
        )
    if mask is None:
        kwargs["decoder_attention_mask"] = torch.ones_like(ids)


def _note_encoded(stored: Any, feed: PromptFeed) -> None:
    if stored is not None and held_by(stored) is None:
        note(stored, HeldPrompt(feed.prompt.detach().clone()))
