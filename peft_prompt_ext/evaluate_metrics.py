"""The metrics of GLUE and SuperGLUE as `evaluate.Metric`, without code from the Hub.

The tasks of this package use the functions of `peft_prompt_ext.metrics`; these classes are for scripts that use
`evaluate`.

Shapes: N rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import evaluate
from datasets import Features, List, Value

from . import metrics
from ._choices import check_choice


class _InMemory(evaluate.Metric):
    """A metric that writes no files, so that two processes never share one."""

    def __init__(self, config_name: str | None = None) -> None:
        super().__init__(config_name, keep_in_memory=True)

    def _build_data_dir(self) -> str:
        return self._data_dir_root  # evaluate would make a folder that stays empty

    def _info(self) -> evaluate.MetricInfo:
        text = type(self).__doc__ or ""
        return evaluate.MetricInfo(description=text, citation="", features=Features(self._features()))

    def _features(self) -> dict[str, Any]:
        # integers would cut probabilities to 0 before the metric could refuse them
        return {"predictions": Value("float64"), "references": Value("float64")}

    def compute(
        self, *, predictions: Sequence[Any] | None = None, references: Sequence[Any] | None = None
    ) -> dict[str, float]:
        """Score N predictions, together with those that `add` and `add_batch` brought since the last call.

        Raises:
            ValueError: There are no rows, not as many predictions as references, or values that are no labels (for
                stsb: no finite numbers).
        """
        got = [0 if values is None else len(values) for values in (predictions, references)]
        if got[0] != got[1]:
            raise ValueError(
                f"Every prediction needs a reference; got {got[0]} predictions and {got[1]} references. "
                "Pass as many of the one as of the other."
            )
        if len(self) + got[0] == 0:
            raise ValueError(
                "A score needs at least one prediction with its reference; got none. "
                "Check that the split has rows and that they reach the metric."
            )
        scores: dict[str, float] = super().compute(predictions=predictions, references=references)
        return scores


class Glue(_InMemory):
    """The metrics of one task of GLUE.

    Args:
        config_name: A name of `metrics.GLUE_METRICS`, which says what comes back.

    Raises:
        ValueError: Unknown name; in `compute`: references that the Hub hides (-1).
    """

    def __init__(self, config_name: str) -> None:
        check_choice("config_name", config_name, tuple(metrics.GLUE))
        super().__init__(config_name)

    def _features(self) -> dict[str, Any]:
        if self.config_name == "stsb":
            return {"predictions": Value("float32"), "references": Value("float32")}
        return super()._features()

    def _compute(self, predictions: list[float], references: list[float]) -> dict[str, float]:
        return metrics.GLUE[self.config_name](predictions, references)


class SuperGlue(_InMemory):
    """The metrics of one task of SuperGLUE; `metrics.multirc` and `metrics.record` say what those two take.

    Args:
        config_name: A name of `metrics.SUPER_GLUE_METRICS`, which says what comes back.

    Raises:
        ValueError: Unknown name; in `compute`: references that the Hub hides (-1, no answers), a row that comes
            twice, a query of record without a prediction.
    """

    def __init__(self, config_name: str) -> None:
        check_choice("config_name", config_name, tuple(metrics.SUPER_GLUE))
        super().__init__(config_name)

    def _features(self) -> dict[str, Any]:
        label, text = Value("float64"), Value("string")
        if self.config_name == "multirc":
            idx = dict.fromkeys(("paragraph", "question", "answer"), Value("int64"))
            return {"predictions": {"idx": idx, "prediction": label}, "references": label}
        if self.config_name == "record":
            idx = dict.fromkeys(("passage", "query"), Value("int64"))
            answers = {"idx": idx, "answers": List(text)}
            return {"predictions": {"idx": idx, "prediction_text": text}, "references": answers}
        return super()._features()

    def _compute(self, predictions: list[Any], references: list[Any]) -> dict[str, float]:
        return metrics.SUPER_GLUE[self.config_name](predictions, references)


class Classification(_InMemory):
    """Accuracy and macro F1 of a user's own task, over the classes that occur among predictions or references."""

    def __init__(self) -> None:
        super().__init__()

    def _compute(self, predictions: list[float], references: list[float]) -> dict[str, float]:
        return metrics.classification(predictions, references)
