"""What an earlier version saved still loads, and answers the same."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from peft_prompt_ext import cli
from peft_prompt_ext.training.predictor import Predictor
from tests.fixtures.build_base import build_base
from tests.helpers import one_thread  # noqa: F401


SAVED = Path(__file__).parents[1] / "fixtures" / "46ac7cc"
RUN = ["--model_name_or_path", "base", "--train_file", "train.csv", "--validation_file", "validation.csv"]
RUN += ["--text_columns", "message", "--label_column", "team", "--output_dir", "run", "--use_cpu", "true"]
RUN += ["--disable_tqdm", "true"]


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """A copy of the fixture with its base model, as the current folder: the names in it are relative."""
    shutil.copytree(SAVED, tmp_path, dirs_exist_ok=True)
    shutil.copytree(SAVED / "tokenizer", tmp_path / "base")
    build_base(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_an_adapter_loads_with_its_record_and_gives_the_same_logits(saved):
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base"), "adapter").eval()
    expected = load_file("logits.safetensors")

    with torch.no_grad():
        logits = model(input_ids=expected["input_ids"]).logits[:, -1]

    torch.testing.assert_close(logits, expected["last_logits"], rtol=0, atol=1e-4)
    config = model.peft_config["default"]
    assert config.prompt_tuning_init_kwargs == {"labels": [" billing", " shipping"]}
    assert [slot["label"] for slot in config.init_record["slots"][:2]] == [" billing", " shipping"]


def test_a_run_folder_gives_the_same_answers(saved):
    expected = json.loads((saved / "answers.json").read_text())

    answers = list(Predictor.from_pretrained("run", "cpu").predict(expected))

    assert len(answers) == 3
    for answer, then in zip(answers, expected, strict=True):
        assert answer["label"] == then["label"]
        assert answer["probabilities"] == pytest.approx(then["probabilities"], abs=1e-4)


def test_a_run_folder_is_scored_again_to_the_same_scores(saved):
    then = json.loads((saved / "run" / "eval_results.json").read_text())

    scores = cli.train([*RUN, "--do_eval", "true"])

    for name in ("eval_accuracy", "eval_f1", "eval_loss"):
        assert scores[name] == pytest.approx(then[name], abs=1e-4)


def test_the_settings_of_a_run_folder_are_those_of_the_same_command_today(saved):
    then = json.loads((saved / "run" / "recipe.json").read_text())
    shutil.move("run", "then")

    cli.train(
        [*RUN, "--max_steps", "4", "--per_device_train_batch_size", "4", "--seed", "5", "--learning_rate", "0.3"]
    )

    new = {"prompt_position": "prefix", "text_cache": "memory", "text_cache_bytes": None}  # settings since then
    assert json.loads((saved / "run" / "recipe.json").read_text()) == {**then, **new}
    first, now = (load_file(f"{folder}/adapter_model.safetensors")["prompt_embeddings"] for folder in ("then", "run"))
    torch.testing.assert_close(now, first, rtol=0, atol=1e-2)
