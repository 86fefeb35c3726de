"""Several prompts behind one text answer together what each answers alone."""

import json

import numpy as np
import pytest
import torch

from peft_prompt_ext import cli
from peft_prompt_ext.tasks import Task
from peft_prompt_ext.tasks.families import CausalLM
from peft_prompt_ext.training import shared_texts
from peft_prompt_ext.training.predictor import Predictor
from peft_prompt_ext.training.shared_texts import SharedTextPredictor
from tests.helpers import one_thread, prompted  # noqa: F401
from tests.training.test_recipe_train import train  # noqa: F401


TEXTS = ["a great film", "terrible acting and a worse script", "the plot", "this film is not great " * 30, "a"]
ROWS = [{"text": text} for text in TEXTS]
LABELS = {"mood": ("good", "bad"), "topic": ("film", "acting by the cast", "plot"), "style": ("plain", "odd")}


@pytest.fixture
def trained(train, tmp_path, capsys):  # noqa: F811
    """Trains a run for each name: `trained("mood", "topic")` gives their folders."""

    def run(*names, **options):
        return [trained_one(train, tmp_path, name, **options) for name in names]

    yield run
    capsys.readouterr()


def trained_one(train, tmp_path, name, *flags, position="suffix", template=None, **options):  # noqa: F811
    labels = LABELS[name]
    file = tmp_path / f"{name}.csv"
    file.write_text("text,label\n" + "".join(f"{text},{labels[i % len(labels)]}\n" for i, text in enumerate(TEXTS)))
    template = template or f"Text: {{text}}\n{name.capitalize()}:"
    arguments = ["--train_file", str(file), "--text_columns", "text", "--do_train", "true", "--max_seq_length", "90"]
    arguments += ["--prompt_position", position, "--learning_rate", "0.5", "--num_virtual_tokens", str(15 + len(name))]
    train(None, *arguments, "--template", template, *flags, folder=name, **options)
    return str(tmp_path / name)


def assert_answers_equal(found, wanted):
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert one["label"] == other["label"]
        assert one["probabilities"] == pytest.approx(other["probabilities"], abs=1e-4)


@pytest.mark.parametrize("batch_size", [1, 32])
@pytest.mark.parametrize(
    ("names", "task_type"), [(("mood", "topic", "style"), "CAUSAL_LM"), (("mood", "style"), "SEQ_CLS")]
)
def test_each_task_answers_as_alone(trained, names, task_type, batch_size):
    folders = trained(*names, task_type=task_type)
    rows = [row for row in ROWS if len(row["text"]) < 99]  # a long text may be cut more than alone

    answers = list(SharedTextPredictor.from_pretrained(folders).predict(rows, batch_size))

    for name, folder in zip(names, folders, strict=True):
        wanted = list(Predictor.from_pretrained(folder).predict(rows))
        assert_answers_equal([answer[name] for answer in answers], wanted)
        assert set(wanted[0]["probabilities"]) == set(LABELS[name])


def test_a_long_text_is_cut_alike_for_answers_of_different_lengths(trained):
    predictor = SharedTextPredictor.from_pretrained(trained("topic", "mood"))

    encoded = [family.encode(ROWS[3]) for family in predictor.families.values()]
    rooms = [90 - max(map(len, one["choices"])) for one in encoded]

    assert rooms[0] < rooms[1] and all(one["truncated"] for one in encoded)
    assert encoded[0]["context"] == encoded[1]["context"] and len(encoded[0]["context"]) <= rooms[0]
    assert len(list(predictor.predict(ROWS))) == len(ROWS)


def test_a_packed_batch_has_each_text_once_for_each_prompt(trained, monkeypatch):
    predictor = SharedTextPredictor.from_pretrained(trained("mood", "topic"))
    monkeypatch.setattr(predictor, "_score_together", lambda encoded: None)
    wanted = list(predictor.predict(ROWS))
    monkeypatch.undo()
    batches, rate = [], shared_texts.rate

    def rate_row_by_row(model, family, encoded, adapter_names):
        batches.append([one["context"] for one in encoded])
        scores = np.full((len(encoded), max(len(one["choices"]) for one in encoded)), -100.0)
        for row, (one, name) in enumerate(zip(encoded, adapter_names, strict=True)):
            model.set_adapter(name)
            scores[row, : len(one["choices"])] = rate(model, family, [one])[0]
        return scores

    monkeypatch.setattr(shared_texts, "rate", rate_row_by_row)
    monkeypatch.setattr(shared_texts, "MAX_SEQUENCES", 12)
    found = list(predictor.predict(ROWS))

    for name in ("mood", "topic"):
        assert_answers_equal([answer[name] for answer in found], [answer[name] for answer in wanted])
    assert len(batches) > 1 and sum(map(len, batches)) == 2 * len(ROWS)
    assert all(batch[::2] == batch[1::2] for batch in batches)


