"""FlexAttention over packed batches, against the dense oracle; and in whole models, against rows run one by one.

On a CPU torch runs FlexAttention unfused, from its mask alone, or compiled, by its lists of blocks, without gradients.
Unfused it computes gradients, but has a check that refuses them, which these tests take away.
"""

import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_prompt_ext import engine_status
from peft_prompt_ext._versions import checkpoint_activations
from peft_prompt_ext.shared_prefix.attention import flex, reference, sdpa, select
from peft_prompt_ext.shared_prefix.layout import pack
from tests.helpers import VIRTUAL, one_thread, prompt_of, prompted  # noqa: F401
from tests.shared_prefix.helpers import assert_rows_equal_those_alone, mixed_model, padded
from tests.shared_prefix.test_packed_attention import assert_equal_with_kept_trunks, layouts, tokens


pytestmark = [
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),  # tracing reads it
]
WINDOWS = st.sampled_from([None, 1, 2, 4, 100])


@pytest.fixture(autouse=True, scope="module")
def gradients_on_a_cpu():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *tensors: None)
        yield


@settings(max_examples=40, deadline=None)
@given(layouts(), WINDOWS, st.sampled_from([None, 3.0]), st.sampled_from([None, 0.3]))
def test_outputs_and_gradients_equal_the_dense_oracles(case, sliding_window, softcap, scaling):
    layout, _ = case
    if layout.position_ids.shape[1] == 0:
        return  # neither a virtual nor a real token
    results = []
    for function in (flex.packed_attention, reference.packed_attention):
        inputs = tokens(layout)
        out = function(*inputs, layout, scaling=scaling, sliding_window=sliding_window, softcap=softcap)
        weight = torch.arange(out.numel(), dtype=out.dtype).view(out.shape).sin()
        results.append([out, *torch.autograd.grad((out * weight).sum(), inputs)])
    for fast, slow in zip(*results, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-9, atol=1e-9)


@settings(max_examples=20, deadline=None)
@given(layouts(), WINDOWS)
def test_branches_with_kept_trunks_have_their_outputs_and_gradients(case, sliding_window):
    layout, _ = case
    if not len(layout.branch):
        return
    assert_equal_with_kept_trunks(flex.packed_attention, layout, sliding_window=sliding_window)


def test_dropout_is_not_lost():
    layout = pack(torch.ones(2, 3), (4,))
    results = []
    for function in (flex.packed_attention, sdpa.packed_attention):
        torch.manual_seed(0)
        results.append(function(*tokens(layout), layout, dropout=0.5))
    assert torch.equal(*results)


def dense(number, blocks):
    """Convert lists of blocks to a bool matrix."""
    seen = torch.zeros(blocks.shape[2:], dtype=torch.bool)
    for row, (count, columns) in enumerate(zip(number[0, 0], blocks[0, 0], strict=True)):
        seen[row, columns[:count].long()] = True
    return seen


@settings(max_examples=150, deadline=None)
@given(layouts(), WINDOWS, st.booleans())
def test_blocks_hold_all_that_is_seen_and_whole_blocks_nothing_else(case, sliding_window, text_alone):
    layout, _ = case
    count = layout.position_ids.shape[1]
    queries = len(layout.branch) if text_alone else count
    if not queries:
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flex, "BLOCK", 3)
        mask = flex.make_block_mask(layout, queries, sliding_window)
    seen = reference.make_mask(layout, sliding_window)[-queries:]
    tiles = torch.nn.functional.pad(seen, (0, -count % 3, 0, -queries % 3)).unfold(0, 3, 3).unfold(1, 3, 3)
    part, whole = dense(mask.kv_num_blocks, mask.kv_indices), dense(mask.full_kv_num_blocks, mask.full_kv_indices)
    assert not (part & whole).any()
    assert torch.equal(part | whole, tiles.flatten(2).any(-1))
    assert tiles[whole].all()
    # a block is whole if one span covers it
    if len(layout.trunk_lengths) == 1 and layout.num_trunk_tokens % 3 == 0:
        assert torch.equal(whole, tiles.flatten(2).all(-1))


