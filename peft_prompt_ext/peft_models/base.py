"""The common part of all tasks: adding, saving and loading adapters, disabling them, outputs without the prompt.

Shapes: B rows, P virtual tokens, T text tokens.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch

from .. import prompt_record
from ..config import PromptTuningExtConfig
from ..devices import load_offloaded
from ..quantization import dequantize_modules, keep_differentiable, new_modules, new_tables
from ..shared_prefix.precision import precision_of
from ..sizes import fill_sizes
from . import token_path
from .adapters import AdaptersMixin
from .decoding.feed import count_given
from .decoding.view import GuardedGeneration, unwrap
from .fit import check_base, is_covered, list_names, make_trainable, remember_base
from .peft_path import PeftPathMixin
from .position import check_decoder
from .tokens import cut_prompt


class PromptTuningMixin(GuardedGeneration, AdaptersMixin, PeftPathMixin):
    """The first base class of a task's model, before PEFT's class."""

    _gathered: Mapping[str, torch.Tensor] = {}
    _has_decoder: ClassVar[bool] = False  # beside an encoder, which gets the prompt
    _heads: ClassVar[tuple[str, ...]] = ()  # modules that PEFT trains together with the prompt

    def __new__(cls, model: Any = None, peft_config: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Build PEFT's own class unless the config is the plugin's (copying and unpickling pass no config)."""
        if peft_config is None or isinstance(peft_config, PromptTuningExtConfig):
            return super().__new__(cls)
        return cls.__bases__[-1](model, peft_config, *args, **kwargs)

    def __init__(self, model: Any, peft_config: Any, *args: Any, **kwargs: Any) -> None:
        token_path.check_task(model, peft_config.task_type)
        keep_differentiable(model)
        super().__init__(model, peft_config, *args, **kwargs)
        self._proved_token_paths: set[Any] = set()  # shared by the replicas of DataParallel

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """See PEFT's class of the task."""
        kwargs = self._name_arguments(args, kwargs)
        self._check_token_path(kwargs)
        seen = count_given(kwargs)
        if seen and not self._has_decoder:
            raise ValueError(
                f"The cache has {seen} tokens, so the prompt would come after them. {type(self).__name__} needs the "
                "whole text: leave the cache out, or pass an empty one."
            )
        text: Any = kwargs.get("input_ids") if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"]
        if (
            text is None
            or not self.active_adapter
            or self.predicts_next
            or getattr(self.active_peft_config, "virtual_columns", True)
        ):
            return super().forward(**kwargs)
        return_dict = kwargs.pop("return_dict", None)
        output = super().forward(return_dict=True, **kwargs)
        self._cut_prompt(output, text.shape[:2], self.active_peft_config.num_virtual_tokens)
        return output if self._wants_dict(return_dict) else output.to_tuple()

    def _cut_prompt(
        self, output: Any, text: Sequence[int], prompt: int, leave: str = "", kept: torch.Tensor | None = None
    ) -> None:
        names = [name for name in output if self._is_per_token(name) and "attentions" not in name and name != leave]
        cut_prompt(output, names, text, prompt, self.predicts_next, kept)

    def _check_token_path(self, inputs: Mapping[str, Any]) -> None:
        """Raise ValueError for inputs other than text, or a base model that uses ids for more than word embeddings.

        The proof runs once for each device and precision.
        """
        if self._adapters_disabled:
            return
        token_path.check_inputs(self.get_base_model(), inputs)
        decodes = self._has_decoder or any(name.startswith("decoder_") for name in inputs)
        words: Any = self.word_embeddings
        key = *precision_of(words), decodes
        if key not in self._proved_token_paths:
            token_path.prove(unwrap(self.get_base_model()), words, self._max_positions, decodes)
            self._proved_token_paths.add(key)

    def save_pretrained(self, save_directory: str, *args: Any, **kwargs: Any) -> None:
        """Save as in PEFT, and the record of each prompt's initialisation (`prompt_init.json`).

        Warns of trainable parameters that belong to no adapter, because they are not saved.
        """
        trained = (name for name, parameter in self.base_model.named_parameters() if parameter.requires_grad)
        unsaved = [name for name in trained if ".modules_to_save." not in name]
        if unsaved:
            warnings.warn(
                f"{list_names(unsaved)} can be trained but belong to no adapter, so they are not saved. Add their "
                "modules to the config's modules_to_save, or freeze them.",
                stacklevel=2,
            )
        self._gathered = kwargs.get("state_dict") or {}
        try:
            super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            self._gathered = {}

    def get_prompt_embedding_to_save(self, adapter_name: str) -> torch.Tensor:
        """Get the prompt [P, H]; from the gathered `state_dict` if there is one, because one process cannot gather."""
        gathered = self._gathered.get(f"prompt_encoder.{adapter_name}.embedding.weight")
        return super().get_prompt_embedding_to_save(adapter_name) if gathered is None else gathered.detach().cpu()

    def add_adapter(self, adapter_name: str, peft_config: Any, *args: Any, **kwargs: Any) -> None:
        """Add an adapter as in PEFT, with the base model's new modules in its `modules_to_save`.

        It is put into training by `set_adapter`; other adapters stay as they are.

        Raises:
            ValueError: The base model has no word embeddings, or the prompt cannot be initialised.
        """
        if isinstance(peft_config, PromptTuningExtConfig):
            check_decoder(self.base_model, peft_config)
            fill_sizes(peft_config, self.base_model)
        base_model, names = self.base_model, [*self._heads, *(peft_config.modules_to_save or [])]
        if not peft_config.inference_mode:  # the modules of a saved adapter are fixed
            new = [path for path in new_modules(base_model, bool(self._heads)) if not is_covered(path, names)]
            if new:
                peft_config.modules_to_save = [*(peft_config.modules_to_save or []), *new]
                names += new
            tables = [path for path in new_tables(base_model) if not is_covered(path, names)]
            if tables:
                warnings.warn(
                    f"The base model's {list_names(tables)} differs from its checkpoint: it is new, or was resized. A "
                    "prompt neither trains nor saves it, so a loaded prompt would get another one. Save the base "
                    "model and load it again, or add it to the config's modules_to_save.",
                    stacklevel=2,
                )
        dequantize_modules(base_model, names)
        load_offloaded(base_model, names)
        trained = [
            parameter for head in self._list_heads() for parameter in head.parameters() if parameter.requires_grad
        ]
        super().add_adapter(adapter_name, peft_config, *args, **kwargs)
        for parameter in trained:
            parameter.requires_grad = True
        for parameter in base_model.parameters(recurse=False):
            parameter.requires_grad = False  # PEFT freezes only parameters of submodules
        if not peft_config.inference_mode:
            remember_base(self, adapter_name)
        if not self.active_adapter:  # the last one was deleted
            self.set_adapter(adapter_name)
        elif adapter_name != self.active_adapter:  # DDP would wait for its gradient
            self.prompt_encoder[adapter_name].requires_grad_(False)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Run the base model with its own head; PEFT's method keeps the trained head, and needs generation."""
        heads = self._list_heads()
        before = [head.disable_adapters for head in heads]
        forward, disabled = self.forward, self._adapters_disabled
        try:
            for head in heads:
                head.enable_adapters(False)
            if self.active_adapter and hasattr(self.base_model, "prepare_inputs_for_generation"):
                with super().disable_adapter():
                    yield
            else:
                self.forward, self._adapters_disabled = self.base_model.forward, True  # type: ignore[method-assign]
                yield
        finally:
            self.forward, self._adapters_disabled = forward, disabled  # type: ignore[method-assign]
            for head, was_disabled in zip(heads, before, strict=True):
                head.enable_adapters(not was_disabled)

    def load_adapter(
        self, model_id: Any, adapter_name: str, is_trainable: bool = False, *args: Any, **kwargs: Any
    ) -> Any:
        """Load as in PEFT; with `is_trainable`, the prompt can be trained further."""
        if adapter_name not in self.peft_config:
            self._add_saved_adapter(str(model_id), adapter_name, kwargs)
        result = super().load_adapter(model_id, adapter_name, is_trainable, *args, **kwargs)
        record = prompt_record.read(str(model_id), **self._split_kwargs(kwargs)[0])
        check_base(self, adapter_name, str(model_id), (record or {}).get("base_model"))
        if is_trainable:
            make_trainable(self, adapter_name)
        return result

    def _add_saved_adapter(self, model_id: str, adapter_name: str, kwargs: dict[str, Any]) -> None:
        hub_kwargs, _ = self._split_kwargs(kwargs)
        config = PromptTuningExtConfig.from_pretrained(model_id, **hub_kwargs)
        config.inference_mode = True
        self.add_adapter(adapter_name, config)
