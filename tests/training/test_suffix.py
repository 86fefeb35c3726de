"""A prompt behind the text from the command line: the template is split, the rest is as for a prompt before it."""

import json

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_prompt_ext import engine_status
from peft_prompt_ext.tasks import Task, get_task
from peft_prompt_ext.tasks.families import CausalLM
from peft_prompt_ext.training.predictor import Predictor
from peft_prompt_ext.training.run import build_trainer
from tests.helpers import one_thread  # noqa: F401
from tests.training.test_predictor import rows_of
from tests.training.test_recipe_train import DATA, read, train  # noqa: F401


SUFFIX = ("--prompt_position", "suffix")


@pytest.mark.parametrize("name", ["sst2", "wic", "copa", "record", "stsb"])
def test_a_task_trains_and_answers_as_it_was_scored(train, tmp_path, name):  # noqa: F811
    results = train(name, *SUFFIX, "--learning_rate", "0.3")

    record = read(tmp_path / "out" / "prompt_init.json")
    assert record["prompt_position"] == "suffix" and results["train_loss"] > 0
    assert read(tmp_path / "out" / "recipe.json")["prompt_position"] == "suffix"
    assert "| prompt position | suffix |" in (tmp_path / "out" / "README.md").read_text()
    again = train(name, *SUFFIX, "--do_eval", "true", "--learning_rate", "0.3")
    assert again["eval_loss"] == pytest.approx(results["eval_loss"], rel=1e-5)
    predictor = Predictor.from_pretrained(str(tmp_path / "out"))
    assert predictor.family.prompt_behind and len(list(predictor.predict(rows_of(name)))) == 6


def test_a_head_reads_the_whole_text_and_trains(train, tmp_path):  # noqa: F811
    results = train("rte", *SUFFIX, task_type="SEQ_CLS")

    assert 0 <= results["eval_accuracy"] <= 1
    assert read(tmp_path / "out" / "prompt_init.json")["prompt_tuning_init"] == "CLASS_LABELS"


def test_the_prompt_ends_as_the_question_does_and_the_init_fills_the_rest(train, tmp_path, saved_model):  # noqa: F811
    train("sst2", *SUFFIX, "--learning_rate", "0")

    record = read(tmp_path / "out" / "prompt_init.json")
    assert record["prompt_tuning_init"] == "ENDING"
    labels = {"fallback": "CLASS_LABELS", "fallback_kwargs": {"labels": [" negative", " positive"]}}
    assert record["prompt_tuning_init_kwargs"] == {"ending": "\nSentiment:", **labels}
    tokenizer = AutoTokenizer.from_pretrained(saved_model("llama"))
    ids = tokenizer("\nSentiment:")["input_ids"]
    assert [slot["token_ids"] for slot in record["slots"][-len(ids) :]] == [[i] for i in ids]
    assert record["slots"][0]["label"] == " negative" and len(record["slots"]) == 8 + len(ids)


@pytest.mark.parametrize(
    ("flags", "kwargs"),
    [
        (["--prompt_tuning_init", "SAMPLE_VOCAB"], {"fallback": "SAMPLE_VOCAB", "fallback_kwargs": {}}),
        (
            ["--prompt_tuning_init", "CLASS_LABELS", "--prompt_tuning_init_kwargs", '{"labels": ["a"]}'],
            {"fallback": "CLASS_LABELS", "fallback_kwargs": {"labels": ["a"]}},
        ),
    ],
)
def test_a_named_init_is_the_fallback(train, tmp_path, flags, kwargs):  # noqa: F811
    train("sst2", *SUFFIX, *flags)

    record = read(tmp_path / "out" / "prompt_init.json")
    assert record["prompt_tuning_init_kwargs"] == {"ending": "\nSentiment:", **kwargs}


def test_an_ending_of_ones_own_and_a_template_without_one_are_taken_as_they_are(train, tmp_path):  # noqa: F811
    own = {"ending": " film"}

    train("sst2", *SUFFIX, "--prompt_tuning_init", "ending", "--prompt_tuning_init_kwargs", json.dumps(own))
    train("copa", *SUFFIX, folder="bare")

    records = [read(tmp_path / folder / "prompt_init.json") for folder in ("out", "bare")]
    assert records[0]["prompt_tuning_init_kwargs"] == own
    assert records[1]["prompt_tuning_init"] == "SAMPLE_VOCAB"


@pytest.mark.parametrize(
    ("architecture", "task_type", "what"),
    [("bert", "SEQ_CLS", "an encoder"), ("t5", "SEQ_2_SEQ_LM", "an encoder-decoder")],
)
def test_a_model_whose_text_sees_the_prompt_is_refused(train, architecture, task_type, what):  # noqa: F811
    with pytest.raises(ValueError, match=rf"--prompt_position suffix needs a decoder.* is {what}\. Leave it out"):
        train("sst2", *SUFFIX, architecture=architecture, task_type=task_type)


