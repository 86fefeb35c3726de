"""Several prompts in one model: which is active, which are in training, and what a prompt cannot do."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper

from .. import _seam


_IN_WEIGHTS = "a prompt changes no weights, so there are none to {}. model.get_base_model() is the model without it."
_NOT_OF_PROMPTS = {
    "merge_and_unload": _IN_WEIGHTS.format("merge"),
    "merge_adapter": _IN_WEIGHTS.format("merge"),
    "unmerge_adapter": _IN_WEIGHTS.format("restore"),
    "unload": _IN_WEIGHTS.format("take out"),
    "add_weighted_adapter": "a weighted sum of prompts is no prompt for their tasks. Give each row its own with "
    "adapter_names, or begin a new prompt from others with prompt_tuning_init='TRANSFER'.",
    "disable_adapter_layers": "a prompt has no layers. Use `with model.disable_adapter():`.",
    "enable_adapter_layers": "a prompt has no layers. Use `with model.disable_adapter():` for the base model alone.",
}


class NotOfPromptsError(AttributeError, NotImplementedError):
    """A method of PEFT's other adapters that prompts cannot have; `hasattr` is False for it, as in PEFT."""


class AdaptersMixin(PeftModel):
    """The adapters of a model: each is a prompt, and its own copy of each module in `modules_to_save`."""

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make an adapter the active one, and the only one in training (none with `inference_mode`).

        Raises:
            ValueError: It is unknown, or more than one.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        if len(names) != 1 or names[0] not in self.peft_config:
            raise ValueError(
                f"set_adapter got {adapter_name!r}: one prompt stands in front of a text. Name one of "
                f"{list(self.peft_config)}; adapter_names in a call gives each row its own."
            )
        super().set_adapter(names[0], inference_mode)
        for name, prompt in self.prompt_encoder.items():
            prompt.requires_grad_(name == names[0] and not inference_mode)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Put adapters beside the active one into training, for batches whose rows name theirs, or take them out.

        Raises:
            ValueError: A name is unknown.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        for name in names:
            if name not in self.peft_config:
                raise ValueError(f"set_requires_grad got {name!r}; the model's adapters are {list(self.peft_config)}.")
            self.prompt_encoder[name].requires_grad_(requires_grad)
            for head in self._wrapped_heads():
                if name in head.modules_to_save:
                    head.modules_to_save[name].requires_grad_(requires_grad)

    def _check_in_training(self, names: Sequence[str]) -> None:
        """Raise ValueError if a training batch names an adapter that is to be trained and would get no gradient."""
        if not self.training or not torch.is_grad_enabled() or set(names) == {self.active_adapter}:
            return
        named = sorted(set(names) & set(self.peft_config))
        for name in named:
            in_training = any(parameter.requires_grad for parameter in self.prompt_encoder[name].parameters())
            if not in_training and not self.peft_config[name].inference_mode:
                raise ValueError(
                    f"A training batch names the adapter {name!r}, which is not in training: only the active one is "
                    f"({self.active_adapter!r}). Call model.set_requires_grad({named}) before the "
                    "optimizer is made."
                )

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter; if it was active another one becomes it. Without any, one has to be added before a call.

        Raises:
            ValueError: It is unknown.
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
        for head in self._wrapped_heads():
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
        """The base model, also where no adapter is left."""
        if not torch.compiler.is_compiling():
            _seam.prepare_trainer()  # a Trainer asks for the base model when it is built
        return self.base_model

    def __getattr__(self, name: str) -> Any:
        """See PEFT; what its other methods have and a prompt cannot have says so."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in _NOT_OF_PROMPTS:
                raise NotOfPromptsError(f"{name}: {_NOT_OF_PROMPTS[name]}", name=name, obj=self) from None
            raise

    def _wrapped_heads(self) -> list[ModulesToSaveWrapper]:
        return [module for module in self.base_model.modules() if isinstance(module, ModulesToSaveWrapper)]
