"""The metrics of GLUE and SuperGLUE as `evaluate.Metric`, without code from the Hub, and the benchmarks' means.

Keys and input forms are those of the Hub's "glue" and "super_glue"; every score is a plain float, 1.0 is perfect.
Where a formula has no value the score is 0.0: a correlation of constant values, F1 without positives.

Sources: Wang et al. 2018 (GLUE), Wang et al. 2019 (SuperGLUE), Khashabi et al. 2018 (MultiRC), Zhang et al. 2018
(ReCoRD).

Shapes: N rows.
"""

from __future__ import annotations

import re
import string
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import evaluate
import numpy as np
from datasets import Features, List, Value

from .._choices import check_choice


_ACCURACY = ("accuracy",)
GLUE_METRICS = {
    "cola": ("matthews_correlation",),
    "sst2": _ACCURACY,
    "mrpc": ("accuracy", "f1"),
    "stsb": ("pearson", "spearmanr"),
    "qqp": ("accuracy", "f1"),
    **dict.fromkeys(("mnli", "mnli_matched", "mnli_mismatched", "qnli", "rte", "wnli"), _ACCURACY),
}
SUPER_GLUE_METRICS = {
    "boolq": _ACCURACY,
    "cb": ("accuracy", "f1"),
    "copa": _ACCURACY,
    "multirc": ("exact_match", "f1_m", "f1_a"),
    "record": ("exact_match", "f1"),
    **dict.fromkeys(("rte", "wic", "wsc"), _ACCURACY),
}
_COUNTED = {**GLUE_METRICS, **SUPER_GLUE_METRICS, "multirc": ("exact_match", "f1_a"), "super_glue_rte": _ACCURACY}
_MNLI = ("mnli_matched", "mnli_mismatched")
_BENCHMARKS = {
    "glue": tuple(name for name in GLUE_METRICS if name != "mnli"),
    "super_glue": (*SUPER_GLUE_METRICS, "super_glue_rte"),
}


class _InMemory(evaluate.Metric):
    """A metric that writes no files, so that processes cannot disturb each other."""

    def __init__(self, config_name: str | None = None) -> None:
        super().__init__(config_name, keep_in_memory=True)

    def _build_data_dir(self) -> str:
        return self._data_dir_root  # evaluate would make a folder that stays empty

    def _info(self) -> evaluate.MetricInfo:
        text = type(self).__doc__ or ""
        return evaluate.MetricInfo(description=text, citation="", features=Features(self._features()))

    def _features(self) -> dict[str, Any]:
        # as integers, probabilities would be cut to 0 before `_labels` could refuse them
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
        config_name: A name of `GLUE_METRICS`, which says what comes back. F1 is that of class 1. A prediction that is
            no class of the task (of a language model that answered something else) is a wrong one.

    Raises:
        ValueError: Unknown name; in `compute`: references that the Hub hides (-1).
    """

    def __init__(self, config_name: str) -> None:
        check_choice("config_name", config_name, tuple(GLUE_METRICS))
        super().__init__(config_name)

    def _features(self) -> dict[str, Any]:
        if self.config_name == "stsb":
            return {"predictions": Value("float32"), "references": Value("float32")}
        return super()._features()

    def _compute(self, predictions: list[float], references: list[float]) -> dict[str, float]:
        if self.config_name == "stsb":
            return _correlations(predictions, references)
        predicted, right = _labels(predictions), _known(_labels(references, "references"))
        if self.config_name == "cola":
            return {"matthews_correlation": _matthews(predicted, right)}
        scores = {"accuracy": _accuracy(predicted, right)}
        if "f1" in GLUE_METRICS[self.config_name]:
            scores["f1"] = _binary_f1(predicted, right)
        return scores


class SuperGlue(_InMemory):
    """The metrics of one task of SuperGLUE.

    Predictions and references are labels, but for two tasks. multirc: a prediction is
    `{"idx": {"paragraph": int, "question": int, "answer": int}, "prediction": 0 or 1}`, references are labels. record:
    `{"idx": {"passage": int, "query": int}, "prediction_text": str}` and `{"idx": ..., "answers": [str, ...]}`, in
    any order.

    cb's `f1` and, within one question, multirc's `f1_m` are means over the classes that occur among predictions or
    references; a class that occurs in neither is left out, as in the Hub's metric. (Khashabi et al. 2018 define
    another F1m; SuperGLUE counts none.)

    Args:
        config_name: A name of `SUPER_GLUE_METRICS`, which says what comes back.

    Raises:
        ValueError: Unknown name; in `compute`: references that the Hub hides (-1, no answers), a row that comes
            twice, a query of record without a prediction.
    """

    def __init__(self, config_name: str) -> None:
        check_choice("config_name", config_name, tuple(SUPER_GLUE_METRICS))
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
        if self.config_name == "record":
            return _record(predictions, references)
        right = _known(_labels(references, "references"))
        if self.config_name == "multirc":
            return _multirc(predictions, right)
        predicted = _labels(predictions)
        scores = {"accuracy": _accuracy(predicted, right)}
        if self.config_name == "cb":
            scores["f1"] = _macro_f1(predicted, right)
        return scores


class Classification(_InMemory):
    """Accuracy and macro F1 of a user's own task, over the classes that occur among predictions or references."""

    def __init__(self) -> None:
        super().__init__()

    def _compute(self, predictions: list[float], references: list[float]) -> dict[str, float]:
        predicted, right = _labels(predictions), _labels(references, "references")
        return {"accuracy": _accuracy(predicted, right), "f1": _macro_f1(predicted, right)}