def test_a_run_of_the_other_position_is_refused(train):  # noqa: F811
    train("sst2", *SUFFIX)

    with pytest.raises(ValueError, match="prompt_position 'suffix', now 'prefix'"):
        train("sst2", "--do_eval", "true")


def test_where_texts_are_kept_is_told_the_prompt_and_not_compared(train, tmp_path, recipe_models):  # noqa: F811
    train("sst2", *SUFFIX, "--text_cache", "none")
    train("sst2", *SUFFIX, "--text_cache_bytes", "8MB", "--do_eval", "true")
    train("sst2", *SUFFIX, "--resume_from_checkpoint", "true")

    fields = [(c.text_cache, c.text_cache_bytes) for c in (m.peft_config["default"] for m in recipe_models)]
    assert fields == [("none", None), ("memory", 8_000_000), ("memory", None)]


@pytest.fixture
def recipe_models(monkeypatch):
    """The models of the runs in a test."""
    models = []

    def build(model, *args, **kwargs):
        models.append(model)
        return build_trainer(model, *args, **kwargs)

    monkeypatch.setattr("peft_prompt_ext.training.run.build_trainer", build)
    return models


def logits_of_the_row_alone(model, context, answer, prompt):
    """`[text | prompt | answer]` in the base model, written out."""
    words = model.get_base_model().get_input_embeddings()
    text, said = (words(torch.tensor(ids, dtype=torch.long)) for ids in (context, answer))
    out = model.get_base_model()(inputs_embeds=torch.cat([text, prompt, said])[None], use_cache=False).logits[0]
    return out[len(context) + len(prompt) - 1 :].log_softmax(-1)


@pytest.mark.parametrize("name", ["sst2", "record"])
def test_a_score_is_the_likelihood_of_the_answer_behind_text_and_prompt(train, tmp_path, saved_model, name):  # noqa: F811
    train(name, *SUFFIX, "--learning_rate", "0.3")
    base = AutoModelForCausalLM.from_pretrained(saved_model("llama"))
    model = PeftModel.from_pretrained(base, str(tmp_path / "out")).eval()
    family = CausalLM(get_task(name), AutoTokenizer.from_pretrained(saved_model("llama")), 400, prompt_behind=True)
    rows = [family.encode(row) for row in rows_of(name)[:3]]

    with torch.no_grad():
        scores = family.score(model, family.collate_choices(rows))
        for row, found in zip(rows, scores, strict=True):
            for answer, score in zip(row["choices"], found, strict=False):
                alone = logits_of_the_row_alone(model, row["context"], answer, model.get_prompt(1)[0])
                wanted = sum(alone[place, token] for place, token in enumerate(answer))
                assert score.item() == pytest.approx(wanted.item(), rel=1e-4)
        before = engine_status(model).texts.hits
        family.score(model, family.collate_choices(rows))
    assert engine_status(model).texts.hits == before + 3  # no logits of texts were asked for


def test_without_supervised_logits_the_labels_are_given_too(train, monkeypatch):  # noqa: F811
    from peft_prompt_ext.training import prompts

    config = prompts.PromptTuningExtConfig
    monkeypatch.setattr(prompts, "PromptTuningExtConfig", lambda **fields: config(**{**fields, "train_logits": "all"}))

    assert train("sst2", *SUFFIX)["train_loss"] > 0


@pytest.mark.parametrize("limit", [60, 400])
def test_text_and_ending_are_the_tokens_of_the_whole_question(tokenizer, limit):
    task = get_task("sst2")
    row = {"sentence": "a great film with a fine cast. " * 9, "label": 1}

    behind, before = (CausalLM(task, tokenizer, limit, prompt_behind=behind).encode(row) for behind in (True, False))

    ending = tokenizer("\nSentiment:")["input_ids"]
    assert behind["choices"] == before["choices"]
    if limit == 400:
        assert behind["context"] + ending == before["context"] and not behind["truncated"]
    else:
        assert behind["truncated"] and limit - 4 <= behind["length"] <= limit
        assert tokenizer.decode(behind["context"]).startswith("Review: a great film")


def test_a_text_that_is_empty_is_refused_before_the_training(tokenizer):
    task = Task(name="bare", template="{text}\nTeam:", texts=("{text}",), label_words=(" a", " b"))

    with pytest.raises(ValueError, match="A row of bare has an empty text"):
        CausalLM(task, tokenizer, 50, prompt_behind=True).encode({"text": "", "label": 0})
    with pytest.raises(ValueError, match="'Team:' of none has no column"):
        CausalLM(Task(name="none", template="Team:", texts=("{text}",), label_words=(" a", " b")), tokenizer, 50, True)
