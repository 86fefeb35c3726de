"""The number of waits for a device in a batch."""

import pytest
import torch

from peft_prompt_ext import engine_status
from peft_prompt_ext.shared_prefix.attention import select, varlen
from tests.helpers import one_thread, prompted  # noqa: F401
from tests.shared_prefix.helpers import mixed_model, padded
from tests.shared_prefix.waits import counting


@pytest.mark.parametrize("attention", ["sdpa", "varlen"])
@pytest.mark.parametrize(
    ("task_type", "logits", "most"),
    [
        ("CAUSAL_LM", "all", 2),
        ("CAUSAL_LM", "supervised", 2),
        ("SEQ_CLS", "all", 1),
    ],
)
def test_a_training_step_waits_for_its_mask_and_its_labels(
    build_model, monkeypatch, attention, task_type, logits, most
):
    monkeypatch.setattr(select, "differs", lambda function, call: None)
    monkeypatch.setattr(varlen, "DTYPES", (torch.float32,))
    # with the shapes of the CUDA kernel
    monkeypatch.setattr(varlen, "flash_attention", lambda query, key, value, *_: query + key.sum() + value.sum())
    monkeypatch.setenv(select.VARIABLE, attention)
    model = prompted(build_model("llama", task_type), task_type, train_logits=logits).train()
    batch = padded("holes", task_type)
    model(**batch).loss.backward()
    assert engine_status(model).attention == attention

    with counting(model, batch) as waits:
        model(**batch).loss.backward()

    assert waits == ["download"] * most


def test_an_evaluation_batch_waits_for_its_prompts_too(build_model):
    model = prompted(build_model("llama"), "CAUSAL_LM").eval()
    batch = padded("left", "CAUSAL_LM")
    with torch.no_grad():
        model(**batch)
        with counting(model, batch) as waits:
            model(**batch)
    assert sorted(waits) == ["download", "download", "equal"]


def test_a_mixed_batch_waits_once(build_model):
    model = mixed_model(build_model).train()
    model.set_requires_grad(["b", "c"])
    batch = padded("left", "CAUSAL_LM")
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    model(**inputs, adapter_names=["b", "__base__", "c"])
    with counting(model, batch) as waits:
        model(**inputs, adapter_names=["b", "__base__", "c"]).logits.sum().backward()
    assert waits == ["download"]


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.tolist(),
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).any()),
        lambda x: x[x > 1],
        lambda x: x.nonzero(),
        lambda x: x.unique(),
        lambda x: x.cpu(),
        lambda x: torch.repeat_interleave(x),
    ],
)
def test_the_count_sees_what_reads_a_device(read):
    batch = {"input_ids": torch.tensor([3, 1, 2])}
    with counting(torch.nn.Linear(1, 1), batch) as waits:
        read(torch.arange(3))
        assert not waits
        read(batch["input_ids"] * 2)
    assert waits
