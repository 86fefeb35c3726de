"""Rows from folders, files and the embedded reviews, and the errors of files that are not right."""

import json
from collections import Counter
from pathlib import Path

import pytest
from datasets import Dataset

from peft_prompt_ext.tasks import HIDDEN, Task, get_task
from peft_prompt_ext.tasks.checks import check_rows
from peft_prompt_ext.tasks.data import load_split
from peft_prompt_ext.tasks.files import read_file
from peft_prompt_ext.tasks.own import own_task
from peft_prompt_ext.tasks.sampling import few_shot, hold_out, sample, sample_to_score


DATA = Path(__file__).parents[1] / "data"
OWN = DATA / "own"


@pytest.fixture
def folder(tmp_path):
    """Writes rows as a split of a folder: `folder("train", [{...}])`."""

    def write(split, rows, suffix="jsonl"):
        lines = rows if isinstance(rows, str) else "\n".join(json.dumps(row) for row in rows)
        (tmp_path / f"{split}.{suffix}").write_text(lines, encoding="utf-8")
        return str(tmp_path)

    return write


def test_a_folder_in_the_hubs_columns_is_read():
    rows = load_split(get_task("sst2"), "train", str(DATA / "glue" / "sst2"))

    assert len(rows) == 8
    assert {"sentence", "label"} <= set(rows.column_names)


def test_a_folder_without_the_split_is_an_error(folder):
    where = folder("train", [{"sentence": "a", "label": 0}])

    with pytest.raises(ValueError, match=r"no validation.jsonl, .* it has train.jsonl"):
        load_split(get_task("sst2"), "validation", where)


def test_a_missing_column_is_named(folder):
    rows = load_split(get_task("rte"), "train", folder("train", [{"sentence1": "a", "text": "b", "label": 0}]))

    with pytest.raises(ValueError, match="no column 'sentence2'; it has sentence1, text, label"):
        check_rows(get_task("rte"), "train", rows)


def test_a_missing_column_that_a_function_reads_is_named(folder):
    rows = load_split(get_task("copa"), "train", folder("train", [{"premise": "a", "choice1": "b", "label": 0}]))

    with pytest.raises(ValueError, match="no column 'question'"):
        check_rows(get_task("copa"), "train", rows)


def test_a_missing_label_column_is_named(folder):
    rows = load_split(get_task("sst2"), "train", folder("train", [{"sentence": "a"}]))

    with pytest.raises(ValueError, match="no column 'label'"):
        check_rows(get_task("sst2"), "train", rows)
    check_rows(get_task("sst2"), "test", rows, labelled=False)


def test_a_wrong_label_is_named_with_its_row(folder):
    where = folder("train", [{"sentence": "a", "label": 0}, {"sentence": "b", "label": 5}])
    rows = load_split(get_task("sst2"), "train", where)

    with pytest.raises(ValueError, match=r"Row 1 of the split 'train' of sst2.*one of 0, 1; got 5"):
        check_rows(get_task("sst2"), "train", rows)


def test_a_choice_that_is_not_there_is_named_with_its_row(folder):
    row = {"premise": "a", "question": "cause", "choice1": "b", "choice2": "c", "label": 2}
    rows = load_split(get_task("copa"), "train", folder("train", [row]))

    with pytest.raises(ValueError, match=r"Row 0 .* one of 0, 1; got 2"):
        check_rows(get_task("copa"), "train", rows)


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("sst2", [{"sentence": "a", "label": "?"}]),
        ("stsb", [{"sentence1": "a", "sentence2": "b", "label": "?"}]),
        ("plot_or_review", [{"text": "a", "category": "tv"}]),
        ("copa", [{"premise": "a", "question": "cause", "choice1": "b", "choice2": "c", "label": "?"}]),
        ("copa", [{"premise": "a", "question": "cause", "choice1": "b", "choice2": "c"}]),
        ("record", [{"passage": "a", "query": "b", "entities": ["c", "d"]}]),
    ],
)
def test_a_label_of_no_kind_is_hidden_where_none_is_needed(folder, name, rows):
    task = get_task(name)
    rows = load_split(task, "test", folder("test", rows))

    check_rows(task, "test", rows, labelled=False)
    assert task.target_or_hidden(task.prepared(rows[0])) == HIDDEN
    with pytest.raises(
        ValueError, match=r"Row 0 of the split 'train' of .*(got '|no column '(label|answers)'; it has)"
    ):
        check_rows(task, "train", rows)


