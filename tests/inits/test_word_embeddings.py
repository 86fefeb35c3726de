"""Word embeddings as the source of a prompt: scaled, tied, in a 4-bit model, sharded, on meta."""

from contextlib import contextmanager

import pytest
import torch
from peft import get_peft_model

from peft_prompt_ext import PromptTuningExtConfig
from tests.helpers import ids_of, make_batch, prompt_of


@pytest.fixture
def sample(tokenizer_folder):
    """Gives a model a prompt of sampled words."""

    def build(base, task_type="CAUSAL_LM"):
        config = PromptTuningExtConfig(
            task_type=task_type, num_virtual_tokens=7, tokenizer_name_or_path=tokenizer_folder
        )
        return get_peft_model(base, config)

    return build


def test_rows_are_taken_through_the_module(sample, build_model):
    model = sample(build_model("gemma3_text"))
    module, ids = model.get_base_model().get_input_embeddings(), ids_of(model)

    assert torch.equal(prompt_of(model), module(torch.tensor(ids)))
    assert not torch.allclose(prompt_of(model), module.weight[ids])  # Gemma scales inside the module


@pytest.mark.parametrize(("architecture", "task_type"), [("gpt2", "CAUSAL_LM"), ("t5", "SEQ_2_SEQ_LM")])
def test_a_tied_table_is_not_touched_by_the_prompt(sample, build_model, architecture, task_type):
    model = sample(build_model(architecture, task_type, tie_word_embeddings=True), task_type)
    table = model.get_base_model().get_input_embeddings().weight

    prompt_of(model).data.add_(1.0)

    torch.testing.assert_close(prompt_of(model) - 1.0, table[ids_of(model)])
    assert model.get_base_model().get_output_embeddings().weight is table


def test_weights_loaded_from_a_folder_are_used(sample, build_model, tmp_path):
    from transformers import AutoModelForCausalLM

    base = build_model("llama")
    base.save_pretrained(tmp_path)

    model = sample(AutoModelForCausalLM.from_pretrained(tmp_path))  # created on meta, then loaded

    assert torch.equal(prompt_of(model), base.get_input_embeddings().weight[ids_of(model)])


def test_a_4_bit_backbone_keeps_its_embeddings_and_trains_a_prompt(sample, build_model, tmp_path):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    base = build_model("llama", hidden_size=64, head_dim=32, intermediate_size=128)
    base.save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    quantised = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)

    model = sample(quantised)
    model(**make_batch("CAUSAL_LM")).loss.backward()

    assert isinstance(quantised.model.layers[0].mlp.up_proj, bitsandbytes.nn.Linear4bit)
    torch.testing.assert_close(
        prompt_of(model), base.get_input_embeddings().weight[ids_of(model)], atol=1e-3, rtol=1e-2
    )
    assert prompt_of(model).grad.abs().sum() > 0


def test_a_sharded_table_is_gathered_while_it_is_read(sample, build_model, monkeypatch):
    base = build_model("llama")
    weight = base.get_input_embeddings().weight
    whole = weight.data.clone()

    @contextmanager
    def gather(parameters):
        assert [p is weight for p in parameters] == [True]
        weight.data.copy_(whole)
        yield
        weight.data.fill_(torch.nan)  # ZeRO-3 frees the table

    weight.data.fill_(torch.nan)
    monkeypatch.setattr("peft_prompt_ext.inits.base.gather_params_ctx", gather)

    model = sample(base)

    assert torch.equal(prompt_of(model), whole[ids_of(model)])


def test_a_tokenizer_larger_than_the_table_is_refused(sample, build_model):
    with pytest.raises(ValueError, match=r"has ids up to \d+, the embedding table has 101 rows"):
        sample(build_model("llama", vocab_size=101))


def test_weights_that_are_not_loaded_yet_are_refused(sample, build_model):
    with pytest.raises(ValueError, match=r"no data \(device meta\)"):
        sample(build_model("llama").to("meta"))
