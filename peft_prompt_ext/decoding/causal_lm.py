"""A decoder behind a prompt: `generate`, and the steps of one's own loop.

Shapes: B rows, P virtual tokens, S text tokens that a cache holds, T text tokens of a call, H hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial, wraps
from inspect import signature
from typing import Any

import torch

from ..padding import reorder
from ..shared_prefix import EngineStatus
from .feed import CACHES, PromptFeed, cache_name, cache_of, check_rows, given_cache, has_keys, place_of
from .held_prompt import HeldPrompt, Place, count_text, held_by, note, without_virtual
from .modes import allow_candidates, check_mode, make_room
from .view import GuardedGeneration


IGNORE_INDEX = -100


class PromptedGeneration(GuardedGeneration):
    """`generate`, `prepare_inputs_for_generation` and calls with a cache, of a decoder behind a prompt."""

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """See PEFT's class. With `past_key_values` or `use_cache` a call is a step of one's own decoding loop.

        The first step puts the prompt in, later ones take the new tokens alone. The mask is as wide as the whole text,
        [B, S + T]; it may have the virtual tokens too, [B, P + S + T].

        Raises:
            ValueError: The cache does not hold the active prompt, or an argument does not fit the text.
        """
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "inputs_embeds": inputs_embeds}
        if kwargs.get("adapter_names") is None and self._is_step({**inputs, **kwargs}):
            self._check_token_path(kwargs)
            self._ran(EngineStatus(False, "it asks for use_cache, or goes on with a cache"))
            return self._step({**inputs, "labels": labels, **kwargs})
        wants_dict = self._wants_dict(kwargs.pop("return_dict", None))
        output = super().forward(input_ids, attention_mask, inputs_embeds, labels, return_dict=True, **kwargs)
        if kwargs.get("use_cache") is None:
            learns, text = self.training or labels is not None, input_ids if input_ids is not None else inputs_embeds
            if wants_dict and not learns:
                self._refuse_packed(output)
            self._note_unasked(output, text, attention_mask, learns)
        return output if wants_dict else output.to_tuple()

    def _is_step(self, inputs: Mapping[str, Any]) -> bool:
        if inputs.get("use_cache") or cache_of(inputs) is not None or place_of(inputs) is not None:
            return True
        # a cache of None is the first call of a loop
        return not inputs.keys().isdisjoint(CACHES) and inputs.get("use_cache") is None and self._caches()

    def _caches(self) -> bool:
        """Whether the base model returns a cache if nobody says."""
        config: Any = self.get_base_model().config
        return bool(getattr(config.get_text_config(decoder=True), "use_cache", False))

    def _step(self, inputs: dict[str, Any]) -> Any:
        base_model: Any = self.get_base_model()
        inputs = {name: value for name, value in inputs.items() if value is not None}
        return_dict, feed = inputs.pop("return_dict", None), PromptFeed(self)
        where, before, ids = place_of(inputs), held_by(cache_of(inputs)), None
        prepared = where is not None  # by prepare_inputs_for_generation
        if where is not None:
            output = base_model(return_dict=True, **inputs)
        else:
            where, ids = self._place_step(feed, inputs)
            output = self._run_step(inputs, where)
        stored = cache_of(output)
        if stored is None and inputs.get("use_cache"):
            raise NotImplementedError(
                f"{type(base_model).__name__} returned no cache, so the next step would begin the text anew. Pass "
                "use_cache=False, and the whole text at each step."
            )
        if ids is not None and not where.begins:
            text = None if before is None else before.text
            # rows of a cache may have been chosen since; one row is the one
            ids = None if text is None or len(text) + len(ids) > 2 else torch.cat([text[:, : where.seen], ids], dim=1)
        if not prepared or held_by(stored) is None:
            feed.note(stored, where, ids)
        return output if self._wants_dict(return_dict) else output.to_tuple()

    def _run_step(self, inputs: dict[str, Any], where: Place) -> Any:
        """Outputs have the caller's order of columns."""
        base_model: Any = self.get_base_model()
        keep = inputs.pop("logits_to_keep", 0) if where.order is not None else 0
        output = base_model(return_dict=True, **inputs)
        if where.order is not None:
            for name, value in output.items():
                output[name] = _put_back(value, where)
        if isinstance(keep, torch.Tensor) or keep:
            output["logits"] = output["logits"][:, keep if isinstance(keep, torch.Tensor) else slice(-keep, None)]
        return output

    def _place_step(self, feed: PromptFeed, inputs: dict[str, Any]) -> tuple[Place, torch.Tensor | None]:
        """Give the new tokens their place and make `inputs` the base model's; the ids are returned too, if any."""
        ids, text = inputs.pop("input_ids", None), inputs.pop("inputs_embeds", None)
        if (ids is None) == (text is None):
            raise ValueError(
                "A step takes the new tokens as input_ids [B, T] or inputs_embeds [B, T, H], one of the two."
            )
        if "shift_labels" in inputs:
            raise ValueError("shift_labels name columns as they stand; a step with a cache takes labels [B, T].")
        stored, new = given_cache(feed.base_model, inputs), (ids if text is None else text).shape[1]
        where = feed.place(stored, new, inputs.pop("attention_mask", None))
        if not where.begins:
            check_rows(stored, len(ids if text is None else text))
        self._check_length(where.seen + new)
        _check_positions(inputs.pop("position_ids", None), where)
        for name in ("cache_position", "task_ids"):
            inputs.pop(name, None)
        self._adjust_prompt_learning_kwargs(self.active_peft_config, kwargs=inputs)
        inputs.setdefault("use_cache", True)
        if where.padded and (where.begins or has_keys(stored)):
            inputs["attention_mask"] = where.mask
        positions = feed.positions(where)
        if positions is not None:
            inputs["position_ids"] = positions[:, -where.now :].expand(len(ids if text is None else text), -1)
        if "labels" in inputs:
            inputs["labels"] = _step_labels(inputs["labels"], where)
        if text is None and not where.begins:
            inputs["input_ids"] = ids if where.order_now is None else reorder(ids, where.order_now)
        else:
            inputs["inputs_embeds"] = feed.put_in(feed.embed(ids) if text is None else text, where)
        return where, ids

    def _refuse_packed(self, output: Any) -> None:
        """Put a cache that is refused where the base model would have one, for a loop that relies on its default."""
        name = cache_name(self.get_base_model())
        if torch.compiler.is_compiling() or not hasattr(output, name) or cache_of(output) is not None:
            return
        if self._caches():
            from transformers import DynamicCache

            output[name] = DynamicCache()
            refusal = "the call that it comes from ran packed and put nothing in: pass use_cache=True"
            note(output[name], HeldPrompt(torch.empty(0), refusal=refusal))

    def _note_unasked(self, output: Any, text: Any, attention_mask: Any, learns: bool) -> None:
        """Note what a cache holds that nobody asked for."""
        stored = cache_of(output)
        if torch.compiler.is_compiling() or stored is None or held_by(stored) is not None:
            return
        if not learns and (attention_mask is None or bool(attention_mask.all())):
            feed = PromptFeed(self)
            feed.note(stored, feed.place(None, text.shape[1], None), text if text.dim() == 2 else None)
        else:
            refusal = "the call that it comes from learned or had pads, and did not ask for it: pass use_cache=True"
            note(stored, HeldPrompt(text.new_empty(0), refusal=refusal))

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        next_sequence_length: int | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        is_first_iteration: bool = False,
        task_ids: Any = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Make inputs of a step, for this model or for its base model: both take them as they are.

        Args:
            input_ids: The whole text or the new tokens, [B, T]; the mask's width tells which, or the text itself.
            next_sequence_length: How many tokens are new.
            attention_mask: Over the whole text, with or without the virtual tokens.
            inputs_embeds: [B, T, H], used in place of the ids in the first iteration.
            is_first_iteration: Whether it is the first.
            task_ids: Ignored, as the prompts of this class have no tasks.
            kwargs: More arguments of the base model's function, `past_key_values` among them.

        Raises:
            ValueError: The cache does not hold the active prompt, or the mask does not fit the text.
        """
        feed = PromptFeed(self)
        stored = given_cache(feed.base_model, kwargs)
        seen = feed.seen_by(stored)
        text = inputs_embeds if inputs_embeds is not None and is_first_iteration else input_ids
        new = text.shape[1]
        if seen and next_sequence_length is not None:
            new = next_sequence_length
        elif seen and text is not input_ids:
            new -= seen
        elif seen and not (attention_mask is None and new <= seen):
            new = count_text(input_ids, attention_mask, stored, seen, len(feed.prompt)) - seen
        where = feed.place(stored, new, attention_mask)
        if not where.begins:
            check_rows(stored, len(text))
        _check_positions(kwargs.pop("position_ids", None), where)
        self._adjust_prompt_learning_kwargs(self.active_peft_config, kwargs=kwargs)
        prepare: Any = feed.base_model.prepare_inputs_for_generation
        return feed.prepare(prepare, where, text, input_ids, is_first_iteration=is_first_iteration, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """See PEFT's class. A cache of an earlier call goes with the whole text, or with an attention mask over it.

        Returns:
            As the base model's `generate`: of the text, without virtual tokens.

        Raises:
            ValueError: The cache does not hold the active prompt, or an argument does not fit the text.
            NotImplementedError: The way of decoding is none that is known to be right behind a prompt.
        """
        from transformers import GenerationMixin

        own = list(signature(GenerationMixin.generate).parameters)[1:]
        kwargs |= dict(zip(own, args, strict=False))
        view: Any = self._view()
        if self._adapters_disabled:
            return self._generate_unprompted(kwargs)
        self._check_token_path(kwargs)
        options = {name: value for name, value in kwargs.items() if name not in own}
        config = view._prepare_generation_config(kwargs.get("generation_config"), **options)[0]
        stored = cache_of(kwargs)
        check_mode(view, config, kwargs)
        feed = self._feed_for(kwargs, config)
        prepare = view.prepare_inputs_for_generation
        view.prepare_inputs_for_generation = wraps(prepare)(partial(feed.step, prepare))
        make_room(view, len(feed.prompt))
        allow_candidates(view)
        output = self._generate(view, kwargs)
        if config.num_beams > 1:
            stored = stored if stored is not None else cache_of(output)
            held = held_by(stored)
            if held is not None:
                refusal = "it has the rows that a beam search ran last, which are not the sequences that it returned"
                note(stored, replace(held, refusal=refusal))
        if feed.first is not None and feed.first.order is not None and not isinstance(output, torch.Tensor):
            for name in ("hidden_states", "attentions"):
                if output.get(name) is not None:
                    output[name] = _put_back(output[name], feed.first)
        return output

    def _feed_for(self, kwargs: dict[str, Any], config: Any) -> PromptFeed:
        """Check what `generate` is given of the text, and make its mask as wide as the text."""
        feed, stored = PromptFeed(self), given_cache(self.get_base_model(), kwargs)
        virtual, seen, feed.chunks = len(feed.prompt), feed.seen_by(stored) or 0, config.prefill_chunk_size
        ids: Any = kwargs.get("input_ids") if kwargs.get("inputs") is None else kwargs["inputs"]
        embeds, mask = kwargs.get("inputs_embeds"), kwargs.get("attention_mask")
        if seen and (feed.chunks is not None or config.token_healing):
            raise ValueError(
                "prefill_chunk_size and token_healing take a text from its beginning, without past_key_values."
            )
        if embeds is not None:
            total = embeds.shape[1]
        elif ids is not None:
            total = count_text(ids, mask, stored, seen, virtual)
        else:
            total = 1  # the base model's generate begins with its bos token
        if total <= seen:
            raise ValueError(f"past_key_values has {seen} text tokens, and {total} were given: none of them is new.")
        if seen:
            each = max(config.num_beams, config.num_return_sequences)
            check_rows(stored, len(ids if embeds is None else embeds), each)
        feed.left_out = total - (ids.shape[1] if ids is not None else total * (embeds is None))
        feed.masked = mask is not None
        self._check_length(total)
        if mask is not None:
            kwargs["attention_mask"] = mask = without_virtual(mask, total, virtual)
        _check_positions(kwargs.pop("position_ids", None), Place(virtual, not seen, 0, total, mask))
        kwargs.pop("task_ids", None)
        self._adjust_prompt_learning_kwargs(self.active_peft_config, kwargs=kwargs)
        if total > 1:
            _drop_types(kwargs, (ids if embeds is None else embeds).shape[:2])
        return feed


def _put_back(value: Any, where: Place) -> Any:
    """Give tensors [B, columns, ...] and attention weights [B, heads, columns, keys] the caller's order of columns."""
    if isinstance(value, tuple | list):
        return type(value)(_put_back(part, where) for part in value)
    if not isinstance(value, torch.Tensor) or where.order is None or where.order_now is None:
        return value
    rows, back = len(where.order), where.order_now.argsort(1)
    if value.dim() in {2, 3} and value.shape[:2] == back.shape:
        return reorder(value, back)
    if value.dim() != 4 or len(value) != rows:
        return value
    if value.shape[3] < where.width:
        raise ValueError(
            "The attention weights of layers with a window cannot be put back in the order of padded rows."
        )
    if value.shape[2] == where.now:
        value = reorder(value.transpose(1, 2), back).transpose(1, 2)
    later = torch.arange(where.width, value.shape[3], device=back.device).expand(rows, -1)
    return reorder(value.transpose(1, 3), torch.cat([where.order.argsort(1), later], dim=1)).transpose(1, 3)


