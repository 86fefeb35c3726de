"""Outputs without columns of virtual tokens, as the base model's."""

import pytest
import torch

from peft_prompt_ext import PromptTuningExtConfig, engine_status
from tests.helpers import make_batch, one_thread, prompted  # noqa: F401
from tests.shared_prefix.helpers import mixed_model, padded


P = 5


def pair(model):
    """Runs a call with all columns and with the text's."""

    def run(**batch):
        outputs = []
        for virtual_columns in (True, False):
            for config in model.peft_config.values():
                config.virtual_columns = virtual_columns
            outputs.append(model(**batch))
        return outputs

    return run


@pytest.mark.parametrize("shared_prefix", [True, False])
@pytest.mark.parametrize("virtual", [1, P])
def test_logits_of_the_text_alone(build_model, shared_prefix, virtual):
    model = prompted(build_model("llama"), "CAUSAL_LM", shared_prefix=shared_prefix, num_virtual_tokens=virtual)
    batch = padded("left", "CAUSAL_LM")
    whole, text = pair(model)(**batch)
    assert engine_status(model).packed == shared_prefix
    assert text.logits.shape[:2] == batch["input_ids"].shape
    assert torch.equal(text.logits, whole.logits[:, virtual:])
    assert torch.equal(text.loss, whole.loss)
    whole, text = pair(model)(**batch, return_dict=False)
    assert torch.equal(text[1], whole[1][:, virtual:])


@pytest.mark.parametrize("shared_prefix", [True, False])
def test_columns_to_keep_are_the_texts(build_model, shared_prefix):
    model = prompted(build_model("llama"), "CAUSAL_LM", shared_prefix=shared_prefix)
    batch = {name: padded("right", "CAUSAL_LM")[name] for name in ("input_ids", "attention_mask")}
    whole = model(**batch).logits[:, P:]
    model.peft_config["default"].virtual_columns = False
    named = torch.tensor([3, 0, 7])
    torch.testing.assert_close(model(**batch, logits_to_keep=named).logits, whole[:, named])
    torch.testing.assert_close(model(**batch, logits_to_keep=4).logits, whole[:, -4:])
    torch.testing.assert_close(model(**batch, logits_to_keep=99).logits, whole)


def test_hidden_states_and_a_loop_of_ones_own(build_model):
    model = prompted(build_model("llama"), "CAUSAL_LM").eval()
    ids = make_batch("CAUSAL_LM")["input_ids"]
    whole, text = pair(model)(input_ids=ids, output_hidden_states=True)
    for one, other in zip(whole.hidden_states, text.hidden_states, strict=True):
        assert torch.equal(one[:, P:], other)
    first, cut = pair(model)(input_ids=ids, use_cache=True)
    assert torch.equal(cut.logits, first.logits[:, P:])
    later = model(input_ids=ids[:, :2], past_key_values=cut.past_key_values, use_cache=True)
    assert later.logits.shape[:2] == (len(ids), 2)


def test_logits_of_labels_alone_stay(build_model):
    model = prompted(build_model("llama"), "CAUSAL_LM", train_logits="supervised").train()
    whole, text = pair(model)(**padded("holes", "CAUSAL_LM"))
    assert torch.equal(whole.logits, text.logits)


def test_mixed_batches_leave_the_longest_prompts_columns_out(build_model):
    model = mixed_model(build_model).eval()
    batch = {name: padded("left", "CAUSAL_LM")[name] for name in ("input_ids", "attention_mask")}
    whole, text = pair(model)(**batch, adapter_names=["b", "__base__", "c"])
    assert torch.equal(text.logits, whole.logits[:, 9:])


@pytest.mark.parametrize(("architecture", "task_type"), [("bert", "FEATURE_EXTRACTION"), ("t5", "SEQ_2_SEQ_LM")])
def test_encoders(build_model, architecture, task_type):
    model = prompted(build_model(architecture, task_type), task_type).eval()
    batch = make_batch(task_type)
    if task_type == "SEQ_2_SEQ_LM":
        batch["labels"] = batch["labels"].repeat(1, 6)  # as long as prompt and text
    whole, text = pair(model)(**batch)
    name = "last_hidden_state" if task_type == "FEATURE_EXTRACTION" else "encoder_last_hidden_state"
    assert torch.equal(text[name], whole[name][:, P:])
    if task_type == "SEQ_2_SEQ_LM":
        assert torch.equal(text.logits, whole.logits)
    else:
        assert torch.equal(text.pooler_output, whole.pooler_output)


def test_it_is_saved_and_anything_else_is_refused(build_model, tmp_path):
    from peft import PeftModel

    model = prompted(build_model("llama"), "CAUSAL_LM", virtual_columns=False)
    model.save_pretrained(tmp_path)
    assert not PeftModel.from_pretrained(model.get_base_model(), tmp_path).active_peft_config.virtual_columns
    with pytest.raises(ValueError, match=r"virtual_columns \('no'\)"):
        PromptTuningExtConfig(task_type="CAUSAL_LM", virtual_columns="no")


def test_columns_by_mask_from_the_end_and_by_position(build_model):
    model = prompted(build_model("llama"), "CAUSAL_LM", num_virtual_tokens=1).eval()
    ids = make_batch("CAUSAL_LM")["input_ids"]
    whole = model(input_ids=ids).logits
    chosen = torch.arange(whole.shape[1]) % 3 == 0
    torch.testing.assert_close(model(input_ids=ids, logits_to_keep=chosen).logits, whole[:, chosen])
    model.peft_config["default"].virtual_columns = False
    text = whole[:, 1:]
    torch.testing.assert_close(model(input_ids=ids, logits_to_keep=chosen[1:]).logits, text[:, chosen[1:]])
    torch.testing.assert_close(model(input_ids=ids, logits_to_keep=torch.tensor([-1, 0])).logits, text[:, [-1, 0]])
    words = model.get_base_model().get_input_embeddings()(ids)
    torch.testing.assert_close(model(None, torch.ones_like(ids), words).logits, text)
    first = model(input_ids=ids[:, :4], use_cache=True)
    torch.testing.assert_close(first.logits, text[:, :4])
    later = model(input_ids=ids[:, 4:], past_key_values=first.past_key_values, logits_to_keep=torch.tensor([2]))
    torch.testing.assert_close(later.logits, text[:, [6]])


def test_in_training_without_the_head_at_labels_too(build_model):
    model = prompted(build_model("llama"), "CAUSAL_LM", train_logits="supervised", virtual_columns=False).train()
    batch = padded("left", "CAUSAL_LM")
    assert model(**batch, output_hidden_states=True).logits.shape[:2] == batch["input_ids"].shape


def test_positional_masks_of_a_classifier_are_made_as_by_name(build_model):
    model = prompted(build_model("llama", "SEQ_CLS"), "SEQ_CLS").eval()
    ids = padded("right", "SEQ_CLS")["input_ids"]
    torch.testing.assert_close(model(ids, None).logits, model(input_ids=ids).logits)
