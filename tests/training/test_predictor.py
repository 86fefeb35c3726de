"""A trained run answers new rows, the same ones in any batch."""

import importlib.util
import io
import json
import sys
from pathlib import Path

import pytest

from peft_prompt_ext.tasks import get_task
from peft_prompt_ext.tasks.data import load_split
from peft_prompt_ext.training.predictor import Predictor
from tests.helpers import one_thread  # noqa: F401
from tests.training.test_recipe_train import DATA, KINDS, recipe, train  # noqa: F401


@pytest.fixture(scope="module")
def predict():
    path = Path(__file__).parents[2] / "recipes" / "predict.py"
    spec = importlib.util.spec_from_file_location("recipes_predict", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows_of(name):
    task = get_task(name)
    return load_split(task, task.validation[0], str(DATA / task.benchmark / task.subset)).to_list()


@pytest.mark.parametrize("name", ["rte", "record", "copa"])
@pytest.mark.parametrize(("architecture", "task_type"), KINDS)
def test_answers_do_not_depend_on_the_batch(train, tmp_path, name, architecture, task_type):  # noqa: F811
    train(name, architecture=architecture, task_type=task_type)
    predictor, rows = Predictor.from_pretrained(str(tmp_path / "out")), rows_of(name)

    together, alone = (list(predictor.predict(rows, batch_size=size)) for size in (6, 1))

    assert len(together) == 6
    for a, b in zip(together, alone, strict=True):
        assert a["label"] == b["label"]
        assert a["probabilities"] == pytest.approx(b["probabilities"], abs=1e-4)
        assert sum(a["probabilities"].values()) == pytest.approx(1)
        assert a["probability"] == max(a["probabilities"].values())


@pytest.mark.parametrize("method", ["prompt_tuning", "lora", "full", "zero_shot"])
def test_answers_are_the_ones_of_the_evaluation(train, tmp_path, method):  # noqa: F811
    results = train("rte", "--method", method, "--learning_rate", "0.5")
    rows = rows_of("rte")

    answers = Predictor.from_pretrained(str(tmp_path / "out")).predict(rows)

    names = get_task("rte").names
    right = [answer["label"] == names[row["label"]] for answer, row in zip(answers, rows, strict=True)]
    assert sum(right) / 6 == pytest.approx(results["eval_accuracy"])


def test_a_regression_gives_a_value(train, tmp_path):  # noqa: F811
    train("stsb")

    answers = list(Predictor.from_pretrained(str(tmp_path / "out")).predict(rows_of("stsb")))

    assert all(0 <= answer["value"] <= 5 for answer in answers)


def test_the_label_of_a_row_is_not_looked_at(train, tmp_path):  # noqa: F811
    train("record")
    predictor, rows = Predictor.from_pretrained(str(tmp_path / "out")), rows_of("record")
    bare = [{key: value for key, value in row.items() if key != "answers"} for row in rows]

    odd = [{**row, "answers": ["?"]} for row in rows]

    assert list(predictor.predict(rows)) == list(predictor.predict(bare)) == list(predictor.predict(odd))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("rte", {"sentence2": None}, "the field 'sentence2' is empty"),
        ("copa", {"question": "why"}, "must be 'cause' or 'effect'; got 'why'"),
        ("record", {"entities": []}, "'entities' must hold at least one"),
    ],
)
def test_a_row_that_cannot_be_asked_is_an_error_before_the_first_answer(train, tmp_path, name, change, message):  # noqa: F811
    train(name)
    predictor, rows = Predictor.from_pretrained(str(tmp_path / "out")), rows_of(name)[:2]

    with pytest.raises(ValueError, match=f"Row 2 for {name}: .*{message}"):
        next(predictor.predict([*rows, {**rows[0], **change}], batch_size=1))
    with pytest.raises(ValueError, match=f"Row 0 for {name}: there is no column '{next(iter(change))}'; it has "):
        next(predictor.predict([{key: value for key, value in rows[0].items() if key not in change}]))


def test_a_folder_without_a_run_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"holds no recipe.json: give the output folder"):
        Predictor.from_pretrained(str(tmp_path))


