"""PEFT's class of causal language models, with the plugin's generation and packed batches.

Shapes: B rows, P virtual tokens, T text tokens, V words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import peft
import torch

from ..labels import IGNORE_INDEX
from .decoding.causal_lm import PromptedGeneration
from .decoding.feed import count_given
from .pad_side import BEHIND
from .padding import is_padded, pads_behind
from .position import is_suffix, place_prompts, predicting_columns
from .tokens import VIRTUAL_TOKEN_VALUES


class PeftModelForCausalLM(PromptedGeneration, peft.PeftModelForCausalLM):  # type: ignore[misc]
    """Output: logits [B, P+T, V], as in PEFT; see the config's `train_logits` and `virtual_columns`.

    A packed batch returns no usable cache; pass `use_cache=True` to get one.
    """

    pad_side = BEHIND
    predicts_next: ClassVar[bool] = True
    _packed_arguments: ClassVar[set[str]] = {"fused_lm_head", "logits_to_keep", "num_items_in_batch", "shift_labels"}
    _packs_packed_rows: ClassVar[bool] = True
    _token_inputs: ClassVar[Mapping[str, int]] = {**VIRTUAL_TOKEN_VALUES, "labels": IGNORE_INDEX}
    _row_inputs: ClassVar[set[str]] = set()

    @staticmethod
    def _packed_forward(base_model: Any, embeds: torch.Tensor, packed: Any, **options: Any) -> Any:
        from ..shared_prefix.forward import causal_lm, causal_lm_with_own_head

        if options.get("fused_lm_head"):  # an option of TRL
            options.pop("supervised")
            return causal_lm_with_own_head(base_model, embeds, packed, **options)
        options.pop("fused_lm_head", None)
        return causal_lm(base_model, embeds, packed, **options)

    def _packed_options(self) -> dict[str, Any]:
        train_logits = getattr(self.active_peft_config, "train_logits", "all")  # a stock config has no such field
        return {"supervised": self.training and (self.loss_alone or train_logits == "supervised")}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """See PEFT's class; `shift_labels` has a label for each text token, or for each kept column."""
        kwargs = self._name_arguments(args, kwargs)
        ids, targets = kwargs.get("input_ids"), kwargs.get("shift_labels")
        text = kwargs.get("inputs_embeds") if ids is None else ids
        if text is None or not self.active_adapter:
            return super().forward(**kwargs)
        configs: dict[str, Any] = self.peft_config
        names = kwargs.get("adapter_names") or [self.active_adapter]
        prompt = max(configs[name].num_virtual_tokens if name in configs else 0 for name in names)
        kwargs["answer_start"] = start = self._find_start(text, names, kwargs)
        if targets is not None and targets.shape == text.shape[:2] and not _selects_columns(kwargs):
            kwargs["shift_labels"] = torch.nn.functional.pad(targets, (prompt, 0), value=IGNORE_INDEX)
        has_seen_text = bool(count_given(kwargs))  # no virtual columns then
        if has_seen_text or getattr(self.active_peft_config, "virtual_columns", True):
            return super().forward(**kwargs)
        return_dict = kwargs.pop("return_dict", None)
        keep, selects = kwargs.get("logits_to_keep", 0), _selects_columns(kwargs)
        if selects and start is None:
            kwargs["logits_to_keep"] = _shift_columns(keep, text.shape[1], prompt)
        elif selects:
            del kwargs["logits_to_keep"]  # the columns differ between the rows: compute all, then select
        output = super().forward(return_dict=True, **kwargs)
        kept = None if start is None else predicting_columns(start, text.shape[1], prompt)
        self._cut_prompt(
            output, text.shape[:2], prompt, leave="logits" if selects and start is None else "", kept=kept
        )
        if selects and start is not None:
            output["logits"] = output["logits"][:, keep if isinstance(keep, torch.Tensor) else slice(-keep, None)]
        return output if self._wants_dict(return_dict) else output.to_tuple()

    def _find_start(self, text: torch.Tensor, names: Sequence[str], inputs: dict[str, Any]) -> torch.Tensor | None:
        """Find where each row's prompt stands, [B] on the host; None if all are prefixes."""
        answer_start, labels = inputs.pop("answer_start", None), inputs.get("labels")
        behind = [name in self.peft_config and is_suffix(self.peft_config[name]) for name in names]
        if not any(behind):
            return None  # for a prefix it does not matter where the answer begins
        self._check_is_no_step(inputs)
        if inputs.get("shift_labels") is not None:
            raise ValueError("With prompt_position='suffix', pass labels [B, T] in place of shift_labels.")
        trains = any(parameter.requires_grad for parameter in self.prompt_encoder.parameters())
        learns = self.training or self.has_answers or (torch.is_grad_enabled() and trains)
        if labels is None and answer_start is None and learns:
            raise ValueError(
                "With prompt_position='suffix', a call in training needs labels, or answer_start [B] (the column of "
                "each row's first answer token): without them the prompt would stand behind the answer. At "
                "inference, call model.eval() and use torch.no_grad()."
            )
        return place_prompts(text, behind, inputs.get("attention_mask"), labels, answer_start)

    def _run_prompted(self, inputs: dict[str, Any]) -> Any:
        mask, labels, targets = (inputs.get(name) for name in ("attention_mask", "labels", "shift_labels"))
        if not is_padded(mask):
            return super()._run_prompted(inputs)
        if labels is not None and labels.shape == mask.shape:
            inputs["labels"] = labels.masked_fill(mask == 0, IGNORE_INDEX)
        if pads_behind(mask) or not _selects_columns(inputs):
            return super()._run_prompted(inputs)
        # logits_to_keep counts the caller's columns: compute all, then select
        return_dict, keep = inputs.pop("return_dict", None), inputs.pop("logits_to_keep")
        columns = keep if isinstance(keep, torch.Tensor) else slice(-keep, None)
        if targets is not None:
            width = self.active_peft_config.num_virtual_tokens + mask.shape[1]
            inputs["shift_labels"] = targets.new_full((len(mask), width), IGNORE_INDEX)
            inputs["shift_labels"][:, columns] = targets
        output = super()._run_prompted({**inputs, "return_dict": True})
        if "logits" in output:
            output["logits"] = output["logits"][:, columns]
        return output if self._wants_dict(return_dict) else output.to_tuple()

    def _prepend_prompt(self, inputs: dict[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        targets = inputs.pop("shift_labels", None)
        tokens, others = super()._prepend_prompt(inputs)
        if targets is not None and _selects_columns(others):
            others["shift_labels"] = targets
        elif targets is not None:
            mask = tokens.get("attention_mask")
            tokens["shift_labels"] = targets if mask is None else targets.masked_fill(mask == 0, IGNORE_INDEX)
        return tokens, others


def _shift_columns(keep: Any, columns: int, prompt: int) -> Any:
    """Shift `logits_to_keep` from columns of the text to columns of prompt and text."""
    if not isinstance(keep, torch.Tensor):
        return min(keep, columns)
    if keep.dtype == torch.bool:
        return torch.nn.functional.pad(keep, (prompt, 0))
    return torch.where(keep < 0, keep + columns, keep) + prompt


def _selects_columns(inputs: Mapping[str, Any]) -> bool:
    """Whether `logits_to_keep` selects columns."""
    keep = inputs.get("logits_to_keep")
    return isinstance(keep, torch.Tensor) or bool(keep)