def _finite(values: list[float], name: str) -> np.ndarray:
    numbers = np.array(values, dtype=np.float64)
    odd = ~np.isfinite(numbers)
    if odd.any():
        raise ValueError(
            f"The {name} must be finite numbers; got {numbers[odd][0]} in {odd.sum()} of {len(odd)} rows "
            "(None becomes nan). Look for what first became nan or infinite."
        )
    return numbers


def _labels(values: list[float], name: str = "predictions") -> np.ndarray:
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
    from sklearn.metrics import matthews_corrcoef

    if np.ptp(predictions) == 0 or np.ptp(references) == 0:
        return 0.0  # scikit-learn's value too, with a warning
    return float(matthews_corrcoef(references, predictions))


def _correlations(predictions: list[float], references: list[float]) -> dict[str, float]:
    from scipy.stats import pearsonr, spearmanr

    predicted, right = _finite(predictions, "predictions"), _known(_finite(references, "references"))
    if np.ptp(predicted) == 0 or np.ptp(right) == 0:
        return {"pearson": 0.0, "spearmanr": 0.0}
    return {
        "pearson": float(pearsonr(predicted, right).statistic),
        "spearmanr": float(spearmanr(predicted, right).statistic),
    }


def _multirc(predictions: list[dict[str, Any]], references: np.ndarray) -> dict[str, float]:
    """The share of questions with all answers right, F1 by question, F1 of all answers (Khashabi et al. 2018)."""
    _unique(row["idx"] for row in predictions)
    predicted = _labels([row["prediction"] for row in predictions])
    questions: dict[tuple[int, int], list[int]] = defaultdict(list)
    for i, row in enumerate(predictions):
        questions[row["idx"]["paragraph"], row["idx"]["question"]].append(i)
    rows = list(questions.values())
    return {
        "exact_match": float(np.mean([_accuracy(predicted[i], references[i]) == 1 for i in rows])),
        "f1_m": float(np.mean([_macro_f1(predicted[i], references[i]) for i in rows])),
        "f1_a": _binary_f1(predicted, references),
    }


def _record(predictions: list[dict[str, Any]], references: list[dict[str, Any]]) -> dict[str, float]:
    """The best score over a query's gold answers, averaged over queries (Zhang et al. 2018)."""
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


def combined_score(scores: Mapping[str, float], task_name: str) -> float:
    """The one number of a task: the mean over the metrics that count in its paper.

    Args:
        scores: What `Glue(task_name)` or `SuperGlue(task_name)` computed.
        task_name: A name of `GLUE_METRICS` or `SUPER_GLUE_METRICS`, or "super_glue_rte".

    Returns:
        All of a task's metrics count, but for multirc's `f1_m` (Wang et al. 2019).

    Raises:
        ValueError: Unknown task, or one of its metrics is missing.
    """
    check_choice("task_name", task_name, tuple(_COUNTED))
    counted = _COUNTED[task_name]
    missing = [name for name in counted if name not in scores]
    if missing:
        raise ValueError(
            f"The score of {task_name!r} is the mean of {', '.join(counted)}; got {', '.join(scores) or 'nothing'}. "
            f"Add {', '.join(missing)}."
        )
    return float(np.mean([scores[name] for name in counted]))


def benchmark_score(
    results: Mapping[str, Mapping[str, float]], benchmark: str, *, exclude: tuple[str, ...] = ()
) -> float:
    """The unweighted mean over the tasks of GLUE (Wang et al. 2018) or SuperGLUE (Wang et al. 2019).

    Args:
        results: The scores of each task. GLUE's mnli comes as mnli_matched and mnli_mismatched, whose mean is one
            task's score. SuperGLUE's rte may be called "super_glue_rte".
        benchmark: "glue" or "super_glue".
        exclude: Tasks that neither count nor need be there: ("wnli",) gives the mean of Devlin et al. 2019 (BERT).

    Raises:
        ValueError: Unknown benchmark or task, tasks missing, or none left.
    """
    check_choice("benchmark", benchmark, tuple(_BENCHMARKS))
    known = _BENCHMARKS[benchmark]
    for name in results:
        check_choice("a task of results", name, known)
    for name in exclude:
        check_choice("a task of exclude", name, (*known, "mnli") if benchmark == "glue" else known)
    if {"rte", "super_glue_rte"} <= set(results):
        raise ValueError("SuperGLUE has one rte; got 'rte' and 'super_glue_rte'. Leave GLUE's out.")
    results = {name.removeprefix("super_glue_"): scores for name, scores in results.items()}
    left_out = {name.removeprefix("super_glue_") for name in exclude} | set(_MNLI if "mnli" in exclude else ())
    wanted = [name for name in known if name not in left_out | {"super_glue_rte"}]
    missing = [name for name in wanted if name not in results]
    if missing or not wanted:
        raise ValueError(
            f"The mean of {benchmark} needs the scores of {', '.join(wanted) or 'at least one task'}; "
            f"missing: {', '.join(missing) or 'all'}. Score them, or name them in exclude."
        )
    by_task: dict[str, list[float]] = defaultdict(list)
    for name in wanted:
        by_task["mnli" if name in _MNLI else name].append(combined_score(results[name], name))
    return float(np.mean([np.mean(parts) for parts in by_task.values()]))
