"""Decoding behind a prompt: `generate`, one's own loop, and what they refuse.

PEFT swaps a method of the base model while it generates, so two calls at once disturb each other. Here each call has
a view of the base model: a shallow copy, whose `prepare_inputs_for_generation` puts the prompt in.

Shapes: B rows, P virtual tokens, S text tokens that a cache holds, T text tokens of a call, H hidden size.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial, wraps
from inspect import signature
from typing import Any

import torch
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper

from .held_prompt import (
    HeldPrompt,
    Place,
    check_hold_no_prompt,
    count_text,
    held_by,
    note,
    place,
    seen_by,
    without_virtual,
)
from .padding import real_first, reorder


IGNORE_INDEX = -100
_CACHES = ("past_key_values", "cache_params")
_IN_PLACE = "_peft_prompt_ext_place"  # of embeddings that have the prompt
_LONGEST = "_previous_max_cache_length"
_LEFT = ("_compiled_call", "_last_compile_config", _LONGEST)  # what `generate` leaves on a model


class GuardedGeneration(PeftModel):
    """Generation that would pass the prompt by is refused: PEFT hands what it does not have itself to the base model."""

    _views: Views | None = None

    def __getattr__(self, name: str) -> Any:
        """See PEFT; a method of transformers' generation that is not known to be harmless is refused when called."""
        value = super().__getattr__(name)
        if name in _methods_of_generation() and callable(value) and not self._adapters_disabled:
            return partial(_refuse, name)
        return value

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """See PEFT; a cache that holds a prompt is refused inside."""
        with super().disable_adapter():
            forward = self.base_model.forward

            @wraps(forward)
            def unprompted(*args: Any, **kwargs: Any) -> Any:
                check_hold_no_prompt([*args, *kwargs.values()])
                return forward(*args, **kwargs)

            self.forward = unprompted  # type: ignore[method-assign]
            yield

    def _view(self) -> Any:
        """The base model for one call of `generate`, with this model's `generation_config`."""
        if self._views is None:
            self._views = Views()
        return self._views.make(_unwrapped(self.get_base_model()), self.generation_config)

    def _generate(self, view: Any, kwargs: dict[str, Any]) -> Any:
        try:
            return view.generate(**kwargs)
        finally:
            self._views.keep(view)  # type: ignore[union-attr]

    def _generate_unprompted(self, kwargs: dict[str, Any]) -> Any:
        check_hold_no_prompt(kwargs.values())
        return self._generate(self._view(), kwargs)


class Views:
    """Makes shallow copies of a base model, and keeps for them what `generate` would keep on the model.

    Modules are shared. One more copy, which nobody generates on, has the compiled calls: a copy of each call's own
    would compile again for each call.
    """

    def __init__(self) -> None:
        self._kept: Any = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles begin anew."""
        return Views, ()

    def make(self, base_model: Any, generation_config: Any) -> Any:
        """Copy a base model; it generates with the given config."""
        kept, view = self._kept, _copy(base_model)
        if kept is None or _own(kept) != _own(base_model):
            kept = self._kept = _copy(base_model)
        view.generation_config = generation_config
        view.get_compiled_call = kept.get_compiled_call
        if _LONGEST in kept.__dict__:
            setattr(view, _LONGEST, getattr(kept, _LONGEST))
        return view

    def keep(self, view: Any) -> None:
        """Keep the length of the view's static cache: the next is no shorter, so that it fits the compiled call."""
        if _LONGEST in view.__dict__:
            setattr(self._kept, _LONGEST, getattr(view, _LONGEST))


def _own(model: Any) -> dict[str, int]:
    """What a model has beside what `generate` leaves on it, to be compared."""
    return {key: id(value) for key, value in model.__dict__.items() if key not in _LEFT}


def _copy(base_model: Any) -> Any:
    view = copy.copy(base_model)
    for name in _LEFT:
        view.__dict__.pop(name, None)
    return view


def _unwrapped(base_model: Any) -> Any:
    """The model inside torch.compile's wrapper, which would hand `generate` to it."""
    return getattr(base_model, "_orig_mod", base_model)


# these neither run the base model nor read its inputs
_HARMLESS = (
    "__",
    "_supports",
    "_validate",
    "_prepare_generation_config",
    "_prepare_special_tokens",
    "_get_logits_processor",
    "_get_stopping_criteria",
    "_merge_criteria",
    "_has_unfinished",
    "compute_transition_scores",
    "destroy_cached_continuous_batching_manager",
)


