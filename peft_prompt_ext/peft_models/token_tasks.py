"""PEFT's classes of tasks with an output for each token: features, token classes, answers to questions.

Shapes: B rows, P virtual tokens, T text tokens, H hidden size, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import peft
import torch

from ..labels import IGNORE_INDEX
from .base import PromptTuningMixin
from .tokens import OF_VIRTUAL_TOKENS, cut_prompt


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
