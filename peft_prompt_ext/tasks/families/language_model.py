"""What causal and text-to-text models share: a choice is an answer in tokens, rated by its likelihood.

Shapes: B rows, C most choices of a row, L most tokens of a choice, T text tokens.
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ...labels import IGNORE_INDEX
from ..encoding import answer_ids, fit, pad
from ..task import Task
from .base import ABSENT, Family, right_choice


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


logger = logging.getLogger(__name__)

MAX_SEQUENCES = 64  # of one forward pass, if rows have many choices


class LanguageModel(Family):
    """Scores a choice by the sum of its tokens' log-probabilities."""

    def __init__(
        self, task: Task, tokenizer: PreTrainedTokenizerBase, max_length: int, prompt_behind: bool = False
    ) -> None:
        super().__init__(task, tokenizer, max_length, prompt_behind)
        words = task.label_words
        ids = self._answers(words) if words else []
        split = [f"{word!r} ({len(i)} tokens)" for word, i in zip(words, ids, strict=True) if len(i) > 1]
        if split:
            logger.info(
                "The tokenizer splits the label words %s. They are scored by the likelihood of all their tokens, "
                "which takes a sequence for each; words of one token are faster.",
                ", ".join(split),
            )

    @property
    def text_room(self) -> int:
        """See `Family`."""
        words = self.task.label_words
        return min(self.text_limit, self.max_length - (self._answer_room(self._answers(words)) if words else 0))

    def texts_of(self, row: Mapping[str, Any]) -> list[str]:
        """See `Family`: the question."""
        return [self.question.format(**row)]

    def encode(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """See `Family`; `context` and `choices` are token ids."""
        row = self.task.prepared(row)
        choices = self._answers(tuple(self.task.choices_of(row)))
        encoded, truncated = fit(
            self.task,
            row,
            lambda values: self.tokenizer(*self.texts_of(values), verbose=False),
            self.tokenizer,
            min(self.text_limit, self.max_length - self._answer_room(choices)),
        )
        context = encoded["input_ids"]
        if self.prompt_behind and not context:
            raise ValueError(f"A row of {self.task.name} has an empty text, and a prompt behind it needs one to read.")
        return {
            "context": context,
            "choices": choices,
            "target": self.task.target_or_hidden(row),
            "length": len(context) + max(map(len, choices)),
            "truncated": truncated,
        }

    def _answers(self, choices: tuple[str, ...]) -> list[list[int]]:
        return answer_ids(self.tokenizer, self.task.template, choices)

    def _answer_room(self, choices: Sequence[Sequence[int]]) -> int:
        """Tokens of the limit that the answer takes from the text."""
        return max(map(len, choices))

    def collate_choices(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """See `Family`: `context` [B, T], `length` [B], `choices` [B, C, L] padded with IGNORE_INDEX."""
        most = max(len(row["choices"]) for row in rows)
        flat = [choice for row in rows for choice in [*row["choices"], *[[]] * (most - len(row["choices"]))]]
        return {
            "context": pad([row["context"] for row in rows], self.tokenizer.pad_token_id),
            "context_length": torch.tensor([len(row["context"]) for row in rows]),
            "choices": pad(flat, IGNORE_INDEX).view(len(rows), most, -1),
            "target": torch.tensor([row["target"] for row in rows]),
        }

    def score(self, model: Any, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """See `Family`; choices that differ in their last token alone share a sequence.

        `adapter_names` (a list of B names), if the batch has it, selects the adapter of each row.
        """
        device = batch["context"].device
        contexts = [
            row[:length].tolist()
            for row, length in zip(batch["context"].cpu(), batch["context_length"].tolist(), strict=True)
        ]
        choices = [[[t for t in choice if t != IGNORE_INDEX] for choice in row] for row in batch["choices"].tolist()]
        sequences: dict[tuple[int, tuple[int, ...]], int] = {}
        wanted = []  # for each token of each choice: row, choice, sequence, place behind the context, token
        for r, row in enumerate(choices):
            for c, choice in enumerate(row):
                number = sequences.setdefault((r, tuple(choice[:-1])), len(sequences)) if choice else -1
                wanted += [(r, c, number, place, token) for place, token in enumerate(choice)]
        names: Any = batch.get("adapter_names")
        scores = torch.zeros(batch["choices"].shape[:2])
        keys = list(sequences)
        for i in range(_most_passes(-(-len(keys) // MAX_SEQUENCES), device)):
            start = i * MAX_SEQUENCES
            part = keys[start : start + MAX_SEQUENCES]
            if not part:
                self._logits(model, contexts[:1], [()], device, {})
                continue
            asked = [(r, c, n - start, p, t) for r, c, n, p, t in wanted if start <= n < start + MAX_SEQUENCES]
            rows, columns, numbers, places, tokens = torch.tensor(asked).T
            options = {"adapter_names": [names[r] for r, _ in part]} if names else {}
            logits = self._logits(model, [contexts[r] for r, _ in part], [key for _, key in part], device, options)
            chosen = logits(numbers, places).float().log_softmax(-1).cpu()  # [asked, V]
            scores.index_put_((rows, columns), chosen.gather(1, tokens[:, None])[:, 0], accumulate=True)
        absent = torch.tensor([[not choice for choice in row] for row in choices])
        return scores.masked_fill(absent, ABSENT).to(device)

    @abstractmethod
    def _logits(
        self,
        model: Any,
        contexts: list[list[int]],
        openings: list[tuple[int, ...]],
        device: torch.device,
        options: dict[str, Any],
    ) -> Any:
        """Run sequences of a context and the opening of an answer.

        Args:
            model: The model.
            contexts: Token ids of each sequence's text.
            openings: Token ids of the answer's first tokens, none or more.
            device: The model's.
            options: Further arguments of the model.

        Returns:
            A function of sequence numbers [n] and places behind the context [n] that gives the logits [n, V] for the
            token at that place.
        """


def _most_passes(passes: int, device: torch.device) -> int:
    """The most forward passes that any process makes: where weights are sharded all have to make as many."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return passes
    most = torch.tensor(passes, device=device)
    torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
    return int(most)


def labelled(row: Mapping[str, Any]) -> list[int]:
    """The right answer's tokens."""
    return row["choices"][right_choice(row)]
