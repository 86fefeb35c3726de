"""The recipe from its command line, on tiny models and rows that this project wrote."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from datasets import load_dataset
from peft import PeftModel
from safetensors.torch import load_file
from tokenizers.processors import TemplateProcessing
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer, Trainer

from peft_prompt_ext import cli
from peft_prompt_ext.tasks import available_tasks, get_task
from peft_prompt_ext.tasks.own import own_task
from peft_prompt_ext.training.arguments import DEFAULTS
from peft_prompt_ext.training.methods import METHODS
from tests.helpers import one_thread  # noqa: F401


ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "recipes" / "train.py"
DATA = Path(__file__).parents[1] / "data"
BENCHMARKS = [name for name in available_tasks() if get_task(name).benchmark]
KINDS = [("llama", "CAUSAL_LM"), ("bert", "SEQ_CLS"), ("t5", "SEQ_2_SEQ_LM")]


@pytest.fixture(scope="module")
def recipe():
    """The steps of a run."""
    from peft_prompt_ext.training import run

    return run


@pytest.fixture
def train(saved_model, tmp_path):
    """Runs the recipe on a tiny model: `train("rte", "--max_steps", "2")`."""

    def run(task, *flags, architecture="llama", task_type="CAUSAL_LM", folder="out"):
        values = [
            "--model_name_or_path",
            saved_model(architecture, "CAUSAL_LM" if architecture == "llama" else task_type),
        ]
        if task:
            entry = get_task(task)
            values += ["--task_name", task, "--data_dir", str(DATA / entry.benchmark / entry.subset)]
        values += ["--output_dir", str(tmp_path / folder), "--task_type", task_type, "--max_steps", "2"]
        values += ["--per_device_train_batch_size", "2", "--use_cpu", "true", "--disable_tqdm", "true"]
        return cli.train([*values, "--logging_steps", "1", "--max_seq_length", "400", *flags])

    return run


def read(path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", BENCHMARKS)
@pytest.mark.parametrize(("architecture", "task_type"), KINDS)
def test_every_task_trains_and_is_scored_with_every_kind_of_model(train, tmp_path, name, architecture, task_type):
    results = train(name, architecture=architecture, task_type=task_type)

    task = get_task(name)
    assert f"eval_{task.main_metric}" in results
    assert results["eval_samples"] == 6
    assert all(0 <= value <= 1 for key, value in results.items() if key.startswith(("eval_acc", "eval_f1")))
    assert read(tmp_path / "out" / "eval_results.json").items() <= results.items()
    assert read(tmp_path / "out" / "train_results.json")["train_loss"] > 0
    if name == "mnli":
        assert {"eval_accuracy", "eval_accuracy_mm"} <= set(results)


WEIGHTS = {"adapter": {"adapter_model.safetensors"}, "model": {"model.safetensors"}, "nothing": set()}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("architecture", "task_type"), [*KINDS, ("llama", "SEQ_CLS")])
def test_every_method_runs_or_says_why_not(train, tmp_path, method, architecture, task_type):
    def run():
        return train("sst2", "--method", method, architecture=architecture, task_type=task_type)

    if task_type not in METHODS[method].task_types:
        with pytest.raises(ValueError, match=f"classification head.*, not {task_type}"):
            run()
        return

    results = run()

    assert 0 <= results["eval_accuracy"] <= 1
    assert ("train_loss" in results) == (METHODS[method].trains != "nothing")
    assert {path.name for path in (tmp_path / "out").glob("*.safetensors")} == WEIGHTS[METHODS[method].stores]


def test_a_checkpoint_of_a_prompt_is_kilobytes(train, tmp_path):
    train("sst2", "--save_steps", "1")

    for checkpoint in (tmp_path / "out").glob("checkpoint-*"):
        assert sum(path.stat().st_size for path in checkpoint.iterdir()) < 100_000
    assert len(list((tmp_path / "out").glob("checkpoint-*"))) == 2


def test_the_default_prompt_begins_as_the_label_words_and_the_form_of_the_question(train, tmp_path):
    train("sst2")

    record = read(tmp_path / "out" / "prompt_init.json")
    assert record["prompt_tuning_init"] == "CLASS_LABELS"
    assert record["prompt_tuning_init_kwargs"] == {"labels": [" negative", " positive"], "fallback": "TEXT"}
    assert record["prompt_tuning_init_text"].endswith("Sentiment: positive\n")


@pytest.mark.parametrize("words_a_token", [1, 2, 4])
def test_the_default_prompt_is_as_long_as_the_whole_form(words_a_token):
    from peft_prompt_ext.training.prompts import prompt_size

    def tokenizer(text, add_special_tokens):
        return {"input_ids": list(range(len(text.split()) // words_a_token))}

    form = "Premise: ...\nHypothesis: ...\nDoes the premise imply the hypothesis? Answer:"
    whole = " ".join(f"{form}{word}\n" for word in get_task("cb").label_words)
    needed = 3 + len(whole.split()) // words_a_token
    sizes = {name: {"num_virtual_tokens": size} for name, size in (("default", None), ("asked", 7))}

    assert prompt_size(sizes["default"], get_task("cb"), tokenizer, True) == max(needed, 20)
    assert prompt_size(sizes["default"], get_task("cb"), tokenizer, False) == 20
    assert prompt_size(sizes["default"], get_task("copa"), tokenizer, True) == 20
    assert prompt_size(sizes["asked"], get_task("cb"), tokenizer, True) == 7


def test_the_settings_have_the_prompts_length_and_a_long_form_is_cut(train, tmp_path):
    train("cb")

    record = read(tmp_path / "out" / "prompt_init.json")
    assert len(record["slots"]) == read(tmp_path / "out" / "recipe.json")["num_virtual_tokens"] == 100
    assert record["prompt_tuning_init_text"].endswith("Answer: maybe\n")


def test_a_text_of_ones_own_stands_behind_the_label_words_before_a_head_too(train, tmp_path):
    flags = ("--prompt_tuning_init_text", "great film", "--num_virtual_tokens", "5")
    train("sst2", *flags, architecture="bert", task_type="SEQ_CLS")

    record = read(tmp_path / "out" / "prompt_init.json")
    assert record["prompt_tuning_init_kwargs"] == {"labels": [" negative", " positive"], "fallback": "TEXT"}
    assert record["prompt_tuning_init_text"] == "great film"


@pytest.mark.parametrize("method", ["prompt_tuning", "lora", "linear_probe", "full"])
def test_a_frozen_base_model_has_no_dropout(train, monkeypatch, method):
    rates = {}

    def keep(trainer, *args, **kwargs):
        modules = trainer.model.modules()
        rates["trained"] = {module.p for module in modules if isinstance(module, torch.nn.Dropout)}
        return stock(trainer, *args, **kwargs)

    stock = Trainer.train
    monkeypatch.setattr(Trainer, "train", keep)
    train("sst2", "--method", method, architecture="bert", task_type="SEQ_CLS")

    assert rates["trained"] == ({0.1} if method == "full" else {0.0})


def test_an_init_of_ones_own_is_taken_as_it_is(train, tmp_path):
    kwargs = ("--prompt_tuning_init_kwargs", '{"population": 50}', "--num_virtual_tokens", "20")
    train("sst2", "--prompt_tuning_init", "sample_vocab", *kwargs)

    record = read(tmp_path / "out" / "prompt_init.json")
    assert record["prompt_tuning_init"] == "SAMPLE_VOCAB"
    assert record["prompt_tuning_init_kwargs"] == {"population": 50}


def test_a_trained_run_is_scored_again_and_predicts(train, tmp_path):
    before = train("sst2", "--learning_rate", "0.5")
    weights = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()

    after = train("sst2", "--do_eval", "true", "--do_predict", "true")

    assert after["eval_loss"] == pytest.approx(before["eval_loss"], rel=1e-5)
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == weights
    assert (tmp_path / "out" / "predict_results_sst2.txt").is_file()


def test_a_trained_run_may_be_scored_on_other_rows_than_it_was_trained_with(train, tmp_path):
    train("sst2", "--max_train_samples", "4")
    record = (tmp_path / "out" / "recipe.json").read_bytes()

    assert train("sst2", "--do_eval", "true")["eval_samples"] == 6
    assert (tmp_path / "out" / "recipe.json").read_bytes() == record
    with pytest.raises(ValueError, match="max_train_samples"):
        train("sst2", "--resume_from_checkpoint", "true")


def test_rows_that_were_trained_on_are_not_scored_as_held_out(train):
    train("sst2", folder="all")
    train("sst2", "--held_out_samples", "2", folder="some")

    assert train("sst2", "--do_eval", "true", "--held_out_samples", "2", folder="some")["eval_samples"] == 2
    with pytest.raises(ValueError, match="held_out_samples None, now 2"):
        train("sst2", "--do_eval", "true", "--held_out_samples", "2", folder="all")
    with pytest.raises(ValueError, match="sample_seed 0, now 1"):
        train("sst2", "--do_eval", "true", "--held_out_samples", "2", "--sample_seed", "1", folder="some")


@pytest.mark.parametrize("job", ["--do_eval", "--do_predict"])
def test_nothing_is_scored_or_predicted_before_a_training(train, job):
    with pytest.raises(ValueError, match=r"out holds nothing trained: add --do_train true"):
        train("sst2", job, "true")


def test_a_checkpoint_is_scored_and_the_last_one_of_a_run_without_an_end(train, tmp_path):
    end = train("sst2", "--max_steps", "4", "--save_steps", "2", "--learning_rate", "0.5")["eval_loss"]
    middle = str(tmp_path / "out" / "checkpoint-2")
    asked = train("sst2", "--do_eval", "true", "--resume_from_checkpoint", middle)["eval_loss"]
    elsewhere = train("sst2", "--do_eval", "true", "--resume_from_checkpoint", middle, folder="new")["eval_loss"]
    assert asked == pytest.approx(elsewhere, rel=1e-6)
    assert abs(asked - end) > 1e-4
    (tmp_path / "out" / "adapter_model.safetensors").unlink()
    assert train("sst2", "--do_eval", "true")["eval_loss"] == pytest.approx(end, rel=1e-5)


def test_the_adapter_loads_in_plain_peft(train, tmp_path, saved_model):
    from transformers import AutoModelForCausalLM

    train("sst2")
    base = AutoModelForCausalLM.from_pretrained(saved_model("llama"))
    model = PeftModel.from_pretrained(base, tmp_path / "out")

    size = read(tmp_path / "out" / "recipe.json")["num_virtual_tokens"]
    assert model.peft_config["default"].num_virtual_tokens == size


def test_a_linear_probe_trains_the_head_alone(train, tmp_path, saved_model):
    train("sst2", "--method", "linear_probe", architecture="bert", task_type="SEQ_CLS")

    before = load_file(Path(saved_model("bert", "SEQ_CLS")) / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert set(after) == {f"bert.{name}" for name in before} | {"classifier.weight", "classifier.bias"}
    assert all(torch.equal(tensor, after[f"bert.{name}"]) for name, tensor in before.items())


@pytest.fixture
def headless(saved_model, tmp_path):
    """Saves a model that lacks more than its head: `headless("bert")` has no pooler, `headless("t5")` is whole."""

    def save(architecture):
        folder = tmp_path / f"headless-{architecture}"
        tokenizer = AutoTokenizer.from_pretrained(saved_model(architecture, "SEQ_CLS"))
        if architecture == "bert":
            AutoModelForMaskedLM.from_pretrained(saved_model("bert", "SEQ_CLS")).save_pretrained(folder)
        else:
            AutoModel.from_pretrained(saved_model(architecture, "SEQ_CLS")).save_pretrained(folder)
            end = TemplateProcessing(single="$A </s>", pair="$A $B </s>", special_tokens=[("</s>", 1)])
            tokenizer.backend_tokenizer.post_processor = end
        tokenizer.save_pretrained(folder)
        return str(folder)

    return save


LACKING = [("bert", "prompt_tuning"), ("bert", "lora"), ("bert", "linear_probe"), ("t5", "lora")]


@pytest.mark.parametrize(("architecture", "method"), LACKING)
def test_modules_that_the_checkpoint_lacks_are_trained_and_saved(
    train, tmp_path, headless, monkeypatch, architecture, method
):
    trained = []
    stock = Trainer.train

    def keep(trainer, *args, **kwargs):
        trained.extend(name for name, p in trainer.model.named_parameters() if p.requires_grad)
        return stock(trainer, *args, **kwargs)

    monkeypatch.setattr(Trainer, "train", keep)
    flags = ("--method", method, "--model_name_or_path", headless(architecture), "--task_type", "SEQ_CLS")
    before = train("sst2", *flags)
    after = train("sst2", *flags, "--do_eval", "true", "--seed", "9")  # another seed of what is new

    assert after["eval_loss"] == pytest.approx(before["eval_loss"], rel=1e-5)
    saved = load_file(next((tmp_path / "out").glob("*.safetensors")))
    new = {"bert": ["pooler.dense", "classifier"], "t5": ["classification_head"]}[architecture]
    for names in (trained, saved):
        assert all(any(f".{module}." in f".{name}" for name in names) for module in new)


def test_a_prompt_before_an_encoder_decoder_with_a_head_is_refused(train):
    with pytest.raises(ValueError, match="choose --task_type SEQ_2_SEQ_LM or --method lora"):
        train("sst2", architecture="t5", task_type="SEQ_CLS")


def test_a_checkpoint_that_lacks_a_weight_of_the_base_model_itself_is_refused(train, monkeypatch):
    from peft_prompt_ext import quantization

    monkeypatch.setattr(quantization, "_new_modules", lambda model, missing: ["bert.encoder"])
    with pytest.raises(ValueError, match=r"lacks weights of bert\.encoder itself.*--method full"):
        train("sst2", architecture="bert", task_type="SEQ_CLS")


def test_the_model_card_has_scores_init_seed_and_versions(train, tmp_path):
    results = train("mrpc", "--seed", "7")

    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    head = yaml.safe_load(card.split("---")[1])
    scores = {m["type"]: m["value"] for m in head["model-index"][0]["results"][0]["metrics"]}
    assert scores["f1"] == results["eval_f1"]
    assert set(scores) == {"accuracy", "f1", "combined_score"}
    assert f"| accuracy | {results['eval_accuracy']:.4f} |" in card
    for expected in ("| seed | 7 |", "| init | CLASS_LABELS |", "| peft | ", "| steps | 2 |"):
        assert expected in card
    assert "base_model" not in head and str(tmp_path.parent) not in card.partition("## Use")[0]


def test_the_card_names_the_base_model_as_the_hub_does(train, tmp_path, monkeypatch, saved_model):
    monkeypatch.setattr("peft_prompt_ext.assets.asset_path", lambda name: saved_model("llama"))
    train("sst2", "--model_name_or_path", "smollm2-135m")

    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert yaml.safe_load(card.split("---")[1])["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_a_later_evaluation_writes_its_scores_into_the_card_of_the_training(train, tmp_path):
    card = tmp_path / "out" / "README.md"
    train("sst2", "--do_train", "true", "--seed", "7", "--save_steps", "1")
    before = card.read_text(encoding="utf-8")
    assert "accuracy" not in before

    train("sst2", "--do_eval", "true", "--resume_from_checkpoint", str(tmp_path / "out" / "checkpoint-1"))
    train("sst2", "--do_predict", "true")
    assert card.read_text(encoding="utf-8") == before
    results = train("sst2", "--do_eval", "true")
    after = card.read_text(encoding="utf-8")

    training, scores = ("## Training", "## Versions"), ("## Scores", "## Training")
    assert before.partition(training[0])[2] == after.partition(training[0])[2]
    assert "| seed | 7 |" in after and "| training rows | 8 |" in after and "| steps | 2 |" in after
    assert f"| accuracy | {results['eval_accuracy']:.4f} |" in after.partition(scores[0])[2]
    assert re.search(r": [1-9][\d,]* trained parameters", after)
    assert "On 6 rows of the split validation." in after
    whole = train("sst2", "--seed", "7", folder="whole")
    assert (tmp_path / "whole" / "README.md").read_text(encoding="utf-8") == after.replace("/out ", "/whole ")
    assert whole["eval_accuracy"] == results["eval_accuracy"]


def test_rows_that_were_cut_are_counted(train, caplog):
    with caplog.at_level("INFO"):
        train("boolq", "--max_seq_length", "120")

    assert re.search(r"\d of 8 rows of train were cut to 120 tokens \(in passage\)", caplog.text)


def test_hidden_labels_are_predicted_and_not_scored(train, tmp_path):
    train("sst2", "--do_train", "true", "--do_predict", "true")

    lines = (tmp_path / "out" / "predict_results_sst2.txt").read_text().split("\n")
    assert lines[0] == "index\tprediction"
    assert [line.split("\t")[0] for line in lines[1:4]] == ["0", "1", "2"]
    assert {line.split("\t")[1] for line in lines[1:4]} <= {"negative", "positive"}


def test_both_test_splits_of_mnli_are_predicted(train, tmp_path):
    folder = tmp_path / "mnli"
    folder.mkdir()
    for split in ("train", "validation_matched", "validation_mismatched"):
        text = (DATA / "glue" / "mnli" / f"{split}.jsonl").read_text(encoding="utf-8")
        (folder / f"{split.replace('validation', 'test')}.jsonl").write_text(text, encoding="utf-8")
    train("mnli", "--data_dir", str(folder), "--do_train", "true", "--do_predict", "true")
    for name in ("mnli", "mnli_mm"):
        lines = (tmp_path / "out" / f"predict_results_{name}.txt").read_text().splitlines()
        assert len(lines) == 7


def test_a_file_of_ones_own_takes_the_place_of_one_split(train, tmp_path):
    rows = (DATA / "glue" / "sst2" / "validation.jsonl").read_text(encoding="utf-8").splitlines()
    (tmp_path / "new.jsonl").write_text("\n".join(rows[:2]) + "\n", encoding="utf-8")
    assert train("sst2", "--validation_file", str(tmp_path / "new.jsonl"))["eval_samples"] == 2


def own(*names):
    return [str(DATA / "own" / name) for name in names]


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
@pytest.mark.parametrize(("architecture", "task_type"), KINDS)
def test_a_users_own_file_trains_without_code(train, suffix, architecture, task_type):
    train_file, validation_file = own(f"train.{suffix}", f"validation.{suffix}")

    results = train(
        None,
        *("--train_file", train_file, "--validation_file", validation_file),
        *("--text_columns", "message", "--label_column", "team"),
        architecture=architecture,
        task_type=task_type,
    )

    assert results["eval_samples"] == 6
    assert {"eval_accuracy", "eval_f1"} <= set(results)


def test_samples_and_shots_are_as_many_as_asked(train, tmp_path):
    results = train("sst2", "--max_train_samples", "3", "--max_eval_samples", "4")
    assert results["eval_samples"] == 4
    train("rte", "--num_shots", "2", folder="shots")
    assert "| training rows | 4 |" in (tmp_path / "shots" / "README.md").read_text()


def test_scores_of_other_samples_of_train_are_of_the_same_rows(recipe, movie_reviews, tmp_path):
    def rows(sample_seed):
        line = [
            "--task_name",
            "movie_reviews",
            "--do_train",
            "true",
            "--do_eval",
            "true",
            "--output_dir",
            str(tmp_path),
        ]
        line += ["--max_train_samples", "20", "--max_eval_samples", "20", "--sample_seed", str(sample_seed)]
        _, data_args, _, args = recipe.parse(line)
        splits = recipe.load_splits(recipe.find_task(data_args), data_args, args)
        return {name: split["text"] for name, split in splits.items()}

    first, second = rows(0), rows(1)
    assert first["validation"] == second["validation"] and first["train"] != second["train"]


def test_rows_held_out_of_train_are_scored_and_not_trained_on(train, tmp_path, recipe, monkeypatch):
    seen = {}
    check = recipe.load_splits
    monkeypatch.setattr(recipe, "load_splits", lambda *args: seen.setdefault("splits", check(*args)))

    results = train("mnli", "--held_out_samples", "3")

    texts = {name: set(rows["premise"]) for name, rows in seen["splits"].items()}
    assert results["eval_samples"] == 3
    assert {name: len(rows) for name, rows in seen["splits"].items()} == {"train": 5, "validation_matched": 3}
    assert not texts["train"] & texts["validation_matched"]
    with pytest.raises(ValueError, match="--held_out_samples 8: train has 8 rows"):
        train("mnli", "--held_out_samples", "8", folder="all")


def test_an_output_folder_of_another_run_is_refused_and_kept(train, tmp_path):
    train("sst2")
    before = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()

    with pytest.raises(ValueError, match=r"out holds a run already: add --resume_from_checkpoint"):
        train("sst2")
    with pytest.raises(ValueError, match=r"holds another run \(task sst2 .*, now cola .*Choose another --output_dir"):
        train("cola")
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == before


def test_the_scores_of_two_tasks_are_not_mixed(train):
    train("mrpc", "--method", "zero_shot")

    with pytest.raises(ValueError, match=r"holds another run \(task mrpc"):
        train("sst2", "--method", "zero_shot")


def test_a_checkpoint_of_elsewhere_does_not_write_over_a_run(train, tmp_path):
    train("sst2", "--save_steps", "1", folder="a")
    train("sst2", "--save_strategy", "no", folder="b")
    checkpoint = ("--resume_from_checkpoint", str(tmp_path / "a" / "checkpoint-1"))

    with pytest.raises(ValueError, match="b holds a run already"):
        train("sst2", *checkpoint, folder="b")
    with pytest.raises(ValueError, match="b holds a finished run without a checkpoint"):
        train("sst2", "--resume_from_checkpoint", "true", folder="b")
    train("sst2", *checkpoint, folder="c")


def test_a_checkpoint_of_another_method_is_refused(train):
    train("sst2", "--method", "lora", "--save_steps", "1")

    with pytest.raises(ValueError, match=r"another run \(method 'lora', now 'prompt_tuning', "):
        train("sst2", "--resume_from_checkpoint", "true")


@pytest.mark.parametrize(("first", "second"), [("lora", "prompt_tuning"), ("prompt_tuning", "full"), ("full", "lora")])
def test_a_checkpoint_of_another_method_is_refused_without_its_settings(train, tmp_path, first, second):
    train("sst2", "--method", first, "--save_steps", "1", folder="first")
    copy = (tmp_path / "first" / "checkpoint-1").rename(tmp_path / "checkpoint-1")

    with pytest.raises(ValueError, match=rf"checkpoint-1 holds .*; --method {second} goes on from "):
        train("sst2", "--method", second, "--resume_from_checkpoint", str(copy), folder="second")


@pytest.mark.parametrize("state", [None, "", '{"epoch": 1'])
def test_a_torn_checkpoint_is_left_out(train, tmp_path, state):
    train("sst2", "--max_steps", "4", "--save_steps", "2", folder="whole")
    train("sst2", "--max_steps", "4", "--save_steps", "2", folder="torn")
    torn = tmp_path / "torn" / "checkpoint-4"
    for path in torn.iterdir():
        path.unlink()
    if state is not None:
        (torn / "trainer_state.json").write_text(state)

    train("sst2", "--max_steps", "4", "--save_steps", "2", "--resume_from_checkpoint", "true", folder="torn")

    weights = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "torn")]
    assert torch.equal(weights[0]["prompt_embeddings"], weights[1]["prompt_embeddings"])


def test_a_checkpoint_that_is_none_is_refused(train, tmp_path):
    with pytest.raises(ValueError, match="is no checkpoint of the Trainer"):
        train("sst2", "--resume_from_checkpoint", str(tmp_path))


def test_a_resumed_run_has_the_losses_of_an_undisturbed_one(train, tmp_path):
    train("sst2", "--max_steps", "6", "--save_steps", "2", "--save_total_limit", "9", folder="whole")
    train("sst2", "--max_steps", "6", "--save_steps", "2", "--save_total_limit", "9", folder="parts")
    for name in ("checkpoint-4", "checkpoint-6"):
        for path in sorted((tmp_path / "parts" / name).rglob("*"), reverse=True):
            path.unlink()
        (tmp_path / "parts" / name).rmdir()

    flags = ("--max_steps", "6", "--save_steps", "2", "--save_total_limit", "9", "--resume_from_checkpoint", "true")
    train("sst2", *flags, folder="parts")

    whole, parts = (read(tmp_path / name / "trainer_state.json")["log_history"] for name in ("whole", "parts"))
    assert [row["loss"] for row in whole if "loss" in row] == [row["loss"] for row in parts if "loss" in row]


CHANGES = [("--seed", "9"), ("--learning_rate", "5"), ("--gradient_accumulation_steps", "2"), ("--weight_decay", "1")]


@pytest.mark.parametrize(("flag", "value"), CHANGES)
def test_a_run_does_not_go_on_with_other_arguments(train, flag, value):
    train("sst2", "--save_steps", "1")

    name = {"--gradient_accumulation_steps": "total_train_batch_size"}.get(flag, flag[2:])
    with pytest.raises(ValueError, match=rf"out holds another run \({name} [\d.]+, now [\d.]+\)"):
        train("sst2", "--resume_from_checkpoint", "true", flag, value)


def test_a_run_goes_on_with_moved_rows_but_not_with_others(train, tmp_path):
    data = with_a_test_split(tmp_path)
    train("sst2", "--data_dir", str(data), "--save_steps", "1")
    moved = data.rename(tmp_path / "moved")
    resume = ("--data_dir", str(moved), "--resume_from_checkpoint", "true")

    train("sst2", *resume)
    rows = (moved / "train.jsonl").read_text(encoding="utf-8").splitlines()
    (moved / "train.jsonl").write_text("\n".join(rows[:-1]) + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"another run \(train_rows '8 rows, .*', now '7 rows, "):
        train("sst2", *resume)


def test_a_run_may_become_longer_and_says_what_that_means(train, tmp_path, caplog):
    train("sst2", "--save_steps", "1")
    train("sst2", "--max_steps", "4", "--resume_from_checkpoint", "true")

    assert "was begun with max_steps 2, now 4: from here on the schedule is that of the new length" in caplog.text
    assert read(tmp_path / "out" / "trainer_state.json")["global_step"] == 4
    assert read(tmp_path / "out" / "recipe.json")["max_steps"] == 4


BAD = [
    (["--task_name", "sst3"], "no task 'sst3'"),
    (["--quantization", "nf4", "--method", "full"], "quantised ones have no gradient"),
    (["--validation_file", "x.csv", "--train_file", "y.csv"], "There is no file y.csv"),
    (["--template", "{sentence}?"], "--template: for your own data alone; sst2 brings its own"),
    (["--model_name_or_path", "nobody/no-such-model"], "no-such-model has no model that transformers can read"),
    (["--label_smoothing_factor", "0.1"], r"--label_smoothing_factor 0\.1: .* Leave it out"),
    (["--prompt_tuning_init_kwargs", "[1]"], r"--prompt_tuning_init_kwargs must be a JSON object .*, got \[1\]"),
    (["--prompt_tuning_init_kwargs", "{a"], r"--prompt_tuning_init_kwargs must be a JSON object .*, got {a"),
    (["--num_virtual_tokens", "997"], r"--num_virtual_tokens 997 leaves no room for text: .* has 997 positions"),
    (["--prompt_tuning_init_text", "x", "--num_virtual_tokens", "2"], "--prompt_tuning_init_text has no place in a"),
    (["--prompt_position", "suffix", "--method", "lora"], "--prompt_position suffix: lora has no prompt"),
    (["--text_cache", "disk"], "are for --prompt_position suffix alone"),
    (["--prompt_position", "suffix", "--text_cache_bytes", "8 parsecs"], "--text_cache_bytes: A size such as '8GB'"),
    (
        ["--prompt_position", "suffix", "--num_virtual_tokens", "1"],
        r"the question says '\\nSentiment:', which has \d+ tokens. Give \d+ or more",
    ),
    *((["--" + name, "0"], f"--{name} must be 1 or more, got 0") for name in ("num_shots", "max_predict_samples")),
    *((["--" + name, "-1"], f"--{name} must be 1 or more, got -1") for name in ("num_shots", "held_out_samples")),
]


@pytest.mark.parametrize(("flags", "message"), BAD, ids=[" ".join(flags) for flags, _ in BAD])
def test_bad_flags_are_one_clear_error_before_weights_load(train, monkeypatch, flags, message):
    monkeypatch.setattr("peft_prompt_ext.training.models.load_frozen_backbone", None)
    with pytest.raises(ValueError, match=message):
        train("sst2", *flags)


def test_own_data_without_rows_to_score_says_which_flag_helps(train):
    flags = ("--train_file", *own("train.csv"), "--text_columns", "message", "--label_column", "team")
    with pytest.raises(
        ValueError, match=r"'validation': add --validation_file, --held_out_samples or --do_train true"
    ):
        train(None, *flags)
    with pytest.raises(ValueError, match=r"no file for the split 'test': add --test_file\."):
        train(None, *flags, "--do_predict", "true", "--do_train", "true")


def test_several_gpus_without_a_launcher_are_one(recipe, saved_model, monkeypatch, caplog, tmp_path):
    *parts, args = recipe.parse(command(tmp_path / "out", saved_model("llama"), "--method", "zero_shot")[2:])
    assert args.n_gpu == 0
    monkeypatch.setattr(args, "_n_gpu", 3)

    job = recipe.prepare(*parts, args)

    assert job.trainer.args.n_gpu == 1
    assert "accelerate launch --num_processes 3 -m peft_prompt_ext.cli train" in caplog.text


CHOICES = [("method", "prefix"), ("quantization", "nf3"), ("task_type", "TOKEN_CLS"), ("dtype", "int4")]


@pytest.mark.parametrize(("flag", "value"), CHOICES)
def test_an_unknown_choice_is_refused_by_the_parser(recipe, capsys, flag, value):
    with pytest.raises(SystemExit):
        recipe.parse([f"--{flag}", value])
    said = capsys.readouterr().err
    assert f"argument --{flag}" in said
    assert f"invalid choice: '{value}' (choose from" in said


def test_without_data_the_error_lists_the_tasks(recipe, monkeypatch):
    monkeypatch.delenv("PEFT_PROMPT_EXT_DEBUG", raising=False)
    with pytest.raises(SystemExit, match=r"^error: Give --task_name \(boolq, .*--train_file"):
        cli.main(["train", "--method", "lora"])


@pytest.mark.parametrize("path", sorted((ROOT / "recipes" / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_a_config_opens_with_its_command_and_is_read(recipe, path):
    lines = path.read_text().splitlines()
    command = next(line for line in lines if "recipes/train.py" in line)
    assert lines.index(command) < 5
    assert f"--config recipes/configs/{path.name}" in command

    model_args, data_args, method_args, args = recipe.parse(["--config", str(path)])

    entries = yaml.safe_load(path.read_text())
    values = {**vars(args), **vars(model_args), **vars(data_args), **vars(method_args)}
    assert entries
    for name, value in entries.items():
        assert values[name] == value


def test_there_are_configs():
    assert list((ROOT / "recipes" / "configs").glob("*.yaml"))


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("task_name: rte\nseed: 5\nlabel_words: [a=b, c=d]\nbf16: false\nlearning_rate: 0.3\n")
    return path


def test_the_command_line_wins_over_the_config_and_that_over_the_defaults(recipe, config):
    _, data_args, _, args = recipe.parse(["--seed", "9", "--config", str(config)])

    assert (data_args.task_name, args.seed, args.learning_rate) == ("rte", 9, 0.3)
    assert data_args.label_words == ["a=b", "c=d"]
    assert args.per_device_train_batch_size == DEFAULTS["per_device_train_batch_size"]


@pytest.mark.parametrize("place", ["command line", "config"])
def test_a_label_may_be_a_negative_number(recipe, tmp_path, place):
    config, rows = tmp_path / "run.yaml", tmp_path / "rows.csv"
    config.write_text("label_words: [-1=bad, 1=good]\n")
    rows.write_text("text,label\na,-1\nb,1\n")
    words = ["--label_words", "-1=bad", "1=good"] if place == "command line" else ["--config", str(config)]

    _, data_args, _, args = recipe.parse(["--train_file", str(rows), *words, "--max_steps", "-1"])
    task = own_task(str(rows), ["text"], "label", data_args.label_words)

    assert args.max_steps == -1
    assert [task.target({"label": label}) for label in (-1, 1)] == [0, 1]
    assert task.label_words == (" bad", " good")


DO = [
    ([], (True, True, False)),
    (["--eval_strategy", "steps"], (True, True, False)),
    (["--do-predict"], (False, False, True)),
    (["--do_train", "--do_eval"], (True, True, False)),
    (["--do_eval", "false"], (True, False, False)),
    (["--do_train=False"], (False, True, False)),
    (["--do_predict", "no"], (True, True, False)),
    (["--do_train", "--do_eval", "false"], (True, False, False)),
]


@pytest.mark.parametrize(("flags", "expected"), DO)
def test_a_run_trains_and_scores_unless_it_is_told_what_to_do(recipe, flags, expected):
    *_, args = recipe.parse(["--task-name", "rte", *flags])

    assert (args.do_train, args.do_eval, args.do_predict) == expected
    assert args.output_dir == "outputs/rte-prompt_tuning"


@pytest.mark.parametrize("method", ["prompt_tuning", "lora", "full", "linear_probe"])
def test_the_learning_rate_is_the_methods(recipe, method):
    *_, args = recipe.parse(["--task_name", "rte", "--method", method])

    assert args.learning_rate == METHODS[method].training_defaults["learning_rate"]
    assert args.output_dir == f"outputs/rte-{method}"


RATES = [(*KINDS[0], [], 0.01), ("llama", "SEQ_CLS", [], 0.01), (*KINDS[1], [], 0.1), (*KINDS[2], [], 0.01)]
RATES += [(*KINDS[1], ["--learning_rate", "0.01"], 0.01), (*KINDS[1], ["--method", "lora"], 0.003)]


@pytest.mark.parametrize(("architecture", "task_type", "flags", "rate"), RATES)
def test_a_prompts_learning_rate_is_that_of_the_kind_of_model(train, tmp_path, architecture, task_type, flags, rate):
    train("rte", *flags, architecture=architecture, task_type=task_type)

    assert f"| learning rate | {rate} |" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


def test_an_unknown_key_is_an_error(recipe, config, capsys):
    config.write_text("task_nam: rte\nnum_virtual_token: 5\n")

    with pytest.raises((SystemExit, ValueError)) as error:
        recipe.parse(["--config", str(config)])
    assert "num_virtual_token" in str(error.value) + capsys.readouterr().err


def test_a_config_that_is_not_there_or_no_mapping_is_an_error(recipe, tmp_path):
    with pytest.raises(ValueError, match="no file"):
        recipe.parse(["--config", "nowhere.yaml"])
    (tmp_path / "a.yaml").write_text("template: {text} is\n")
    with pytest.raises(ValueError, match=r"a\.yaml is not YAML"):
        recipe.parse(["--config", str(tmp_path / "a.yaml")])
    (tmp_path / "a.yaml").write_text("- 1\n")
    with pytest.raises(ValueError, match="must hold `name: value` lines, got list"):
        recipe.parse(["--config", str(tmp_path / "a.yaml")])


def command(folder, model, *flags):
    values = [sys.executable, str(SCRIPT), "--task_name", "sst2", "--data_dir", str(DATA / "glue" / "sst2")]
    values += ["--model_name_or_path", model, "--output_dir", str(folder), "--use_cpu", "true"]
    return [*values, "--logging_steps", "1", "--max_seq_length", "400", *flags]


def test_help_answers_at_once_without_torch():
    start = resource.getrusage(resource.RUSAGE_CHILDREN)
    program = (
        f"import sys, runpy; sys.argv = ['train.py', '--help']; runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    )
    program = f"{program}; assert 'torch' not in sys.modules"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, env=environment
    )
    end = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = end.ru_utime - start.ru_utime + end.ru_stime - start.ru_stime

    assert done.returncode == 0, done.stderr
    for flag in ("--task_name", "--method", "--train_file", "--config", "--num_shots", "--quantization"):
        assert flag in done.stdout
    assert seconds < 0.6  # of the processor; the promise is 0.3 s on a machine with nothing else to do


def test_a_run_that_was_killed_goes_on_to_the_same_losses(tmp_path, saved_model):
    flags = (
        "--max_steps",
        "30",
        "--save_steps",
        "1",
        "--per_device_train_batch_size",
        "2",
        "--num_virtual_tokens",
        "7",
    )
    whole = command(tmp_path / "whole", saved_model("llama"), *flags)
    subprocess.run(whole, check=True, capture_output=True, timeout=300)
    killed = command(tmp_path / "killed", saved_model("llama"), *flags)

    run = subprocess.Popen(killed, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while not list((tmp_path / "killed").glob("checkpoint-[3-9]")) and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    assert not (tmp_path / "killed" / "all_results.json").exists()
    subprocess.run([*killed, "--resume_from_checkpoint", "true"], check=True, capture_output=True, timeout=300)

    histories = [read(tmp_path / name / "trainer_state.json")["log_history"] for name in ("whole", "killed")]
    losses = [[row["loss"] for row in history if "loss" in row] for history in histories]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 30
    scores = [read(tmp_path / name / "eval_results.json")["eval_accuracy"] for name in ("whole", "killed")]
    assert scores[0] == scores[1]


@pytest.mark.parametrize(("architecture", "task_type"), [*KINDS, ("llama", "SEQ_CLS")])
def test_accumulated_batches_have_the_loss_and_gradient_of_one(train, tmp_path, architecture, task_type):
    flags = ("--max_steps", "3", "--per_device_train_batch_size")  # of eight rows: the last step has two
    for folder, sizes in (("whole", ("3",)), ("parts", ("1", "--gradient_accumulation_steps", "3"))):
        train("mnli", *flags, *sizes, architecture=architecture, task_type=task_type, folder=folder)

    whole, parts = (read(tmp_path / name / "trainer_state.json")["log_history"] for name in ("whole", "parts"))
    for key in ("loss", "grad_norm"):
        before, now = ([row[key] for row in history if key in row] for history in (whole, parts))
        assert len(now) == 3
        assert now == pytest.approx(before, rel=1e-4)


def test_the_square_of_a_number_is_accumulated_as_a_mean(train, tmp_path):
    flags = ("--max_steps", "3", "--per_device_train_batch_size")
    bert = {"architecture": "bert", "task_type": "SEQ_CLS"}
    train("stsb", *flags, "3", **bert, folder="whole")
    train("stsb", *flags, "1", "--gradient_accumulation_steps", "3", **bert, folder="parts")

    whole, parts = (read(tmp_path / name / "trainer_state.json")["log_history"] for name in ("whole", "parts"))
    losses = [[row["loss"] for row in history if "loss" in row] for history in (whole, parts)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.parametrize(("architecture", "task_type"), KINDS)
def test_two_processes_have_the_losses_of_one_with_the_same_global_batch(
    recipe, tmp_path, saved_model, architecture, task_type
):
    model = saved_model(architecture, task_type)
    flags = ("--task_type", task_type, "--max_steps", "6", "--num_virtual_tokens", "7")
    one = command(tmp_path / "one", model, *flags, "--per_device_train_batch_size", "4")
    two = command(tmp_path / "two", model, *flags, "--per_device_train_batch_size", "2")
    config = str(ROOT / "recipes" / "configs" / "accelerate" / "ddp.yaml")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config, "--main_process_port", "0"]

    cli.train(one[2:])
    subprocess.run([*launch, *two[1:]], check=True, capture_output=True, timeout=300)

    histories = [read(tmp_path / name / "trainer_state.json")["log_history"] for name in ("one", "two")]
    losses = [[row["loss"] for row in history if "loss" in row] for history in histories]
    epochs = [[row["epoch"] for row in history if "loss" in row] for history in histories]
    assert len(losses[0]) == 6
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert epochs[0] == epochs[1]  # else the second was one process with half of the batch
    scores = [read(tmp_path / name / "eval_results.json") for name in ("one", "two")]
    assert scores[0]["eval_accuracy"] == scores[1]["eval_accuracy"]
    assert scores[0]["eval_loss"] == pytest.approx(scores[1]["eval_loss"], rel=1e-4)


def with_a_test_split(tmp_path):
    """Rows of sst2 whose test split is the validation: it has labels, so that predictions can be counted."""
    folder = tmp_path / "data"
    folder.mkdir(exist_ok=True)
    for split, source in (("train", "train"), ("validation", "validation"), ("test", "validation")):
        text = (DATA / "glue" / "sst2" / f"{source}.jsonl").read_text(encoding="utf-8")
        (folder / f"{split}.jsonl").write_text(text, encoding="utf-8")
    return folder


def test_metrics_equal_a_count_over_the_predictions(train, tmp_path):
    folder = with_a_test_split(tmp_path)
    flags = ("--data_dir", str(folder), "--do_train", "true", "--do_eval", "true", "--do_predict", "true")
    results = train("sst2", *flags)

    rows = load_dataset("json", data_files=str(folder / "validation.jsonl"), split="train")
    lines = (tmp_path / "out" / "predict_results_sst2.txt").read_text().splitlines()[1:]
    names = [("negative", "positive")[label] for label in rows["label"]]
    right = [line.split("\t")[1] == name for line, name in zip(lines, names, strict=True)]
    assert results["eval_accuracy"] == pytest.approx(sum(right) / len(right))


def test_rows_keep_their_places_when_training_groups_them_by_length(recipe, saved_model, tmp_path):
    line = ["--task_name", "sst2", "--data_dir", str(DATA / "glue" / "sst2"), "--method", "zero_shot", "--use_cpu"]
    line += ["--model_name_or_path", saved_model("llama", "CAUSAL_LM"), "--output_dir", str(tmp_path / "out")]
    job = recipe.prepare(*recipe.parse([*line, "--train_sampling_strategy", "group_by_length"]))
    rows = job.encoded["validation"].select([3, 0, 2, 1])
    assert len(set(rows["length"])) > 1 and len(set(rows["target"])) > 1
    job.trainer.compute_metrics = None
    assert job.trainer.predict(rows).label_ids.tolist() == rows["target"]
    assert job.trainer.evaluation_loop(job.trainer.get_eval_dataloader(rows), "").label_ids.tolist() == rows["target"]


def test_a_method_that_is_added_to_the_table_trains_and_answers(train, tmp_path, monkeypatch):
    from dataclasses import replace

    from peft_prompt_ext.training.predictor import Predictor

    monkeypatch.setitem(METHODS, "lora_fast", replace(METHODS["lora"], name="lora_fast", learning_rate=0.5))

    results = train("sst2", "--method", "lora_fast")

    assert read(tmp_path / "out" / "recipe.json")["learning_rate"] == 0.5
    assert "train_loss" in results and (tmp_path / "out" / "adapter_model.safetensors").is_file()
    predictor = Predictor.from_pretrained(str(tmp_path / "out"))
    assert next(predictor.predict([{"sentence": "a film"}]))["label"] in {"negative", "positive"}
    monkeypatch.delitem(METHODS, "lora_fast")
    with pytest.raises(ValueError, match=r"There is no method 'lora_fast' \(did you mean 'lora'\?\)"):
        Predictor.from_pretrained(str(tmp_path / "out"))
