"""The benchmarks' metrics against their definitions, worked out by hand or with plain loops."""

import itertools
import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_prompt_ext import metrics
from peft_prompt_ext.benchmark_scores import benchmark_score, combined_score
from peft_prompt_ext.evaluate_metrics import Classification, Glue, SuperGlue
from peft_prompt_ext.metrics import GLUE_METRICS, SUPER_GLUE_METRICS


ACCURACY_ONLY = ["sst2", "mnli", "mnli_matched", "mnli_mismatched", "qnli", "rte", "wnli"]
PAIRS = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=12)
NUMBERS = st.floats(0, 5, width=32)


def score(metric, predictions, references):
    return metric.compute(predictions=predictions, references=references)


def drawn(seed, rows, classes):
    """Predictions that are right for about half of the rows, and references."""
    dice = random.Random(seed)
    right = [dice.randrange(classes) for _ in range(rows)]
    return [label if dice.random() < 0.5 else dice.randrange(classes) for label in right], right


def accuracy_of(predictions, references):
    return sum(p == r for p, r in zip(predictions, references, strict=True)) / len(references)


def f1_of(predictions, references, label=1):
    pairs = list(zip(predictions, references, strict=True))
    hits = sum(p == label == r for p, r in pairs)
    wrong = sum((p == label) != (r == label) for p, r in pairs)
    return 2 * hits / (2 * hits + wrong) if hits else 0.0


def macro_f1_of(predictions, references):
    classes = {*predictions, *references}
    return sum(f1_of(predictions, references, label) for label in classes) / len(classes)


def pearson_of(xs, ys):
    mean_x, mean_y = math.fsum(xs) / len(xs), math.fsum(ys) / len(ys)
    both = math.fsum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True))
    return both / math.sqrt(math.fsum((x - mean_x) ** 2 for x in xs) * math.fsum((y - mean_y) ** 2 for y in ys))


def ranks_of(xs):
    """Ranks from 1; equal values share the mean of theirs."""
    return [sum(other < x for other in xs) + (sum(other == x for other in xs) + 1) / 2 for x in xs]


def multirc_rows(predictions, answers_by_question):
    """Rows for questions with these numbers of answers, two questions to a paragraph, numbered anew in each."""
    idx = [
        {"paragraph": i // 2, "question": i % 2, "answer": k}
        for i, count in enumerate(answers_by_question)
        for k in range(count)
    ]
    return [{"idx": key, "prediction": label} for key, label in zip(idx, predictions, strict=True)]


def record_rows(*rows):
    """Predictions and references of (text, answers) for one query after another."""
    predictions = [{"idx": {"passage": 7, "query": i}, "prediction_text": text} for i, (text, _) in enumerate(rows)]
    references = [{"idx": {"passage": 7, "query": i}, "answers": answers} for i, (_, answers) in enumerate(rows)]
    return predictions, references


def record_of(*rows):
    return score(SuperGlue("record"), *record_rows(*rows))


@pytest.mark.parametrize("name", ACCURACY_ONLY)
def test_glue_tasks_without_a_metric_of_their_own_have_the_accuracy(name):
    assert score(Glue(name), [0, 1, 1, 0], [0, 1, 0, 0]) == {"accuracy": 0.75}


@pytest.mark.parametrize("name", ["boolq", "copa", "rte", "wic", "wsc"])
def test_super_glue_tasks_without_a_metric_of_their_own_have_the_accuracy(name):
    assert score(SuperGlue(name), [0, 1, 1, 0], [0, 1, 0, 0]) == {"accuracy": 0.75}


@pytest.mark.parametrize("name", ["mrpc", "qqp"])
@pytest.mark.parametrize("seed", range(3))
def test_paraphrases_have_accuracy_and_the_f1_of_class_1(name, seed):
    predictions, references = drawn(seed, rows=41, classes=2)

    scores = score(Glue(name), predictions, references)

    assert scores == pytest.approx(
        {"accuracy": accuracy_of(predictions, references), "f1": f1_of(predictions, references)}, abs=1e-12
    )
    assert scores["f1"] != pytest.approx(macro_f1_of(predictions, references), abs=1e-3)


@pytest.mark.parametrize("seed", range(3))
def test_cola_has_the_matthews_correlation(seed):
    predictions, references = drawn(seed, rows=41, classes=2)
    # for two classes it is Pearson's correlation of the labels (Matthews 1975)
    expected = pearson_of(predictions, references)
    assert score(Glue("cola"), predictions, references) == pytest.approx({"matthews_correlation": expected}, abs=1e-12)


def test_matthews_correlation_by_hand():
    # 3 true positives, 1 false negative, 1 false positive, 2 true negatives: (3 * 2 - 1 * 1) / sqrt(4 * 4 * 3 * 3)
    scores = score(Glue("cola"), [1, 1, 1, 0, 1, 0, 0], [1, 1, 1, 1, 0, 0, 0])
    assert scores == pytest.approx({"matthews_correlation": 5 / 12}, abs=1e-12)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=9))
