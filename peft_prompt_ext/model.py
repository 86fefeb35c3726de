"""PEFT's model classes with what a PromptTuningExtConfig adds: length check, targets, the record, loading to train.

The classes keep PEFT's names, because AutoPeftModel compares names; with any other config they build PEFT's own class.

Shapes: B batch, P virtual tokens, T text tokens, C labels.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from inspect import signature
from pathlib import Path
from typing import Any, ClassVar, TypeGuard

import peft
import torch
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper

from . import _record
from .config import PromptTuningExtConfig
from .frozen_backbone import dequantize_modules, keep_differentiable
from .padding import pads_behind, real_first, real_last, reorder
from .shared_prefix import SharedPrefixMixin
from .tokens import (
    IGNORE_INDEX,
    OF_VIRTUAL_TOKENS,
    check_mask,
    column_behind,
    cut_prompt,
    positions_behind,
    put_back,
    widen,
)


class PromptTuningMixin(PeftModel):
    """Goes in front of PEFT's model class of a task."""

    _gathered: Mapping[str, torch.Tensor] = {}
    _heads: ClassVar[tuple[str, ...]] = ()  # modules that PEFT trains beside the prompt
    _token_inputs: ClassVar[Mapping[str, int]] = OF_VIRTUAL_TOKENS
    _row_inputs: ClassVar[set[str]] = {"labels"}  # not of each token, whatever their shape
    _row_outputs: ClassVar[set[str]] = {"pooler_output"}
    _column_inputs: ClassVar[tuple[str, ...]] = ()  # each names a column of the text

    def __new__(cls, model: Any = None, peft_config: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Build PEFT's own class unless the config is the plugin's (no config at all: a copy is being made)."""
        if peft_config is None or isinstance(peft_config, PromptTuningExtConfig):
            return super().__new__(cls)
        return cls.__bases__[-1](model, peft_config, *args, **kwargs)

    def __init__(self, model: Any, peft_config: Any, *args: Any, **kwargs: Any) -> None:
        keep_differentiable(model)
        dequantize_modules(model, [*self._heads, *(peft_config.modules_to_save or [])])
        super().__init__(model, peft_config, *args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """See PEFT's class of the task.

        Raises:
            ValueError: The text has no room behind the prompt, or nobody knows what the prompt has of an argument that
                is as long as the text.
        """
        inputs = {**dict(zip(signature(super().forward).parameters, args, strict=False)), **kwargs} if args else kwargs
        return self._prompted_forward({name: value for name, value in inputs.items() if value is not None})

    def _prompted_forward(self, inputs: dict[str, Any]) -> Any:
        """Run the base model on the prompt and the text behind it; no pad stands between them."""
        if "adapter_names" in inputs:
            raise ValueError(f"{type(self).__name__} takes no adapter_names: set_adapter chooses one for all rows.")
        return_dict = inputs.pop("return_dict", None)
        tokens, others = self._behind_prompt(inputs)
        order = self._order(tokens.get("attention_mask"))
        for name in filter(others.__contains__, self._column_inputs):
            others[name] = column_behind(others[name], self.active_peft_config.num_virtual_tokens, order)
        if order is None:
            asked = {} if return_dict is None else {"return_dict": return_dict}
            return self._base_forward({**others, **tokens}, **asked)
        tokens = {name: reorder(value, order.to(value.device)) for name, value in tokens.items()}
        if "position_ids" in self._base_arguments and "position_ids" not in tokens:
            if bool((tokens["attention_mask"][:, 0] == 0).any()):
                tokens["position_ids"] = _positions(tokens["attention_mask"])
        output = self._base_forward({**others, **tokens}, return_dict=True)
        put_back(output, filter(self._is_of_tokens, output), order)
        return output if self._wants_dict(return_dict) else output.to_tuple()

    def _base_forward(self, inputs: dict[str, Any], **options: Any) -> Any:
        return self.get_base_model()(**inputs, **options)

    def _behind_prompt(self, inputs: dict[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Inputs of each token, [B, P+T, ...], and the others."""
        ids, text = inputs.pop("input_ids", None), inputs.pop("inputs_embeds", None)
        if ids is None and text is None:
            raise ValueError("The model got neither input_ids nor inputs_embeds: it needs a text.")
        rows, columns = (ids if text is None else text).shape[:2]
        self._check_length(columns)
        mask, prompt = inputs.get("attention_mask"), self.active_peft_config.num_virtual_tokens
        check_mask(mask, rows, columns)
        positions = inputs.pop("position_ids", None)
        inputs.pop("task_ids", None)  # of other prompt methods
        self._drop_unused(inputs)
        tokens = widen(inputs, self._token_inputs, self._row_inputs, (rows, columns), prompt)
        if positions is not None:
            positions = positions_behind(positions, mask, rows, prompt)
            if "position_ids" in self._base_arguments:
                tokens["position_ids"] = positions
        text = self.word_embeddings(ids) if text is None else text  # type: ignore[misc]
        virtual = self.get_prompt(batch_size=rows).to(text.device, text.dtype)
        tokens["inputs_embeds"] = torch.cat([virtual, text], dim=1)
        return tokens, inputs

    def _drop_unused(self, inputs: dict[str, Any]) -> None:
        """Drop what a tokenizer gives and the base model does not read."""
        if "token_type_ids" in inputs and "token_type_ids" not in self._base_arguments:
            warnings.warn("The base model has no token types: token_type_ids are left out.", stacklevel=2)
            del inputs["token_type_ids"]
        if "attention_mask" in inputs and "attention_mask" not in self._base_arguments:
            if _is_padded(inputs.pop("attention_mask")):
                raise ValueError(
                    f"attention_mask has pads, and {type(self.get_base_model()).__name__} takes no mask: its tokens "
                    "see every pad. Make batches of texts of one length, or leave the mask out and have pads read."
                )

    @cached_property
    def _base_arguments(self) -> set[str]:
        return set(signature(self.get_base_model().forward).parameters)

    def _order(self, mask: torch.Tensor | None) -> torch.Tensor | None:
        """Columns of the mask [B, P+T] as the base model should see them; None: as they are."""
        return real_first(mask) if _is_padded(mask) and not pads_behind(mask) else None

    def _is_of_tokens(self, name: str) -> bool:
        """Whether an output's field may have something for each token of the text."""
        return name not in self._row_outputs

    def _wants_dict(self, return_dict: bool | None) -> bool:
        return return_dict if return_dict is not None else getattr(self.config, "return_dict", True)

    def _check_length(self, text_tokens: int, virtual_tokens: int | None = None) -> None:
        limit = self._max_positions
        prompt = virtual_tokens if virtual_tokens is not None else self.active_peft_config.num_virtual_tokens
        if limit is not None and prompt + text_tokens > limit:
            raise ValueError(
                f"{prompt} virtual tokens and {text_tokens} text tokens make {prompt + text_tokens}; the base model "
                f"has {limit} positions. Truncate the text to {max(limit - prompt, 0)} tokens or lower "
                "num_virtual_tokens."
            )

    @cached_property
    def _max_positions(self) -> int | None:
        return max_positions(self.get_base_model())

    def save_pretrained(self, save_directory: str, *args: Any, **kwargs: Any) -> None:
        """Save as PEFT does, and beside each adapter the record of how its prompt began (`prompt_init.json`)."""
        self._gathered = kwargs.get("state_dict") or {}
        try:
            super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            self._gathered = {}
        if not kwargs.get("is_main_process", True):
            return
        for name in kwargs.get("selected_adapters") or list(self.peft_config):
            config = self.peft_config[name]
            if isinstance(config, PromptTuningExtConfig) and config.init_record is not None:
                _record.write(save_directory if name == "default" else Path(save_directory, name), config)

    def get_prompt_embedding_to_save(self, adapter_name: str) -> torch.Tensor:
        """The prompt [P, H], from the gathered state if there is one: the process that saves cannot gather alone."""
        gathered = self._gathered.get(f"prompt_encoder.{adapter_name}.embedding.weight")
        return super().get_prompt_embedding_to_save(adapter_name) if gathered is None else gathered.detach().cpu()

    def add_adapter(self, adapter_name: str, peft_config: Any, *args: Any, **kwargs: Any) -> None:
        """Add an adapter as PEFT does; it is not in training before `set_adapter`, and no other one leaves it.

        Raises:
            ValueError: The base model has no word embeddings, or the prompt cannot be initialised.
        """
        if isinstance(peft_config, PromptTuningExtConfig):
            fill_sizes(peft_config, self.base_model)
        heads = [module for module in self.modules() if isinstance(module, ModulesToSaveWrapper)]
        trained = [parameter for head in heads for parameter in head.parameters() if parameter.requires_grad]
        super().add_adapter(adapter_name, peft_config, *args, **kwargs)
        for parameter in trained:
            parameter.requires_grad = True
        if not self.active_adapter:  # the last one was deleted
            self.set_adapter(adapter_name, inference_mode=peft_config.inference_mode)
        elif adapter_name != self.active_adapter:
            self.prompt_encoder[adapter_name].requires_grad_(False)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """The base model alone, with its own head; PEFT's leaves the trained one, and raises without generation."""
        heads = [module for module in self.modules() if isinstance(module, ModulesToSaveWrapper)]
        before = [head.disable_adapters for head in heads]
        forward, disabled = self.forward, self._adapters_disabled
        try:
            for head in heads:
                head.enable_adapters(False)
            if hasattr(self.base_model, "prepare_inputs_for_generation"):
                with super().disable_adapter():
                    yield
            else:
                self.forward, self._adapters_disabled = self.base_model.forward, True  # type: ignore[method-assign]
                yield
        finally:
            self.forward, self._adapters_disabled = forward, disabled  # type: ignore[method-assign]
            for head, was in zip(heads, before, strict=True):
                head.enable_adapters(not was)

    def load_adapter(
        self, model_id: Any, adapter_name: str, is_trainable: bool = False, *args: Any, **kwargs: Any
    ) -> Any:
        """Load as PEFT does; a prompt may be loaded to be trained further as well."""
        if adapter_name not in self.peft_config:
            self._add_saved_adapter(str(model_id), adapter_name, kwargs)
        result = super().load_adapter(model_id, adapter_name, is_trainable, *args, **kwargs)
        if is_trainable:
            make_trainable(self, adapter_name)
        return result

    def _add_saved_adapter(self, model_id: str, adapter_name: str, kwargs: dict[str, Any]) -> None:
        hub_kwargs, _ = self._split_kwargs(kwargs)
        config = PromptTuningExtConfig.from_pretrained(model_id, **hub_kwargs)
        config.inference_mode = True
        self.add_adapter(adapter_name, config)


class PeftModelForCausalLM(SharedPrefixMixin, PromptTuningMixin, peft.PeftModelForCausalLM):
    """Output: as PEFT's, logits [B, P+T, V]; see the config's `train_logits`. A packed batch returns no cache."""

    _packed_arguments: ClassVar[set[str]] = {"logits_to_keep", "num_items_in_batch", "shift_labels"}
    _token_inputs: ClassVar = {**OF_VIRTUAL_TOKENS, "labels": IGNORE_INDEX, "shift_labels": IGNORE_INDEX}
    _row_inputs: ClassVar[set[str]] = set()

    @staticmethod
    def _packed_forward(base_model: Any, embeds: torch.Tensor, layout: Any, **options: Any) -> Any:
        from .shared_prefix.forward import causal_lm

        return causal_lm(base_model, embeds, layout, **options)

    def _packed_options(self) -> dict[str, Any]:
        train_logits = getattr(self.active_peft_config, "train_logits", "all")  # a stock config has no such field
        return {"supervised": self.training and train_logits == "supervised"}

    def _prompted_forward(self, inputs: dict[str, Any]) -> Any:
        if inputs.get("past_key_values") is not None:
            return peft.PeftModelForCausalLM.forward(self, **inputs)
        mask, keep = inputs.get("attention_mask"), inputs.get("logits_to_keep", 0)
        if not _is_padded(mask):
            return super()._prompted_forward(inputs)
        for name in ("labels", "shift_labels"):
            if name in inputs and inputs[name].shape == mask.shape:
                inputs[name] = inputs[name].masked_fill(mask == 0, IGNORE_INDEX)
        if pads_behind(mask) or (not isinstance(keep, torch.Tensor) and keep == 0):
            return super()._prompted_forward(inputs)
        # columns are named as the caller has them: all of them come back, then those
        return_dict, _ = inputs.pop("return_dict", None), inputs.pop("logits_to_keep")
        columns = keep if isinstance(keep, torch.Tensor) else slice(-keep, None)
        output = super()._prompted_forward({**inputs, "return_dict": True})
        if "logits" in output:
            output["logits"] = output["logits"][:, columns]
        return output if self._wants_dict(return_dict) else output.to_tuple()

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """See PEFT's class; what would give wrong tokens is refused before the first one.

        Raises:
            ValueError: The text has no room behind the prompt, or a padded batch is to be read in chunks.
        """
        inputs = args[0] if args else kwargs.get("input_ids", kwargs.get("inputs"))
        if inputs is not None and not self._adapters_disabled:
            self._check_length(inputs.shape[1])
            self._check_chunks(kwargs)
        return super().generate(*args, **kwargs)

    def _check_chunks(self, kwargs: Mapping[str, Any]) -> None:
        config: Any = kwargs.get("generation_config") or getattr(self.base_model, "generation_config", None)
        size = kwargs.get("prefill_chunk_size", getattr(config, "prefill_chunk_size", None))
        if size is not None and _is_padded(kwargs.get("attention_mask")):
            raise ValueError(
                f"prefill_chunk_size ({size}) needs rows without pads: pads are moved before the prompt, and that "
                "across chunks. Leave it out, or generate for rows of one length."
            )

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """See PEFT's class; pads are moved before the prompt, so that none stands between it and the text."""
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        mask = inputs.get("attention_mask")  # [B, P + text so far]
        if not _is_padded(mask):
            return inputs
        order = real_last(mask)
        inputs["attention_mask"] = mask.gather(1, order)
        if inputs.get("inputs_embeds") is not None:
            inputs["inputs_embeds"] = reorder(inputs["inputs_embeds"], order)
        new = inputs["inputs_embeds"] if inputs.get("input_ids") is None else inputs["input_ids"]
        if "position_ids" in signature(self.get_base_model().forward).parameters:
            inputs["position_ids"] = _positions(inputs["attention_mask"])[:, -new.shape[1] :]
        return inputs


class PeftModelForSequenceClassification(
    SharedPrefixMixin, PromptTuningMixin, peft.PeftModelForSequenceClassification
):
    """Output: as PEFT's, logits [B, C]. A decoder reads them off the last real token; PEFT reads them off a pad."""

    _packed_arguments: ClassVar[set[str]] = {"num_items_in_batch"}
    _heads_of_rows: ClassVar[set[str]] = {"score"}
    _row_outputs: ClassVar[set[str]] = {"logits"}
    _heads: ClassVar[tuple[str, ...]] = ("classifier", "score")

    @staticmethod
    def _packed_forward(base_model: Any, embeds: torch.Tensor, layout: Any, **options: Any) -> Any:
        from .shared_prefix.forward import sequence_classification

        return sequence_classification(base_model, embeds, layout, **options)

    def _mixed_options(self, names: list[str]) -> dict[str, Any]:
        return {"adapter_names": names}

    def forward(self, input_ids: torch.Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """See PEFT's class; without a mask a decoder finds its last token by the pad token, as it does alone."""
        if input_ids is not None and not args and kwargs.get("attention_mask") is None and self._pools_last:
            kwargs["attention_mask"] = self._mask_of_text(input_ids)
        return super().forward(input_ids, *args, **kwargs)

    @cached_property
    def _pools_last(self) -> bool:
        return hasattr(self.get_base_model(), "score")

    def _mask_of_text(self, input_ids: torch.Tensor) -> torch.Tensor | None:
        """Mask [B, T] without the pads behind each text; None if there are none."""
        pad = self.config.get_text_config().pad_token_id
        if pad is None:
            return None
        real = (input_ids != pad).long()
        mask = real.flip(1).cummax(1).values.flip(1)
        return None if bool(mask.all()) else mask

    def _order(self, mask: torch.Tensor | None) -> torch.Tensor | None:
        # without input_ids a decoder pools the last column: let it be a real token
        return real_last(mask) if _is_padded(mask) and self._pools_last else super()._order(mask)


def _is_padded(mask: Any) -> TypeGuard[torch.Tensor]:
    return isinstance(mask, torch.Tensor) and mask.dim() == 2 and not bool(mask.all())


def _positions(attention_mask: torch.Tensor) -> torch.Tensor:
    """Number of each real token in its row, [B, T]; pads have 0."""
    return (attention_mask.long().cumsum(1) - 1).clamp(min=0)


class PeftModelForSeq2SeqLM(PromptTuningMixin, peft.PeftModelForSeq2SeqLM):
    """Output: as PEFT's, logits of the decoder, which has no prompt."""

    def _prompted_forward(self, inputs: dict[str, Any]) -> Any:
        if "encoder_outputs" in inputs:
            raise ValueError(
                "encoder_outputs stand for a text that the encoder has read, where no prompt can be put in front. "
                "Give input_ids; to read a text once for many outputs, use generate."
            )
        return super()._prompted_forward(inputs)

    def _is_of_tokens(self, name: str) -> bool:
        return name.startswith(("encoder_", "cross_"))

    def generate(self, **kwargs: Any) -> Any:
        """See PEFT's class; pads in front of the text go behind it."""
        ids, mask = kwargs.get("input_ids"), kwargs.get("attention_mask")
        if ids is not None and not self._adapters_disabled:
            check_mask(mask, *ids.shape)
            if _is_padded(mask) and not pads_behind(mask):
                order = real_first(mask)
                moved = ("input_ids", "attention_mask")
                kwargs.update({name: reorder(kwargs[name], order.to(kwargs[name].device)) for name in moved})
        return super().generate(**kwargs)


class PeftModelForFeatureExtraction(PromptTuningMixin, peft.PeftModelForFeatureExtraction):
    """Output: as PEFT's, hidden states [B, P+T, H]."""


class OfTextMixin(PromptTuningMixin):
    """Outputs are [B, T, ...], one for each text token."""

    def _prompted_forward(self, inputs: dict[str, Any]) -> Any:
        return_dict = inputs.pop("return_dict", None)
        text = inputs.get("inputs_embeds", inputs.get("input_ids"))
        output = super()._prompted_forward({**inputs, "return_dict": True})
        cut_prompt(output, text.shape[:2], self.active_peft_config.num_virtual_tokens)  # type: ignore[union-attr]
        return output if self._wants_dict(return_dict) else output.to_tuple()


class PeftModelForTokenClassification(OfTextMixin, peft.PeftModelForTokenClassification):
    """Output: logits [B, T, C], one for each text token; PEFT returns P+T of them and cannot take labels [B, T]."""

    _heads: ClassVar[tuple[str, ...]] = ("classifier", "score")
    _token_inputs: ClassVar[Mapping[str, int]] = {**OF_VIRTUAL_TOKENS, "labels": IGNORE_INDEX}
    _row_inputs: ClassVar[set[str]] = set()


class PeftModelForQuestionAnswering(OfTextMixin, peft.PeftModelForQuestionAnswering):
    """Output: start and end logits [B, T], one for each text token; PEFT returns P+T of them.

    `start_positions` and `end_positions` [B] count text tokens from 0.
    """

    _heads: ClassVar[tuple[str, ...]] = ("qa_outputs",)
    _column_inputs: ClassVar[tuple[str, ...]] = ("start_positions", "end_positions", "cls_index")


def make_trainable(model: PeftModel, adapter_name: str) -> None:
    """Make a loaded prompt and its `modules_to_save` parameters to train, as `is_trainable=True` does for LoRA."""
    model.peft_config[adapter_name].inference_mode = False
    model.prompt_encoder[adapter_name].requires_grad_(True)
    if adapter_name in model.active_adapters:
        model.set_adapter(adapter_name)  # also turns on the gradients of modules_to_save


def fill_sizes(config: PromptTuningExtConfig, base_model: Any) -> None:
    """Fill in the sizes that PEFT asks for where the base model's config has names for them that PEFT does not know.

    A prompt needs none but its width, which comes from the word embeddings.

    Raises:
        ValueError: The base model has no vocabulary.
    """
    sizes = base_model.config.get_text_config()
    if getattr(sizes, "vocab_size", None) is None:
        raise ValueError(
            f"{type(base_model).__name__} has no vocabulary (its config has no vocab_size), so no word embeddings "
            "that a prompt could stand beside. Prompt tuning needs a transformers model with word embeddings."
        )
    config.token_dim = config.token_dim or 0
    for name, name_there in (("num_layers", "num_hidden_layers"), ("num_attention_heads", "num_attention_heads")):
        value = getattr(config, name) or getattr(sizes, name_there, None)
        setattr(config, name, value if isinstance(value, int) else 1)


def max_positions(base_model: Any) -> int | None:
    """How many tokens the base model has positions for; None if its positions are relative and without end."""
    config = base_model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and limit <= 0:  # XLNet's way to say that there is none
        return None
    for name, module in base_model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return module.num_embeddings - module.padding_idx - 1  # RoBERTa counts from padding_idx + 1
    return limit
