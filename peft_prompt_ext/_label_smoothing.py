"""Trainer's label smoothing for prompts.

Trainer shifts the labels of a causal model that it finds at `model.base_model.model`, where LoRA keeps it; a prompt's
model lies one level higher. And PEFT's logits have the prompt's columns before the text's. So a smoother that gets
more columns of logits than of labels has a prompt's logits, and would raise: nothing else changes for it.
"""

from __future__ import annotations

import sys
from typing import Any


def smooth_labels_of_prompts() -> None:
    """Teach transformers' LabelSmoother to compare a prompt's logits [B, P+T, V] with labels [B, T].

    Only where a Trainer has been imported, since an import of it takes seconds. Calling it twice does nothing more.
    """
    module = sys.modules.get("transformers.trainer_pt_utils")
    smoother = getattr(module, "LabelSmoother", None)
    if smoother is None or hasattr(smoother.__call__, "of_prompts"):
        return
    original = smoother.__call__

    def call(
        self: Any, model_output: Any, labels: Any, shift_labels: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        logits = model_output["logits"] if isinstance(model_output, dict) else model_output[0]
        if labels.dim() == 2 and logits.dim() == 3 and logits.shape[1] > labels.shape[1]:
            # the last virtual token predicts the first text token
            model_output, shift_labels = {"logits": logits[:, -labels.shape[1] - 1 : -1]}, False
        return original(self, model_output, labels, shift_labels, num_items_in_batch)

    call.of_prompts = True  # type: ignore[attr-defined]
    smoother.__call__ = call