def test_stsb_has_both_correlations_and_zero_where_one_side_is_constant(pairs):
    predictions, references = map(list, zip(*pairs, strict=True))

    scores = score(Glue("stsb"), predictions, references)

    if min(len(set(predictions)), len(set(references))) == 1:
        assert scores == {"pearson": 0.0, "spearmanr": 0.0}
    else:
        assert scores["spearmanr"] == pytest.approx(pearson_of(ranks_of(predictions), ranks_of(references)), abs=1e-9)
        assert -1 <= scores["pearson"] <= 1


def test_stsb_correlations_of_random_numbers_with_ties():
    dice = random.Random(5)
    references = [dice.randrange(26) / 5 for _ in range(37)]
    predictions = [round(2 * r + dice.gauss(0, 2)) / 2 for r in references]
    wanted = {
        "pearson": pearson_of(predictions, references),
        "spearmanr": pearson_of(ranks_of(predictions), ranks_of(references)),
    }
    assert score(Glue("stsb"), predictions, references) == pytest.approx(wanted, abs=1e-6)
    opposite = score(Glue("stsb"), [-p for p in predictions], references)
    assert opposite == pytest.approx({name: -value for name, value in wanted.items()}, abs=1e-6)


@settings(deadline=None, max_examples=60)
@given(PAIRS)
def test_cb_and_ones_own_tasks_have_accuracy_and_the_mean_f1_of_classes_that_occur(pairs):
    predictions, references = map(list, zip(*pairs, strict=True))
    wanted = {"accuracy": accuracy_of(predictions, references), "f1": macro_f1_of(predictions, references)}
    for metric in (SuperGlue("cb"), Classification()):
        assert score(metric, predictions, references) == pytest.approx(wanted, abs=1e-12)


def test_a_class_that_nobody_named_does_not_lower_the_macro_f1():
    assert score(SuperGlue("cb"), [0, 1], [0, 1]) == {"accuracy": 1.0, "f1": 1.0}
    assert score(SuperGlue("cb"), [0, 2], [0, 1]) == pytest.approx({"accuracy": 0.5, "f1": 1 / 3})


