"""A plain Trainer script: a causal language model learns to answer "positive" or "negative" to a movie review.

Lines that end in `# prompt tuning` are all that the plugin needs; without them this is ordinary full fine-tuning.
With the prompt_position "suffix" the prompt stands between the review and its answer.

    python recipes/existing_script.py MODEL TRAIN.csv OUTPUT_DIR
"""

import sys

from datasets import load_dataset
from peft import get_peft_model  # prompt tuning
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

from peft_prompt_ext import PromptTuningExtConfig  # prompt tuning


ANSWERS = {"fresh": " positive", "rotten": " negative"}
model_name, train_file, output_dir = sys.argv[1:4]
tokenizer = AutoTokenizer.from_pretrained(model_name)
model = AutoModelForCausalLM.from_pretrained(model_name)
config = PromptTuningExtConfig(  # prompt tuning
    task_type="CAUSAL_LM",  # prompt tuning
    prompt_position="prefix",  # prompt tuning
    prompt_tuning_init="CLASS_LABELS",  # prompt tuning
    prompt_tuning_init_kwargs={"labels": list(ANSWERS.values())},  # prompt tuning
    train_logits="supervised",  # prompt tuning
)  # prompt tuning
model = get_peft_model(model, config)  # prompt tuning


def tokenize(row):
    """One review and its answer; only the answer is scored."""
    question = tokenizer(f"Review: {row['text']}\nSentiment:")["input_ids"]
    answer = tokenizer(ANSWERS[row["category"]])["input_ids"]
    return {"input_ids": question + answer, "labels": [-100] * len(question) + answer}


rows = load_dataset("csv", data_files=train_file, split="train").filter(lambda row: row["category"] in ANSWERS)
train_set = rows.shuffle(seed=0).select(range(1600)).map(tokenize, remove_columns=rows.column_names)
args = TrainingArguments(
    output_dir, max_steps=100, per_device_train_batch_size=16, learning_rate=3e-5, logging_steps=10, report_to="none"
)
args.learning_rate = 2e-2  # prompt tuning
trainer = Trainer(model, args, train_dataset=train_set, data_collator=DataCollatorForSeq2Seq(tokenizer))
trainer.train()
trainer.save_model(output_dir)
