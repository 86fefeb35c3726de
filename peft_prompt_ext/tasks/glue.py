"""GLUE (Wang et al. 2018): an entry for each task, over the columns and label codes of `nyu-mll/glue`."""

from __future__ import annotations

from typing import Any

from .. import metrics
from .metric import ACCURACY, ACCURACY_AND_F1, MATTHEWS, Metric
from .task import Row, Task, register_tasks


_PAIR: dict[str, Any] = {"texts": ("{sentence1}", "{sentence2}")}


def _glue(name: str, metric: Metric = ACCURACY, **values: Any) -> Task:
    revision = "bcdcba79d07bc864c1c254ccfcedcce55bcc9a8c"
    return Task(
        name=name, path="nyu-mll/glue", subset=name, revision=revision, benchmark="glue", metric=metric, **values
    )


def _similarity(row: Row) -> float:
    return row["label"]


register_tasks(
    [
        _glue(
            "cola",
            template="Sentence: {sentence}\nIs this correct English? Answer:",
            texts=("{sentence}",),
            label_words=(" no", " yes"),
            metric=MATTHEWS,
            main_metric="matthews_correlation",
        ),
        _glue(
            "sst2",
            template="Review: {sentence}\nSentiment:",
            texts=("{sentence}",),
            label_words=(" negative", " positive"),
        ),
        _glue(
            "mrpc",
            template="Sentence 1: {sentence1}\nSentence 2: {sentence2}\nDo they say the same? Answer:",
            label_words=(" no", " yes"),
            metric=ACCURACY_AND_F1,
            main_metric="combined_score",
            **_PAIR,
        ),
        _glue(
            "stsb",
            template="Sentence 1: {sentence1}\nSentence 2: {sentence2}\nSimilarity from zero to five:",
            label_words=(" zero", " one", " two", " three", " four", " five"),
            values=(0.0, 1.0, 2.0, 3.0, 4.0, 5.0),
            metric=Metric(compute=metrics.correlations, counted=("pearson", "spearmanr"), reference=_similarity),
            main_metric="combined_score",
            **_PAIR,
        ),
        _glue(
            "qqp",
            template="Question 1: {question1}\nQuestion 2: {question2}\nDo they ask the same? Answer:",
            texts=("{question1}", "{question2}"),
            label_words=(" no", " yes"),
            metric=ACCURACY_AND_F1,
            main_metric="combined_score",
        ),
        _glue(
            "mnli",
            template="Premise: {premise}\nHypothesis: {hypothesis}\nDoes the premise imply the hypothesis? Answer:",
            texts=("{premise}", "{hypothesis}"),
            label_words=(" yes", " maybe", " no"),
            label_names=("entailment", "neutral", "contradiction"),
            splits=("train", "validation_matched", "validation_mismatched", "test_matched", "test_mismatched"),
            validation=("validation_matched", "validation_mismatched"),
        ),
        _glue(
            "qnli",
            template="Question: {question}\nText: {sentence}\nDoes the text answer the question? Answer:",
            texts=("{question}", "{sentence}"),
            label_words=(" yes", " no"),
            label_names=("entailment", "not_entailment"),
            truncate=("sentence",),
        ),
        _glue(
            "rte",
            template="Premise: {sentence1}\nHypothesis: {sentence2}\nDoes the premise imply the hypothesis? Answer:",
            label_words=(" yes", " no"),
            label_names=("entailment", "not_entailment"),
            truncate=("sentence1",),
            **_PAIR,
        ),
        _glue(
            "wnli",
            template="Text: {sentence1}\nStatement: {sentence2}\nDoes the text imply the statement? Answer:",
            label_words=(" no", " yes"),
            label_names=("not_entailment", "entailment"),
            truncate=("sentence1",),
            **_PAIR,
        ),
    ]
)