def test_multirc_by_hand():
    predictions = multirc_rows([1, 0, 1, 1, 0, 0, 1], [2, 3, 2])
    # question 1 right; question 2: 1, 0 right of 1, 1, 0; question 3: both wrong
    scores = score(SuperGlue("multirc"), predictions, [1, 0, 1, 0, 0, 1, 0])
    # macro F1 of question 2: class 1 has 2/3, class 0 has 2/3; of answers: 2 hits, 2 wrong positives, 1 missed
    assert scores == pytest.approx({"exact_match": 1 / 3, "f1_m": (1 + 2 / 3 + 0) / 3, "f1_a": 4 / 7}, abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_multirc_groups_answers_by_paragraph_and_question_in_any_order(seed):
    counts = [3, 1, 4, 2, 5, 3, 2]
    labels, references = drawn(seed, rows=sum(counts), classes=2)
    starts = [sum(counts[:i]) for i in range(len(counts) + 1)]
    spans = [slice(*ends) for ends in itertools.pairwise(starts)]
    wanted = {
        "exact_match": sum(labels[span] == references[span] for span in spans) / len(counts),
        "f1_m": sum(macro_f1_of(labels[span], references[span]) for span in spans) / len(counts),
        "f1_a": f1_of(labels, references),
    }
    rows = list(zip(multirc_rows(labels, counts), references, strict=True))
    random.Random(seed).shuffle(rows)

    assert score(SuperGlue("multirc"), *map(list, zip(*rows, strict=True))) == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Angela Merkel", "angela merkel"),
        ("The White House", "White House"),
        ("White   House\n", "an White a House the"),
        ("U.S.", "US"),
        ("L'Oréal", "loréal"),
        ("the-best", "thebest"),  # punctuation goes before articles
        ("A.", "the"),  # nothing is left of either
    ],
)
def test_record_normalises_before_it_compares(text, answer):
    assert record_of((text, [answer]))["exact_match"] == 1.0


@pytest.mark.parametrize(("text", "answer"), [("theatre", "atre"), ("Ann", "n"), ("New York", "NewYork"), ("x", "")])
def test_record_keeps_what_is_no_article_or_space(text, answer):
    assert record_of((text, [answer])) == {"exact_match": 0.0, "f1": 0.0}


def test_record_has_no_f1_where_nothing_is_left_of_the_answer():
    assert record_of(("The", ["a"])) == {"exact_match": 1.0, "f1": 0.0}  # so in the official script


def test_record_counts_words_as_often_as_they_occur():
    # 2 common words of 3 and of 4, then 3 of 3 and of 4
    for answer, wanted in (("New York City Hall", 4 / 7), ("York New York Hall", 6 / 7)):
        scores = record_of(("York York New", [answer]))
        assert scores == pytest.approx({"exact_match": 0.0, "f1": wanted}, abs=1e-12)


def test_record_takes_the_best_answer_of_each_query_and_the_mean_of_queries():
    scores = record_of(
        ("Barack Obama", ["Obama", "President Barack Obama", "x"]),  # F1 2/3, 4/5, 0
        ("the Senate", ["House", "Senate"]),
        ("nobody", ["Senate"]),
    )
    assert scores == pytest.approx({"exact_match": 1 / 3, "f1": (4 / 5 + 1) / 3}, abs=1e-12)


def test_record_finds_predictions_by_passage_and_query():
    predictions, references = record_rows(("x", ["x"]), ("y", ["y"]), ("z", ["z"]))
    other = {"idx": {"passage": 8, "query": 0}}
    predictions.append({**other, "prediction_text": "w"})
    references.append({**other, "answers": ["w"]})
    assert score(SuperGlue("record"), predictions[::-1], references) == {"exact_match": 1.0, "f1": 1.0}


ALL_RIGHT = {name: dict.fromkeys(metrics, 1.0) for name, metrics in GLUE_METRICS.items()}


@pytest.mark.parametrize("name", GLUE_METRICS)
def test_right_predictions_have_a_score_of_1(name):
    assert score(Glue(name), [0, 1, 1, 0, 1], [0, 1, 1, 0, 1]) == pytest.approx(ALL_RIGHT[name], abs=1e-12)


def test_wrong_predictions_have_the_lowest_score():
    wrong, right = [0, 1, 1, 0, 1], [1, 0, 0, 1, 0]
    assert score(Glue("mrpc"), wrong, right) == {"accuracy": 0.0, "f1": 0.0}
    assert score(Glue("cola"), wrong, right) == {"matthews_correlation": -1.0}
    assert score(SuperGlue("cb"), wrong, right) == {"accuracy": 0.0, "f1": 0.0}
    assert score(SuperGlue("multirc"), multirc_rows(wrong, [2, 3]), right) == {
        "exact_match": 0.0,
        "f1_m": 0.0,
        "f1_a": 0.0,
    }


