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
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

from peft_prompt_ext import PromptTuningExtConfig


pytestmark = pytest.mark.real

ROOT = Path(__file__).parent.parent
ANSWERS = {"fresh": " positive", "rotten": " negative"}


@pytest.fixture(scope="module")
def rows(smollm2, movie_reviews):
    """16 short reviews, 8 of each class, tokenized with the label on the answer alone."""
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
    assert [row["init"] for row in table] == ["stock PEFT default (RANDOM)", "CLASS_LABELS"]
    for row in table:
        assert row["trainable_parameters"] == 20 * 576
        assert 0 <= row["accuracy_before"] <= 1 and 0 <= row["accuracy_after"] <= 1
        assert row["adapter_bytes"] == (Path(row["adapter"]) / "adapter_model.safetensors").stat().st_size
        assert row["train_time_s"] > 0 and row["seed"] == 0
    assert (tmp_path / "learning_curves.png").read_bytes().startswith(b"\x89PNG")
    assert "A joy." in capsys.readouterr().out
