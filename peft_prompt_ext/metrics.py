"""The metrics of GLUE and SuperGLUE as functions of predictions and references.

Keys and input forms are those of the Hub's "glue" and "super_glue"; every score is a plain float, 1.0 is perfect.
Where a formula has no value the score is 0.0: a correlation of constant values, F1 without positives.
`peft_prompt_ext.evaluate_metrics` has them as `evaluate.Metric` classes, `peft_prompt_ext.benchmark_scores` the
benchmarks' means.

Sources: Wang et al. 2018 (GLUE), Wang et al. 2019 (SuperGLUE), Khashabi et al. 2018 (MultiRC), Zhang et al. 2018
(ReCoRD).

Shapes: N rows.
"""

from __future__ import annotations

import re
import string
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    import numpy as np


Compute = Callable[[Sequence[Any], Sequence[Any]], dict[str, float]]


def accuracy(predictions: Sequence[float], references: Sequence[float]) -> dict[str, float]:
    """Share of right labels; a prediction that is no class of the task is a wrong one.

    Args:
        predictions: N labels.
        references: N labels, 0 or more.

    Raises:
        ValueError: Values that are no labels, or references that the Hub hides (-1).
    """
    return {"accuracy": _accuracy(*_labels_of(predictions, references))}


def accuracy_and_f1(predictions: Sequence[float], references: Sequence[float]) -> dict[str, float]:
    """Accuracy and the F1 of class 1; see [`accuracy`]."""
    predicted, right = _labels_of(predictions, references)
    return {"accuracy": _accuracy(predicted, right), "f1": _binary_f1(predicted, right)}


def accuracy_and_mean_f1(predictions: Sequence[float], references: Sequence[float]) -> dict[str, float]:
    """Accuracy and the mean F1 of the classes that occur among predictions or references; see [`accuracy`]."""
    predicted, right = _labels_of(predictions, references)
    return {"accuracy": _accuracy(predicted, right), "f1": _macro_f1(predicted, right)}


def classification(predictions: Sequence[float], references: Sequence[float]) -> dict[str, float]:
    """As [`accuracy_and_mean_f1`], for a user's own task: its labels may be negative."""
    _check_lengths(predictions, references)
    predicted, right = _labels(predictions), _labels(references, "references")
    return {"accuracy": _accuracy(predicted, right), "f1": _macro_f1(predicted, right)}


def matthews_correlation(predictions: Sequence[float], references: Sequence[float]) -> dict[str, float]:
    """Matthews' correlation of labels; see [`accuracy`]."""
    return {"matthews_correlation": _matthews(*_labels_of(predictions, references))}


def correlations(predictions: Sequence[float], references: Sequence[float]) -> dict[str, float]:
    """Pearson's and Spearman's correlation of numbers, in float32 as the Hub's metric has them.

    Raises:
        ValueError: A number is not finite, or a reference is hidden (-1).
    """
    import numpy as np
    from scipy.stats import pearsonr, spearmanr

    _check_lengths(predictions, references)
    predicted, right = _finite(predictions, "predictions"), _known(_finite(references, "references"))
    predicted, right = (values.astype(np.float32).astype(np.float64) for values in (predicted, right))
    if np.ptp(predicted) == 0 or np.ptp(right) == 0:
        return {"pearson": 0.0, "spearmanr": 0.0}
    return {
        "pearson": float(pearsonr(predicted, right).statistic),
        "spearmanr": float(spearmanr(predicted, right).statistic),
    }


def multirc(predictions: Sequence[Mapping[str, Any]], references: Sequence[float]) -> dict[str, float]:
    """The share of questions with all answers right, F1 by question, F1 of all answers (Khashabi et al. 2018).

    Within a question `f1_m` is the mean over the classes that occur, as in the Hub's metric. (Khashabi et al. 2018
    define another F1m; SuperGLUE counts none.)

    Args:
        predictions: N of `{"idx": {"paragraph": int, "question": int, "answer": int}, "prediction": 0 or 1}`.
        references: N labels.

    Raises:
        ValueError: As [`accuracy`], or a row comes twice.
    """
    import numpy as np

    _check_lengths(predictions, references)
    right = _known(_labels(references, "references"))
    _unique(row["idx"] for row in predictions)
    predicted = _labels([row["prediction"] for row in predictions])
    questions: dict[tuple[int, int], list[int]] = defaultdict(list)
    for i, row in enumerate(predictions):
        questions[row["idx"]["paragraph"], row["idx"]["question"]].append(i)
    rows = list(questions.values())
    return {
        "exact_match": float(np.mean([_accuracy(predicted[i], right[i]) == 1 for i in rows])),
        "f1_m": float(np.mean([_macro_f1(predicted[i], right[i]) for i in rows])),
        "f1_a": _binary_f1(predicted, right),
    }


