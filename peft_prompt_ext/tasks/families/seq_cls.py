"""Encoders and decoders with a classification head; choices that differ by row are a yes/no question each.

Shapes: B rows, C choices, T text tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from ..encoding import fit, pad
from ..task import HIDDEN
from .base import ABSENT, Family, right_choice


class SequenceClassification(Family):
    """See `Family`. A regression has one logit, and the score is the number itself."""

    task_type: ClassVar[str] = "SEQ_CLS"
    asks_question: ClassVar[bool] = False

    @property
    def num_labels(self) -> int:
        """Outputs of the head."""
        if self.task.is_regression:
            return 1
        return len(self.task.label_words) or 2

    @property
    def model_options(self) -> dict[str, Any]:
        """See `Family`: the size of the new head and the names of its labels."""
        names = self.task.names if self.task.label_words and not self.task.is_regression else ("no", "yes")
        kind = "regression" if self.task.is_regression else "single_label_classification"
        if self.task.is_regression:
            return {"num_labels": 1, "problem_type": kind}
        labels = dict(enumerate(names))
        return {
            "num_labels": self.num_labels,
            "problem_type": kind,
            "id2label": labels,
            "label2id": {name: i for i, name in labels.items()},
        }

    def encode(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """See `Family`; `inputs` has one text, or one for each choice; `number` is the value of a regression."""
        row = self.task.prepared(row)
        versions = [{**row, "choice": choice.strip()} for choice in self.task.choices_of(row)]
        fitted = [
            fit(self.task, version, self._encode, self.tokenizer, self.text_limit)
            for version in (versions if self.task.choices else [row])
        ]
        target = self.task.target_or_hidden(row)
        number = float(row[self.task.label_column]) if self.task.is_regression and target != HIDDEN else 0.0
        return {
            "inputs": [{name: encoded[name] for name in self._names} for encoded, _ in fitted],
            "target": target,
            "number": number,
            "length": max(len(encoded["input_ids"]) for encoded, _ in fitted),
            "truncated": any(cut for _, cut in fitted),
        }

    def texts_of(self, row: Mapping[str, Any]) -> list[str]:
        """See `Family`: the task's one or two texts."""
        texts = [text.format(**row) for text in self.task.texts]
        # without a separator nothing would stand between the two
        return texts if self.tokenizer.sep_token_id is not None else ["\n".join(texts)]

    def _encode(self, row: Mapping[str, Any]) -> Any:
        return self.tokenizer(*self.texts_of(row), verbose=False)

    def collate(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """See `Family`."""
        batch, right = self._pad([text for row in rows for text in row["inputs"]]), [right_choice(row) for row in rows]
        if self.task.is_regression:
            labels = torch.tensor([row["number"] for row in rows])
        elif self.task.choices:
            asked = zip(rows, right, strict=True)
            labels = torch.tensor([int(i == answer) for row, answer in asked for i in range(len(row["inputs"]))])
        else:
            labels = torch.tensor(right)
        return {**batch, "labels": labels}

    def collate_choices(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """See `Family`; `count` [B] is the number of a row's texts."""
        return {
            **self._pad([text for row in rows for text in row["inputs"]]),
            "count": torch.tensor([len(row["inputs"]) for row in rows]),
            "target": torch.tensor([row["target"] for row in rows]),
            "number": torch.tensor([row["number"] for row in rows]),
        }

    @property
    def _names(self) -> list[str]:
        return [name for name in self.tokenizer.model_input_names if name in {"input_ids", "token_type_ids"}]

    def _pad(self, texts: list[Mapping[str, list[int]]]) -> dict[str, torch.Tensor]:
        fill = {"input_ids": self.tokenizer.pad_token_id, "token_type_ids": self.tokenizer.pad_token_type_id}
        batch = {name: pad([text[name] for text in texts], fill[name]) for name in self._names}
        return {**batch, "attention_mask": pad([[1] * len(text["input_ids"]) for text in texts], 0)}

    def score(self, model: Any, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """See `Family`; `adapter_names` (one for each text), if the batch has it, selects adapters."""
        inputs = {
            name: batch[name]
            for name in ("input_ids", "attention_mask", "token_type_ids", "adapter_names")
            if name in batch
        }
        logits = model(**inputs).logits.float()
        if self.task.is_regression:
            return logits
        scores = logits.log_softmax(-1)
        if not self.task.choices:
            return scores
        rows = scores[:, 1].split(batch["count"].tolist())  # the likelihood of yes
        return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=ABSENT)

    def loss(self, scores: torch.Tensor, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """See `Family`; the mean squared error of a regression."""
        if self.task.is_regression:
            return torch.nn.functional.mse_loss(scores[:, 0], batch["number"])
        return super().loss(scores, batch)
