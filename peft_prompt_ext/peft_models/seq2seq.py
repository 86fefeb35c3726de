"""PEFT's class of encoder-decoders, whose prompt stands in front of the encoder's text."""

from __future__ import annotations

from typing import Any, ClassVar

import peft

from .decoding.seq2seq import PromptedEncoderDecoder
from .pad_side import BEHIND


class PeftModelForSeq2SeqLM(PromptedEncoderDecoder, peft.PeftModelForSeq2SeqLM):
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
