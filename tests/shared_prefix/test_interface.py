"""The wrapper of transformers' attention lookup changes only packed batches."""

import gc
import pickle
import subprocess
import sys

import pytest
import torch
from transformers import CONFIG_MAPPING, AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaAttention, eager_attention_forward

from peft_prompt_ext import _seam, engine_status, peft_models
from peft_prompt_ext._versions import checkpoint_activations
from peft_prompt_ext.shared_prefix import interface
from tests.helpers import make_batch, one_thread, prompt_of, prompted  # noqa: F401
from tests.shared_prefix.causal_models import tiny_model
from tests.shared_prefix.helpers import padded


IDS = make_batch("CAUSAL_LM", rows=3, text=37)["input_ids"]


def names_and_functions():
    gc.collect()
    looked_up = [ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention_forward) for name in ("sdpa", "eager")]
    return looked_up, {name: AttentionInterface()[name] for name in AttentionInterface()}


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_names_registry_and_lookups_are_what_they_were_around_a_packed_batch(build_model, implementation):
    before = names_and_functions()
    base = build_model("llama", attn_implementation=implementation)
    model = prompted(base, "CAUSAL_LM")

    model(**padded("left", "CAUSAL_LM")).loss.backward()

    assert engine_status(model).packed
    assert names_and_functions() == before
    assert base.config._attn_implementation == implementation
    assert before[0] == [sdpa_attention_forward, eager_attention_forward]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2", "bert"])
def test_other_models_are_bit_equal_while_a_packed_batch_is_in_use(build_model, architecture, implementation):
    if (architecture, implementation) == ("gemma2", "sdpa"):
        implementation = "eager"  # its only implementation
    other = build_model(architecture, attn_implementation=implementation)
    before = other(input_ids=IDS).logits
    model = prompted(build_model("llama"), "CAUSAL_LM").train()
    checkpoint_activations(model.get_base_model())  # looks up the attention again in the backward pass
    loss = model(**padded("left", "CAUSAL_LM")).loss

    assert interface._in_use
    assert torch.equal(other(input_ids=IDS).logits, before)
    loss.backward()


# these models branch on the attention's name
@pytest.mark.parametrize(
    "model_type", ["deepseek_v32", "glm_moe_dsa", "axk2", "hy_v4", "dots3_note_text", "minimax_m3_vl_text", "gpt2"]
)
def test_a_base_model_that_branches_on_the_name_is_bit_equal_before_and_after(model_type):
    if model_type not in CONFIG_MAPPING:
        pytest.skip("this transformers does not have it")
    model = prompted(tiny_model(model_type), "CAUSAL_LM").eval()
    with torch.no_grad(), model.disable_adapter():
        before = model(input_ids=IDS).logits

    status = engine_status(model)
    with torch.no_grad():
        model(input_ids=IDS)
        with model.disable_adapter():
            after = model(input_ids=IDS).logits

    assert status.packed == (model_type == "gpt2"), status
    assert torch.equal(before, after)


def test_a_newly_registered_function_is_proved(build_model):
    def twice_as_sharp(module, query, *args, **kwargs):
        return sdpa_attention_forward(module, 2 * query, *args, **kwargs)

    model = prompted(build_model("llama"), "CAUSAL_LM")
    batch = padded("right", "CAUSAL_LM")
    assert model(**batch) and engine_status(model).packed
    AttentionInterface.register("sdpa", twice_as_sharp)
    try:
        for parameter in model.base_model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        got = model(**batch).logits
        assert not engine_status(model).packed
        assert "relative error" in engine_status(model).reason
        assert AttentionInterface()["sdpa"] is twice_as_sharp
    finally:
        AttentionInterface.register("sdpa", sdpa_attention_forward)
    assert (model(**batch).logits - got).abs().max() > 1e-2
    assert engine_status(model).packed


@pytest.mark.parametrize("name", ["flash_attention_2", "flex_attention", "paged|eager"])
def test_another_implementation_is_refused_by_its_name(build_model, name):
    model = prompted(build_model("llama"), "CAUSAL_LM")
    assert engine_status(model).packed

    model.get_base_model().config._attn_implementation = name

    assert not engine_status(model).packed
    assert repr(name) in engine_status(model).reason


def test_the_lookup_is_restored_and_replaced_again(build_model, seam):
    own = interface._own_lookup
    model = prompted(build_model("llama"), "CAUSAL_LM")
    batch = padded("right", "CAUSAL_LM")
    before = model(**batch).logits
    assert AttentionInterface.get_interface is not own

    seam.deactivate()
    assert AttentionInterface.get_interface is own
    _seam.restore(AttentionInterface, "get_interface")
    peft_models.register()

    assert torch.equal(model(**batch).logits, before)


def test_a_lookup_that_another_library_wraps_stays_wrapped(build_model, monkeypatch):
    _seam.restore(AttentionInterface, "get_interface")
    names, own = [], AttentionInterface.get_interface
    model = prompted(build_model("llama"), "CAUSAL_LM")
    model(**padded("right", "CAUSAL_LM"))
    ours = AttentionInterface.get_interface

    def wrapped(self, name, default):
        names.append(name)
        return ours(self, name, default)

    monkeypatch.setattr(AttentionInterface, "get_interface", wrapped)
    _seam.restore(AttentionInterface, "get_interface")
    assert AttentionInterface.get_interface is wrapped
    model(**padded("left", "CAUSAL_LM"))
    assert names == ["sdpa", "sdpa"]  # two layers
    monkeypatch.undo()
    _seam.restore(AttentionInterface, "get_interface")
    assert AttentionInterface.get_interface is own


