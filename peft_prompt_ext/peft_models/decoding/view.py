"""What a call of `generate` runs on: a view of the base model, a shallow copy of its own.

PEFT swaps a method of the base model while it generates, so that two calls at once disturb each other, and leaves
traces on it.
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
_LEFT = ("_compiled_call", "_last_compile_config", _LONGEST)  # what `generate` leaves on a model


class GuardedGeneration(PeftModel):
    """Refuses generation that would pass the prompt by: PEFT hands what it does not have itself to the base model."""

    _views: Views | None = None

    def __getattr__(self, name: str) -> Any:
        """See PEFT; a method of transformers' generation that is not known to be harmless is refused when called."""
        value = super().__getattr__(name)
        if name in _methods_of_generation() and callable(value) and not self._adapters_disabled:
            return partial(_refuse, name)
        return value

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """See PEFT; of a model whose task has no text to generate there is the base model alone."""
        return super().generate(*args, **kwargs) if self._adapters_disabled else _refuse("generate")

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
        return self._views.make(unwrapped(self.get_base_model()), self.generation_config)

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


def unwrapped(base_model: Any) -> Any:
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
        f"{name} of the base model would leave the prompt out. Use generate with task_type CAUSAL_LM or SEQ_2_SEQ_LM, "
        "or call it inside disable_adapter() for the base model alone."
    )
