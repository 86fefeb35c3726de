"""Encoder-decoders in the manner of T5: the encoder reads the question, the decoder is scored on the answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from ...labels import IGNORE_INDEX
from ..encoding import pad
from .base import base_model_of
from .language_model import LanguageModel, labelled


class Seq2SeqLM(LanguageModel):
    """See `Family`. Answers are trained with the end of the text behind them, as T5 writes them."""

    task_type: ClassVar[str] = "SEQ_2_SEQ_LM"

    def collate(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """See `Family`."""
        end = self.tokenizer.eos_token_id
        answers = [labelled(row) for row in rows]
        labels = [answer if answer[-1] == end or end is None else [*answer, end] for answer in answers]
        return {**self._inputs([row["context"] for row in rows]), "labels": pad(labels, IGNORE_INDEX)}

    def _answer_room(self, choices: Sequence[Sequence[int]]) -> int:
        return 0  # the decoder has positions of its own

    def _inputs(self, contexts: list[list[int]]) -> dict[str, torch.Tensor]:
        mask = pad([[1] * len(context) for context in contexts], 0)
        return {"input_ids": pad(contexts, self.tokenizer.pad_token_id), "attention_mask": mask}

    def _logits(
        self,
        model: Any,
        contexts: list[list[int]],
        openings: list[tuple[int, ...]],
        device: torch.device,
        options: dict[str, Any],
    ) -> Any:
        start = base_model_of(model).config.decoder_start_token_id
        # what the decoder sees behind an opening does not reach the places before it
        said = pad([[start, *opening] for opening in openings], self.tokenizer.pad_token_id)
        inputs = {**self._inputs(contexts), "decoder_input_ids": said}
        logits = model(**{name: value.to(device) for name, value in inputs.items()}, **options).logits
        return lambda numbers, places: logits[numbers.to(device), places.to(device)]
