"""PEFT's class of causal language models, with the plugin's generation and packed batches.

Shapes: B rows, P virtual tokens, T text tokens, V words.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import peft
import torch

from ..labels import IGNORE_INDEX
from .decoding.causal_lm import PromptedGeneration
from .decoding.feed import cache_of
from .pad_side import BEHIND
from .padding import is_padded, pads_behind
from .tokens import OF_VIRTUAL_TOKENS


class PeftModelForCausalLM(PromptedGeneration, peft.PeftModelForCausalLM):  # type: ignore[misc]
    """Output: as PEFT's, logits [B, P+T, V]; see the config's `train_logits` and `virtual_columns`.

    Nothing can go on with the cache of a packed batch: ask for one with `use_cache=True`.
    """

    pad_side = BEHIND
    predicts_next: ClassVar[bool] = True
    _packed_arguments: ClassVar[set[str]] = {"fused_lm_head", "logits_to_keep", "num_items_in_batch", "shift_labels"}
    _packs_packed_rows: ClassVar[bool] = True
    _token_inputs: ClassVar[Mapping[str, int]] = {**OF_VIRTUAL_TOKENS, "labels": IGNORE_INDEX}
    _row_inputs: ClassVar[set[str]] = set()

    @staticmethod
    def _packed_forward(base_model: Any, embeds: torch.Tensor, packed: Any, **options: Any) -> Any:
        from ..shared_prefix.forward import causal_lm, causal_lm_with_own_head

        if options.get("fused_lm_head"):  # of TRL
            options.pop("supervised")
            return causal_lm_with_own_head(base_model, embeds, packed, **options)
        options.pop("fused_lm_head", None)
        return causal_lm(base_model, embeds, packed, **options)

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
        goes_on = bool(getattr(cache_of(kwargs), "get_seq_length", int)())  # without the prompt's columns
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
