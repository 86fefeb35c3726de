"""PEFT's classes of tasks with an output per token: feature extraction, token classification, question answering.

Shapes: B rows, P virtual tokens, T text tokens, H hidden size, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import peft
import torch

from ..labels import IGNORE_INDEX
from .base import PromptTuningMixin
from .tokens import VIRTUAL_TOKEN_VALUES, cut_prompt


class PeftModelForFeatureExtraction(PromptTuningMixin, peft.PeftModelForFeatureExtraction):
    """Output: hidden states [B, P+T, H], as in PEFT."""


class TextOutputMixin(PromptTuningMixin):
    """Outputs have a value for each text token, [B, T, ...]."""

    def _run_prompted(self, inputs: dict[str, Any]) -> Any:
        return_dict = inputs.pop("return_dict", None)
        text = inputs.get("inputs_embeds", inputs.get("input_ids"))
        output = super()._run_prompted({**inputs, "return_dict": True})
        tensors = [name for name in output if isinstance(output[name], torch.Tensor)]
        cut_prompt(output, tensors, text.shape[:2], self.active_peft_config.num_virtual_tokens, False)  # type: ignore[union-attr]
        return output if self._wants_dict(return_dict) else output.to_tuple()


class PeftModelForTokenClassification(TextOutputMixin, peft.PeftModelForTokenClassification):
    """Output: logits [B, T, C]. Stock PEFT returns [B, P+T, C], and fails with labels [B, T]."""

    _heads: ClassVar[tuple[str, ...]] = ("classifier", "score")
    _token_inputs: ClassVar[Mapping[str, int]] = {**VIRTUAL_TOKEN_VALUES, "labels": IGNORE_INDEX}
    _row_inputs: ClassVar[set[str]] = set()


class PeftModelForQuestionAnswering(TextOutputMixin, peft.PeftModelForQuestionAnswering):
    """Output: start and end logits [B, T]. Stock PEFT returns [B, P+T].

    `start_positions` and `end_positions` [B] count text tokens from 0.
    """

    _heads: ClassVar[tuple[str, ...]] = ("qa_outputs",)
    _column_inputs: ClassVar[tuple[str, ...]] = ("start_positions", "end_positions", "cls_index")
