"""The real SmolLM2-135M on real reviews, from the package registry. Leave out with -m 'not real'."""

import bz2
import csv
import hashlib
import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

from peft_prompt_ext import PromptTuningExtConfig, engine_status, load_frozen_backbone
from tests.helpers import prompt_of
from tests.peft_models.suffix import assert_equals_rows_alone


pytestmark = pytest.mark.real

ROOT = Path(__file__).parent.parent
ANSWERS = {"fresh": " positive", "rotten": " negative"}


@pytest.fixture(scope="module")
def rows(smollm2, movie_reviews):
    """16 short reviews, 8 of each class, with labels only on the answer."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    chosen = {"fresh": [], "rotten": []}
    with bz2.open(movie_reviews, "rt", encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row["category"] in chosen and len(chosen[row["category"]]) < 8 and len(row["text"]) < 90:
                question = tokenizer(f"Review: {row['text']}\nSentiment:")["input_ids"]
                answer = tokenizer(ANSWERS[row["category"]])["input_ids"]
                labels = [-100] * len(question) + answer
                chosen[row["category"]].append({"input_ids": question + answer, "labels": labels})
    return chosen["fresh"] + chosen["rotten"]


def weights_hash(model):
    digest = hashlib.sha256()
    for parameter in model.parameters():
        digest.update(parameter.detach().numpy().tobytes())
    return digest.hexdigest()


def test_a_class_label_prompt_learns_and_leaves_the_backbone_alone(rows, smollm2, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    config = PromptTuningExtConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=5,
        prompt_tuning_init="CLASS_LABELS",
        prompt_tuning_init_kwargs={"labels": list(ANSWERS.values())},
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(smollm2), config)
    before = weights_hash(model.get_base_model())
    args = TrainingArguments(
        str(tmp_path / "run"),
        max_steps=10,
        per_device_train_batch_size=8,
        learning_rate=0.02,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(model, args, train_dataset=rows, data_collator=DataCollatorForSeq2Seq(tokenizer))

    trainer.train()
    trainer.save_model(tmp_path / "adapter")

    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert sum(losses[-2:]) < 0.7 * sum(losses[:2])
    assert weights_hash(model.get_base_model()) == before
    inputs = {"input_ids": torch.tensor([rows[0]["input_ids"]])}
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(smollm2), tmp_path / "adapter")
    with torch.inference_mode():
        assert torch.equal(model.eval()(**inputs).logits, again(**inputs).logits)


def test_the_quickstart_writes_its_table_picture_and_adapters(smollm2, movie_reviews, tmp_path, monkeypatch, capsys):
    command = ["quickstart.py", "A joy.", "--output_dir", str(tmp_path), "--max_steps", "2"]
    command += ["--max_eval_samples", "8", "--num_virtual_tokens", "20", "--per_device_train_batch_size", "2"]
    monkeypatch.setattr(sys, "argv", command)

    runpy.run_path(str(ROOT / "recipes" / "quickstart.py"), run_name="__main__")

    table = json.loads((tmp_path / "quickstart_results.json").read_text())
    bare, *trained = table
    assert [row["init"] for row in trained] == ["stock PEFT default (RANDOM)", "CLASS_LABELS"]
    assert bare["init"] == "no prompt (zero-shot)" and bare["accuracy_before"] == bare["accuracy_after"]
    assert bare["trainable_parameters"] == bare["adapter_bytes"] == bare["train_time_s"] == 0
    for row in trained:
        assert row["trainable_parameters"] == 20 * 576
        assert 0 <= row["accuracy_before"] <= 1 and 0 <= row["accuracy_after"] <= 1
        assert row["adapter_bytes"] == (Path(row["adapter"]) / "adapter_model.safetensors").stat().st_size
        assert row["train_time_s"] > 0 and row["seed"] == 0
    assert (tmp_path / "learning_curves.png").read_bytes().startswith(b"\x89PNG")
    assert "A joy." in capsys.readouterr().out


def test_the_engine_gives_the_loss_the_gradient_and_the_logits_of_stock_peft(rows, smollm2):
    """Compares rows of several lengths in one batch with each row alone."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    chosen = [rows[0], rows[5], rows[11]]
    batch = DataCollatorForSeq2Seq(tokenizer)(chosen)
    results = {}
    for name, config_class in (("ours", PromptTuningExtConfig), ("stock", PromptTuningConfig)):
        torch.manual_seed(0)
        model = get_peft_model(
            AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32),
            config_class(task_type="CAUSAL_LM", num_virtual_tokens=20, prompt_tuning_init="RANDOM"),
        ).eval()
        prompt = model.prompt_encoder["default"].embedding.weight
        with torch.no_grad():
            prompt.copy_(model.word_embeddings.weight[1000:1020])
        if name == "ours":
            assert engine_status(model).packed
            out = model(**batch)
            loss, logits = out.loss, [row[row.abs().sum(1) > 0] for row in out.logits.detach()]
        else:
            outs = [model(**{key: torch.tensor([row[key]]) for key in ("input_ids", "labels")}) for row in chosen]
            loss, logits = torch.stack([out.loss for out in outs]).mean(), [out.logits[0].detach() for out in outs]
        loss.backward()
        results[name] = loss.item(), prompt.grad, logits

    (loss, grad, logits), (stock_loss, stock_grad, stock_logits) = results["ours"], results["stock"]
    assert abs(loss - stock_loss) <= 1e-5 * stock_loss
    assert (grad - stock_grad).norm() <= 1e-5 * stock_grad.norm()
    for ours, stock in zip(logits, stock_logits, strict=True):
        torch.testing.assert_close(ours, stock, rtol=0, atol=1e-4)


def test_a_suffix_gives_what_each_row_gives_alone(rows, smollm2):
    base_model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    flags = {"prompt_position": "suffix", "train_logits": "supervised"}
    model = get_peft_model(base_model, PromptTuningExtConfig(task_type="CAUSAL_LM", num_virtual_tokens=12, **flags))
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    for side in ("left", "right"):
        tokenizer.padding_side = side
        batch = dict(DataCollatorForSeq2Seq(tokenizer)(rows[5:11]))
        wanted = assert_equals_rows_alone(model.eval(), batch).loss
        gradient = prompt_of(model).grad
        model.train()
        for hits in (0, 6):
            prompt_of(model).grad = None
            loss = model(**batch).loss
            loss.backward()
            torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=0)
            assert (prompt_of(model).grad - gradient).norm() <= 1e-5 * gradient.norm()
            assert engine_status(model).packed and engine_status(model).texts.hits >= hits


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_a_base_model_in_fewer_bits_is_proved_in_spite_of_its_rounding(rows, smollm2, quantization):
    base = load_frozen_backbone(smollm2, quantization=quantization)
    thresholds = [module.state.threshold for module in base.modules() if hasattr(module, "state")]
    model = get_peft_model(base, PromptTuningExtConfig(task_type="CAUSAL_LM", num_virtual_tokens=5))

    loss = model(**DataCollatorForSeq2Seq(AutoTokenizer.from_pretrained(smollm2))(rows[:4])).loss
    loss.backward()

    assert engine_status(model).packed and engine_status(model).max_tokens is None
    assert model.prompt_encoder["default"].embedding.weight.grad.norm() > 0
    assert [module.state.threshold for module in base.modules() if hasattr(module, "state")] == thresholds
    assert len(thresholds) > 100 if quantization == "int8" else not thresholds