@pytest.mark.parametrize(("predictions", "references"), [([1, 1, 1], [0, 1, 1]), ([0, 1, 1], [1, 1, 1]), ([1], [1])])
def test_constant_values_correlate_with_nothing(predictions, references):
    assert score(Glue("cola"), predictions, references) == {"matthews_correlation": 0.0}
    assert score(Glue("stsb"), predictions, references) == {"pearson": 0.0, "spearmanr": 0.0}


def test_f1_without_positives_is_zero():
    assert score(Glue("mrpc"), [0, 0], [0, 0]) == {"accuracy": 1.0, "f1": 0.0}
    scores = score(SuperGlue("multirc"), multirc_rows([0, 0], [1, 1]), [0, 0])
    assert scores == {"exact_match": 1.0, "f1_m": 1.0, "f1_a": 0.0}


def test_a_prediction_that_is_no_class_is_a_wrong_one():
    assert score(Glue("mrpc"), [-1, 1, 0], [1, 1, 0]) == pytest.approx({"accuracy": 2 / 3, "f1": 2 / 3})


def test_as_many_classes_as_rows_are_no_regression():
    everything = list(range(40))
    assert score(Classification(), everything, everything) == {"accuracy": 1.0, "f1": 1.0}


def test_ones_own_labels_may_be_negative():
    assert score(Classification(), [-1, 1], [-1, 1]) == {"accuracy": 1.0, "f1": 1.0}


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor, lambda labels: np.array(labels) == 1])
def test_arrays_tensors_and_booleans_are_labels_too(kind):
    scores = score(Glue("mrpc"), kind([1, 1, 0]), kind([1, 0, 0]))
    assert scores == pytest.approx({"accuracy": 2 / 3, "f1": 2 / 3})
    assert {type(value) for value in scores.values()} == {float}


@pytest.mark.parametrize("name", SUPER_GLUE_METRICS)
def test_super_glue_scores_are_plain_floats_under_the_documented_keys(name):
    if name == "record":
        scores = record_of(("x", ["x"]))
    else:
        scores = score(SuperGlue(name), multirc_rows([1], [1]) if name == "multirc" else [1], [1])
    assert {key: type(value) for key, value in scores.items()} == dict.fromkeys(SUPER_GLUE_METRICS[name], float)


def test_rows_may_come_in_parts_and_a_score_starts_anew():
    metric = Glue("mrpc")
    metric.add(prediction=1, reference=1)
    metric.add_batch(predictions=[0, 0], references=[1, 0])
    assert score(metric, [1], [1]) == pytest.approx({"accuracy": 0.75, "f1": 0.8})
    metric.add_batch(predictions=[0, 1], references=[1, 1])
    assert metric.compute() == pytest.approx({"accuracy": 0.5, "f1": 2 / 3})
    metric.add_batch(predictions=[0, 1], references=[1, 1])
    assert score(metric, [], []) == pytest.approx({"accuracy": 0.5, "f1": 2 / 3})
    assert score(metric, [0], [1]) == {"accuracy": 0.0, "f1": 0.0}


def test_a_refused_call_leaves_nothing_behind():
    metric = Glue("mrpc")
    for wrong in (["x"], [0.5], [None]):
        with pytest.raises(ValueError):
            score(metric, wrong, [0])
    with pytest.raises(ValueError, match="Mismatch"):
        metric.add_batch(predictions=[0, 1], references=[1])
    assert score(metric, [1], [1]) == {"accuracy": 1.0, "f1": 1.0}


def test_nothing_is_written_and_two_at_once_do_not_mix(tmp_path, monkeypatch):
    monkeypatch.setattr("evaluate.config.HF_METRICS_CACHE", str(tmp_path / "cache"))
    one, other = Glue("rte"), Glue("rte")
    one.add_batch(predictions=[1, 1], references=[1, 1])
    other.add_batch(predictions=[1, 0], references=[0, 1])
    assert one.compute() == {"accuracy": 1.0}
    assert other.compute() == {"accuracy": 0.0}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("metric", [*map(Glue, GLUE_METRICS), *map(SuperGlue, SUPER_GLUE_METRICS), Classification()])
