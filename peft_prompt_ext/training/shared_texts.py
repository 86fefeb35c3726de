"""Answers of several runs to the same texts: a text is read once, and the prompt of each run behind it asks."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..peft_models.packed import engine_status
from ..tasks.families import Family
from ..tasks.families.language_model import MAX_SEQUENCES
from .folder import read_settings
from .models import trained_model
from .predictor import check_asked, check_device, name_answers, place, rate, saved_family


logger = logging.getLogger(__name__)

SAME = ("model_name_or_path", "model_revision", "task_type", "quantization", "dtype")  # of all runs


class SharedTextPredictor:
    """Labels with probabilities of several tasks for rows whose text is the same for all of them.

    Args:
        model: The model with one prompt behind the text for each task.
        families: How rows are asked, by the name of the task's column in the answers; in the order of the adapters.

    Example:
    ```py
    >>> predictor = SharedTextPredictor.from_pretrained(["outputs/mood", "outputs/topic"])
    >>> next(predictor.predict([{"text": "a warm and funny film"}]))["mood"]["label"]
    ```
    """

    def __init__(self, model: Any, families: Mapping[str, Family]) -> None:
        self.model = model.eval()
        self.families = dict(families)
        self.adapters = list(model.peft_config)
        limit = min(family.text_room for family in self.families.values())
        for family in self.families.values():  # a long text has to be cut alike
            family.text_limit = limit

    @classmethod
    def from_pretrained(cls, folders: Sequence[str], device: str | None = None) -> SharedTextPredictor:
        """Load the folders of runs.

        Args:
            folders: Their output folders, or the Hub ids that they were pushed to.
            device: Where to run; by default a GPU if there is one. Not for a quantised base model.

        Raises:
            ValueError: A folder holds no run or no prompt behind a text, or the runs have different base models or
                heads.
        """
        runs = {folder: read_settings(folder) for folder in folders}
        if len(runs) < len(folders):
            raise ValueError(f"A folder is named twice in {', '.join(folders)}: name each once.")
        check_runs(runs)
        first = folders[0]
        check_device(first, runs[first], device)
        families = {folder: saved_family(settings) for folder, settings in runs.items()}
        _check_heads(families)
        model = trained_model(families[first], runs[first], first)
        for number, folder in enumerate(folders[1:], 1):
            model.load_adapter(folder, adapter_name=f"adapter_{number}")
        return cls(place(model, runs[first], device), dict(zip(name_columns(folders), families.values(), strict=True)))

    def predict(self, rows: Sequence[Mapping[str, Any]], batch_size: int = 32) -> Iterator[dict[str, dict[str, Any]]]:
        """Answer rows, in their order.

        Args:
            rows: Rows with the text columns of all tasks.
            batch_size: Most rows at a time; the answers do not depend on it.

        Yields:
            By task, what `Predictor.predict` yields.

        Raises:
            ValueError: A task cannot ask a row, or the tasks read different texts.
        """
        for family in self.families.values():
            check_asked(family.task, rows)
        for number, row in enumerate(rows):
            texts = [family.texts_of(family.task.prepared(row)) for family in self.families.values()]
            self._check_same(f"Row {number}", texts)
        batch: list[list[dict[str, Any]]] = []
        start = 0
        for number, row in enumerate(rows):
            encoded = self._encode(number, row)
            full = len(batch) == batch_size or sum(map(_sequences, [*batch, encoded])) > MAX_SEQUENCES
            if batch and full:
                yield from self._answer(rows[start:number], batch)
                batch, start = [], number
            batch.append(encoded)
        if batch:
            yield from self._answer(rows[start:], batch)

    def _encode(self, number: int, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The row as each task asks it."""
        encoded = [family.encode(row) for family in self.families.values()]
        texts = [one["context"] if "context" in one else one["inputs"] for one in encoded]
        self._check_same(f"Row {number}, which was cut", texts)
        return encoded

    def _check_same(self, where: str, texts: Sequence[Sequence[Any]]) -> None:
        first = next(iter(self.families))
        for name, text in zip(self.families, texts, strict=True):
            if text != texts[0]:
                raise ValueError(
                    f"{where}: {first} and {name} read different texts, {_end(texts[0])} and {_end(text)}. Runs that "
                    "share a text have templates that are equal up to their last column; answer others alone."
                )

    def _answer(
        self, rows: Sequence[Mapping[str, Any]], encoded: list[list[dict[str, Any]]]
    ) -> Iterator[dict[str, dict[str, Any]]]:
        scores = self._score_together(encoded) or self._score_in_turn(encoded)
        named = [
            name_answers(family.task, rows, found)
            for family, found in zip(self.families.values(), scores, strict=True)
        ]
        for answers in zip(*named, strict=True):
            yield dict(zip(self.families, answers, strict=True))

    def _score_together(self, encoded: list[list[dict[str, Any]]]) -> list[Any] | None:
        """Scores by task, of one batch with each row's text once for each prompt; None if it cannot run packed."""
        family, count = next(iter(self.families.values())), len(self.adapters)
        flat = [one for row in encoded for one in row]
        try:
            scores = rate(self.model, family, flat, adapter_names=self.adapters * len(encoded))
        except ValueError:
            status = engine_status(self.model)
            if status.packed:
                raise
            logger.info("The prompts answer one after the other: %s.", status.reason)
            return None
        return [scores[number::count] for number in range(count)]

    def _score_in_turn(self, encoded: list[list[dict[str, Any]]]) -> list[Any]:
        """Scores by task, of one batch for each prompt."""
        scores = []
        for number, (adapter, family) in enumerate(zip(self.adapters, self.families.values(), strict=True)):
            self.model.set_adapter(adapter, inference_mode=True)
            scores.append(rate(self.model, family, [row[number] for row in encoded]))
        return scores


