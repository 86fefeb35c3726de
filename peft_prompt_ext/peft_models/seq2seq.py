"""PEFT's class of encoder-decoders; the prompt is in front of the encoder's text."""

from __future__ import annotations

from typing import Any, ClassVar

import peft

from .decoding.seq2seq import PromptedEncoderDecoder
from .pad_side import BEHIND


class PeftModelForSeq2SeqLM(PromptedEncoderDecoder, peft.PeftModelForSeq2SeqLM):
    """Output: logits of the decoder, as in PEFT; the decoder has no prompt."""

    pad_side = BEHIND
    _has_decoder: ClassVar[bool] = True

    def _run_prompted(self, inputs: dict[str, Any]) -> Any:
        if "encoder_outputs" in inputs:
            raise ValueError(
                "encoder_outputs were computed without the prompt. Pass input_ids; to encode a text once for many "
                "outputs, use generate."
            )
        return super()._run_prompted(inputs)

    def _is_per_token(self, name: str) -> bool:
        return name.startswith(("encoder_", "cross_")) or not self.config.is_encoder_decoder