def _step_labels(labels: torch.Tensor, where: Place) -> torch.Tensor:
    if where.begins:
        labels = torch.cat([labels.new_full((len(labels), where.virtual), IGNORE_INDEX), labels], dim=1)
    if where.order_now is not None:
        labels = reorder(labels, where.order_now)
    return labels if where.mask is None else labels.masked_fill(where.mask[:, -where.now :] == 0, IGNORE_INDEX)


def _check_positions(given: torch.Tensor | None, where: Place) -> None:
    """Raise unless positions [B, T] count the text's real tokens, with the virtual ones or without."""
    if given is None:
        return
    total, width = where.seen + where.new, given.shape[-1]
    real = where.text_mask if where.text_mask is not None else given.new_ones(1, total)
    if given.dim() == 2 and width <= total:
        away = (given - (real.long().cumsum(1) - 1)[:, total - width :].to(given.device))[
            (real[:, total - width :] != 0).to(given.device).expand(len(given), -1)
        ]
        if bool((away == 0).all()) or bool((away == where.virtual).all()):
            return
    raise ValueError(
        f"position_ids {tuple(given.shape)} do not count the real tokens of each row from 0 (or from the "
        f"{where.virtual} virtual tokens on). A text to generate from, or with a cache, has these positions alone: "
        "leave position_ids out, and give one text a row."
    )


def _drop_types(kwargs: dict[str, Any], shape: Any) -> None:
    """Raise for what `generate` is given for each token that has no value for the prompt; types of 0 are left out."""
    from transformers import GenerationMixin

    known = {"input_ids", "inputs_embeds", "attention_mask", "labels", *signature(GenerationMixin.generate).parameters}
    for name, value in list(kwargs.items()):
        if name in known or not isinstance(value, torch.Tensor) or value.shape[:2] != shape:
            continue
        if name.endswith("token_type_ids") and not bool(value.any()):
            del kwargs[name]
            continue
        raise ValueError(
            f"generate was given {name} {tuple(value.shape)}, a value for each text token. There is none for the "
            "virtual tokens: leave it out."
        )
