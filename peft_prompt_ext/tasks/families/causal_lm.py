"""Decoders: the answer follows the question.

Shapes: B rows, T text tokens, K columns of logits, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from inspect import signature
from typing import Any, ClassVar

import torch

from ...labels import IGNORE_INDEX
from ..encoding import pad
from .base import base_model_of, has_prompt_behind, prompt_length
from .language_model import LanguageModel, labelled


class CausalLM(LanguageModel):
    """See `Family`. The loss is that of the answer's tokens alone."""

    task_type: ClassVar[str] = "CAUSAL_LM"

    def collate(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """See `Family`."""
        answers = [labelled(row) for row in rows]
        texts = [[*row["context"], *answer] for row, answer in zip(rows, answers, strict=True)]
        labels = [[*[IGNORE_INDEX] * len(row["context"]), *answer] for row, answer in zip(rows, answers, strict=True)]
        return {**_inputs(texts, self.tokenizer.pad_token_id), "labels": pad(labels, IGNORE_INDEX)}

    def collate_labelled_logits(self, rows: Sequence[Mapping[str, Any]], prompt: int = 0) -> dict[str, torch.Tensor]:
        """As `collate`, with logits only in the columns where some row has a label.

        Args:
            rows: Encoded rows.
            prompt: Virtual tokens that the model's logits begin with.
        """
        batch = self.collate(rows)
        columns = (batch["labels"][:, 1:] != IGNORE_INDEX).any(0).nonzero()[:, 0]
        return {**batch, "shift_labels": batch["labels"][:, columns + 1], "logits_to_keep": columns + prompt}

    def _logits(
        self,
        model: Any,
        contexts: list[list[int]],
        openings: list[tuple[int, ...]],
        device: torch.device,
        options: dict[str, Any],
    ) -> Any:
        behind = has_prompt_behind(model)
        # with a prompt behind them all texts end in one column, so no logits of a text are asked for
        front = [max(map(len, contexts)) - len(context) if behind else 0 for context in contexts]
        texts = [[*c, *o] for c, o in zip(contexts, openings, strict=True)]
        inputs = _inputs(texts, self.tokenizer.pad_token_id, front)
        first = torch.tensor([pads + len(context) - 1 for pads, context in zip(front, contexts, strict=True)])
        asked = {int(f) + i for f, o in zip(first, openings, strict=True) for i in range(len(o) + 1)}
        columns = torch.tensor(sorted(asked))
        prompt = prompt_length(model, options.get("adapter_names"))
        if behind:
            inputs["answer_start"] = first + 1
        if keeps_columns(model):
            inputs["logits_to_keep"] = columns + prompt
        logits = model(**{name: value.to(device) for name, value in inputs.items()}, **options).logits
        if "logits_to_keep" not in inputs:
            logits = logits[:, (columns + prompt).to(device)]
        kept = torch.zeros(int(columns.max()) + 1, dtype=torch.long)
        kept[columns] = torch.arange(len(columns))
        return lambda numbers, places: logits[numbers.to(device), kept[first[numbers] + places].to(device)]


def keeps_columns(model: Any) -> bool:
    """Whether the model can compute the logits of chosen columns alone."""
    return "logits_to_keep" in signature(base_model_of(model).forward).parameters


def _inputs(texts: list[list[int]], pad_token_id: int, front: Sequence[int] | None = None) -> dict[str, torch.Tensor]:
    """Pad texts behind, and in front by the given numbers of pads."""
    pads = front or [0] * len(texts)
    ids = [[*[pad_token_id] * count, *text] for count, text in zip(pads, texts, strict=True)]
    mask = [[*[0] * count, *[1] * len(text)] for count, text in zip(pads, texts, strict=True)]
    return {"input_ids": pad(ids, pad_token_id), "attention_mask": pad(mask, 0)}