COPA = {
    "premise": "It rained.",
    "question": "effect",
    "choice1": "We got wet.",
    "choice2": "The sun shone.",
    "label": 0,
}
RECORD = {"passage": "Ann met Bob.", "query": "@placeholder left", "entities": ["Ann", "Bob"], "answers": ["Bob"]}
WSC = {
    "text": "Ann met Bob .",
    "span1_index": 0,
    "span1_text": "Ann",
    "span2_index": 2,
    "span2_text": "Bob",
    "label": 0,
}


@pytest.mark.parametrize(
    ("name", "row", "column", "value", "message"),
    [
        ("copa", COPA, "premise", None, "'premise' must hold a text; got None"),
        ("copa", COPA, "choice1", None, "'choice1' must hold a text; got None"),
        ("copa", COPA, "choice2", " ", "'choice2' must hold a text; got ' '"),
        ("copa", COPA, "question", "why", "'question' must be 'cause' or 'effect'; got 'why'"),
        ("copa", COPA, "label", None, "it has no label"),
        ("record", RECORD, "entities", None, "'entities' must hold a list of texts; got None"),
        ("record", RECORD, "entities", "Ann", "'entities' must hold a list of texts; got 'Ann'"),
        ("record", RECORD, "entities", [], "'entities' must hold at least one to choose from; got \\[\\]"),
        ("record", RECORD, "answers", "Bob", "'answers' must hold a list of texts; got 'Bob'"),
        ("wsc", WSC, "span1_index", 4, "'span1_index' must count a word of the text, from 0 to 3; got 4"),
        ("wsc", WSC, "span2_index", None, "'span2_index' must count a word of the text, from 0 to 3; got None"),
        ("wsc", WSC, "span2_text", None, "'span2_text' must hold a text; got None"),
    ],
)
def test_a_field_that_cannot_be_read_is_named_with_its_row(name, row, column, value, message):
    task = get_task(name)
    check_rows(task, "train", [row])

    with pytest.raises(ValueError, match=f"Row 1 of the split 'train' of {name}: .*{message}"):
        check_rows(task, "train", [row, {**row, column: value}])


@pytest.mark.parametrize(
    ("name", "row", "column"),
    [("copa", COPA, "choice1"), ("copa", COPA, "label"), ("record", RECORD, "entities"), ("wsc", WSC, "span1_index")],
)
def test_a_column_that_a_function_lacks_is_named(name, row, column):
    row = {key: value for key, value in row.items() if key != column}

    with pytest.raises(ValueError, match=f"Row 0 .*: there is no column '{column}'; it has {', '.join(row)}"):
        check_rows(get_task(name), "train", [row])


@pytest.mark.parametrize("index", [None, 3, {"passage": 0}, {"passage": 0, "query": None}])
def test_an_index_that_a_metric_needs_is_asked_of_rows_to_be_scored_alone(index):
    task = get_task("record")
    check_rows(task, "validation", [{**RECORD, "idx": {"passage": 0, "query": 0}}])
    check_rows(task, "train", [{**RECORD, "idx": index}])

    with pytest.raises(ValueError, match=r"Row 0 .*'idx' must hold an object with the numbers passage, query; got "):
        check_rows(task, "validation", [{**RECORD, "idx": index}])


def test_the_error_of_a_users_own_function_names_the_row():
    task = Task(name="t", template="{a}", texts=("{a}",), choices=lambda row: [row["a"].upper()], answer=lambda row: 0)

    with pytest.raises(ValueError, match="Row 0 of the split 'train' of t: it cannot be asked: 'int' object"):
        check_rows(task, "train", [{"a": 3}])


