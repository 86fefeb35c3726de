"""Views: each call of `generate` runs on its own shallow copy of the base model.

PEFT replaces a method of the base model during the call, so that calls in two threads affect each other.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial, wraps
from typing import Any

from peft import PeftModel

from .held_prompt import check_hold_no_prompt


_LONGEST = "_previous_max_cache_length"
_TRACES = ("_compiled_call", "_last_compile_config", _LONGEST)  # attributes that `generate` sets on a model


class GuardedGeneration(PeftModel):
    """Raises for generation without the prompt: PEFT gets missing methods from the base model."""

    _views: Views | None = None

    def __getattr__(self, name: str) -> Any:
        """See PEFT; a method of transformers that generates raises when called."""
        value = super().__getattr__(name)
        if name in _list_generation_methods() and callable(value) and not self._adapters_disabled:
            return partial(_refuse, name)
        return value

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """See PEFT; for tasks without generation, only the base model can generate."""
        return super().generate(*args, **kwargs) if self._adapters_disabled else _refuse("generate")

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """See PEFT; inside, a cache with a prompt raises."""
        with super().disable_adapter():
            forward = self.base_model.forward

            @wraps(forward)
            def unprompted(*args: Any, **kwargs: Any) -> Any:
                check_hold_no_prompt([*args, *kwargs.values()])
                return forward(*args, **kwargs)

            self.forward = unprompted  # type: ignore[method-assign]
            yield

    def _view(self) -> Any:
        """Make a view of the base model, with this model's `generation_config`, for one call of `generate`."""
        if self._views is None:
            self._views = Views()
        return self._views.make(unwrap(self.get_base_model()), self.generation_config)

    def _generate(self, view: Any, kwargs: dict[str, Any]) -> Any:
        try:
            return view.generate(**kwargs)
        finally:
            self._views.keep(view)  # type: ignore[union-attr]

    def _generate_unprompted(self, kwargs: dict[str, Any]) -> Any:
        check_hold_no_prompt(kwargs.values())
        return self._generate(self._view(), kwargs)


class Views:
    """Makes shallow copies of a base model, and stores the attributes that `generate` sets on them.

    Modules are shared. One more copy has the compiled calls, so that a new view does not compile again.
    """

    def __init__(self) -> None:
        self._kept: Any = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle without the stored attributes."""
        return Views, ()

    def make(self, base_model: Any, generation_config: Any) -> Any:
        """Copy a base model, and set its generation config."""
        kept, view = self._kept, _copy(base_model)
        if kept is None or _list_attributes(kept) != _list_attributes(base_model):
            kept = self._kept = _copy(base_model)
        view.generation_config = generation_config
        view.get_compiled_call = kept.get_compiled_call
        if _LONGEST in kept.__dict__:
            setattr(view, _LONGEST, getattr(kept, _LONGEST))
        return view

    def keep(self, view: Any) -> None:
        """Store the length of a view's static cache, so that the next one fits the compiled call."""
        if _LONGEST in view.__dict__:
            setattr(self._kept, _LONGEST, getattr(view, _LONGEST))


def _list_attributes(model: Any) -> dict[str, int]:
    """List the identities of a model's attributes, without those that `generate` sets."""
    return {key: id(value) for key, value in model.__dict__.items() if key not in _TRACES}


def _copy(base_model: Any) -> Any:
    view = copy.copy(base_model)
    for name in _TRACES:
        view.__dict__.pop(name, None)
    return view


def unwrap(base_model: Any) -> Any:
    """Get the model inside torch.compile's wrapper; the wrapper's `generate` would run on that model."""
    return getattr(base_model, "_orig_mod", base_model)


# methods that neither run the base model nor read its inputs
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
def _list_generation_methods() -> frozenset[str]:
    """List transformers' methods that generate with the model."""
    from transformers import GenerationMixin

    names = {name for kind in GenerationMixin.__mro__[:-1] for name, value in vars(kind).items() if callable(value)}
    return frozenset(name for name in names | {"get_compiled_call"} if not name.startswith(_HARMLESS))


def _refuse(name: str, *args: Any, **kwargs: Any) -> Any:
    raise NotImplementedError(
        f"{name} of the base model would leave the prompt out. Use generate with task_type CAUSAL_LM or SEQ_2_SEQ_LM; "
        "for the base model alone, call it inside disable_adapter()."
    )