def test_a_batch_of_short_rows_leaves_most_blocks_out():
    layout = pack(torch.ones(64, 32), (256,))  # 2 blocks of 128 virtual tokens, 16 of four rows each

    mask = flex.make_block_mask(layout, 256 + 64 * 32)

    assert mask.full_kv_num_blocks.sum() == 1 + 16 * 2  # the prompt's earlier blocks; the prompt for each text
    assert mask.kv_num_blocks.sum() == 2 + 16  # the diagonal


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.filterwarnings("ignore")  # the compiler warns
def test_one_compiled_kernel_skips_blocks_for_all_lengths_windows_and_caps(monkeypatch):
    from torch._dynamo.utils import counters

    compiled = flex._get_flex_attention.__wrapped__("cuda")
    monkeypatch.setattr(flex, "_get_flex_attention", lambda device_type: compiled)
    generator, compilations = torch.Generator().manual_seed(0), []
    for softcap in (None, 3.0, 50.0):
        for rows, sliding_window in (((300, 40, 1, 77), None), ((5, 1, 9), None), ((128,), 4), ((200, 150), 100)):
            mask = torch.arange(max(rows)) < torch.tensor(rows)[:, None]
            layout = pack(mask, (130, 3), torch.arange(len(rows)) // 2)
            count = layout.position_ids.shape[1]
            inputs = [torch.randn(1, heads, count, 16, generator=generator) for heads in (6, 3, 3)]
            with torch.no_grad():
                fast, slow = (
                    function(*inputs, layout, sliding_window=sliding_window, softcap=softcap)
                    for function in (flex.packed_attention, reference.packed_attention)
                )
            torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-5)
            compilations.append(counters["stats"]["unique_graphs"])
    assert compilations[3] == compilations[0]  # without soft-capping
    assert compilations[-1] == compilations[4] == compilations[0] + 1  # with it


@pytest.fixture
def flex_first(monkeypatch):
    monkeypatch.setenv(select.VARIABLE, "flex")


@pytest.mark.parametrize("kind", ["right", "left", "holes"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2", "gemma3_text", "mistral"])
def test_models_give_each_rows_own_results(build_model, flex_first, architecture, kind):
    """The windows are 16: 13 virtual tokens and 11 real ones."""
    model = prompted(build_model(architecture), "CAUSAL_LM", num_virtual_tokens=13)

    assert_rows_equal_those_alone(model, padded(kind, "CAUSAL_LM"), "CAUSAL_LM")

    assert engine_status(model).attention == "flex"


def test_classifiers_give_each_rows_own_results(build_model, flex_first):
    model = prompted(build_model("llama", "SEQ_CLS"), "SEQ_CLS")

    assert_rows_equal_those_alone(model, padded("left", "SEQ_CLS"), "SEQ_CLS")

    assert engine_status(model).attention == "flex"


def test_a_batch_is_laid_out_in_blocks_once_for_each_window_not_for_each_layer(build_model, flex_first, monkeypatch):
    made, make_block_mask = [], flex.make_block_mask
    monkeypatch.setattr(flex, "make_block_mask", lambda *args: made.append(args[1:]) or make_block_mask(*args))
    model = prompted(build_model("gemma2", num_hidden_layers=5), "CAUSAL_LM")
    engine_status(model)
    made.clear()

    batch = padded("holes", "CAUSAL_LM")

    model(**batch).loss.backward()

    count = VIRTUAL + int(batch["attention_mask"].sum())
    assert sorted(made, key=str) == [(count, 16), (count, None)]


def test_mixed_batches_and_kept_prompts(build_model, flex_first):
    model = mixed_model(build_model).eval()
    batch = padded("left", "CAUSAL_LM")
    wanted = []
    for row, name in enumerate(("b", "__base__", "c")):
        text = batch["input_ids"][row, batch["attention_mask"][row].bool()][None]
        if name == "__base__":
            wanted.append(model.get_base_model()(input_ids=text).logits[0])
        else:
            model.set_adapter(name)
            wanted.append(model(input_ids=text).logits[0, -text.shape[1] :])
    for gradients in (True, False):  # without gradients, prefixes are kept
        with torch.set_grad_enabled(gradients):
            logits = model(**batch, adapter_names=["b", "__base__", "c"]).logits[:, 9:]
        torch.testing.assert_close(logits[batch["attention_mask"].bool()], torch.cat(wanted), rtol=0, atol=1e-4)
    assert set(model._engine.prefixes) == {"b", "c"}
    assert engine_status(model).attention == "flex"


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(build_model, flex_first, reentrant):
    gradients = []
    for checkpointing in (False, True):
        model = prompted(build_model("llama"), "CAUSAL_LM").train()
        if checkpointing:
            checkpoint_activations(model, use_reentrant=reentrant)
        model(**padded("holes", "CAUSAL_LM")).loss.backward()
        gradients.append(prompt_of(model).grad)
        assert engine_status(model).attention == "flex"
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-8)
