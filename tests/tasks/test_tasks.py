"""The entries of GLUE, SuperGLUE and the reviews, on rows that this project wrote."""

import json
from pathlib import Path

import pytest
from datasets import Dataset

from peft_prompt_ext.tasks import HIDDEN, Metric, Task, available_tasks, get_task, register_tasks
from peft_prompt_ext.tasks.checks import check_rows
from peft_prompt_ext.tasks.data import load_split
from peft_prompt_ext.tasks.scoring import evaluate_predictions
from peft_prompt_ext.tasks.task import TASKS


DATA = Path(__file__).parents[1] / "data"
SHARED = Path(__file__).parents[3] / "shared" / "data"
GLUE = {"cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli"}
SUPER_GLUE = {"boolq", "cb", "copa", "multirc", "record", "super_glue_rte", "wic", "wsc"}
BENCHMARKS = sorted(GLUE | SUPER_GLUE)


def own_rows(name, split=None):
    task = get_task(name)
    return load_split(task, split or task.validation[0], str(DATA / task.benchmark / task.subset))


def test_every_task_of_both_benchmarks_is_there():
    assert set(available_tasks()) == GLUE | SUPER_GLUE | {"movie_reviews", "plot_or_review"}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_row_of_every_task_becomes_a_question_with_answers(name):
    task = get_task(name)
    for row in own_rows(name):
        prepared = task.prepared(row)
        choices = task.choices_of(prepared)
        question = task.template.format(**prepared)
        texts = [text.format(**prepared, choice=choices[0]) for text in task.texts]

        assert question == question.rstrip()  # the space belongs to the answer
        assert all(choice.startswith(" ") and choice.strip() for choice in choices)
        assert 0 <= task.target(prepared) < len(choices)
        assert 1 <= len(texts) <= 2
    check_rows(task, "validation", own_rows(name))


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_task_names_its_data_and_what_may_be_cut(name):
    task = get_task(name)

    assert task.path in {"nyu-mll/glue", "aps/super_glue"}
    assert len(task.revision) == 40
    assert set(task.truncate) <= set(task.columns)
    assert set(task.validation) <= set(task.splits)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_label_of_the_real_data_is_the_tasks(name):
    task = get_task(name)
    folder = SHARED / task.benchmark / task.subset
    if not folder.is_dir():
        pytest.skip(f"real rows of {name} are not on this machine")

    for split in ("train", *task.validation):
        assert check_rows(task, split, load_split(task, split, str(folder))) is None


def read(benchmark, name, split):
    lines = (DATA / benchmark / name / f"{split}.jsonl").read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines if line]


LABELS = {  # by the Hub's codes
    "sst2": {0: " negative", 1: " positive"},
    "cola": {0: " no", 1: " yes"},
    "mrpc": {0: " no", 1: " yes"},
    "mnli": {0: " yes", 1: " maybe", 2: " no"},
    "qnli": {0: " yes", 1: " no"},
    "rte": {0: " yes", 1: " no"},
    "wnli": {0: " no", 1: " yes"},
    "cb": {0: " yes", 1: " no", 2: " maybe"},
    "boolq": {0: " no", 1: " yes"},
    "wic": {0: " no", 1: " yes"},
}


@pytest.mark.parametrize(("name", "words"), LABELS.items())
def test_a_label_is_answered_by_its_word(name, words):
    task = get_task(name)

    for label, word in words.items():
        assert task.label_words[task.target({"label": label})] == word


def test_copa_is_a_sentence_to_be_ended():
    task = get_task("copa")
    row = {"premise": "It rained. ", "choice1": "The street got wet.", "choice2": "The sun shone.", "label": 0}

    assert task.template.format(**task.prepared({**row, "question": "effect"})) == "It rained so"
    assert task.template.format(**task.prepared({**row, "question": "cause"})) == "It rained because"
    assert task.choices_of(row) == [" the street got wet.", " the sun shone."]


@pytest.mark.parametrize("choice", ["I got wet.", "I'm wet.", "I\u2019d been out.", "It got wet."])
def test_copa_keeps_the_capital_of_i_alone(choice):
    choices = get_task("copa").choices_of({"choice1": choice, "choice2": "The sun shone."})

    assert choices[0] == (f" {choice}" if choice != "It got wet." else " it got wet.")


def test_record_asks_for_an_entity_and_trains_on_a_right_one():
    task = get_task("record")
    row = {
        "passage": "Ann met Bob.\n@highlight\nBob was late",
        "query": "@placeholder came late",
        "entities": ["Ann", "Bob"],
        "answers": ["Bob"],
    }
    prepared = task.prepared(row)

    assert task.choices_of(prepared) == [" Ann", " Bob"]
    assert task.target(prepared) == 1
    assert "@highlight" not in task.template.format(**prepared)
    assert task.target({**prepared, "answers": []}) == HIDDEN


