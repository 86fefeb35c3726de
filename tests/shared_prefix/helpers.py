"""Ragged batches, and what each of their rows gives alone in stock PEFT."""

import copy

import torch
from peft import PromptTuningConfig, get_peft_model

from peft_prompt_ext import PromptTuningExtConfig
from tests.helpers import make_batch, prompt_of, prompted
from tests.zoo import DECODERS


PACKED = [name for name in DECODERS if name != "bloom"]
MASKS = {
    "right": [[1] * 7 + [0] * 4, [1] * 11, [1] + [0] * 10],
    "left": [[0] * 4 + [1] * 7, [1] * 11, [0] * 10 + [1]],
    "holes": [[0, 1, 1, 0, 0, 1, 1, 1, 0, 1, 0], [1] * 11, [0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0]],
    "one row": [[1] * 11],
}
P = 5


def padded(kind, task_type):
    mask = torch.tensor(MASKS[kind])
    ids = make_batch("CAUSAL_LM", rows=len(mask), text=mask.shape[1])["input_ids"].masked_fill(mask == 0, 2)
    labels = ids.masked_fill(mask == 0, -100) if task_type == "CAUSAL_LM" else torch.arange(len(mask)) % 2
    if task_type == "CAUSAL_LM" and len(labels) > 1:
        labels[1] = -100  # a row without a label
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def alone(model, batch, task_type):
    """Run each row without pads in stock PEFT: logits, the loss over all rows, and its gradient."""
    stock = get_peft_model(
        copy.deepcopy(model.get_base_model()),
        PromptTuningConfig(task_type=task_type, num_virtual_tokens=model_size(model)),
    ).eval()
    stock.load_state_dict(model.state_dict())
    logits, total, count = [], 0.0, 0
    for row, real in enumerate(batch["attention_mask"].bool()):
        ids = batch["input_ids"][row, real][None]
        labels = batch["labels"][row, real][None] if task_type == "CAUSAL_LM" else batch["labels"][row : row + 1]
        labelled = int((labels != -100).sum())
        out = stock(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels if labelled else None)
        if labelled:
            total, count = total + out.loss * labelled, count + labelled
        logits.append(out.logits[0].detach())
    loss = total / count
    loss.backward()
    return loss.item(), logits, prompt_of(stock).grad


def model_size(model):
    return model.peft_config["default"].num_virtual_tokens


def assert_rows_equal_those_alone(model, batch, task_type):
    wanted_loss, wanted_logits, wanted_grad = alone(model, batch, task_type)
    out = model(**batch)
    out.loss.backward()
    assert abs(out.loss.item() - wanted_loss) <= 1e-5 * abs(wanted_loss)
    assert (prompt_of(model).grad - wanted_grad).norm() <= 1e-5 * wanted_grad.norm()
    size = model_size(model)
    for row, (got, wanted) in enumerate(zip(out.logits, wanted_logits, strict=True)):
        if task_type == "CAUSAL_LM":
            assert got.shape[0] == size + batch["input_ids"].shape[1]
            got = torch.cat([got[:size], got[size:][batch["attention_mask"][row].bool()]])
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-4)


def mixed_model(build_model, task_type="CAUSAL_LM"):
    model = prompted(build_model("llama", task_type), task_type)
    for name, size in (("b", 3), ("c", 9)):
        changes = {"num_virtual_tokens": size, "prompt_tuning_init_seed": size}
        model.add_adapter(
            name, PromptTuningExtConfig(task_type=task_type, prompt_tuning_init="RANDOM_UNIFORM", **changes)
        )
    return model