def test_hidden_labels_are_never_scored():
    rows = load_split(get_task("sst2"), "test", str(DATA / "glue" / "sst2"))

    with pytest.raises(ValueError, match="has no label: a split without labels can be predicted"):
        check_rows(get_task("sst2"), "test", rows)
    check_rows(get_task("sst2"), "test", rows, labelled=False)


def test_an_empty_field_is_named_with_its_row(folder):
    rows = load_split(get_task("sst2"), "train", folder("train", [{"sentence": "a", "label": 0}, {"label": 1}]))

    with pytest.raises(
        ValueError, match=r"Row 1 .* field 'sentence' is empty: a text is wanted. The row: {'sentence': None"
    ):
        check_rows(get_task("sst2"), "train", rows)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"sentence": "a", "label": 0}\n{"sentence": "b", "label"\n', "line 2 is not JSON"),
        ('{"sentence": "a", "label": 0}\n[1, 2]\n', "line 2 is not an object"),
    ],
)
def test_a_broken_line_is_named(folder, text, reason):
    with pytest.raises(ValueError, match=reason):
        load_split(get_task("sst2"), "train", folder("train", text))


def test_a_broken_line_of_a_csv_is_named(folder):
    with pytest.raises(ValueError, match="line 3"):
        load_split(get_task("sst2"), "train", folder("train", "sentence,label\na,0\nb,1,2,3\n", "csv"))


@pytest.mark.parametrize("text", ["", "\n\n"])
def test_an_empty_file_is_an_error(folder, text):
    with pytest.raises(ValueError, match="is empty: rows were wanted"):
        load_split(get_task("sst2"), "train", folder("train", text))


def test_a_file_that_is_not_there_and_another_kind_of_file_are_errors(tmp_path):
    with pytest.raises(ValueError, match="There is no file"):
        read_file(tmp_path / "a.csv")
    with pytest.raises(ValueError, match=r"ends in .jsonl, .json, .csv"):
        read_file(tmp_path / "a.txt")


def test_without_the_hub_the_error_says_what_to_do():
    with pytest.raises(ValueError, match=r"nyu-mll/glue \(sst2\) could not be had .* --data_dir with train.jsonl"):
        load_split(get_task("sst2"), "train")


def test_an_unknown_split_is_an_error():
    with pytest.raises(ValueError, match="has the splits train, validation, test; got 'dev'"):
        load_split(get_task("sst2"), "dev")


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_a_users_own_file_becomes_a_task(suffix):
    task = own_task(str(OWN / f"train.{suffix}"), ["message"], "team")
    files = {"train": str(OWN / f"train.{suffix}"), "validation": str(OWN / f"validation.{suffix}")}

    assert task.labels == ("billing", "returns", "shipping")
    assert task.label_words == (" billing", " returns", " shipping")
    assert task.template == "Message: {message}\nTeam:"
    for split, size in (("train", 12), ("validation", 6)):
        rows = load_split(task, split, files=files)
        check_rows(task, split, rows)
        assert len(rows) == size


def test_two_columns_and_words_of_ones_own():
    task = own_task(str(OWN / "pairs.csv"), ["question", "answer"], "good", ["yes=right", "no=wrong"], "{question}")

    assert task.labels == ("no", "yes")
    assert task.label_words == (" wrong", " right")
    assert task.texts == ("{question}", "{answer}")
    assert task.template == "{question}"


def test_labels_that_are_numbers_need_words(tmp_path):
    path = tmp_path / "train.csv"
    path.write_text("text,stars\na,1\nb,2\n")

    with pytest.raises(ValueError, match=r"label '1' needs a word .*--label_words 1=WORD"):
        own_task(str(path), ["text"], "stars")
    task = own_task(str(path), ["text"], "stars", ["1=bad", "2=good"])
    assert (task.labels, task.label_words) == (("1", "2"), (" bad", " good"))