def test_no_rows_are_no_score(metric):
    for inputs in ({}, {"predictions": [], "references": []}, {"predictions": np.array([]), "references": []}):
        with pytest.raises(ValueError, match=r"at least one prediction with its reference; got none. Check"):
            metric.compute(**inputs)


@pytest.mark.parametrize(
    ("inputs", "got"),
    [
        ({"predictions": [0, 1], "references": [1]}, "got 2 predictions and 1 references"),
        ({"predictions": [0, 1], "references": []}, "got 2 predictions and 0 references"),
        ({"references": [1]}, "got 0 predictions and 1 references"),
    ],
)
def test_predictions_and_references_are_as_many(inputs, got):
    with pytest.raises(ValueError, match=f"Every prediction needs a reference; {got}. Pass"):
        Glue("rte").compute(**inputs)


@pytest.mark.parametrize(
    ("build", "name", "message"),
    [
        (Glue, "colla", r"config_name \('colla'\) must be one of 'cola', 'sst2', .*'wnli' \(did you mean 'cola'\?\)"),
        (Glue, "boolq", "must be one of 'cola'"),
        (SuperGlue, "multi_rc", r"must be one of 'boolq', .*'wsc' \(did you mean 'multirc'\?\)"),
        (SuperGlue, None, r"config_name \(None\) must be one of 'boolq'"),
    ],
)
def test_unknown_tasks_are_named_with_the_nearest_known_one(build, name, message):
    with pytest.raises(ValueError, match=message):
        build(name)


@pytest.mark.parametrize("metric", [Glue("mrpc"), Glue("stsb"), Glue("cola"), SuperGlue("cb"), SuperGlue("boolq")])
def test_hidden_answers_are_no_references(metric):
    with pytest.raises(ValueError, match=r"references must be 0 or more; got -1.*hidden answers. Score a split"):
        score(metric, [0, 1], [-1, 1])


def test_multirc_refuses_hidden_answers_and_probabilities():
    rows = multirc_rows([1, 0], [2])
    with pytest.raises(ValueError, match="got -1, with which the Hub marks hidden answers"):
        score(SuperGlue("multirc"), rows, [-1, -1])
    with pytest.raises(ValueError, match=r"predictions must be labels, which are whole numbers; got 0.5"):
        score(SuperGlue("multirc"), multirc_rows([1, 0.5], [2]), [1, 0])


@pytest.mark.parametrize("metric", [Glue("mrpc"), SuperGlue("cb"), Classification()])
def test_probabilities_are_no_labels(metric):
    with pytest.raises(ValueError, match=r"predictions must be labels.*got 0.7. Of probabilities or logits take"):
        score(metric, [1, 0.7], [1, 0])
    with pytest.raises(ValueError, match=r"references must be labels, which are whole numbers; got 0.25"):
        score(metric, [1, 0], [1, 0.25])
    with pytest.raises(ValueError, match="don't match the expected format"):
        score(metric, [[0.1, 0.9]], [1])


@pytest.mark.parametrize("value", [math.nan, math.inf, None])
@pytest.mark.parametrize("metric", [Glue("stsb"), Glue("rte"), Classification()])
def test_what_is_not_finite_has_no_score(metric, value):
    with pytest.raises(ValueError, match=r"predictions must be finite numbers; got (nan|inf) in 1 of 3 rows .*Look"):
        score(metric, [1.0, value, 2.0], [1, 0, 2])
    with pytest.raises(ValueError, match="references must be finite numbers"):
        score(metric, [1.0, 0, 2.0], [1, value, 2])


