"""Trainer's label smoothing for prompts.

To learn whether the labels of a model are shifted, Trainer asks for the name of `model.base_model.model`, where LoRA
keeps the base model. A prompt's lies one level higher: T5, GPT-2 or BERT have nothing of that name, and Trainer dies;
Llama has another model there, and labels are not shifted. And PEFT's logits have the prompt's columns in front.
"""

from __future__ import annotations

import sys
from functools import partial, wraps
from typing import Any


def smooth_labels_of_prompts() -> None:
    """Teach transformers' Trainer and LabelSmoother to compare a prompt's logits [B, P+T, V] with labels [B, T].

    Only where a Trainer has been imported, since an import of it takes seconds. Calling it twice does nothing more.
    """
    smoother = getattr(sys.modules.get("transformers.trainer_pt_utils"), "LabelSmoother", None)
    if smoother is not None and not hasattr(smoother.__call__, "of_prompts"):
        smoother.__call__ = _with_prompt_columns(smoother.__call__)
    trainer = getattr(sys.modules.get("transformers.trainer"), "Trainer", None)
    if trainer is not None and not hasattr(trainer.compute_loss, "of_prompts"):
        trainer.compute_loss = _with_smoothing(trainer.compute_loss)


def _with_prompt_columns(original: Any) -> Any:
    @wraps(original)
    def call(
        self: Any, model_output: Any, labels: Any, shift_labels: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        logits = model_output["logits"] if isinstance(model_output, dict) else model_output[0]
        if labels.dim() == 2 and logits.dim() == 3 and logits.shape[1] > labels.shape[1]:
            # the last virtual token predicts the first text token
            model_output, shift_labels = {"logits": logits[:, -labels.shape[1] - 1 : -1]}, False
        return original(self, model_output, labels, shift_labels, num_items_in_batch)

    call.of_prompts = True  # type: ignore[attr-defined]
    return call


def _with_smoothing(original: Any) -> Any:
    @wraps(original)
    def compute_loss(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        from .model import PeftModelForCausalLM, PromptTuningMixin

        smoother: Any = self.label_smoother
        if smoother is None or self.compute_loss_func is not None:
            return original(self, model, inputs, *args, **kwargs)
        prompted = self.accelerator.unwrap_model(model)
        if not isinstance(prompted, PromptTuningMixin):
            return original(self, model, inputs, *args, **kwargs)
        # a loss of one's own is asked for before any name is
        self.compute_loss_func = partial(smoother, shift_labels=isinstance(prompted, PeftModelForCausalLM))
        try:
            return original(self, model, inputs, *args, **kwargs)
        finally:
            self.compute_loss_func = None

    compute_loss.of_prompts = True  # type: ignore[attr-defined]
    return compute_loss