def test_a_quantised_run_is_given_no_device(train, tmp_path, predict):  # noqa: F811
    train("sst2")
    record = tmp_path / "out" / "recipe.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "quantization": "nf4"}))

    with pytest.raises(SystemExit, match=r"is quantised \(nf4\) .* not to 'cpu': leave --device out"):
        predict.main([str(tmp_path / "out"), "--text", "a film", "--device", "cpu"])


def test_the_files_of_an_own_task_may_hold_any_word_and_label(train, tmp_path, predict, capsys):  # noqa: F811
    files = {
        "train": "text,label\na,0\nb,1\n",
        "validation": "text,label\na,1\nb,\n",
        "test": "text,label\nN/A,?\nb,7\n",
    }
    for name, text in files.items():
        (tmp_path / f"{name}.csv").write_text(text)
    flags = [item for name in ("train", "test") for item in (f"--{name}_file", str(tmp_path / f"{name}.csv"))]
    flags += ["--text_columns", "text", "--label_words", "0=bad", "1=good", "--do_train", "true"]

    train(None, *flags, "--do_predict", "true")
    lines = (tmp_path / "out" / "predict_results_own_data.txt").read_text().splitlines()[1:]
    capsys.readouterr()
    predict.main([str(tmp_path / "out"), "--file", str(tmp_path / "test.csv")])
    answers = [json.loads(line)["label"] for line in capsys.readouterr().out.splitlines()]

    assert answers == [line.split("\t")[1] for line in lines] and set(answers) <= {"0", "1"}
    with pytest.raises(ValueError, match=r"Row 1 of the split 'validation' of own_data: it has no label"):
        train(None, *flags, "--do_eval", "true", "--validation_file", str(tmp_path / "validation.csv"), folder="other")


def test_an_own_task_is_asked_with_its_own_words(train, tmp_path):  # noqa: F811
    files = (str(DATA / "own" / name) for name in ("train.csv", "validation.csv"))
    names = ("--train_file", "--validation_file")
    flags = [item for pair in zip(names, files, strict=True) for item in pair]
    train(None, *flags, "--text_columns", "message", "--label_column", "team")

    answer = next(Predictor.from_pretrained(str(tmp_path / "out")).predict([{"message": "my parcel is late"}]))

    assert set(answer["probabilities"]) == {"billing", "returns", "shipping"}


def test_the_command_answers_texts_files_and_lines(train, tmp_path, predict, capsys, monkeypatch):  # noqa: F811
    train("sst2")
    folder, texts = str(tmp_path / "out"), ["a great film", "terrible"]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"sentence": text}) + "\n" for text in texts))
    monkeypatch.setattr(sys, "stdin", io.StringIO(f'{texts[0]}\n{{"sentence": "{texts[1]}"}}\n'))
    capsys.readouterr()

    outputs = []
    for arguments in (["--text", *texts], ["--file", str(file)], []):
        predict.main([folder, *arguments])
        outputs.append([json.loads(line) for line in capsys.readouterr().out.splitlines()])

    assert outputs[0] == outputs[1] == outputs[2]
    assert [set(answer) for answer in outputs[0]] == [{"label", "probability", "probabilities"}] * 2


def test_every_line_has_an_answer(train, tmp_path, predict, capsys, monkeypatch):  # noqa: F811
    train("sst2")
    monkeypatch.setattr(sys, "stdin", io.StringIO("a great film\n\nterrible\n"))
    capsys.readouterr()

    predict.main([str(tmp_path / "out")])

    assert len(capsys.readouterr().out.splitlines()) == 3


def test_a_text_for_a_task_of_two_columns_is_an_error(train, tmp_path, predict):  # noqa: F811
    train("rte")

    with pytest.raises(SystemExit, match="rte is a JSON object with sentence1, sentence2; line 1 is 'a film'"):
        predict.main([str(tmp_path / "out"), "--text", "a film"])


def test_a_broken_object_is_no_text(train, tmp_path, predict):  # noqa: F811
    train("sst2")

    with pytest.raises(SystemExit, match="Line 2 is not JSON"):
        predict.main([str(tmp_path / "out"), "--text", '{"sentence": "good"}', '{"sentence": "a film"'])