@cache
def _methods_of_generation() -> frozenset[str]:
    """Names of transformers' methods that decode with the model that they are called on."""
    from transformers import GenerationMixin

    names = {name for kind in GenerationMixin.__mro__[:-1] for name, value in vars(kind).items() if callable(value)}
    return frozenset(name for name in names | {"get_compiled_call"} if not name.startswith(_HARMLESS))


def _refuse(name: str, *args: Any, **kwargs: Any) -> Any:
    raise NotImplementedError(
        f"{name} of the base model would leave the prompt out. Use generate, or call it inside disable_adapter() for "
        "the base model alone."
    )


class PromptFeed:
    """Puts one prompt into the inputs of one base model; the prompt is the one that was active when it was made.

    Attributes:
        prompt: [P, H].
        first: Where the tokens of the first call stand; None before it.
        left_out: How many tokens of the text the ids of `generate` do not have.
        masked: Whether the caller gave an attention mask, so that no mask means no pads.
        chunks: How much of the text `generate` reads at a time; None if all of it.
    """

    def __init__(self, model: Any) -> None:
        """Read a model's active prompt."""
        self.base_model = _unwrapped(model.get_base_model())
        self.prompt = model.get_prompt(batch_size=1)[0, : model.active_peft_config.num_virtual_tokens]
        self.embed = model.word_embeddings
        self.first: Place | None = None
        self.left_out, self.masked, self.chunks = 0, False, None
        self._noted = self.prompt.detach().clone()
        self._heads: dict[ModulesToSaveWrapper, Any] | None = None

    def seen_by(self, stored: Any) -> int | None:
        """See `held_prompt.seen_by`."""
        return seen_by(stored, self._noted)

    def place(self, stored: Any, new: int, mask: torch.Tensor | None) -> Place:
        """See `held_prompt.place`."""
        return place(stored, self.seen_by(stored), new, mask, len(self.prompt))

    def step(
        self,
        prepare: Callable[..., dict[str, Any]],
        input_ids: torch.Tensor,
        next_sequence_length: int | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        is_first_iteration: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The base model's inputs of a step of `generate`, in place of its `prepare_inputs_for_generation`.

        Args:
            prepare: The base model's own function.
            input_ids: All the text that `generate` was given and made, [B, T], or a chunk of what it was given.
            next_sequence_length: What `generate` takes to be new. It does not count the virtual tokens, so only
                whether it is there tells something: a chunk comes without.
            attention_mask: [B, S + T], or None.
            inputs_embeds: The text that `generate` was given in place of ids, [B, T, H].
            is_first_iteration: Whether that text has still to be read.
            kwargs: More arguments of the base model's function.

        Raises:
            ValueError: See `held_prompt`, or the head was changed during the call.
        """
        self._check_heads()
        device = self.base_model.device
        if device.type != "meta":  # `generate` takes inputs that are elsewhere
            input_ids, attention_mask, inputs_embeds = (
                None if x is None else x.to(device) for x in (input_ids, attention_mask, inputs_embeds)
            )
        stored = _cache_of(kwargs)[1]
        seen = self.seen_by(stored) or 0
        text = inputs_embeds if inputs_embeds is not None and is_first_iteration else input_ids
        if self.chunks is not None and next_sequence_length is None:
            new = text.shape[1]
        else:
            new = text.shape[1] + (self.left_out if text is input_ids else 0) - seen
        if attention_mask is None and self.masked:
            attention_mask = input_ids.new_ones(len(text), seen + new) if seen else None
        where = self.place(stored, new, attention_mask)
        if self.chunks is not None and where.blocks:
            raise ValueError(
                f"prefill_chunk_size ({self.chunks}) needs rows without pads: pads are moved before the prompt, and "
                "that across chunks. Leave it out, or generate for rows of one length."
            )
        self.first = self.first or (where if where.begins else None)
        return self.prepare(prepare, where, text, input_ids, is_first_iteration=is_first_iteration, **kwargs)

    def _check_heads(self) -> None:
        heads = (module for module in self.base_model.modules() if isinstance(module, ModulesToSaveWrapper))
        if self._heads is None:
            self._heads = {head: _state(head) for head in heads}
        if any(_state(head) != state for head, state in self._heads.items()):
            raise ValueError(
                "The active adapter was switched while generate ran, and the adapters have heads of their own "
                "(modules_to_save). Switch back before the call goes on, or let it end first."
            )

    def prepare(
        self,
        prepare: Callable[..., dict[str, Any]],
        where: Place,
        text: torch.Tensor,
        input_ids: torch.Tensor,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The base model's inputs for the last tokens of `text`, whose place is known.

        The base model's own function gets ids and a mask that have the virtual tokens, so that its lengths are true.

        Args:
            prepare: The base model's own function.
            where: Where the new tokens stand.
            text: Ids [B, T] or embeddings [B, T, H].
            input_ids: [B, T]; `text` itself unless that is embeddings.
            kwargs: Arguments of the base model's function.

        Raises:
            NotImplementedError: The function does not give the new tokens alone.
        """
        ids = input_ids.new_zeros(len(input_ids), where.width)  # 0 for virtual tokens, and for text without ids
        known = min(input_ids.shape[1], where.seen + where.new)
        ids[:, where.width - known :] = input_ids[:, input_ids.shape[1] - known :]
        whole = ids[:, where.virtual :] if known == where.seen + where.new else None
        for name in ("position_ids", "cache_position"):  # of the text alone
            kwargs.pop(name, None)
        if where.positions is not None and _takes(self.base_model, "position_ids"):
            kwargs["position_ids"] = where.positions
        if text is not input_ids:
            kwargs["inputs_embeds"] = self.put_in(text[:, text.shape[1] - where.new :], where)
        result = prepare(
            ids if where.order is None else reorder(ids, where.order),
            next_sequence_length=None if where.begins or text is not input_ids else where.new,
            attention_mask=where.mask,
            **kwargs,
        )
        name, stored = _cache_of(result)
        if text is input_ids and (where.begins or result["input_ids"].shape[1] != where.new):
            # all of the text: it is new, or the base model reads it again (phi3, where its positions change)
            if whole is None or result["input_ids"].shape[1] != where.width or not (where.begins or stored is None):
                raise NotImplementedError(
                    f"{type(self.base_model).__name__} does not take new tokens alone behind a cache. Pass "
                    "use_cache=False, with the whole text as input_ids."
                )
            where = replace(where, begins=True, seen=0, new=where.seen + where.new)
            result["inputs_embeds"] = self.put_in(self.embed(whole), where)
            result["input_ids"] = None
        if where.begins:
            setattr(result["inputs_embeds"], _IN_PLACE, where)
        dynamic = self.base_model._supports_default_dynamic_cache()
        if stored is None and kwargs.get("use_cache") is not False and dynamic:
            from transformers import DynamicCache

            name = "cache_params" if _takes(self.base_model, "cache_params") else "past_key_values"
            stored = result[name] = DynamicCache(config=self.base_model.config.get_text_config(decoder=True))
        self.note(stored, where, whole)
        return result

    def put_in(self, text: torch.Tensor, where: Place) -> torch.Tensor:
        """Embeddings of a call's columns from those of its text [B, T, H]: with the prompt if it begins the text."""
        if where.begins:
            text = torch.cat([self.prompt.to(text).expand(len(text), -1, -1), text], dim=1)
        return text if where.order_now is None else reorder(text, where.order_now)

    def note(self, stored: Any, where: Place, ids: torch.Tensor | None) -> None:
        """Note in a cache, if there is one, what it holds after a call; `ids` are those of all the text."""
        if stored is None:
            return
        note(stored, HeldPrompt(self._noted, where.width, where.blocks, ids))


def _state(head: ModulesToSaveWrapper) -> tuple[Any, ...]:
    return tuple(head.active_adapters), head.disable_adapters


def _cache_of(inputs: Mapping[str, Any]) -> tuple[str, Any]:
    """The name and value of the cache among inputs or outputs; the value is None if there is none."""
    name = next((name for name in _CACHES if inputs.get(name) is not None), _CACHES[0])
    return name, inputs.get(name)


def _takes(base_model: Any, name: str) -> bool:
    return name in signature(base_model.forward).parameters


class PromptedGeneration(GuardedGeneration):
    """`generate`, `prepare_inputs_for_generation` and calls with a cache, of a decoder behind a prompt."""

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """See PEFT's class. With `past_key_values` or `use_cache` a call is a step of one's own decoding loop.

        The first step puts the prompt in, later ones take the new tokens alone. The mask is as wide as the whole text,
        [B, S + T]; it may have the virtual tokens too, [B, P + S + T].

        Raises:
            ValueError: The cache does not hold the active prompt, or an argument does not fit the text.
        """
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "inputs_embeds": inputs_embeds}
        if not args and kwargs.get("adapter_names") is None and self._is_step(inputs_embeds, kwargs):
            return self._step({**inputs, "labels": labels, **kwargs})
        output = super().forward(input_ids, attention_mask, inputs_embeds, labels, *args, **kwargs)
        if labels is None and not self.training and kwargs.get("use_cache") is None:
            self._note_unasked(output, input_ids if input_ids is not None else inputs_embeds, attention_mask)
        return output

    def _is_step(self, inputs_embeds: Any, kwargs: Mapping[str, Any]) -> bool:
        if kwargs.get("use_cache") or _cache_of(kwargs)[1] is not None or hasattr(inputs_embeds, _IN_PLACE):
            return True
        # `past_key_values=None` is the first call of a loop
        return "past_key_values" in kwargs and kwargs.get("use_cache") is None and self._caches()

    def _caches(self) -> bool:
        """Whether the base model returns a cache if nobody says."""
        return bool(getattr(self.get_base_model().config, "use_cache", False))

    def _step(self, inputs: dict[str, Any]) -> Any:
        base_model: Any = self.get_base_model()
        inputs = {name: value for name, value in inputs.items() if value is not None}
        return_dict, feed = inputs.pop("return_dict", None), PromptFeed(self)
        where: Place | None = getattr(inputs.get("inputs_embeds"), _IN_PLACE, None)
        if where is not None:  # from prepare_inputs_for_generation
            output = base_model(return_dict=True, **inputs)
            if held_by(_cache_of(output)[1]) is None:
                feed.note(_cache_of(output)[1], where, None)
            return output if self._wants_dict(return_dict) else output.to_tuple()  # type: ignore[attr-defined]
        before = held_by(_cache_of(inputs)[1])
        where, ids = self._place_step(feed, inputs)
        keep = inputs.pop("logits_to_keep", 0) if where.order is not None else 0
        output = base_model(return_dict=True, **inputs)
        if where.order is not None:
            for name, value in output.items():
                output[name] = _put_back(value, where)
            columns = keep if isinstance(keep, torch.Tensor) else slice(-keep if keep else None, None)
            output["logits"] = output["logits"][:, columns]
        if not where.begins and ids is not None:
            text = getattr(before, "text", None)
            # rows of a cache may have been chosen since; one row is the one
            ids = None if text is None or len(text) + len(ids) > 2 else torch.cat([text[:, : where.seen], ids], dim=1)
        feed.note(_cache_of(output)[1], where, ids)
        return output if self._wants_dict(return_dict) else output.to_tuple()  # type: ignore[attr-defined]

    def _place_step(self, feed: PromptFeed, inputs: dict[str, Any]) -> tuple[Place, torch.Tensor | None]:
        """Give the new tokens their place: `inputs` become the base model's. The ids are returned, if there are some."""
        ids, text = inputs.pop("input_ids", None), inputs.pop("inputs_embeds", None)
        if (ids is None) == (text is None):
            raise ValueError(
                "A step takes the new tokens as input_ids [B, T] or inputs_embeds [B, T, H], one of the two."
            )
        if "shift_labels" in inputs:
            raise ValueError("shift_labels name columns as they stand; a step with a cache takes labels [B, T].")
        stored, new = _cache_of(inputs)[1], (ids if text is None else text).shape[1]
        mask = inputs.pop("attention_mask", None)
        where = feed.place(stored, new, mask)
        self._check_length(where.seen + new)  # type: ignore[operator]
        _check_positions(inputs.pop("position_ids", None), where)
        for name in ("cache_position", "task_ids"):
            inputs.pop(name, None)
        self._adjust_prompt_learning_kwargs(self.active_peft_config, kwargs=inputs)
        inputs.setdefault("use_cache", True)
        if where.mask is not None:
            inputs["attention_mask"] = where.mask
        if where.positions is not None and _takes(feed.base_model, "position_ids"):
            inputs["position_ids"] = where.positions[:, -where.now :]
        if "labels" in inputs:
            inputs["labels"] = _step_labels(inputs["labels"], where)
        if text is None and not where.begins:
            inputs["input_ids"] = ids if where.order_now is None else reorder(ids, where.order_now)
        else:
            inputs["inputs_embeds"] = feed.put_in(feed.embed(ids) if text is None else text, where)
        return where, ids

    def _note_unasked(self, output: Any, inputs: torch.Tensor | None, attention_mask: Any) -> None:
        """Note what a cache holds that nobody asked for; a packed batch gets one that nothing can be put behind.

        So a loop that relies on the base model's default is right, or is told.
        """
        if torch.compiler.is_compiling() or inputs is None or not hasattr(output, "past_key_values"):
            return
        stored = _cache_of(output)[1]
        if stored is None and self._caches():
            from transformers import DynamicCache

            output["past_key_values"] = stored = DynamicCache()
            refusal = "the call that it comes from ran packed and put nothing in: pass use_cache=True"
            note(stored, HeldPrompt(inputs.new_empty(0), refusal=refusal))
        elif stored is not None and (attention_mask is None or bool(attention_mask.all())):
            feed = PromptFeed(self)
            feed.note(stored, feed.place(None, inputs.shape[1], None), inputs if inputs.dim() == 2 else None)
        elif stored is not None:
            refusal = "the call that it comes from had pads and did not ask for it: pass use_cache=True"
            note(stored, HeldPrompt(inputs.new_empty(0), refusal=refusal))

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
        feed, stored = PromptFeed(self), _cache_of(kwargs)[1]
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
        _check_positions(kwargs.pop("position_ids", None), where)
        self._adjust_prompt_learning_kwargs(self.active_peft_config, kwargs=kwargs)
        prepare = self.get_base_model().prepare_inputs_for_generation
        return feed.prepare(prepare, where, text, input_ids, is_first_iteration=is_first_iteration, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """See PEFT's class. A cache of an earlier call may be given, with the whole text or with an attention mask over it.

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
        options = {name: value for name, value in kwargs.items() if name not in own}
        config = view._prepare_generation_config(kwargs.get("generation_config"), **options)[0]
        stored = _cache_of(kwargs)[1]
        _check_mode(view, config, kwargs)
        feed = self._feed_for(kwargs, config)
        prepare = view.prepare_inputs_for_generation
        view.prepare_inputs_for_generation = wraps(prepare)(partial(feed.step, prepare))
        _make_room(view, len(feed.prompt))
        _allow_candidates(view)
        output = self._generate(view, kwargs)
        if config.num_beams > 1:
            stored = stored if stored is not None else getattr(output, "past_key_values", None)
            if held_by(stored) is not None:
                refusal = "it has the rows that a beam search ran last, which are not the sequences that it returned"
                note(stored, replace(held_by(stored), refusal=refusal))
        if feed.first is not None and feed.first.order is not None and not isinstance(output, torch.Tensor):
            for name in ("hidden_states", "attentions"):
                if output.get(name) is not None:
                    output[name] = _put_back(output[name], feed.first)
        return output

    def _feed_for(self, kwargs: dict[str, Any], config: Any) -> PromptFeed:
        """Check what `generate` is given of the text, and make its mask as wide as the text."""
        feed, stored = PromptFeed(self), _cache_of(kwargs)[1]
        virtual, seen, feed.chunks = len(feed.prompt), feed.seen_by(stored) or 0, config.prefill_chunk_size
        ids = kwargs.get("input_ids") if kwargs.get("inputs") is None else kwargs["inputs"]
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
        feed.left_out = total - (ids.shape[1] if ids is not None else total * (embeds is None))
        feed.masked = mask is not None
        self._check_length(total)  # type: ignore[operator]
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
        f"{where.virtual} virtual tokens on). A text with a cache, or to generate from, has these positions alone: leave "
        "position_ids out, and give one text a row."
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
            f"generate was given {name} {tuple(value.shape)}, a value for each text token: there is none for the prompt."
        )


def _check_mode(view: Any, config: Any, kwargs: Mapping[str, Any]) -> None:
    """Raise a NotImplementedError for a way of decoding that is not known to be right behind a prompt."""
    from transformers import GenerationMixin
    from transformers.generation import GenerationMode

    mode = config.get_generation_mode(kwargs.get("assistant_model"))
    known = {"greedy_search", "sample", "beam_search", "beam_sample", "assisted_generation"}
    assisted = mode == GenerationMode.ASSISTED_GENERATION
    outputs = config.return_dict_in_generate and (config.output_hidden_states or config.output_attentions)
    own = getattr(view.generate, "__func__", None) is not GenerationMixin.generate
    paged = "paged" in {config.cache_implementation, kwargs.get("cache_implementation")}
    refused = {
        f"the generate that {type(view).__name__} has of its own": own,
        "custom_generate": kwargs.get("custom_generate") is not None,
        "cache_implementation='paged' (continuous batching)": paged,
        f"{mode.value} decoding": mode.value not in known,
        "use_mtp": assisted and config.use_mtp,
        "assistant_early_exit": assisted and config.assistant_early_exit is not None,
        f"speculation_type={config.speculation_type!r}": config.speculation_type is not None,
        "assisting another model": config.is_assistant,
        "output_hidden_states and output_attentions of assisted decoding": assisted and outputs,
        f"the states that {type(view).__name__} keeps outside of a cache of transformers (use_cache=False works)": (
            config.use_cache and not view._supports_default_dynamic_cache()
        ),
    }
    for what, asked in refused.items():
        if asked:
            raise NotImplementedError(
                f"generate behind a prompt is not known to be right with {what}. Greedy and sampled decoding, beam search, "
                "assisted decoding with an assistant_model and prompt lookup are."
            )


def _make_room(view: Any, virtual: int) -> None:
    """Let a view make caches that have room for the virtual tokens."""
    make = view._prepare_cache_for_generation

    @wraps(make)
    def with_room(
        generation_config: Any, model_kwargs: Any, generation_mode: Any, batch_size: int, max_cache_length: int
    ) -> Any:
        try:
            return make(generation_config, model_kwargs, generation_mode, batch_size, max_cache_length + virtual)
        except ImportError as error:
            name = generation_config.cache_implementation
            raise ValueError(f"cache_implementation={name!r} cannot be made here: {error}") from error

    view._prepare_cache_for_generation = with_room


def _allow_candidates(view: Any) -> None:
    """Let a view take candidates for assisted decoding only from where they do not depend on its own lengths."""
    get = view._get_candidate_generator

    @wraps(get)
    def known(*args: Any, **kwargs: Any) -> Any:
        from transformers.generation import candidate_generator as kinds

        candidates = get(*args, **kwargs)
        names = ("AssistedCandidateGenerator", "AssistedCandidateGeneratorDifferentTokenizers")
        names += ("UniversalSpeculativeDecodingGenerator", "PromptLookupCandidateGenerator")
        if type(candidates) not in {getattr(kinds, name) for name in names}:
            raise NotImplementedError(
                f"Assisted decoding with {type(candidates).__name__} is not known to be right behind a prompt. An "
                "assistant_model with a language modelling head of its own is, and so is prompt lookup."
            )
        return candidates

    view._get_candidate_generator = known


class PromptedEncoderDecoder(GuardedGeneration):
    """`generate` and calls with a cache, of an encoder-decoder whose encoder has a prompt."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """See PEFT's class.

        Raises:
            ValueError: `past_key_values` comes from another prompt.
        """
        feed = PromptFeed(self)
        _check_encoded(kwargs.get("past_key_values"), feed)
        output = super().forward(*args, **kwargs)
        _note_encoded(getattr(output, "past_key_values", None), feed)
        return output

    def generate(self, **kwargs: Any) -> Any:
        """See PEFT's class.

        Raises:
            ValueError: There is no text, or `past_key_values` comes from another prompt.
            NotImplementedError: The base model would generate without the prompt.
        """
        if self._adapters_disabled:
            return self._generate_unprompted(kwargs)
        view: Any = self._view()
        if getattr(view.generate, "__self__", None) is not view or kwargs.get("cache_implementation") == "paged":
            raise NotImplementedError("This way of generating would leave the prompt out.")
        feed = PromptFeed(self)
        _check_encoded(kwargs.get("past_key_values"), feed)
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
        where = Place(len(feed.prompt), True, 0, text.shape[1], mask)
        prepare = view.prepare_inputs_for_generation

        @wraps(prepare)
        def noting(*args: Any, **inputs: Any) -> dict[str, Any]:
            _note_encoded(inputs.get("past_key_values"), feed)
            return prepare(*args, **inputs)

        view.prepare_inputs_for_generation = noting
        with torch.no_grad():
            kwargs["inputs_embeds"] = feed.put_in(text, where)
        return self._generate(view, kwargs if mask is None else {**kwargs, "attention_mask": where.mask})


def _check_encoded(stored: Any, feed: PromptFeed) -> None:
    held = held_by(stored)
    if held is not None and not torch.equal(held.prompt, feed.prompt.detach().to(held.prompt.device)):
        raise ValueError(
            "past_key_values comes from another prompt than the active one, or the prompt was changed since. Begin with "
            "an empty cache."
        )


def _note_encoded(stored: Any, feed: PromptFeed) -> None:
    if stored is not None and held_by(stored) is None:
        note(stored, HeldPrompt(feed.prompt.detach().clone()))
