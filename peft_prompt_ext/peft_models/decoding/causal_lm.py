"""Decoding with a prompt in a decoder: `generate`, and the steps of the caller's own loop.

Shapes: B rows, P virtual tokens, S text tokens in a cache, T text tokens of a call, H hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial, wraps
from inspect import signature
from typing import Any

import torch

from ...labels import IGNORE_INDEX
from ...shared_prefix.status import EngineStatus
from ..packed import BASE, PackedMixin
from ..padding import reorder
from .feed import CACHES, PromptFeed, cache_name, check_rows, find_cache, get_place, has_keys, take_cache
from .held_prompt import HeldPrompt, Place, count_text, drop_virtual, get_held, set_held
from .kept import check_names, find_mode_obstacle, put_prompts
from .modes import allow_candidates, check_mode, check_suffix, make_room


_BEHIND = "its prompt stands behind the text (prompt_position='suffix'), and no answer follows; use generate"


class PromptedGeneration(PackedMixin):
    """`generate`, `prepare_inputs_for_generation` and calls with a cache, for a decoder with a prompt."""

    def forward(  # type: ignore[override]  # called by name
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """See PEFT's class. A call with `past_key_values` or `use_cache` is a step of a decoding loop.

        The first step adds the prompt; later steps take only new tokens. The mask covers the whole text, [B, S + T],
        or the virtual tokens too, [B, P + S + T].

        Raises:
            ValueError: The cache does not have the active prompt, or an argument does not fit the text.
        """
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "inputs_embeds": inputs_embeds}
        if kwargs.get("adapter_names") is None and self._is_step({**inputs, **kwargs}):
            self._check_token_path(kwargs)
            self._engine.set_last_status(
                self.get_base_model(), EngineStatus(False, "the call has use_cache or a cache")
            )
            return self._step({**inputs, "labels": labels, **kwargs})
        wants_dict = self._wants_dict(kwargs.pop("return_dict", None))
        output = super().forward(input_ids, attention_mask, inputs_embeds, labels, return_dict=True, **kwargs)
        if kwargs.get("use_cache") is None:
            learns, text = self.training or labels is not None, input_ids if input_ids is not None else inputs_embeds
            is_behind = kwargs.get("answer_start") is not None
            if wants_dict and not learns:
                self._refuse_cache_of_packed(output, is_behind)
            self._mark_default_cache(output, text, attention_mask, learns, is_behind)
        return output if wants_dict else output.to_tuple()

    def _is_step(self, inputs: Mapping[str, Any]) -> bool:
        if inputs.get("use_cache") or find_cache(inputs) is not None or get_place(inputs) is not None:
            return True
        # a cache of None is the first call of a loop
        return not inputs.keys().isdisjoint(CACHES) and inputs.get("use_cache") is None and self._returns_cache()

    def _check_is_no_step(self, inputs: Mapping[str, Any]) -> None:
        """Raise NotImplementedError for a step of a loop, whose prompt stands behind a text of unknown length."""
        if inputs.get("adapter_names") is None and self._is_step(inputs):
            given = [name for name in ("use_cache", *CACHES) if name in inputs]
            raise _make_loop_error(f"a call with {' and '.join(given) or 'inputs of such a loop'}")

    def _returns_cache(self) -> bool:
        """Whether the base model returns a cache by default."""
        config: Any = self.get_base_model().config
        return bool(getattr(config.get_text_config(decoder=True), "use_cache", False))

    def _step(self, inputs: dict[str, Any]) -> Any:
        base_model: Any = self.get_base_model()
        inputs = {name: value for name, value in inputs.items() if value is not None}
        return_dict, feed = inputs.pop("return_dict", None), PromptFeed(self)
        where, before, ids = get_place(inputs), get_held(find_cache(inputs)), None
        is_prepared = where is not None  # by prepare_inputs_for_generation
        if where is not None:
            output = base_model(return_dict=True, **inputs)
        else:
            where, ids = self._place_step(feed, inputs)
            output = self._run_step(inputs, where)
        stored = find_cache(output)
        if stored is None and inputs.get("use_cache"):
            raise NotImplementedError(
                f"{type(base_model).__name__} returned no cache, so the next step would lose the text. Pass "
                "use_cache=False, and the whole text at each step."
            )
        if ids is not None and not where.begins:
            text = None if before is None else before.text
            # the caller may have reordered the cache's rows; a single row stays the same
            ids = None if text is None or len(text) + len(ids) > 2 else torch.cat([text[:, : where.seen], ids], dim=1)
        if not is_prepared or get_held(stored) is None:
            feed.mark(stored, where, ids)
        return output if self._wants_dict(return_dict) else output.to_tuple()

    def _run_step(self, inputs: dict[str, Any], where: Place) -> Any:
        """Run the base model, and restore the caller's order of columns."""
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
        """Find the place of the new tokens, and turn `inputs` into the base model's. Returns the place and the ids."""
        ids, text = inputs.pop("input_ids", None), inputs.pop("inputs_embeds", None)
        if (ids is None) == (text is None):
            raise ValueError(
                "A step takes the new tokens as either input_ids [B, T] or inputs_embeds [B, T, H]. Pass one of them."
            )
        if "shift_labels" in inputs:
            raise ValueError("A step with a cache takes no shift_labels. Pass labels [B, T].")
        stored, new = take_cache(feed.base_model, inputs), (ids if text is None else text).shape[1]
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
            inputs["labels"] = _place_labels(inputs["labels"], where)
        if text is None and not where.begins:
            inputs["input_ids"] = ids if where.order_now is None else reorder(ids, where.order_now)
        else:
            inputs["inputs_embeds"] = feed.put_in(feed.embed(ids) if text is None else text, where)
        return where, ids

    def _refuse_cache_of_packed(self, output: Any, is_behind: bool) -> None:
        """Return an unusable cache after a packed batch, where the base model returns one by default.

        So a loop that relies on that default gets an error.
        """
        name = cache_name(self.get_base_model())
        if torch.compiler.is_compiling() or not hasattr(output, name) or find_cache(output) is not None:
            return
        if self._returns_cache():
            from transformers import DynamicCache

            output[name] = DynamicCache()
            refusal = (
                _BEHIND if is_behind else "it comes from a packed batch, which fills no cache; pass use_cache=True"
            )
            set_held(output[name], HeldPrompt(torch.empty(0), refusal=refusal))

    def _mark_default_cache(self, output: Any, text: Any, attention_mask: Any, learns: bool, is_behind: bool) -> None:
        """Mark the cache that the base model returns by default with its prompt, or as unusable."""
        stored = find_cache(output)
        if torch.compiler.is_compiling() or stored is None or get_held(stored) is not None:
            return
        if is_behind:
            set_held(stored, HeldPrompt(text.new_empty(0), refusal=_BEHIND))
        elif not learns and (attention_mask is None or bool(attention_mask.all())):
            feed = PromptFeed(self)
            feed.mark(stored, feed.place(None, text.shape[1], None), text if text.dim() == 2 else None)
        else:
            refusal = "it comes from a call in training, with labels or with pads; pass use_cache=True"
            set_held(stored, HeldPrompt(text.new_empty(0), refusal=refusal))

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
        """Make the inputs of a step, for this model or for its base model.

        Args:
            input_ids: The whole text or the new tokens, [B, T], recognised by the mask's width or by the text.
            next_sequence_length: The number of new tokens.
            attention_mask: Over the whole text, with or without the virtual tokens.
            inputs_embeds: [B, T, H], used instead of the ids in the first iteration.
            is_first_iteration: Whether this is the first iteration.
            task_ids: Ignored; these prompts have no tasks.
            kwargs: Other arguments of the base model's function, such as `past_key_values`.

        Raises:
            ValueError: The cache does not have the active prompt, or the mask does not fit the text.
            NotImplementedError: The prompt stands behind the text.
        """
        feed = PromptFeed(self)
        if feed.is_suffix:
            raise _make_loop_error("prepare_inputs_for_generation")
        stored = take_cache(feed.base_model, kwargs)
        seen = feed.count_seen(stored)
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
        """See PEFT's class. With the cache of an earlier call, pass the whole text, or an attention mask over it.

        With `prompt_position="suffix"`, rows are `[text | prompt | answer]`, and the cache cannot be continued.
        `adapter_names` selects an adapter for each row, `"__base__"` none; that cache cannot be continued either.

        Returns:
            As the base model's `generate`, without virtual tokens.

        Raises:
            ValueError: The cache does not have the active prompt, or an argument does not fit the text.
            NotImplementedError: The decoding mode is not supported with a prompt, or with a prompt for each row.
        """
        from transformers import GenerationMixin

        own = list(signature(GenerationMixin.generate).parameters)[1:]
        kwargs |= dict(zip(own, args, strict=False))
        view: Any = self._view()
        if self._adapters_disabled:
            kwargs.pop("adapter_names", None)
            return self._generate_unprompted(kwargs)
        texts = (kwargs.get(name) for name in ("inputs_embeds", "inputs", "input_ids"))
        names = check_names(self, kwargs.pop("adapter_names", None), next((x for x in texts if x is not None), None))
        if names and set(names) == {BASE}:
            return self._generate_unprompted(kwargs)
        self._check_token_path(kwargs)
        options = {name: value for name, value in kwargs.items() if name not in own}
        config = view._prepare_generation_config(kwargs.get("generation_config"), **options)[0]
        stored = find_cache(kwargs)
        check_mode(view, config, kwargs)
        feed = PromptFeed(self, names)
        obstacle = find_mode_obstacle(config, kwargs, feed)
        self._prepare_feed(feed, kwargs, config)
        feed.put_prompts = partial(put_prompts, self, feed, obstacle)
        prepare = view.prepare_inputs_for_generation
        view.prepare_inputs_for_generation = wraps(prepare)(partial(feed.step, prepare))
        make_room(view, len(feed.prompt))
        allow_candidates(view)
        output = self._generate(view, kwargs)
        if config.num_beams > 1 or names:
            stored = stored if stored is not None else find_cache(output)
            held = get_held(stored)
            refusal = "it has the last rows of a beam search, which are not the returned sequences"
            if names:
                refusal = "its rows have the prompts of several adapters"
            if held is not None:
                set_held(stored, replace(held, refusal=refusal))
        if feed.first is not None and feed.first.blocks and not isinstance(output, torch.Tensor):
            for name in ("hidden_states", "attentions"):
                if output.get(name) is not None:
                    output[name] = _put_back(output[name], feed.first)
        return output

    def _prepare_feed(self, feed: PromptFeed, kwargs: dict[str, Any], config: Any) -> None:
        """Check the text that `generate` gets, and cut virtual tokens off its mask."""
        stored = take_cache(self.get_base_model(), kwargs)
        virtual, seen, feed.chunks = len(feed.prompt), feed.count_seen(stored) or 0, config.prefill_chunk_size
        if feed.is_suffix:
            check_suffix(config, seen)
            virtual = 0  # the caller's mask and positions have no virtual tokens
        ids: Any = kwargs.get("input_ids") if kwargs.get("inputs") is None else kwargs["inputs"]
        embeds, mask = kwargs.get("inputs_embeds"), kwargs.get("attention_mask")
        if seen and (feed.chunks is not None or config.token_healing):
            raise ValueError("prefill_chunk_size and token_healing need the whole text. Leave past_key_values out.")
        if embeds is not None:
            total = embeds.shape[1]
        elif ids is not None:
            total = count_text(ids, mask, stored, seen, virtual)
        else:
            total = 1  # the base model's generate begins with its bos token
        if total <= seen:
            raise ValueError(
                f"past_key_values has {seen} text tokens, and the call has {total}, so none is new. Pass new tokens."
            )
        if seen:
            each = max(config.num_beams, config.num_return_sequences)
            check_rows(stored, len(ids if embeds is None else embeds), each)
        feed.left_out = total - (ids.shape[1] if ids is not None else total * (embeds is None))
        feed.masked, feed.in_front = mask is not None, total * feed.is_suffix
        self._check_length(total, len(feed.prompt))
        if mask is not None:
            kwargs["attention_mask"] = mask = drop_virtual(mask, total, virtual)
        _check_positions(kwargs.pop("position_ids", None), Place(virtual, not seen, 0, total, mask))
        kwargs.pop("task_ids", None)
        self._adjust_prompt_learning_kwargs(self.active_peft_config, kwargs=kwargs)
        if total > 1:
            _check_token_inputs(kwargs, (ids if embeds is None else embeds).shape[:2])