def write(path, *lines):
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def test_labels_of_two_files_are_compared_as_texts(tmp_path):
    train = write(tmp_path / "train.csv", "text,label", "a,1", "b,2", "c,other")
    validation = write(tmp_path / "validation.csv", "text,label", "a,1", "b,2")
    lines = write(tmp_path / "lines.jsonl", '{"text": "a", "label": 2}', '{"text": "b", "label": "other"}')
    task = own_task(train, ["text"], "label", ["1=bad", "2=good"])

    assert task.labels == ("1", "2", "other")
    for path, expected in ((train, [0, 1, 2]), (validation, [0, 1]), (lines, [1, 2])):
        rows = load_split(task, "validation", files={"validation": path})
        check_rows(task, "validation", rows)
        assert [task.target(row) for row in rows] == expected


def test_a_label_that_is_missing_is_named_and_makes_no_floats_of_the_others(tmp_path):
    train = write(tmp_path / "train.csv", "text,label", "a,0", "b,1", "c,")
    task = own_task(train, ["text"], "label", ["0=bad", "1=good"])

    assert task.labels == ("0", "1")
    with pytest.raises(ValueError, match=r"Row 2 .* it has no label"):
        check_rows(task, "train", load_split(task, "train", files={"train": train}))


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_minus_one_may_be_a_label_of_ones_own(tmp_path, suffix):
    lines = {
        "csv": ("text,label", "a,-1", "b,1"),
        "jsonl": ('{"text": "a", "label": -1}', '{"text": "b", "label": 1}'),
    }
    train = write(tmp_path / f"train.{suffix}", *lines[suffix])
    task = own_task(train, ["text"], "label", ["-1=bad", "1=good"])

    check_rows(task, "train", rows := load_split(task, "train", files={"train": train}))
    assert [task.target(row) for row in rows] == [0, 1]


def test_words_that_other_readers_take_for_nothing_are_labels_and_texts(tmp_path):
    words = ["None", "NA", "null", "nan", "N/A"]
    train = write(tmp_path / "train.csv", "text,label", *(f"{word},{word}" for word in words))
    task = own_task(train, ["text"], "label")
    rows = load_split(task, "train", files={"train": train})

    assert set(task.labels) == set(rows["text"]) == set(words)
    check_rows(task, "train", rows)


def test_numbers_of_a_named_task_are_numbers_and_its_texts_keep_every_word(folder):
    task = get_task("sst2")
    rows = load_split(task, "train", folder("train", "sentence,label\nN/A,0\na film,1\n", "csv"))

    check_rows(task, "train", rows)
    assert (rows["sentence"][0], rows["label"][0]) == ("N/A", 0)


@pytest.mark.parametrize("name", ["own", "sst2"])
def test_a_file_with_a_header_alone_has_no_rows(tmp_path, name):
    path = write(tmp_path / "train.csv", "sentence,label")

    with pytest.raises(ValueError, match=r"train.csv has no rows: at least one is wanted"):
        own_task(path, ["sentence"], "label") if name == "own" else load_split(get_task(name), "train", str(tmp_path))


@pytest.mark.parametrize("words", [["4=good"], ["good"]])
def test_a_word_for_no_label_is_an_error(words):
    with pytest.raises(ValueError, match=r"LABEL=WORD with a label out of billing, returns, shipping"):
        own_task(str(OWN / "train.csv"), ["message"], "team", words)


@pytest.mark.parametrize(("text", "label"), [(["text"], "team"), ([], "team"), (["message"], "x")])
def test_a_column_that_is_not_there_is_an_error(text, label):
    with pytest.raises(ValueError, match=r"has the columns message, team"):
        own_task(str(OWN / "train.csv"), text, label)


def test_a_column_of_one_value_or_of_texts_is_no_label_column(tmp_path):
    path = tmp_path / "train.csv"
    path.write_text("text,label\n" + "".join(f"a{i},same\n" for i in range(60)))

    with pytest.raises(ValueError, match="has 1 different values"):
        own_task(str(path), ["text"], "label")
    with pytest.raises(ValueError, match="has 60 different values"):
        own_task(str(path), ["label"], "text")


def test_samples_depend_on_their_seed_alone():
    rows = read_file(OWN / "train.csv")

    assert sample(rows, 5, 0)["message"] == sample(rows, 5, 0)["message"] != sample(rows, 5, 1)["message"]
    assert len(sample(rows, 99, 0)) == 12
    with pytest.raises(ValueError, match="0 rows was asked"):
        sample(rows, 0, 0)


