"""PEFT's class of sequence classifiers: encoders take PEFT's path, decoders run packed.

Shapes: B rows, T text tokens, C classes.
"""

from __future__ import annotations

from typing import Any, ClassVar

import peft
import torch

from .packed import PackedMixin
from .pad_side import BEHIND, IN_FRONT
from .position import is_suffix, place_prompts


class PeftModelForSequenceClassification(PackedMixin, peft.PeftModelForSequenceClassification):
    """Output: logits [B, C], as in PEFT. A decoder reads them from the last real token; stock PEFT from a pad."""

    _packed_arguments: ClassVar[set[str]] = {"num_items_in_batch"}
    _heads_of_rows: ClassVar[set[str]] = {"score"}
    _row_outputs: ClassVar[set[str]] = {"logits"}
    _heads: ClassVar[tuple[str, ...]] = ("classifier", "score")

    @staticmethod
    def _packed_forward(base_model: Any, embeds: torch.Tensor, packed: Any, **options: Any) -> Any:
        from ..shared_prefix.forward import sequence_classification

        return sequence_classification(base_model, embeds, packed, **options)

    def _mixed_options(self, names: list[str]) -> dict[str, Any]:
        return {"adapter_names": names}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """See PEFT's class; without a mask, a decoder finds the last real token by the pad token, as without PEFT."""
        kwargs = self._name_arguments(args, kwargs)
        if kwargs.get("input_ids") is not None and kwargs.get("attention_mask") is None:
            kwargs["attention_mask"] = self._make_mask(kwargs["input_ids"])
        if kwargs.pop("answer_start", None) is not None:
            raise ValueError("A classifier takes no answer_start: its prompt stands behind the last real token.")
        text = kwargs.get("inputs_embeds") if kwargs.get("input_ids") is None else kwargs["input_ids"]
        if text is not None and self.active_adapter:
            names = kwargs.get("adapter_names") or [self.active_adapter]
            behind = [name in self.peft_config and is_suffix(self.peft_config[name]) for name in names]
            if any(behind):
                kwargs["answer_start"] = place_prompts(text, behind, kwargs.get("attention_mask"))
        return super().forward(**kwargs)

    def _make_mask(self, input_ids: torch.Tensor) -> torch.Tensor | None:
        """Make a mask [B, T] of the pads behind each text; None: no pads, or the base model does not need one."""
        pad = self.config.get_text_config().pad_token_id
        if pad is None and len(input_ids) > 1 and hasattr(self.get_base_model(), "score"):
            raise ValueError(
                f"{len(input_ids)} texts came without attention_mask, and the base model's config has no "
                "pad_token_id, so the end of each text is unknown. Pass attention_mask, or set "
                "model.config.pad_token_id."
            )
        if pad is None or not bool((input_ids[:, -1] == pad).any()) or self._find_pad_side() == BEHIND:
            return None
        return (input_ids != pad).long().flip(1).cummax(1).values.flip(1)

    def _find_pad_side(self) -> str:
        # with inputs_embeds a decoder reads the last column
        return IN_FRONT if hasattr(self.get_base_model(), "score") else super()._find_pad_side()
