"""Inputs and training runs shared by the tests."""

import hashlib

import pytest
import torch
from peft import get_peft_model
from transformers import Trainer, TrainingArguments

from peft_prompt_ext import PromptTuningExtConfig


ROWS, TEXT = 3, 7  # B, T
VIRTUAL = 5  # P


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Use one thread in modules that import it, because threads slow tiny models down."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_batch(task_type, rows=ROWS, text=TEXT, seed=1):
    """Make an unpadded batch with labels, as the Trainer passes it."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 300, (rows, text), generator=generator)
    targets = {
        "CAUSAL_LM": {"labels": ids},
        "SEQ_2_SEQ_LM": {"labels": ids[:, :2].contiguous()},
        "SEQ_CLS": {"labels": torch.arange(rows) % 2},
        "TOKEN_CLS": {"labels": ids % 2},
        "QUESTION_ANS": {"start_positions": torch.arange(rows), "end_positions": torch.arange(rows) + 2},
        "FEATURE_EXTRACTION": {},
    }
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **targets[task_type]}


def prompted(model, task_type, **changes):
    """Call get_peft_model with the plugin's config."""
    values = {"num_virtual_tokens": VIRTUAL, "prompt_tuning_init": "RANDOM_UNIFORM", **changes}
    return get_peft_model(model, PromptTuningExtConfig(task_type=task_type, **values))


def prompt_of(model, adapter_name="default"):
    return model.prompt_encoder[adapter_name].embedding.weight


def dataset(task_type, size=24):
    batch = make_batch(task_type, rows=size)
    return [{key: value[i].tolist() for key, value in batch.items()} for i in range(size)]


def make_trainer(model, task_type, folder, callbacks=None, **changes):
    values = {
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.05,
        "logging_steps": 1,
        "save_steps": 3,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
        **changes,
    }
    data = dataset(task_type)
    args = TrainingArguments(str(folder), **values)
    return Trainer(model, args, train_dataset=data, eval_dataset=data, callbacks=callbacks)


def losses_of(trainer, key="loss"):
    return [row[key] for row in trainer.state.log_history if key in row]


def weights_hash(base_model):
    """Hash the base model's original weights, by their original names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(base_model.state_dict().items()):
        if ".modules_to_save." not in name:
            digest.update(name.replace(".original_module", "").encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def slots(model):
    return model.peft_config["default"].init_record["slots"]


def ids_of(model):
    return [slot["token_ids"][0] for slot in slots(model)]


def rows(model, ids):
    with torch.no_grad():
        return model.get_base_model().get_input_embeddings()(torch.tensor(ids))