def _put_back(value: Any, where: Place) -> Any:
    """Restore the caller's order of columns in tensors [B, columns, ...] and weights [B, heads, columns, keys].

    It is `[text | prompt]` with a suffix.
    """
    if isinstance(value, tuple | list):
        return type(value)(_put_back(part, where) for part in value)
    whole = where.back
    if (
        whole is None
        or not isinstance(value, torch.Tensor)
        or value.dim() not in {2, 3, 4}
        or len(value) != len(whole)
    ):
        return value
    if value.dim() < 4:
        back = _find_back(where, whole, value.shape[1])
        return value if back is None else reorder(value, back)
    if value.shape[3] < where.width:
        raise ValueError(
            "Attention weights of layers with a sliding window are not available for padded rows. Make batches of "
            "texts of one length, or set output_attentions=False."
        )
    back = _find_back(where, whole, value.shape[2])
    if back is not None:
        value = reorder(value.transpose(1, 2), back).transpose(1, 2)
    return reorder(value.transpose(1, 3), _add_later(whole, value.shape[3])).transpose(1, 3)


def _find_back(where: Place, whole: torch.Tensor, columns: int) -> torch.Tensor | None:
    """Find the order of the columns of a call, or of a later one that reads the whole text again; None: only new."""
    if columns == where.now:
        return where.back_now
    return _add_later(whole, columns) if where.begins and columns > where.now else None


