"""The flags of `peft-prompt-ext train` beside those of `transformers.TrainingArguments`, and their defaults.

Nothing here imports torch, so that help is instant.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from .methods import METHODS


# Defaults of TrainingArguments for every method; a method's own come on top
DEFAULTS = {
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 32,
    "logging_steps": 10,
    "save_total_limit": 2,
    "report_to": "none",
}


@dataclass
class ModelArguments:
    """Which base model."""

    model_name_or_path: str = field(
        default="smollm2-135m", metadata={"help": "A Hub id, a folder or an embedded asset"}
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit on the Hub"})
    task_type: Literal["CAUSAL_LM", "SEQ_CLS", "SEQ_2_SEQ_LM"] | None = field(
        default=None, metadata={"help": "Kind of model; by default what the checkpoint is made for"}
    )
    quantization: Literal["nf4", "fp4", "int8"] | None = field(
        default=None, metadata={"help": "Load the frozen base model in 4 or 8 bits"}
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto", metadata={"help": "Type of weights and arithmetic; auto: the checkpoint's or the device's"}
    )


@dataclass
class DataArguments:
    """Which rows."""

    task_name: str | None = field(default=None, metadata={"help": "A task of the list below, such as sst2"})
    data_dir: str | None = field(
        default=None,
        metadata={
            "help": "Read the task's rows from train.jsonl, validation.jsonl, ... in this folder, not from the Hub"
        },
    )
    train_file: str | None = field(default=None, metadata={"help": "Your own CSV, JSON or JSONL file"})
    validation_file: str | None = field(default=None, metadata={"help": "Your own file to score on"})
    test_file: str | None = field(default=None, metadata={"help": "Your own file to predict"})
    text_columns: list[str] = field(default_factory=list, metadata={"help": "Columns of text in your own file"})
    label_column: str = field(default="label", metadata={"help": "Column of the label in your own file"})
    label_words: list[str] = field(
        default_factory=list, metadata={"help": "LABEL=WORD for each label of your file; by default the label itself"}
    )
    template: str | None = field(
        default=None, metadata={"help": "Question to a language model about your row; columns in braces"}
    )
    max_seq_length: int = field(
        default=256, metadata={"help": "Most tokens of a row, the prompt not counted; longer texts are cut"}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on this many rows, sampled"})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Score this many rows, sampled"})
    max_predict_samples: int | None = field(default=None, metadata={"help": "Predict this many rows, the first ones"})
    num_shots: int | None = field(default=None, metadata={"help": "Train on this many rows of each class"})
    held_out_samples: int | None = field(
        default=None,
        metadata={"help": "Score on this many rows held out of train, to choose settings without the validation rows"},
    )
    sample_seed: int = field(
        default=0,
        metadata={"help": "Seed of the sampling of train; the rows of --max_eval_samples do not depend on it"},
    )


@dataclass
class MethodArguments:
    """What is trained."""

    method: str = field(
        default="prompt_tuning", metadata={"help": "What to train; see the table", "choices": METHODS.keys()}
    )
    num_virtual_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Length of the prompt; by default what label words and question need, between 20 and 100 (behind "
            "the text the question's end and 8 more)"
        },
    )
    prompt_tuning_init: str | None = field(
        default=None,
        metadata={"help": "By default CLASS_LABELS, or SAMPLE_VOCAB for a task without label words"},
    )
    prompt_tuning_init_text: str | None = field(default=None, metadata={"help": "Text for the init TEXT"})
    prompt_tuning_init_kwargs: str | None = field(default=None, metadata={"help": "The init's arguments as JSON"})
    prompt_position: Literal["prefix", "suffix"] = field(
        default="prefix",
        metadata={
            "help": "Where the prompt stands: in front of the text, or between text and answer (decoders alone)"
        },
    )
    text_cache: Literal["none", "memory", "disk"] = field(
        default="memory", metadata={"help": "Where a suffix keeps what it read of the texts, for the next epoch"}
    )
    text_cache_bytes: str | None = field(
        default=None,
        metadata={"help": "Most bytes of kept texts, such as 8GB; by default a quarter of the free memory or disk"},
    )
    lora_r: int = field(default=8, metadata={"help": "Rank of LoRA"})
    lora_alpha: int = field(default=16, metadata={"help": "Scale of LoRA, divided by its rank"})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout of LoRA"})
