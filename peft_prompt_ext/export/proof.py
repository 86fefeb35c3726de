"""The proof of an export: what PEFT's model answers, and what the exported folder answers to the same texts.

Each text runs alone, so that no padding has a part in it. Shapes: T tokens of a text, V rows of the head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..tasks.encoding import answer_ids
from ..tasks.families import Family
from .adapters import Prompt
from .head import MARGIN, all_logits, lowest_margin


NEW_TOKENS = 8
TOLERANCES = {torch.float64: 1e-4, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 5e-3}


@dataclass(frozen=True)
class Answer:
    """What a model says to one text.

    Attributes:
        tokens: Greedy ones.
        scores: The log-probability of each of them.
        label_scores: The log-probability of each label word.
    """

    tokens: list[int]
    scores: list[float]
    label_scores: list[float]


def ask(model: Any, rows: Sequence[Sequence[int]], family: Family | None) -> list[Answer]:
    """Ask a model.

    Args:
        model: PEFT's model with one prompt, or a plain one.
        rows: The token ids of each text; for a plain model with the prompt's tokens.
        family: Scores label words; None without a task.
    """
    return [_ask_one(model, list(row), family) for row in rows]


def _ask_one(model: Any, ids: list[int], family: Family | None) -> Answer:
    inputs = torch.tensor([ids], device=model.device)
    with torch.inference_mode():
        done = model.generate(
            input_ids=inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            num_beams=1,
            pad_token_id=0,  # not used in a row alone; without one generate warns
            return_dict_in_generate=True,
            output_logits=True,
        )
    steps = torch.stack(done.logits)[:, 0].float().log_softmax(-1)
    tokens = done.sequences[0, -len(steps) :]
    answer = Answer(tokens.tolist(), steps[torch.arange(len(steps)), tokens].tolist(), _score(model, ids, family))
    if not all(map(math.isfinite, answer.scores + answer.label_scores)):
        raise ValueError(
            f"The model gives NaN or infinite scores to a text of {len(ids)} tokens. Nothing was written. Its weights "
            "may be too large for 16 bits: --dtype float32."
        )
    return answer


def _score(model: Any, ids: list[int], family: Family | None) -> list[float]:
    if family is None or not family.task.label_words:
        return []
    choices = answer_ids(family.tokenizer, family.task.template, family.task.label_words)
    batch = family.collate_choices([{"context": ids, "choices": choices, "target": 0}])
    with torch.inference_mode():
        return family.score(model, {name: value.to(model.device) for name, value in batch.items()})[0].tolist()


def check_same(prompt: Prompt, texts: Sequence[str], wanted: Sequence[Answer], found: Sequence[Answer]) -> float:
    """Find the largest difference of log-probabilities.

    Raises:
        ValueError: Greedy tokens differ.
    """
    largest = 0.0
    for text, one, other in zip(texts, wanted, found, strict=True):
        if one.tokens != other.tokens:
            raise ValueError(
                f"The export of {prompt.name!r} answers otherwise than PEFT: {other.tokens} instead of {one.tokens} "
                f"to {text[:60]!r}. Nothing was written. In 16 bits answers may lie near one another: --dtype float32."
            )
        pairs = zip(one.scores + one.label_scores, other.scores + other.label_scores, strict=True)
        largest = max([largest, *(abs(a - b) for a, b in pairs)])
    return largest


def check_tolerance(prompt: Prompt, difference: float, dtype: torch.dtype) -> None:
    """Raise ValueError if log-probabilities differ by more than a dtype's tolerance."""
    if not difference <= TOLERANCES[dtype]:
        raise ValueError(
            f"The export of {prompt.name!r} differs from PEFT by {difference:.3g} in a log-probability; wanted at "
            f"most {TOLERANCES[dtype]:g} in {str(dtype).removeprefix('torch.')}. Nothing was written. Try --dtype "
            "float32. If it differs there too, the model does more with ids than look up their embeddings, or gives "
            "its reserved rows a probability, which the prompts take away: serve the adapter with PEFT."
        )


def find_margin(model: Any, batches: Sequence[torch.Tensor], ids: Sequence[int]) -> float:
    """Find how far the new tokens' logits are below all others, at the worst position of batches of ids [B, T].

    Raises:
        ValueError: It is less than MARGIN.
    """
    with torch.inference_mode():
        margins = [lowest_margin(all_logits(model, batch), ids) for batch in batches]
    least = torch.tensor(margins).min().item()  # the least of floats may leave a NaN out
    if not least >= MARGIN:
        raise ValueError(
            f"A prompt's token could be answered: its logit is {least:.3g} below the lowest other one at some "
            f"position; wanted {MARGIN:g} or more. Nothing was written. A model that caps its logits (Gemma 2) leaves "
            "no room below: serve the adapter with PEFT."
        )
    return least