def test_a_row_counts_once():
    rows = multirc_rows([1, 0], [2])
    with pytest.raises(ValueError, match=r"got {'answer': 0, 'paragraph': 0, 'question': 0} 2 times. Drop"):
        score(SuperGlue("multirc"), [*rows, rows[0]], [1, 0, 1])
    predictions, references = record_rows(("x", ["x"]), ("y", ["y"]))
    for copied in ([predictions[:1] * 2, references], [predictions, references[:1] * 2]):
        with pytest.raises(ValueError, match=r"got {'passage': 7, 'query': 0} 2 times. Drop"):
            score(SuperGlue("record"), *copied)


def test_record_needs_a_prediction_and_answers_for_every_query():
    predictions, references = record_rows(("x", ["x"]), ("y", ["y"]), ("z", []))
    with pytest.raises(ValueError, match=r"needs a prediction; got none for {'passage': 7, 'query': 1}. Add"):
        score(SuperGlue("record"), [predictions[0], predictions[2]], references[:2])
    with pytest.raises(ValueError, match=r"needs gold answers; got none for {'passage': 7, 'query': 2}. Score"):
        score(SuperGlue("record"), predictions, references)


@pytest.mark.parametrize(
    ("scores", "name", "wanted"),
    [
        ({"matthews_correlation": 0.25}, "cola", 0.25),
        ({"accuracy": 0.5, "f1": 0.75}, "mrpc", 0.625),
        ({"pearson": 0.5, "spearmanr": 1.0, "loss": 9.0}, "stsb", 0.75),
        ({"accuracy": 0.5, "f1": 0.75}, "qnli", 0.5),
        ({"accuracy": 0.5, "f1": 1.0}, "cb", 0.75),
        ({"exact_match": 0.25, "f1_m": 0.9, "f1_a": 0.75}, "multirc", 0.5),
        ({"exact_match": 0.25, "f1": 0.75}, "record", 0.5),
        ({"accuracy": 0.5}, "super_glue_rte", 0.5),
    ],
)
def test_the_score_of_a_task_is_the_mean_of_the_metrics_that_count(scores, name, wanted):
    assert combined_score(scores, name) == wanted


def test_a_missing_metric_or_an_unknown_task_has_no_combined_score():
    with pytest.raises(ValueError, match=r"'mrpc' is the mean of accuracy, f1; got accuracy. Add f1."):
        combined_score({"accuracy": 1.0}, "mrpc")
    with pytest.raises(ValueError, match=r"'rte' is the mean of accuracy; got nothing. Add accuracy."):
        combined_score({}, "rte")
    with pytest.raises(ValueError, match=r"task_name \('mrcp'\) must be one of .* \(did you mean 'mrpc'\?\)"):
        combined_score({}, "mrcp")


GLUE_RESULTS = {
    "cola": {"matthews_correlation": 0.6},
    "sst2": {"accuracy": 0.9},
    "mrpc": {"accuracy": 0.8, "f1": 0.9},  # 0.85
    "stsb": {"pearson": 0.7, "spearmanr": 0.8},  # 0.75
    "qqp": {"accuracy": 0.9, "f1": 0.8},  # 0.85
    "mnli_matched": {"accuracy": 0.8},  # 0.7 with the next
    "mnli_mismatched": {"accuracy": 0.6},
    "qnli": {"accuracy": 0.9},
    "rte": {"accuracy": 0.7},
    "wnli": {"accuracy": 0.5},
}
SUPER_GLUE_RESULTS = {
    "boolq": {"accuracy": 0.8},
    "cb": {"accuracy": 0.9, "f1": 0.8},  # 0.85
    "copa": {"accuracy": 0.7},
    "multirc": {"exact_match": 0.2, "f1_m": 0.9, "f1_a": 0.7},  # 0.45
    "record": {"exact_match": 0.7, "f1": 0.8},  # 0.75
    "rte": {"accuracy": 0.75},
    "wic": {"accuracy": 0.65},
    "wsc": {"accuracy": 0.6},
}


