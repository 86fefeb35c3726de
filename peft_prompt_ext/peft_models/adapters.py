"""Several prompts in one model: the active one, the ones in training, and methods that prompts do not support."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper

from .. import _seam


_NO_WEIGHTS = "a prompt changes no weights, so there are none to {}. model.get_base_model() is the model without it."
_UNSUPPORTED = {
    "merge_and_unload": _NO_WEIGHTS.format("merge"),
    "merge_adapter": _NO_WEIGHTS.format("merge"),
    "unmerge_adapter": _NO_WEIGHTS.format("restore"),
    "unload": _NO_WEIGHTS.format("remove"),
    "add_weighted_adapter": "a weighted sum of prompts solves none of their tasks. Select a prompt for each row "
    "with adapter_names, or initialise a new prompt from others with prompt_tuning_init='TRANSFER'.",
    "disable_adapter_layers": "a prompt has no layers. Use `with model.disable_adapter():`.",
    "enable_adapter_layers": "a prompt has no layers. Use `with model.disable_adapter():` for the base model alone.",
}


class NotOfPromptsError(AttributeError, NotImplementedError):
    """A method of other adapters that prompts do not support. `hasattr` is False for it, as in PEFT."""


class AdaptersMixin(PeftModel):
    """The adapters of a model: each has a prompt, and its own copy of each module in `modules_to_save`."""

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Activate an adapter, and train only this one (none with `inference_mode`).

        Raises:
            ValueError: The adapter is unknown, or more than one is given.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        if len(names) != 1 or names[0] not in self.peft_config:
            raise ValueError(
                f"set_adapter got {adapter_name!r}; wanted one of {list(self.peft_config)}. To select an adapter for "
                "each row, pass adapter_names to the call."
            )
        super().set_adapter(names[0], inference_mode)
        for name, prompt in self.prompt_encoder.items():
            prompt.requires_grad_(name == names[0] and not inference_mode)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Turn training of adapters on or off, also of inactive ones, for batches with `adapter_names`.

        Raises:
            ValueError: A name is unknown.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        for name in names:
            if name not in self.peft_config:
                raise ValueError(f"set_requires_grad got {name!r}; the model's adapters are {list(self.peft_config)}.")
            self.prompt_encoder[name].requires_grad_(requires_grad)
            for head in self._list_heads():
                if name in head.modules_to_save:
                    head.modules_to_save[name].requires_grad_(requires_grad)

    def _check_in_training(self, names: Sequence[str]) -> None:
        """Raise ValueError if a training batch names a trainable adapter that would get no gradient."""
        if not self.training or not torch.is_grad_enabled() or set(names) == {self.active_adapter}:
            return
        named = sorted(set(names) & set(self.peft_config))
        for name in named:
            in_training = any(parameter.requires_grad for parameter in self.prompt_encoder[name].parameters())
            if not in_training and not self.peft_config[name].inference_mode:
                raise ValueError(
                    f"A training batch names the adapter {name!r}, which is not in training; the active adapter is "
                    f"{self.active_adapter!r}. Call model.set_requires_grad({named}) before you create the optimizer."
                )

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter. If it was active, the first of the others becomes active.

        Raises:
            ValueError: The adapter is unknown.
        """
        if adapter_name not in self.peft_config:
            raise ValueError(
                f"delete_adapter got {adapter_name!r}; the model's adapters are {list(self.peft_config)}."
            )
        others = [name for name in self.peft_config if name != adapter_name]
        if others and adapter_name == self.active_adapter:
            warnings.warn(f"{adapter_name!r} was active and is deleted; {others[0]!r} is active now.", stacklevel=2)
            self.set_adapter(others[0])
        for part in (self.peft_config, self.prompt_encoder, self.prompt_tokens):
            del part[adapter_name]
        for head in self._list_heads():
            head.delete_adapter(adapter_name, [self.active_adapter] if others else None)
        if not others:
            self.active_adapter = []  # type: ignore[assignment]

    @property
    def active_peft_config(self) -> Any:
        """See PEFT.

        Raises:
            ValueError: The last adapter was deleted.
        """
        if not self.active_adapter:
            raise ValueError(
                "The model has no adapter: the last one was deleted. Add or load one, or use model.get_base_model()."
            )
        return self.peft_config[self.active_adapter]

    def get_base_model(self) -> Any:
        """Get the base model, also without an adapter."""
        if not torch.compiler.is_compiling():
            _seam.prepare_trainer()  # every Trainer calls this method in its __init__
        return self.base_model

    def __getattr__(self, name: str) -> Any:
        """See PEFT; for a method that prompts do not support, the error says why."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in _UNSUPPORTED:
                raise NotOfPromptsError(f"{name}: {_UNSUPPORTED[name]}", name=name, obj=self) from None
            raise

    def _list_heads(self) -> list[ModulesToSaveWrapper]:
        return [module for module in self.base_model.modules() if isinstance(module, ModulesToSaveWrapper)]