@pytest.mark.parametrize("whole", [True, False])
def test_the_engine_leaves_nothing_in_a_pickled_base_model(build_model, tmp_path, whole):
    model = prompted(build_model("llama"), "CAUSAL_LM").eval()
    with torch.no_grad():
        want = model(input_ids=IDS).logits
    base = model.get_base_model()
    assert b"peft_prompt_ext" not in pickle.dumps(base)
    saved = model if whole else base
    torch.save((saved, IDS, want if whole else base(input_ids=IDS).logits), tmp_path / "model.pt")
    command = (
        ("" if whole else "import sys\nsys.modules['peft_prompt_ext'] = None\n")  # its import fails
        + "import sys, torch\nmodel, ids, want = torch.load(sys.argv[1], weights_only=False)\n"
        "torch.testing.assert_close(model(input_ids=ids).logits, want)\n"
    )
    ran = subprocess.run([sys.executable, "-c", command, tmp_path / "model.pt"], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_layer_that_runs_again_in_the_backward_pass_finds_its_layout(build_model, implementation, reentrant):
    gradients = []
    for checkpointing in (False, True):
        base = build_model("llama", attn_implementation=implementation)
        model = prompted(base, "CAUSAL_LM").train()
        if checkpointing:
            checkpoint_activations(model, use_reentrant=reentrant)
        loss = model(**padded("holes", "CAUSAL_LM")).loss
        gc.collect()
        prompted(build_model("gpt2"), "CAUSAL_LM")(**padded("left", "CAUSAL_LM"))  # another pass in between
        loss.backward()
        gradients.append(prompt_of(model).grad)
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-8)


def hand(model, least_tokens=0, **extra):
    """Make every attention layer pass one more argument to its attention, in long passes only."""

    def more(module, args, kwargs):
        long = kwargs["hidden_states"].shape[1] >= least_tokens
        return args, {**kwargs, **(extra if long else {})}

    for module in model.modules():
        if isinstance(module, LlamaAttention):
            module.register_forward_pre_hook(more, with_kwargs=True)


@pytest.mark.parametrize("value", [torch.ones(2), 0.5, (torch.ones(2), torch.ones(2)), torch.zeros(0)])
@pytest.mark.parametrize("name", ["sinks", "position_bias", "alibi", "indices", "anything"])
def test_an_unknown_argument_is_refused_by_its_name(build_model, name, value):
    model = prompted(build_model("llama"), "CAUSAL_LM")
    hand(model.base_model, **{name: value})

    assert not engine_status(model).packed
    assert name in engine_status(model).reason


@pytest.mark.parametrize("extra", [{"position_ids": IDS}, {"anything": None}, {"cache_position": IDS[0]}])
def test_arguments_that_do_not_affect_attention_are_accepted(build_model, extra):
    model = prompted(build_model("llama"), "CAUSAL_LM")
    hand(model.base_model, **extra)
    assert engine_status(model).packed


@pytest.mark.parametrize("shape", [(1, 1, 18, 18), (1, 1, 1, 1), (18, 18), (1, 1, 1, 18)])
def test_a_mask_that_is_not_the_engines_is_refused(build_model, shape):
    model = prompted(build_model("llama"), "CAUSAL_LM")
    hand(model.base_model, attention_mask=torch.zeros(shape))

    assert not engine_status(model).packed
    assert "mask of its own" in engine_status(model).reason


@pytest.mark.parametrize("gradients", [True, False])
def test_an_unknown_argument_of_a_long_batch_makes_it_take_pefts_path(build_model, gradients):
    model = prompted(build_model("llama"), "CAUSAL_LM").eval()
    hand(model.base_model, least_tokens=3 * 11, indices=torch.ones(2))  # ignored by SDPA
    short, long = IDS[:2, :5], IDS[:, :20]
    with torch.set_grad_enabled(gradients):
        model(input_ids=short)
        assert engine_status(model).packed
        got = model(input_ids=long).logits
        assert "indices" in engine_status(model).reason
        alone = [model(input_ids=row[None]).logits[0] for row in long]
    torch.testing.assert_close(got, torch.stack(alone), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "asked", [{"output_hidden_states": True}, {"use_cache": True}, {"inputs_embeds": torch.ones(2, 3, 24)}]
)
def test_the_status_is_of_the_batch_that_ran(build_model, asked):
    model = prompted(build_model("llama"), "CAUSAL_LM")
    model(input_ids=IDS)
    first = engine_status(model)
    assert first.packed

    model(**({} if "inputs_embeds" in asked else {"input_ids": IDS}), **asked)
    status = engine_status(model)
    assert status.packed == ("inputs_embeds" in asked)
    assert status.packed or next(iter(asked)) in status.reason

    model(input_ids=IDS)
    assert engine_status(model) == first


def test_a_package_of_transformers_without_the_engine_is_not_imported_by_it():
    command = "import peft_prompt_ext, sys; print('peft_prompt_ext.shared_prefix.interface' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True)
    assert ran.stdout.strip() == "False", ran.stderr