def test_glue_is_the_mean_of_nine_tasks():
    # 0.6 + 0.9 + 0.85 + 0.75 + 0.85 + 0.7 + 0.9 + 0.7 + 0.5 = 6.75
    assert benchmark_score(GLUE_RESULTS, "glue") == pytest.approx(6.75 / 9, abs=1e-12)


@pytest.mark.parametrize(
    ("exclude", "wanted"),
    [(("wnli",), 6.25 / 8), (("mnli", "wnli"), 5.55 / 7), (("mnli_mismatched",), 6.85 / 9)],
)
def test_excluded_tasks_neither_count_nor_need_be_there(exclude, wanted):
    assert benchmark_score(GLUE_RESULTS, "glue", exclude=exclude) == pytest.approx(wanted, abs=1e-12)
    rest = {name: scores for name, scores in GLUE_RESULTS.items() if name.split("_")[0] not in exclude}
    assert benchmark_score(rest, "glue", exclude=exclude) == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("rte", ["rte", "super_glue_rte"])
def test_super_glue_is_the_mean_of_eight_tasks(rte):
    results = {rte if name == "rte" else name: scores for name, scores in SUPER_GLUE_RESULTS.items()}
    # 0.8 + 0.85 + 0.7 + 0.45 + 0.75 + 0.75 + 0.65 + 0.6 = 5.55
    assert benchmark_score(results, "super_glue") == pytest.approx(5.55 / 8, abs=1e-12)
    for name in ("rte", "super_glue_rte"):
        assert benchmark_score(results, "super_glue", exclude=(name,)) == pytest.approx(4.8 / 7, abs=1e-12)


@pytest.mark.parametrize(
    ("results", "benchmark", "exclude", "message"),
    [
        (
            {name: scores for name, scores in GLUE_RESULTS.items() if name not in {"qqp", "mnli_mismatched"}},
            "glue",
            (),
            "mean of glue needs the scores of cola, .*, wnli; missing: qqp, mnli_mismatched. Score them, or name them",
        ),
        ({}, "super_glue", ("wsc",), "missing: boolq, cb, copa, multirc, record, rte, wic. Score"),
        (GLUE_RESULTS, "glue", tuple(GLUE_RESULTS), "needs the scores of at least one task; missing: all"),
        (
            {**GLUE_RESULTS, "mnli": {"accuracy": 0.8}},
            "glue",
            (),
            r"task of results \('mnli'\) must be one of 'cola', .*'mnli_matched', 'mnli_mismatched'",
        ),
        (GLUE_RESULTS, "super_glue", (), r"task of results \('cola'\) must be one of 'boolq'"),
        (GLUE_RESULTS, "glue", ("wnly",), r"task of exclude \('wnly'\) must be one of .* \(did you mean 'wnli'\?\)"),
        (
            {**SUPER_GLUE_RESULTS, "super_glue_rte": {}},
            "super_glue",
            (),
            "has one rte; got 'rte' and 'super_glue_rte'",
        ),
        (GLUE_RESULTS, "superglue", (), r"benchmark \('superglue'\) must be one of 'glue', 'super_glue' \(did you"),
        (
            {**GLUE_RESULTS, "mrpc": {"f1": 1.0}},
            "glue",
            (),
            "'mrpc' is the mean of accuracy, f1; got f1. Add accuracy.",
        ),
    ],
)
def test_benchmarks_are_whole_and_of_their_own_tasks(results, benchmark, exclude, message):
    with pytest.raises(ValueError, match=message):
        benchmark_score(results, benchmark, exclude=exclude)


@pytest.mark.parametrize("compute", [metrics.accuracy, metrics.classification, metrics.correlations, metrics.multirc])
@pytest.mark.parametrize(("predictions", "references"), [([1.0], [1.0, 0.0]), ([], [])])
def test_other_numbers_of_predictions_than_of_references_are_refused(compute, predictions, references):
    with pytest.raises(ValueError, match=f"got {len(predictions)} predictions"):
        compute(predictions, references)


def test_record_without_references_is_refused():
    with pytest.raises(ValueError, match="got none"):
        metrics.record([], [])