def test_few_shots_are_as_many_of_each_class():
    task, rows = own_task(str(OWN / "train.csv"), ["message"], "team"), read_file(OWN / "train.csv")

    drawn = few_shot(task, rows, 2, seed=3)

    assert Counter(drawn["team"]) == {"billing": 2, "returns": 2, "shipping": 2}
    assert drawn["message"] == few_shot(task, rows, 2, seed=3)["message"] != few_shot(task, rows, 2, seed=4)["message"]
    with pytest.raises(ValueError, match="9 rows of each class were asked for; 'billing' has"):
        few_shot(task, rows, 9, seed=3)
    with pytest.raises(ValueError, match="no classes to draw from"):
        few_shot(get_task("copa"), rows, 2, seed=3)


def test_a_wrong_label_is_named_with_its_row_before_shots_are_drawn():
    rows = Dataset.from_list([{"sentence": "a", "label": label} for label in (0, 1, 0, 1, 7)])

    with pytest.raises(ValueError, match=r"Row 4 of the split 'train' of sst2.*one of 0, 1; got 7"):
        few_shot(get_task("sst2"), rows, 1, seed=0)


@pytest.mark.real
@pytest.mark.parametrize("name", ["movie_reviews", "plot_or_review"])
def test_no_movie_is_in_two_splits(movie_reviews, name):
    task = get_task(name)
    splits = {split: load_split(task, split) for split in ("train", "validation", "test")}
    movies = [set(rows["movie_name"]) for rows in splits.values()]

    assert not movies[0] & movies[1] | movies[0] & movies[2] | movies[1] & movies[2]
    assert all(len(rows) > 2000 for rows in splits.values())
    for split, rows in splits.items():
        check_rows(task, split, rows)
        assert {task.target(task.prepared(row)) for row in rows} == {0, 1}
    with pytest.raises(ValueError, match="splits validation, test, train; got 'dev'"):
        load_split(task, "dev")


@pytest.mark.parametrize(
    ("column", "template", "message"),
    [
        ("review.text", None, "'review.text' cannot stand in a template"),
        ("text", "Review: {}", "asks for {}"),
        ("text", "Review: {body}", r"asks for {body}; --text_columns has text"),
        ("text", "Review: {text", "columns stand in braces"),
    ],
)
def test_a_template_that_cannot_be_filled_is_refused_at_once(tmp_path, column, template, message):
    path = tmp_path / "rows.csv"
    path.write_text(f"{column},label\na,yes\nb,no\n")
    with pytest.raises(ValueError, match=message):
        own_task(str(path), [column], "label", template=template)


def test_a_question_of_multirc_is_sampled_and_held_out_with_all_its_answers():
    task = get_task("multirc")
    sizes = (4, 3, 5, 2)
    numbered = [(passage, answer) for passage, size in enumerate(sizes) for answer in range(size)]
    rows = Dataset.from_list([{"paragraph": f"Passage {passage}.", "answer": answer} for passage, answer in numbered])
    for seed in range(8):
        sampled = Counter(sample_to_score(task, rows, 8, seed)["paragraph"])
        train, held = (Counter(part["paragraph"]) for part in hold_out(task, rows, 8, seed))
        for drawn in (sampled, held):
            assert 0 < drawn.total() <= 8
            assert all(sizes[int(passage[8])] == count for passage, count in drawn.items())
        assert not set(train) & set(held) and train.total() + held.total() == len(rows)
    assert len(sample_to_score(task, rows, None, 0)) == len(sample_to_score(task, rows, 99, 0)) == len(rows)
    with pytest.raises(ValueError, match="multirc is sampled by whole paragraph: 2 rows at least, not 1"):
        sample_to_score(task, rows, 1, 0)
    with pytest.raises(ValueError, match="whole paragraph: there is no such column; it has answer"):
        sample_to_score(task, rows.remove_columns("paragraph"), 8, 0)