@pytest.mark.parametrize("row", read("super_glue", "wsc", "train"), ids=lambda row: str(row["idx"]))
def test_wsc_marks_both_spans_where_they_stand(row):
    marked = get_task("wsc").prepared(row)["marked"]

    assert f"#{row['span1_text']}" in marked
    assert f"*{row['span2_text']}" in marked
    assert marked.replace("#", "").replace("*", "") == row["text"]
    assert (marked.count("#"), marked.count("*")) == (2, 2)


def test_wic_names_the_word():
    row = read("super_glue", "wic", "train")[0]
    assert row["word"] in get_task("wic").template.format(**row)


def test_stsb_takes_numbers_between_its_words():
    task = get_task("stsb")

    assert [task.target({"label": value}) for value in (0.0, 2.4, 2.6, 5.0)] == [0, 2, 3, 5]
    with pytest.raises(ValueError, match=r"from 0.0 to 5.0, got 7"):
        task.target({"label": 7})


def test_reviews_of_both_kinds_are_one_label_beside_plots():
    task = get_task("plot_or_review")

    kinds = [task.target(task.prepared({"category": c})) for c in ("plot", "fresh", "rotten")]
    assert kinds == [0, 1, 1]
    assert get_task("movie_reviews").target({"category": "fresh"}) == 1


def test_an_unknown_task_suggests_the_nearest_and_lists_all():
    with pytest.raises(ValueError, match=r"no task 'sst-2' \(did you mean 'sst2'\?\).*super_glue_rte"):
        get_task("sst-2")


def test_a_label_out_of_the_set_is_an_error():
    with pytest.raises(ValueError, match="'rte' is one of 0, 1; got 2"):
        get_task("rte").target({"label": 2})


def test_a_name_cannot_be_taken_twice():
    with pytest.raises(ValueError, match="a task 'rte' already"):
        register_tasks([get_task("rte")])


@pytest.mark.parametrize("values", [{"labels": ("a",)}, {"label_names": ("a", "b", "c")}, {"values": (1.0,)}])
def test_a_task_needs_one_value_for_each_word(values):
    with pytest.raises(ValueError, match="2 label words"):
        Task(name="t", template="{x}", texts=("{x}",), label_words=(" a", " b"), **values)


def test_a_task_needs_words_or_choices():
    with pytest.raises(ValueError, match="label_words or choices"):
        Task(name="t", template="{x}", texts=("{x}",))


@pytest.mark.parametrize("name", sorted(TASKS))
def test_a_saved_task_is_found_again(name):
    assert Task.from_dict(json.loads(json.dumps(get_task(name).to_dict()))) is get_task(name)


def test_an_own_task_is_saved_whole():
    task = Task(name="mine", template="{a}", texts=("{a}",), labels=(3, "x"), label_words=(" p", " q"))

    assert Task.from_dict(json.loads(json.dumps(task.to_dict()))) == task


def test_another_version_is_asked_as_it_was_written_down():
    old = {**get_task("rte").to_dict(), "version": 0, "template": "{sentence1} {sentence2}"}

    assert Task.from_dict(old).template == "{sentence1} {sentence2}"
    with pytest.raises(ValueError, match="'copa' was saved as version 0; this is version 2"):
        Task.from_dict({**get_task("copa").to_dict(), "version": 0})
    with pytest.raises(ValueError, match="no field colour"):
        Task.from_dict({**old, "colour": "red"})


def test_a_task_brings_its_loader_and_its_metric():
    def load(task, split):
        return Dataset.from_dict({"text": [f"{task.name} {split}"] * 3, "label": [0, 1, 1], "weight": [1, 2, 3]})

    def weighted(predictions, references):
        right = [weight for answer, (label, weight) in zip(predictions, references, strict=True) if answer == label]
        return {"weighted": sum(right) / sum(weight for _, weight in references), "count": float(len(references))}

    task = Task(
        name="weighted_task",
        template="{text}",
        texts=("{text}",),
        label_words=(" no", " yes"),
        loader=load,
        metric=Metric(compute=weighted, counted=("weighted",), reference=lambda row: (row["label"], row["weight"])),
        main_metric="combined_score",
    )
    rows = load_split(task, "validation")

    assert rows[0]["text"] == "weighted_task validation"
    scores = evaluate_predictions(task, [0, 0, 1], rows)
    assert scores == {"weighted": 4 / 6, "count": 3.0, "combined_score": 4 / 6}
    assert not {"loader", "metric"} & set(task.to_dict())


def test_a_score_needs_a_prediction_for_every_row():
    task = get_task("sst2")

    with pytest.raises(ValueError, match="Every prediction needs a row; got 1 predictions and 6 rows"):
        evaluate_predictions(task, [0], own_rows("sst2"))
