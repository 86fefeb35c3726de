"""How a task's answers become scores: which function of `peft_prompt_ext.metrics`, and what it is called with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .. import metrics


@dataclass(frozen=True, kw_only=True)
class Metric:
    """The metric of a task.

    Attributes:
        compute: Function of N predictions and N references that returns scores as fractions.
        counted: Keys whose mean is the score "combined_score"; empty where there is none.
        prediction: Function of a row and the index of its predicted answer that gives what `compute` takes; by
            default the index.
        reference: Function of a row that gives what `compute` takes; by default the index of the right answer.
        index: Numbers that the column `idx` of a row must hold because `compute` groups rows by them.
    """

    compute: metrics.Compute
    counted: tuple[str, ...] = ()
    prediction: Callable[[Mapping[str, Any], Any], Any] | None = None
    reference: Callable[[Mapping[str, Any]], Any] | None = None
    index: tuple[str, ...] = ()


CLASSIFICATION = Metric(compute=metrics.classification)
ACCURACY = Metric(compute=metrics.accuracy)
ACCURACY_AND_F1 = Metric(compute=metrics.accuracy_and_f1, counted=("accuracy", "f1"))
ACCURACY_AND_MEAN_F1 = Metric(compute=metrics.accuracy_and_mean_f1, counted=("accuracy", "f1"))
MATTHEWS = Metric(compute=metrics.matthews_correlation)