def _add_later(whole: torch.Tensor, columns: int) -> torch.Tensor:
    later = torch.arange(whole.shape[1], columns, device=whole.device).expand(len(whole), -1)
    return torch.cat([whole, later], dim=1)


def _make_loop_error(what: str) -> NotImplementedError:
    return NotImplementedError(
        f"prompt_position='suffix' does not support a decoding loop of the caller's own, got {what}. Use generate, or "
        "pass the whole text in each call, without a cache."
    )


def _place_labels(labels: torch.Tensor, where: Place) -> torch.Tensor:
    if where.begins:
        labels = torch.cat([labels.new_full((len(labels), where.virtual), IGNORE_INDEX), labels], dim=1)
    if where.order_now is not None:
        labels = reorder(labels, where.order_now)
    return labels if where.mask is None else labels.masked_fill(where.mask[:, -where.now :] == 0, IGNORE_INDEX)


def _check_positions(given: torch.Tensor | None, where: Place) -> None:
    """Raise ValueError unless positions [B, T] count the real tokens, with or without virtual tokens."""
    if given is None:
        return
    total, width = where.seen + where.new, given.shape[-1]
    real = where.text_mask if where.text_mask is not None else given.new_ones(1, total)
    if given.dim() == 2 and width <= total:
        offset = (given - (real.long().cumsum(1) - 1)[:, total - width :].to(given.device))[
            (real[:, total - width :] != 0).to(given.device).expand(len(given), -1)
        ]
        if bool((offset == 0).all()) or bool((offset == where.virtual).all()):
            return
    other = f" (or from {where.virtual}, the number of virtual tokens)" if where.virtual else ""
    raise ValueError(
        f"position_ids {tuple(given.shape)} do not count each row's real tokens from 0{other}. With generate or a "
        "cache no other positions are supported: leave position_ids out, and pass one text per row."
    )


def _check_token_inputs(kwargs: dict[str, Any], shape: Any) -> None:
    """Raise ValueError for arguments of `generate` per token that have no value for the prompt; drop types of 0."""
    from transformers import GenerationMixin

    known = {"input_ids", "inputs_embeds", "attention_mask", "labels", *signature(GenerationMixin.generate).parameters}
    for name, value in list(kwargs.items()):
        if name in known or not isinstance(value, torch.Tensor) or value.shape[:2] != shape:
            continue
        if name.endswith("token_type_ids") and not bool(value.any()):
            del kwargs[name]
            continue
        raise ValueError(
            f"generate got {name} {tuple(value.shape)}, a value for each text token, but virtual tokens have none. "
            "Leave it out."
        )
