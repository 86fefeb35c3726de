"""SuperGLUE (Wang et al. 2019): an entry for each task, over the columns and label codes of `aps/super_glue`.

Names that GLUE has too carry a prefix: `super_glue_rte`.
"""

from __future__ import annotations

import re
from typing import Any

from .. import metrics
from .metric import ACCURACY, ACCURACY_AND_MEAN_F1, Metric
from .task import Row, Task, register_tasks


_NO_YES: dict[str, Any] = {"label_words": (" no", " yes")}


def _super_glue(subset: str, name: str | None = None, metric: Metric = ACCURACY, **values: Any) -> Task:
    revision = "3de24cf8022e94f4ee4b9d55a6f539891524d646"
    return Task(
        name=name or subset,
        path="aps/super_glue",
        subset=subset,
        revision=revision,
        benchmark="super_glue",
        metric=metric,
        **values,
    )


def _text(row: Row, column: str) -> str:
    text = row[column]
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"the column {column!r} must hold a text; got {text!r}.")
    return text


def _texts(row: Row, column: str) -> list[str]:
    texts = row[column]
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) and text.strip() for text in texts):
        raise ValueError(f"the column {column!r} must hold a list of texts; got {texts!r}.")
    return list(texts)


def _copa_opening(row: Row) -> dict[str, str]:
    """The premise as the opening of a sentence that each choice can end (Radford et al. 2019, section 3)."""
    links = {"cause": "because", "effect": "so"}
    question = _text(row, "question")
    if question not in links:
        raise ValueError(f"the column 'question' must be {' or '.join(map(repr, links))}; got {question!r}.")
    return {"opening": f"{_text(row, 'premise').strip().rstrip('.')} {links[question]}"}


def _copa_choices(row: Row) -> list[str]:
    return [f" {_ending(_text(row, column))}" for column in ("choice1", "choice2")]


def _ending(sentence: str) -> str:
    """The sentence as another one's end: without its capital, unless that is the word "I"."""
    return sentence if re.match(r"I\b", sentence) else f"{sentence[:1].lower()}{sentence[1:]}"


def _copa_answer(row: Row) -> int | None:
    return row["label"]


def _record_passage(row: Row) -> dict[str, str]:
    """The passage with its highlights as sentences: the files mark them."""
    return {"text": _text(row, "passage").replace("\n@highlight\n", " ").replace("@highlight", " ")}


def _record_choices(row: Row) -> list[str]:
    entities = _texts(row, "entities")
    if not entities:
        raise ValueError("the column 'entities' must hold at least one to choose from; got [].")
    return [f" {entity}" for entity in entities]


def _record_answer(row: Row) -> int | None:
    """The first right entity: a row is trained on one."""
    answers = set(() if row["answers"] is None else _texts(row, "answers"))
    return next((i for i, entity in enumerate(row["entities"]) if entity in answers), None)


_MULTIRC = Metric(
    compute=metrics.multirc,
    counted=("exact_match", "f1_a"),
    prediction=lambda row, answer: {"idx": row["idx"], "prediction": answer},
    index=("paragraph", "question", "answer"),
)
_RECORD = Metric(
    compute=metrics.record,
    counted=("exact_match", "f1"),
    prediction=lambda row, answer: {"idx": row["idx"], "prediction_text": row["entities"][answer]},
    reference=lambda row: {"idx": row["idx"], "answers": row["answers"]},
    index=("passage", "query"),
)


def _wsc_marks(row: Row) -> dict[str, str]:
    """The text with its two spans marked, as T5 does (Raffel et al. 2020, appendix D)."""
    words = _text(row, "text").split(" ")
    for name, mark in (("span1", "#"), ("span2", "*")):
        first, length = row[f"{name}_index"], len(_text(row, f"{name}_text").split(" "))
        if first not in range(len(words)):
            raise ValueError(
                f"the column '{name}_index' must count a word of the text, from 0 to {len(words) - 1}; got {first!r}."
            )
        first = int(first)  # a CSV file with an empty one elsewhere holds 3.0
        words[first] = f"{mark}{words[first]}"
        last = min(first + length, len(words)) - 1
        words[last] = f"{words[last]}{mark}"
    return {"marked": " ".join(words)}


register_tasks(
    [
        _super_glue(
            "boolq",
            template="Passage: {passage}\nQuestion: {question}?\nAnswer:",
            texts=("{question}", "{passage}"),
            truncate=("passage",),
            **_NO_YES,
        ),
        _super_glue(
            "cb",
            template="Premise: {premise}\nHypothesis: {hypothesis}\nDoes the premise imply the hypothesis? Answer:",
            texts=("{premise}", "{hypothesis}"),
            label_words=(" yes", " no", " maybe"),
            label_names=("entailment", "contradiction", "neutral"),
            truncate=("premise",),
            metric=ACCURACY_AND_MEAN_F1,
            main_metric="combined_score",
        ),
        _super_glue(
            "copa",
            version=2,  # 1 wrote "i" for "I"
            template="{opening}",
            texts=("{opening}", "{choice}"),
            prepare=_copa_opening,
            choices=_copa_choices,
            answer=_copa_answer,
        ),
        _super_glue(
            "multirc",
            template="Passage: {paragraph}\nQuestion: {question}\nAnswer: {answer}\nIs the answer right?",
            texts=("{paragraph}", "{question} {answer}"),
            group="paragraph",
            truncate=("paragraph",),
            metric=_MULTIRC,
            main_metric="combined_score",
            **_NO_YES,
        ),
        _super_glue(
            "record",
            template="Passage: {text}\nSentence: {query}\nThe @placeholder is",
            texts=("{text}", "{query} {choice}"),
            prepare=_record_passage,
            choices=_record_choices,
            answer=_record_answer,
            truncate=("text",),
            metric=_RECORD,
            main_metric="combined_score",
        ),
        _super_glue(
            "rte",
            name="super_glue_rte",
            template="Premise: {premise}\nHypothesis: {hypothesis}\nDoes the premise imply the hypothesis? Answer:",
            texts=("{premise}", "{hypothesis}"),
            label_words=(" yes", " no"),
            label_names=("entailment", "not_entailment"),
            truncate=("premise",),
        ),
        _super_glue(
            "wic",
            template="{sentence1}\n{sentence2}\nDoes {word} mean the same in both sentences? Answer:",
            texts=("{word}: {sentence1}", "{sentence2}"),
            truncate=("sentence1", "sentence2"),
            **_NO_YES,
        ),
        _super_glue(
            "wsc",
            template="{marked}\nDoes *{span2_text}* refer to #{span1_text}#? Answer:",
            texts=("{marked}", "{span2_text} {span1_text}"),
            prepare=_wsc_marks,
            truncate=("marked",),
            **_NO_YES,
        ),
    ]
)