def check_runs(runs: Mapping[str, Mapping[str, Any]]) -> None:
    """Check that runs can share a text, from their settings by folder.

    Raises:
        ValueError: A run has no prompt behind its text, or two have different base models.
    """
    (first, settings), *_ = runs.items()
    for folder, other in runs.items():
        if other.get("prompt_position") != "suffix":
            raise ValueError(
                f"{folder} has no prompt behind the text, so it reads the text in its own way: answer it alone, or "
                "train it with --prompt_position suffix."
            )
        different = [name for name in SAME if other[name] != settings[name]]
        if different:
            changes = ", ".join(f"{name} {settings[name]!r} and {other[name]!r}" for name in different)
            raise ValueError(f"{first} and {folder} have different base models ({changes}): answer them one by one.")


def name_columns(folders: Sequence[str]) -> list[str]:
    """Names of the tasks in the answers: the folders' own names, or their paths where two have one name."""
    names = [Path(folder).name for folder in folders]
    return names if len(set(names)) == len(names) else list(folders)


def _check_heads(families: Mapping[str, Family]) -> None:
    """Classification heads have to be of one size, and read one text for each row."""
    (first, family), *_ = families.items()
    if family.asks_question:
        return
    for folder, other in families.items():
        if other.task.choices:
            raise ValueError(f"{folder} reads a text for each choice ({other.task.name}): answer it alone.")
        sizes = [one.model_options["num_labels"] for one in (family, other)]
        if sizes[0] != sizes[1]:
            raise ValueError(f"{first} has a head of {sizes[0]} outputs, {folder} of {sizes[1]}: answer them alone.")


def _sequences(row: Sequence[Mapping[str, Any]]) -> int:
    """Sequences that a row takes, of all tasks; choices that differ in their last token alone share one."""
    return sum(len({tuple(choice[:-1]) for choice in one["choices"]}) if "choices" in one else 1 for one in row)


def _end(text: Sequence[Any]) -> str:
    """The end of texts or of tokens, for an error."""
    words = "\n".join(map(str, text))
    return repr(words if len(words) <= 60 else f"...{words[-60:]}")
