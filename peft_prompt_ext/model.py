"""PEFT's model classes with what a PromptTuningExtConfig adds: targets, generation, the record, loading to train.

The classes keep PEFT's names, because AutoPeftModel compares names; with any other config they build PEFT's own class.

Shapes: B batch, P virtual tokens, T text tokens, C labels.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, cast

import peft
import torch
from peft import PeftModel

from . import _record, token_path
from .adapters import AdaptersMixin
from .config import PromptTuningExtConfig
from .decoding import GuardedGeneration, PromptedEncoderDecoder, PromptedGeneration, unwrapped
from .decoding.feed import given_length
from .devices import bring_back
from .encoder import fill_sizes
from .frozen_backbone import dequantize_modules, keep_differentiable, new_modules, new_tables
from .inits.base import InitContext
from .inits.fingerprint import check_saved, fingerprint
from .pad_side import BEHIND, IN_FRONT
from .padding import is_padded, pads_behind
from .peft_path import PeftPathMixin
from .shared_prefix import SharedPrefixMixin
from .tokens import IGNORE_INDEX, OF_VIRTUAL_TOKENS, cut_prompt


class PromptTuningMixin(GuardedGeneration, AdaptersMixin, PeftPathMixin):
    """Goes in front of PEFT's model class of a task."""

    _gathered: Mapping[str, torch.Tensor] = {}
    _has_decoder: ClassVar[bool] = False  # beside the part that the prompt enters
    _heads: ClassVar[tuple[str, ...]] = ()  # modules that PEFT trains beside the prompt

    def __new__(cls, model: Any = None, peft_config: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Build PEFT's own class unless the config is the plugin's (no config at all: a copy is being made)."""
        if peft_config is None or isinstance(peft_config, PromptTuningExtConfig):
            return super().__new__(cls)
        return cls.__bases__[-1](model, peft_config, *args, **kwargs)

    def __init__(self, model: Any, peft_config: Any, *args: Any, **kwargs: Any) -> None:
        token_path.check_task(model, peft_config.task_type)
        keep_differentiable(model)
        super().__init__(model, peft_config, *args, **kwargs)
        self._proved_token_paths: set[Any] = set()  # one for all of a model's replicas

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """See PEFT's class of the task."""
        kwargs = self._by_name(args, kwargs)
        self._check_token_path(kwargs)
        seen = given_length(kwargs)
        if seen and not self._has_decoder:
            raise ValueError(
                f"The cache that is given holds {seen} tokens, and the prompt would stand behind them: "
                f"{type(self).__name__} reads a text from its beginning. Leave the cache out, or give an empty one."
            )
        text: Any = kwargs.get("input_ids") if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"]
        if (
            text is None
            or not self.active_adapter
            or self._predicts_next
            or getattr(self.active_peft_config, "virtual_columns", True)
        ):
            return super().forward(**kwargs)
        return_dict = kwargs.pop("return_dict", None)
        output = super().forward(return_dict=True, **kwargs)
        self._cut_prompt(output, text.shape[:2], self.active_peft_config.num_virtual_tokens)
        return output if self._wants_dict(return_dict) else output.to_tuple()

    def _cut_prompt(self, output: Any, text: Sequence[int], prompt: int, leave: str = "") -> None:
        names = [name for name in output if self._is_of_tokens(name) and "attentions" not in name and name != leave]
        cut_prompt(output, names, text, prompt, self._predicts_next)

    def _check_token_path(self, inputs: Mapping[str, Any]) -> None:
        """Refuse a base model that makes more of ids than embeddings, and inputs beside the text, before they are run.

        `inputs` are by name. The base model runs once for each device and precision.
        """
        from .shared_prefix.precision import precision_of

        if self._adapters_disabled:
            return
        token_path.check_inputs(self.get_base_model(), inputs)
        decodes = self._has_decoder or any(name.startswith("decoder_") for name in inputs)
        words: Any = self.word_embeddings
        now = *precision_of(words), decodes
        if now not in self._proved_token_paths:
            token_path.prove(unwrapped(self.get_base_model()), words, self._max_positions, decodes)
            self._proved_token_paths.add(now)

    def save_pretrained(self, save_directory: str, *args: Any, **kwargs: Any) -> None:
        """Save as PEFT does, and beside each adapter the record of how its prompt began (`prompt_init.json`).

        What is trained and belongs to no adapter, so that it is not saved, is a warning.
        """
        trained = (name for name, parameter in self.base_model.named_parameters() if parameter.requires_grad)
        unsaved = [name for name in trained if ".modules_to_save." not in name]
        if unsaved:
            warnings.warn(
                f"{_listed(unsaved)} can be trained and belong to no adapter, so they are not saved. Name their "
                "modules in the config's modules_to_save, or freeze them.",
                stacklevel=2,
            )
        self._gathered = kwargs.get("state_dict") or {}
        try:
            super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            self._gathered = {}

    def get_prompt_embedding_to_save(self, adapter_name: str) -> torch.Tensor:
        """The prompt [P, H], from the gathered state if there is one: the process that saves cannot gather alone."""
        gathered = self._gathered.get(f"prompt_encoder.{adapter_name}.embedding.weight")
        return super().get_prompt_embedding_to_save(adapter_name) if gathered is None else gathered.detach().cpu()

    def add_adapter(self, adapter_name: str, peft_config: Any, *args: Any, **kwargs: Any) -> None:
        """Add an adapter as PEFT does, with all that is new beside the prompt.

        It is not in training before `set_adapter`, and no other one leaves it.

        Raises:
            ValueError: The base model has no word embeddings, or the prompt cannot be initialised.
        """
        if isinstance(peft_config, PromptTuningExtConfig):
            fill_sizes(peft_config, self.base_model)
        base_model, names = self.base_model, [*self._heads, *(peft_config.modules_to_save or [])]
        if not peft_config.inference_mode:  # a saved adapter has what it has
            new = [path for path in new_modules(base_model, bool(self._heads)) if not _is_covered(path, names)]
            if new:
                peft_config.modules_to_save = [*(peft_config.modules_to_save or []), *new]
                names += new
            tables = [path for path in new_tables(base_model) if not _is_covered(path, names)]
            if tables:
                warnings.warn(
                    f"The base model's {_listed(tables)} is not as its checkpoint has it: it is new, or was resized. "
                    "A prompt neither trains nor saves it, so it would be another one when the prompt is loaded. Save "
                    "the base model and load it again, or name it in the config's modules_to_save.",
                    stacklevel=2,
                )
        dequantize_modules(base_model, names)
        bring_back(base_model, names)
        trained = [
            parameter for head in self._wrapped_heads() for parameter in head.parameters() if parameter.requires_grad
        ]
        super().add_adapter(adapter_name, peft_config, *args, **kwargs)
        for parameter in trained:
            parameter.requires_grad = True
        for parameter in base_model.parameters(recurse=False):
            parameter.requires_grad = False  # PEFT freezes those of the modules inside alone
        if not peft_config.inference_mode:
            remember_base(self, adapter_name)
        if not self.active_adapter:  # the last one was deleted
            self.set_adapter(adapter_name)
        elif adapter_name != self.active_adapter:  # a process group waits for every gradient that is asked for
            self.prompt_encoder[adapter_name].requires_grad_(False)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """The base model alone, with its own head; PEFT's leaves the trained one, and raises without generation."""
        heads = self._wrapped_heads()
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
            for head, was in zip(heads, before, strict=True):
                head.enable_adapters(not was)

    def load_adapter(
        self, model_id: Any, adapter_name: str, is_trainable: bool = False, *args: Any, **kwargs: Any
    ) -> Any:
        """Load as PEFT does; a prompt may be loaded to be trained further as well."""
        if adapter_name not in self.peft_config:
            self._add_saved_adapter(str(model_id), adapter_name, kwargs)
        result = super().load_adapter(model_id, adapter_name, is_trainable, *args, **kwargs)
        record = _record.read(str(model_id), **self._split_kwargs(kwargs)[0])
        check_base(self, adapter_name, str(model_id), (record or {}).get("base_model"))
        if is_trainable:
            make_trainable(self, adapter_name)
        return result

    def _add_saved_adapter(self, model_id: str, adapter_name: str, kwargs: dict[str, Any]) -> None:
        hub_kwargs, _ = self._split_kwargs(kwargs)
        config = PromptTuningExtConfig.from_pretrained(model_id, **hub_kwargs)
        config.inference_mode = True
        self.add_adapter(adapter_name, config)


class PeftModelForCausalLM(  # type: ignore[misc]
    PromptedGeneration, SharedPrefixMixin, PromptTuningMixin, peft.PeftModelForCausalLM
):
    """Output: as PEFT's, logits [B, P+T, V]; see the config's `train_logits` and `virtual_columns`.

    Nothing can go on with the cache of a packed batch: ask for one with `use_cache=True`.
    """

    pad_side = BEHIND
    _predicts_next: ClassVar[bool] = True
    _packed_arguments: ClassVar[set[str]] = {"fused_lm_head", "logits_to_keep", "num_items_in_batch", "shift_labels"}
    _packs_packed_rows: ClassVar[bool] = True
    _token_inputs: ClassVar[Mapping[str, int]] = {**OF_VIRTUAL_TOKENS, "labels": IGNORE_INDEX}
    _row_inputs: ClassVar[set[str]] = set()

    @staticmethod
    def _packed_forward(base_model: Any, embeds: torch.Tensor, layout: Any, **options: Any) -> Any:
        from .shared_prefix.forward import causal_lm, causal_lm_with_own_head

        if options.get("fused_lm_head"):  # of TRL
            options.pop("supervised")
            return causal_lm_with_own_head(base_model, embeds, layout, **options)
        options.pop("fused_lm_head", None)
        return causal_lm(base_model, embeds, layout, **options)

    def _packed_options(self) -> dict[str, Any]:
        train_logits = getattr(self.active_peft_config, "train_logits", "all")  # a stock config has no such field
        return {"supervised": self.training and train_logits == "supervised"}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """See PEFT's class; `shift_labels` are what each text token predicts, or each of the columns kept."""
        kwargs = self._by_name(args, kwargs)
        ids, targets = kwargs.get("input_ids"), kwargs.get("shift_labels")
        text = kwargs.get("inputs_embeds") if ids is None else ids
        if text is None or not self.active_adapter:
            return super().forward(**kwargs)
        configs: dict[str, Any] = self.peft_config
        names = kwargs.get("adapter_names") or [self.active_adapter]
        prompt = max(configs[name].num_virtual_tokens if name in configs else 0 for name in names)
        if targets is not None and targets.shape == text.shape[:2] and not _keeps_some(kwargs):
            kwargs["shift_labels"] = torch.nn.functional.pad(targets, (prompt, 0), value=IGNORE_INDEX)
        goes_on = bool(given_length(kwargs))  # without the prompt's columns
        if goes_on or getattr(self.active_peft_config, "virtual_columns", True):
            return super().forward(**kwargs)
        return_dict = kwargs.pop("return_dict", None)
        if _keeps_some(kwargs):
            kwargs["logits_to_keep"] = _columns_behind(kwargs["logits_to_keep"], text.shape[1], prompt)
        output = super().forward(return_dict=True, **kwargs)
        self._cut_prompt(output, text.shape[:2], prompt, leave="logits" if _keeps_some(kwargs) else "")
        return output if self._wants_dict(return_dict) else output.to_tuple()

    def _prompted_forward(self, inputs: dict[str, Any]) -> Any:
        mask, labels, targets = (inputs.get(name) for name in ("attention_mask", "labels", "shift_labels"))
        if not is_padded(mask):
            return super()._prompted_forward(inputs)
        if labels is not None and labels.shape == mask.shape:
            inputs["labels"] = labels.masked_fill(mask == 0, IGNORE_INDEX)
        if pads_behind(mask) or not _keeps_some(inputs):
            return super()._prompted_forward(inputs)
        # columns are named as the caller has them: all of them come back, then those
        return_dict, keep = inputs.pop("return_dict", None), inputs.pop("logits_to_keep")
        columns = keep if isinstance(keep, torch.Tensor) else slice(-keep, None)
        if targets is not None:
            width = self.active_peft_config.num_virtual_tokens + mask.shape[1]
            inputs["shift_labels"] = targets.new_full((len(mask), width), IGNORE_INDEX)
            inputs["shift_labels"][:, columns] = targets
        output = super()._prompted_forward({**inputs, "return_dict": True})
        if "logits" in output:
            output["logits"] = output["logits"][:, columns]
        return output if self._wants_dict(return_dict) else output.to_tuple()

    def _behind_prompt(self, inputs: dict[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        targets = inputs.pop("shift_labels", None)
        tokens, others = super()._behind_prompt(inputs)
        if targets is not None and _keeps_some(others):
            others["shift_labels"] = targets
        elif targets is not None:
            mask = tokens.get("attention_mask")
            tokens["shift_labels"] = targets if mask is None else targets.masked_fill(mask == 0, IGNORE_INDEX)
        return tokens, others


def _columns_behind(keep: Any, columns: int, prompt: int) -> Any:
    """Columns of the text as they are numbered with the prompt's; a number of last columns stays within the text."""
    if not isinstance(keep, torch.Tensor):
        return min(keep, columns)
    if keep.dtype == torch.bool:
        return torch.nn.functional.pad(keep, (prompt, 0))
    return torch.where(keep < 0, keep + columns, keep) + prompt


def _keeps_some(inputs: Mapping[str, Any]) -> bool:
    """Whether logits of some columns alone are asked for."""
    keep = inputs.get("logits_to_keep")
    return isinstance(keep, torch.Tensor) or bool(keep)


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

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """See PEFT's class; without a mask a decoder finds its last token by the pad token, as it does alone."""
        kwargs = self._by_name(args, kwargs)
        if kwargs.get("input_ids") is not None and kwargs.get("attention_mask") is None:
            kwargs["attention_mask"] = self._mask_of_text(kwargs["input_ids"])
        return super().forward(**kwargs)

    def _mask_of_text(self, input_ids: torch.Tensor) -> torch.Tensor | None:
        """Mask [B, T] without the pads behind each text, where the base model looks for them; None: no pads."""
        pad = self.config.get_text_config().pad_token_id
        if pad is None and len(input_ids) > 1 and hasattr(self.get_base_model(), "score"):
            raise ValueError(
                f"{len(input_ids)} texts came without attention_mask, and the base model's config has no "
                "pad_token_id: nobody knows where a text ends. Give attention_mask, or set model.config.pad_token_id."
            )
        if pad is None or not bool((input_ids[:, -1] == pad).any()) or self._find_pad_side() == BEHIND:
            return None
        return (input_ids != pad).long().flip(1).cummax(1).values.flip(1)

    def _find_pad_side(self) -> str:
        # a decoder reads the last column off, having no input_ids to find the last token by
        return IN_FRONT if hasattr(self.get_base_model(), "score") else super()._find_pad_side()


class PeftModelForSeq2SeqLM(PromptedEncoderDecoder, PromptTuningMixin, peft.PeftModelForSeq2SeqLM):
    """Output: as PEFT's, logits of the decoder, which has no prompt."""

    pad_side = BEHIND
    _has_decoder: ClassVar[bool] = True

    def _prompted_forward(self, inputs: dict[str, Any]) -> Any:
        if "encoder_outputs" in inputs:
            raise ValueError(
                "encoder_outputs stand for a text that the encoder has read, where no prompt can be put in front. "
                "Give input_ids; to read a text once for many outputs, use generate."
            )
        return super()._prompted_forward(inputs)

    def _is_of_tokens(self, name: str) -> bool:
        return name.startswith(("encoder_", "cross_")) or not self.config.is_encoder_decoder


class PeftModelForFeatureExtraction(PromptTuningMixin, peft.PeftModelForFeatureExtraction):
    """Output: as PEFT's, hidden states [B, P+T, H]."""


class OfTextMixin(PromptTuningMixin):
    """Outputs are [B, T, ...], one for each text token."""

    def _prompted_forward(self, inputs: dict[str, Any]) -> Any:
        return_dict = inputs.pop("return_dict", None)
        text = inputs.get("inputs_embeds", inputs.get("input_ids"))
        output = super()._prompted_forward({**inputs, "return_dict": True})
        tensors = [name for name in output if isinstance(output[name], torch.Tensor)]
        cut_prompt(output, tensors, text.shape[:2], self.active_peft_config.num_virtual_tokens, False)  # type: ignore[union-attr]
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


def _is_covered(path: str, names: Sequence[str]) -> bool:
    """Whether PEFT's `modules_to_save` mean a module, or one around it: it goes by the ends of paths."""
    parts = path.split(".")
    return any(".".join(parts[: end + 1]).endswith(tuple(names)) for end in range(len(parts)))


def _listed(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _init_context(model: PeftModel, adapter_name: str) -> InitContext:
    config: Any = model.peft_config[adapter_name]
    words: Any = model.word_embeddings
    return InitContext(config=config, word_embeddings=words, generator=torch.Generator())


def remember_base(model: PeftModel, adapter_name: str) -> None:
    """Keep in the config which word embeddings its prompt is trained for."""
    config = model.peft_config[adapter_name]
    if isinstance(config, PromptTuningExtConfig):
        config.base_fingerprint = fingerprint(_init_context(model, adapter_name), _model_type(model))


def check_base(model: PeftModel, adapter_name: str, source: str, saved: Any = None) -> None:
    """Warn if a loaded prompt was trained on another base model, or its base model has random modules it lacks.

    `saved` is the fingerprint beside it, if there is one.
    """
    kept, name = getattr(model.peft_config[adapter_name], "modules_to_save", None), f"The prompt of {source!r}"
    prompt = cast(Any, model.prompt_encoder)[adapter_name].embedding.weight.detach()
    check_saved(_init_context(model, adapter_name), prompt, saved, name, _model_type(model))
    lacks = [path for path in new_modules(model.base_model, False) if not _is_covered(path, kept or [])]
    if lacks:
        warnings.warn(
            f"{name} has no weights for {_listed(lacks)}, and the base model's checkpoint had none: they are random, "
            "and were so when it was trained. Train it again, or load the base model that it was trained on.",
            stacklevel=2,
        )


def _model_type(model: PeftModel) -> str | None:
    return getattr(getattr(model.base_model, "config", None), "model_type", None)


def make_trainable(model: PeftModel, adapter_name: str) -> None:
    """Put a loaded prompt and its `modules_to_save` into training: at once if it is active, else by `set_adapter`."""
    model.peft_config[adapter_name].inference_mode = False
    remember_base(model, adapter_name)
    if adapter_name in model.active_adapters:
        model.set_adapter(adapter_name)  # also turns on the gradients of modules_to_save