def record(predictions: Sequence[Mapping[str, Any]], references: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The best score over a query's gold answers, averaged over queries (Zhang et al. 2018).

    Args:
        predictions: N of `{"idx": {"passage": int, "query": int}, "prediction_text": str}`, in any order.
        references: N of `{"idx": ..., "answers": [str, ...]}`.

    Raises:
        ValueError: A row comes twice, or a query has no prediction or no answers.
    """
    import numpy as np

    if not references:
        raise ValueError("Wanted one or more references; got none.")
    keys = _unique(row["idx"] for row in predictions)
    texts = {key: row["prediction_text"] for key, row in zip(keys, predictions, strict=True)}
    matches, f1s = [], []
    for key, row in zip(_unique(row["idx"] for row in references), references, strict=True):
        if key not in texts:
            raise ValueError(f"Every query needs a prediction; got none for {dict(key)}. Add its prediction_text.")
        if not row["answers"]:
            raise ValueError(
                f"Every query needs gold answers; got none for {dict(key)}. Score a split whose answers are known."
            )
        matches.append(max(_words(texts[key]) == _words(answer) for answer in row["answers"]))
        f1s.append(max(_token_f1(texts[key], answer) for answer in row["answers"]))
    return {"exact_match": float(np.mean(matches)), "f1": float(np.mean(f1s))}


GLUE: dict[str, Compute] = {
    "cola": matthews_correlation,
    "sst2": accuracy,
    "mrpc": accuracy_and_f1,
    "stsb": correlations,
    "qqp": accuracy_and_f1,
    **dict.fromkeys(("mnli", "mnli_matched", "mnli_mismatched", "qnli", "rte", "wnli"), accuracy),
}
SUPER_GLUE: dict[str, Compute] = {
    "boolq": accuracy,
    "cb": accuracy_and_mean_f1,
    "copa": accuracy,
    "multirc": multirc,
    "record": record,
    **dict.fromkeys(("rte", "wic", "wsc"), accuracy),
}
_KEYS: dict[Compute, tuple[str, ...]] = {
    accuracy: ("accuracy",),
    accuracy_and_f1: ("accuracy", "f1"),
    accuracy_and_mean_f1: ("accuracy", "f1"),
    matthews_correlation: ("matthews_correlation",),
    correlations: ("pearson", "spearmanr"),
    multirc: ("exact_match", "f1_m", "f1_a"),
    record: ("exact_match", "f1"),
}
GLUE_METRICS = {name: _KEYS[compute] for name, compute in GLUE.items()}
SUPER_GLUE_METRICS = {name: _KEYS[compute] for name, compute in SUPER_GLUE.items()}


def _labels_of(predictions: Sequence[float], references: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    _check_lengths(predictions, references)
    return _labels(predictions), _known(_labels(references, "references"))


def _check_lengths(predictions: Sequence[Any], references: Sequence[Any]) -> None:
    if not len(predictions) == len(references) > 0:
        raise ValueError(
            f"Wanted one prediction for each reference, one or more; got {len(predictions)} predictions and "
            f"{len(references)} references."
        )


def _finite(values: Sequence[float], name: str) -> np.ndarray:
    import numpy as np

    numbers = np.array(values, dtype=np.float64)
    odd = ~np.isfinite(numbers)
    if odd.any():
        raise ValueError(
            f"The {name} must be finite numbers; got {numbers[odd][0]} in {odd.sum()} of {len(odd)} rows "
            "(None becomes nan). Look for what first became nan or infinite."
        )
    return numbers


def _labels(values: Sequence[float], name: str = "predictions") -> np.ndarray:
    import numpy as np

    numbers = _finite(values, name)
    odd = numbers != np.floor(numbers)
    if odd.any():
        raise ValueError(
            f"The {name} must be labels, which are whole numbers; got {numbers[odd][0]}. "
            "Of probabilities or logits take the argmax first."
        )
    return numbers.astype(np.int64)


def _known(references: np.ndarray) -> np.ndarray:
    if (references < 0).any():
        raise ValueError(
            f"The references must be 0 or more; got {references.min()}, with which the Hub marks hidden answers. "
            "Score a split whose answers are known."
        )
    return references


def _accuracy(predictions: np.ndarray, references: np.ndarray) -> float:
    return float((predictions == references).mean())


def _binary_f1(predictions: np.ndarray, references: np.ndarray) -> float:
    from sklearn.metrics import f1_score

    return float(f1_score(references == 1, predictions == 1, zero_division=0.0))


def _macro_f1(predictions: np.ndarray, references: np.ndarray) -> float:
    from sklearn.metrics import f1_score

    return float(f1_score(references, predictions, average="macro", zero_division=0.0))


def _matthews(predictions: np.ndarray, references: np.ndarray) -> float:
    import numpy as np
    from sklearn.metrics import matthews_corrcoef

    if np.ptp(predictions) == 0 or np.ptp(references) == 0:
        return 0.0  # scikit-learn's value too, with a warning
    return float(matthews_corrcoef(references, predictions))


def _unique(indices: Iterable[Mapping[str, int]]) -> list[tuple[tuple[str, int], ...]]:
    keys = [tuple(sorted(idx.items())) for idx in indices]
    key, count = Counter(keys).most_common(1)[0]
    if count > 1:
        raise ValueError(f"Every row counts once; got {dict(key)} {count} times. Drop the copies.")
    return keys


def _words(text: str) -> list[str]:
    """Words in lower case without punctuation and articles, as in SQuAD's script, which ReCoRD's took over."""
    text = text.lower().translate(str.maketrans("", "", string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def _token_f1(prediction: str, answer: str) -> float:
    """F1 of two bags of words; 0.0 for two empty ones, as in ReCoRD's script."""
    predicted, right = _words(prediction), _words(answer)
    common = (Counter(predicted) & Counter(right)).total()
    return 2 * common / (len(predicted) + len(right)) if common else 0.0