def test_an_error_of_a_packed_batch_is_not_hidden(trained, monkeypatch):
    predictor = SharedTextPredictor.from_pretrained(trained("mood", "style"))

    rate = shared_texts.rate

    def fail(*args, **options):
        if options:
            raise ValueError("broken")
        return rate(*args)

    monkeypatch.setattr(shared_texts, "rate", fail)
    with pytest.raises(ValueError, match="broken"):
        next(predictor.predict(ROWS))


def test_scores_of_mixed_rows_are_those_of_each_adapter(build_model, tokenizer):
    model = prompted(build_model("llama", max_position_embeddings=97), "CAUSAL_LM", num_virtual_tokens=5)
    other = prompted(build_model("llama"), "CAUSAL_LM", num_virtual_tokens=8, prompt_tuning_init_seed=9)
    model.add_adapter("other", other.peft_config["default"])
    task = Task(name="t", template="{text}:", texts=("{text}",), label_words=(" great", " terrible film", " a film"))
    family = CausalLM(task, tokenizer, 80)
    batch = family.collate_choices([family.encode({"text": text, "label": 0}) for text in TEXTS[:3]])
    names = ["other", "default", "other"]

    with torch.inference_mode():
        mixed = family.score(model.eval(), {**batch, "adapter_names": names})
        for row, name in enumerate(names):
            model.set_adapter(name)
            torch.testing.assert_close(mixed[row], family.score(model, batch)[row], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"position": "prefix"}, r"topic has no prompt behind the text.* train it with --prompt_position suffix"),
        ({"template": "Film: {text}\nTopic:"}, "Row 0: mood and topic read different texts, 'Text: a.*'Film: a great"),
        ({"task_type": "SEQ_CLS"}, r"different base models \(task_type 'CAUSAL_LM' and 'SEQ_CLS'\)"),
    ],
)
def test_runs_that_read_different_texts_are_refused_before_the_first_answer(train, tmp_path, change, message):  # noqa: F811
    folders = [trained_one(train, tmp_path, "mood"), trained_one(train, tmp_path, "topic", **change)]

    with pytest.raises(ValueError, match=message):
        next(SharedTextPredictor.from_pretrained(folders).predict(ROWS))


def test_heads_of_different_sizes_and_one_folder_twice_are_refused(trained):
    mood, topic = trained("mood", "topic", task_type="SEQ_CLS")

    with pytest.raises(ValueError, match=r"mood has a head of 2 outputs, .*topic of 3"):
        SharedTextPredictor.from_pretrained([mood, topic])
    with pytest.raises(ValueError, match="A folder is named twice"):
        SharedTextPredictor.from_pretrained([mood, mood])


def test_the_command_writes_one_column_a_task(trained, tmp_path, capsys):
    folders = trained("mood", "topic")
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    capsys.readouterr()

    cli.main(["predict", *folders, "--file", str(file)])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    cli.main(["predict", folders[1], "--file", str(file)])
    alone = [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    assert [list(line) for line in lines] == [["mood", "topic"]] * len(ROWS)
    assert_answers_equal([line["topic"] for line in lines], alone)


def test_folders_of_one_name_are_told_apart():
    assert shared_texts.name_columns(["runs/mood", "runs/topic"]) == ["mood", "topic"]
    assert shared_texts.name_columns(["a/out", "b/out"]) == ["a/out", "b/out"]


def test_a_person_sees_a_column_for_each_task(monkeypatch, capsys):
    from peft_prompt_ext.training import answers

    task = Task(name="t", template="{text}:", texts=("{text}",), label_words=(" x",))
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)

    found = {"mood": {"label": "good", "probability": 0.9}, "stars": {"value": 3.25}}
    answers.show_several({"mood": task, "stars": task}, {"text": "a film"}, found)

    assert " ".join(capsys.readouterr().out.split()) == "mood: good 90 % stars: 3.25 a film"
