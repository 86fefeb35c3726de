"""A prompt behind the text: each row gives what it gives alone as `[text | prompt | answer]`."""

import copy

import pytest
import torch

from peft_prompt_ext import engine_status
from tests.helpers import VIRTUAL, one_thread, prompt_of, prompted  # noqa: F401
from tests.peft_models.suffix import MASKS, assert_equals_rows_alone, make_suffix_batch
from tests.zoo import DECODERS


@pytest.mark.parametrize("shared_prefix", [True, False])
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("architecture", DECODERS)
def test_each_row_equals_it_alone(build_model, architecture, kind, shared_prefix):
    model = prompted(build_model(architecture), "CAUSAL_LM", prompt_position="suffix", shared_prefix=shared_prefix)
    assert_equals_rows_alone(model, make_suffix_batch(kind))
    assert engine_status(model).packed == (shared_prefix and architecture != "bloom")


@pytest.mark.parametrize("size", [1, 40])
def test_short_and_long_prompts(build_model, size):
    model = prompted(build_model("llama"), "CAUSAL_LM", prompt_position="suffix", num_virtual_tokens=size)
    assert_equals_rows_alone(model, make_suffix_batch("holes", answers=(1, 2, 1)))


@pytest.mark.parametrize(
    ("architecture", "task_type"), [("bert", "SEQ_CLS"), ("bert", "CAUSAL_LM"), ("roberta", "CAUSAL_LM")]
)
def test_encoders_are_refused_when_the_model_is_made(build_model, architecture, task_type):
    with pytest.raises(ValueError, match="needs a decoder"):
        prompted(build_model(architecture, task_type), task_type, prompt_position="suffix")


NO_DROPOUT = {
    "gpt2": {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
    "opt": {"dropout": 0.0, "attention_dropout": 0.0},
}


def texts_of(model):
    return engine_status(model).texts


@pytest.mark.parametrize("architecture", DECODERS)
def test_kept_texts_give_the_same(build_model, architecture):
    base_model = build_model(architecture, **NO_DROPOUT.get(architecture, {}))
    model = prompted(base_model, "CAUSAL_LM", prompt_position="suffix", train_logits="supervised")
    batch, runs = make_suffix_batch("holes"), []
    for _ in range(3):
        prompt_of(model).grad = None
        model.train()
        out = model(**batch)
        out.loss.backward()
        runs.append((out.loss.detach(), prompt_of(model).grad))
    if architecture == "bloom":
        assert texts_of(model) is None
        return
    assert (texts_of(model).hits, texts_of(model).misses) == (6, 3)
    assert texts_of(model).num_bytes > 0
    for loss, gradient in runs[1:]:
        torch.testing.assert_close(loss, runs[0][0], rtol=1e-6, atol=0)
        assert (gradient - runs[0][1]).norm() <= 1e-6 * gradient.norm()


def write_a_weight(model):
    with torch.no_grad():
        next(model.get_base_model().base_model.parameters()).mul_(1.5)


def write_data_and_change_the_mode(model):
    next(model.get_base_model().base_model.parameters()).data.mul_(1.5)
    model.eval()
    model.train()


def swap_rows_of_data_and_change_the_mode(model):
    weight = next(p for p in model.get_base_model().base_model.parameters() if p.dim() == 2)
    weight.data = weight.data.flip(0)
    model.eval()
    model.train()


def add_a_hook(model):
    model.get_base_model().base_model.layers[0].register_forward_hook(lambda *_: None)


def change_an_option(model):
    model.peft_config["default"].text_cache = "none"


def set_a_config(model):
    model.get_base_model().base_model.layers[0].self_attn.scaling *= 2


CHANGES = [
    write_a_weight,
    write_data_and_change_the_mode,
    swap_rows_of_data_and_change_the_mode,
    add_a_hook,
    change_an_option,
    set_a_config,
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_the_model_drops_kept_texts(build_model, change):
    model = prompted(build_model("llama"), "CAUSAL_LM", prompt_position="suffix", train_logits="supervised").train()
    batch = make_suffix_batch("left")
    model(**batch)
    model(**batch)
    assert texts_of(model).hits == 3
    change(model)
    out = model(**batch)
    assert texts_of(model) is None or texts_of(model).hits == 0
    fresh = prompted(copy.deepcopy(model.get_base_model()), "CAUSAL_LM", prompt_position="suffix")
    torch.testing.assert_close(out.loss, fresh(**batch).loss)


def test_evaluation_between_epochs_keeps_the_texts(build_model):
    model = prompted(build_model("llama"), "CAUSAL_LM", prompt_position="suffix", train_logits="supervised")
    batch = make_suffix_batch("left")
    model.train()
    model(**batch).loss.backward()
    model.eval()
    with torch.inference_mode():
        model(**batch, logits_to_keep=1)
    model.train()
    model(**batch).loss.backward()
    assert texts_of(model).hits == 6


def test_texts_of_inference_mode_can_be_trained_on(build_model):
    model = prompted(build_model("llama"), "CAUSAL_LM", prompt_position="suffix", train_logits="supervised").eval()
    batch = make_suffix_batch("left")
    with torch.inference_mode():
        model(
            input_ids=batch["input_ids"],
            labels=batch["labels"],
            attention_mask=batch["attention_mask"],
            logits_to_keep=6,
        )
    model.train()
    model(**batch).loss.backward()
    assert texts_of(model).hits == 3


def test_a_budget_keeps_what_fits(build_model):
    model = prompted(
        build_model("llama"), "CAUSAL_LM", prompt_position="suffix", train_logits="supervised", text_cache_bytes=3000
    ).train()
    batch = make_suffix_batch("none")
    losses = [model(**batch).loss for _ in range(2)]
    kept = texts_of(model)
    assert 0 < kept.num_bytes <= 3000
    assert 0 < kept.hits < 3
    torch.testing.assert_close(*losses)


def test_rows_that_share_a_text_read_it_once(build_model):
    model = prompted(build_model("llama"), "CAUSAL_LM", prompt_position="suffix", text_cache="none")
    batch = make_suffix_batch("none")
    batch["input_ids"][1, :7], batch["input_ids"][2, :7] = batch["input_ids"][0, :7], batch["input_ids"][0, :7]
    batch["labels"][:] = -100
    batch["labels"][:, 7:] = batch["input_ids"][:, 7:]
    model(**batch)
    counted = []
    hook = model.get_base_model().base_model.register_forward_pre_hook(
        lambda _, args, kwargs: counted.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    out = model(**batch)
    hook.remove()
    assert counted == [7, 3 * (VIRTUAL + 5)]
    assert_equals_rows_alone(model, batch)
    assert out.logits.shape == (3, VIRTUAL + 12, 331)
