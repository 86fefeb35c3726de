"""The real SmolLM2 with a prompt that the command trained: exported, it answers reviews as the predictor does."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_prompt_ext import cli
from peft_prompt_ext.tasks import get_task
from peft_prompt_ext.tasks.data import load_split
from peft_prompt_ext.training.predictor import Predictor


pytestmark = pytest.mark.real


def test_a_prompt_of_the_train_command_answers_reviews_the_same(smollm2, movie_reviews, tmp_path, capsys):
    train = ["--task_name", "movie_reviews", "--model_name_or_path", "smollm2-135m", "--max_steps", "2"]
    train += ["--per_device_train_batch_size", "2", "--max_train_samples", "16", "--do_eval", "false"]
    train += ["--output_dir", str(tmp_path / "movies"), "--use_cpu", "true", "--disable_tqdm", "true"]
    cli.main(["train", *train])
    cli.main(["export", str(tmp_path / "movies"), "--format", "checkpoint", "--output_dir", str(tmp_path / "served")])
    task = get_task("movie_reviews")
    rows = [row for row in load_split(task, "validation") if len(row["text"]) < 200][:12]
    wanted = list(Predictor.from_pretrained(str(tmp_path / "movies"), "cpu").predict(rows, batch_size=1))

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "served")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "served")
    prompt = json.loads((tmp_path / "served" / "prompts.json").read_text())["prompts"]["movie_reviews"]
    words = [tokenizer(word)["input_ids"] for word in prompt["label_words"]]
    new = torch.tensor(prompt["token_ids"])
    assert all(len(ids) == 1 for ids in words) and len(new) >= 20
    for row, answer in zip(rows, wanted, strict=True):
        text = prompt["in_front"] + prompt["template"].format(**row) + prompt["behind"]
        with torch.no_grad():
            logits = model(**tokenizer(text, return_tensors="pt")).logits[0]
        shares = logits[-1, [ids[0] for ids in words]].softmax(-1).tolist()

        assert dict(zip(prompt["label_names"], shares, strict=True)) == pytest.approx(
            answer["probabilities"], abs=1e-4
        )
        assert logits[:, new].amax() <= torch.cat([logits[:, : new[0]], logits[:, new[-1] + 1 :]], 1).amin() - 10
    report = json.loads(Path(tmp_path, "served", "export.json").read_text())
    assert report["head_was_tied"] and report["least_projection"] > 0.3
    assert "16 texts answered as by PEFT" in capsys.readouterr().out
