"""PEFT's model classes with what a PromptTuningExtConfig adds: length check, targets, the record, loading to train.

The classes keep PEFT's names, because AutoPeftModel compares names; with any other config they build PEFT's own class.

Shapes: B batch, P virtual tokens, T text tokens, C labels.
"""

from __future__ import annotations

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


IGNORE_INDEX = -100  # what torch.nn.CrossEntropyLoss, and so every model of transformers, leaves out


class PromptTuningMixin(PeftModel):
    """Goes in front of PEFT's model class of a task."""

    _gathered: Mapping[str, torch.Tensor] = {}
    _heads: ClassVar[tuple[str, ...]] = ()  # modules that PEFT trains beside the prompt
    _token_inputs: ClassVar[tuple[str, ...]] = ("input_ids", "inputs_embeds", "attention_mask", "token_type_ids")
    _token_outputs: ClassVar[tuple[str, ...]] = ("hidden_states", "attentions")

    def __new__(cls, model: Any = None, peft_config: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Build PEFT's own class unless the config is the plugin's (no config at all: a copy is being made)."""
        if peft_config is None or isinstance(peft_config, PromptTuningExtConfig):
            return super().__new__(cls)
        return cls.__bases__[-1](model, peft_config, *args, **kwargs)

    def __init__(self, model: Any, peft_config: Any, *args: Any, **kwargs: Any) -> None:
        keep_differentiable(model)
        dequantize_modules(model, [*self._heads, *(peft_config.modules_to_save or [])])
        super().__init__(model, peft_config, *args, **kwargs)

    def forward(self, input_ids: torch.Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """See PEFT's class of the task."""
        inputs = input_ids if input_ids is not None else kwargs.get("inputs_embeds")
        if inputs is not None and not _has_cache(kwargs):
            self._check_length(inputs.shape[1])
        if args:
            return super().forward(input_ids, *args, **kwargs)
        return self._stock_forward(super().forward, {"input_ids": input_ids, **kwargs})

    def _stock_forward(self, forward: Any, inputs: dict[str, Any]) -> Any:
        """Run PEFT's `forward` with pads behind the text, so that none stands between it and the prompt."""
        mask = inputs.get("attention_mask")
        if not _is_padded(mask) or pads_behind(mask):
            return forward(**inputs)
        order, return_dict = real_first(mask), inputs.pop("return_dict", None)
        prompt, back = self.active_peft_config.num_virtual_tokens, order.argsort(1)
        output = forward(**self._move_pads(inputs, order), return_dict=True)
        _move_back(output, self._token_outputs, back, prompt)
        return output if self._wants_dict(return_dict) else output.to_tuple()

    def _move_pads(self, inputs: dict[str, Any], order: torch.Tensor) -> dict[str, Any]:
        moved = {name: inputs[name] for name in self._token_inputs if inputs.get(name) is not None}
        return {**inputs, **{name: reorder(x, order) for name, x in moved.items()}}

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

    def add_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Add an adapter as PEFT does; the heads of other adapters stay in training."""
        heads = [module for module in self.modules() if isinstance(module, ModulesToSaveWrapper)]
        trained = [parameter for head in heads for parameter in head.parameters() if parameter.requires_grad]
        super().add_adapter(*args, **kwargs)
        for parameter in trained:
            parameter.requires_grad = True

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
    _token_inputs: ClassVar[tuple[str, ...]] = (*PromptTuningMixin._token_inputs, "labels")
    _token_outputs: ClassVar[tuple[str, ...]] = (*PromptTuningMixin._token_outputs, "logits")

    @staticmethod
    def _packed_forward(base_model: Any, embeds: torch.Tensor, layout: Any, **options: Any) -> Any:
        from .shared_prefix.forward import causal_lm

        return causal_lm(base_model, embeds, layout, **options)

    def _packed_options(self) -> dict[str, Any]:
        train_logits = getattr(self.active_peft_config, "train_logits", "all")  # a stock config has no such field
        return {"supervised": self.training and train_logits == "supervised"}

    def _stock_forward(self, forward: Any, inputs: dict[str, Any]) -> Any:
        mask, labels = inputs.get("attention_mask"), inputs.get("labels")
        if not _is_padded(mask) or _has_cache(inputs):
            return forward(**inputs)
        if labels is not None and labels.shape == mask.shape:
            inputs = {**inputs, "labels": labels.masked_fill(mask == 0, IGNORE_INDEX)}
        if pads_behind(mask) or inputs.get("shift_labels") is not None:  # those name columns as they stand
            return forward(**inputs)
        keep, return_dict = inputs.pop("logits_to_keep", 0), inputs.pop("return_dict", None)
        output = super()._stock_forward(forward, {**inputs, "return_dict": True})
        columns = keep if isinstance(keep, torch.Tensor) else slice(-keep if keep else None, None)
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
        cache = inputs.get("cache", inputs.get("past_key_values"))
        cached = cache.get_seq_length() if cache is not None else 0
        if cached:
            # PEFT takes the last token alone, where a chunk or an assistant's guess has more; and from transformers
            # 5.24 on, which renamed the cache, it finds none and puts the prompt in at every step
            inputs.pop("inputs_embeds", None)
            input_ids = args[0] if args else kwargs["input_ids"]
            new = kwargs.get("next_sequence_length")
            if new is None:
                new = input_ids.shape[1]
            elif new + cached == input_ids.shape[1]:  # counted as if no prompt were in the cache
                new += self.active_peft_config.num_virtual_tokens
            inputs["input_ids"] = input_ids[:, -new:]
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
    _heads: ClassVar[tuple[str, ...]] = ("classifier", "score")

    @staticmethod
    def _packed_forward(base_model: Any, embeds: torch.Tensor, layout: Any, **options: Any) -> Any:
        from .shared_prefix.forward import sequence_classification

        return sequence_classification(base_model, embeds, layout, **options)

    def _mixed_options(self, names: list[str]) -> dict[str, Any]:
        return {"adapter_names": names}

    def _inputs_of_tokens(self) -> set[str]:
        return {"token_type_ids"} & set(signature(self.get_base_model().forward).parameters)

    def _stock_forward(self, forward: Any, inputs: dict[str, Any]) -> Any:
        mask = inputs.get("attention_mask")
        base_model: Any = self.get_base_model()
        if not _is_padded(mask) or not hasattr(base_model, "score"):
            return super()._stock_forward(forward, inputs)
        # without input_ids a decoder pools the last column: let it be a real token
        rows = len(mask)
        prompt = self.get_prompt(batch_size=rows)
        text = inputs.pop("inputs_embeds", None)
        ids = inputs.pop("input_ids", None)
        text = text if text is not None else base_model.get_input_embeddings()(ids)
        embeds = torch.cat([prompt.to(text.dtype), text], dim=1)
        mask = torch.cat([mask.new_ones(rows, prompt.shape[1]), mask], dim=1)
        order = real_last(mask)
        inputs = {name: value for name, value in inputs.items() if value is not None}
        types = inputs.pop("token_type_ids", None)
        if types is not None and self._inputs_of_tokens():
            types = torch.cat([types.new_zeros(rows, prompt.shape[1]), types], dim=1)
            inputs["token_type_ids"] = types.gather(1, order)
        for name in ("position_ids", "task_ids"):
            inputs.pop(name, None)
        return_dict = inputs.pop("return_dict", None)
        inputs["attention_mask"] = mask.gather(1, order)
        if "position_ids" in signature(base_model.forward).parameters:
            inputs["position_ids"] = _positions(inputs["attention_mask"])
        output = base_model(inputs_embeds=reorder(embeds, order), return_dict=True, **inputs)
        _move_back(output, self._token_outputs, order.argsort(1), 0)
        return output if self._wants_dict(return_dict) else output.to_tuple()


def _is_padded(mask: Any) -> TypeGuard[torch.Tensor]:
    return isinstance(mask, torch.Tensor) and mask.dim() == 2 and not bool(mask.all())


def _has_cache(inputs: Mapping[str, Any]) -> bool:
    # transformers 5.24 has renamed the first to the second
    return any(inputs.get(name) is not None for name in ("past_key_values", "cache"))


def _move_back(output: Any, names: tuple[str, ...], back: torch.Tensor, prompt: int) -> None:
    """Give the named outputs the order of columns that the caller has; `prompt` columns before them stay."""
    for name in names:
        value = output.get(name)
        if isinstance(value, torch.Tensor):
            output[name] = reorder(value, back, prompt)
        elif value is not None:  # of each layer
            moving = _MOVING.get(name, reorder)
            output[name] = tuple(moving(x, back, prompt) for x in value)


def _reorder_attention(weights: torch.Tensor, order: torch.Tensor, prompt: int) -> torch.Tensor:
    """Queries and keys of weights [B, heads, P+T, P+T] in the given order of the text."""
    weights = reorder(weights.transpose(1, 2), order, prompt).transpose(1, 2)
    return _reorder_keys(weights, order, prompt)


def _reorder_keys(weights: torch.Tensor, order: torch.Tensor, prompt: int) -> torch.Tensor:
    return reorder(weights.transpose(1, 3), order, prompt).transpose(1, 3)


_MOVING = {
    "attentions": _reorder_attention,
    "encoder_attentions": _reorder_attention,
    "cross_attentions": _reorder_keys,
}


def _positions(attention_mask: torch.Tensor) -> torch.Tensor:
    """Number of each real token in its row, [B, T]; pads have 0."""
    return (attention_mask.long().cumsum(1) - 1).clamp(min=0)


class PeftModelForSeq2SeqLM(PromptTuningMixin, peft.PeftModelForSeq2SeqLM):
    """Output: as PEFT's, logits of the decoder, which has no prompt."""

    _token_outputs: ClassVar[tuple[str, ...]] = (
        "encoder_last_hidden_state",
        "encoder_hidden_states",
        "encoder_attentions",
        "cross_attentions",
    )

    def generate(self, **kwargs: Any) -> Any:
        """See PEFT's class; pads in front of the text go behind it."""
        mask = kwargs.get("attention_mask")
        if _is_padded(mask) and not self._adapters_disabled:
            kwargs = self._move_pads(kwargs, real_first(mask))
        return super().generate(**kwargs)


class PeftModelForFeatureExtraction(PromptTuningMixin, peft.PeftModelForFeatureExtraction):
    """Output: as PEFT's, hidden states [B, P+T, H]."""

    _token_outputs: ClassVar[tuple[str, ...]] = (*PromptTuningMixin._token_outputs, "last_hidden_state")


class PeftModelForTokenClassification(PromptTuningMixin, peft.PeftModelForTokenClassification):
    """Output: logits [B, T, C], one for each text token; PEFT returns P+T of them and cannot take labels [B, T]."""

    _heads: ClassVar[tuple[str, ...]] = ("classifier", "score")
    _token_outputs: ClassVar[tuple[str, ...]] = (*PromptTuningMixin._token_outputs, "logits")

    def _move_pads(self, inputs: dict[str, Any], order: torch.Tensor) -> dict[str, Any]:
        inputs = super()._move_pads(inputs, order)
        if inputs.get("labels") is not None:
            inputs["labels"] = reorder(inputs["labels"], order, self.active_peft_config.num_virtual_tokens)
        return inputs

    def forward(  # type: ignore[override]
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """See PEFT's class; `labels` [B, T] belong to the text tokens."""
        if labels is not None:
            prompt_labels = labels.new_full((len(labels), self.active_peft_config.num_virtual_tokens), IGNORE_INDEX)
            labels = torch.cat([prompt_labels, labels], dim=1)
        inputs: dict[str, Any] = {"attention_mask": attention_mask, "inputs_embeds": inputs_embeds, "labels": labels}
        return _of_text(self, super().forward, ["logits"], input_ids, **inputs, **kwargs)


class PeftModelForQuestionAnswering(PromptTuningMixin, peft.PeftModelForQuestionAnswering):
    """Output: start and end logits [B, T], one for each text token; PEFT returns P+T of them."""

    _heads: ClassVar[tuple[str, ...]] = ("qa_outputs",)
    _token_outputs: ClassVar[tuple[str, ...]] = (*PromptTuningMixin._token_outputs, "start_logits", "end_logits")

    def _move_pads(self, inputs: dict[str, Any], order: torch.Tensor) -> dict[str, Any]:
        inputs, prompt = super()._move_pads(inputs, order), self.active_peft_config.num_virtual_tokens
        for name in ("start_positions", "end_positions"):
            if inputs.get(name) is not None:
                column = inputs[name] - prompt
                inside = (column >= 0) & (column < order.shape[1])
                moved = order.argsort(1).gather(1, column.where(inside, 0)[:, None])[:, 0]
                inputs[name] = torch.where(inside, moved + prompt, inputs[name])
        return inputs

    def forward(  # type: ignore[override]
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        start_positions: torch.Tensor | None = None,
        end_positions: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """See PEFT's class; `start_positions` and `end_positions` [B] count text tokens from 0."""
        prompt = self.active_peft_config.num_virtual_tokens
        inputs: dict[str, Any] = {
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
            "start_positions": None if start_positions is None else start_positions + prompt,
            "end_positions": None if end_positions is None else end_positions + prompt,
        }
        return _of_text(self, super().forward, ["start_logits", "end_logits"], input_ids, **inputs, **kwargs)


def _of_text(
    model: PromptTuningMixin,
    forward: Any,
    names: list[str],
    *args: Any,
    return_dict: bool | None = None,
    **kwargs: Any,
) -> Any:
    """Run `forward` and cut the virtual tokens off the named outputs, so that item t belongs to text token t."""
    output = forward(*args, return_dict=True, **kwargs)
    for name in names:
        output[name] = output[name][:, model.active_peft_config.num_virtual_tokens :]
    return output if model._wants_dict(return_dict) else output.to_tuple()


def make_trainable(model: PeftModel, adapter_name: str) -> None:
    """Make a loaded prompt and its `modules_to_save` parameters to train, as `is_trainable=True` does for LoRA."""
    model.peft_config[adapter_name].inference_mode = False
    model.prompt_encoder[adapter_name].requires_grad_(True)
    if adapter_name in model.active_adapters:
        model.set_adapter(adapter_name)  # also turns on the gradients of modules_to_save


def max_positions(base_model: Any) -> int | None:
    """How many tokens the base model has positions for; None if its positions are relative and without end."""
    config = base_model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    for name, module in base_model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return module.num_embeddings - module.padding_idx - 1  # RoBERTa counts from padding_idx + 1
    return limit
