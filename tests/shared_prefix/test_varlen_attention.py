"""FlashAttention over sequences of several lengths, by the CPU's kernel one by one, against the dense oracle."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_prompt_ext import engine_status
from peft_prompt_ext.shared_prefix.attention import reference, sdpa, select, varlen
from peft_prompt_ext.shared_prefix.layout import causal, pack
from tests.helpers import one_thread, prompted  # noqa: F401
from tests.shared_prefix.helpers import assert_rows_equal_those_alone, padded
from tests.shared_prefix.test_packed_attention import assert_equal_with_kept_trunks, layouts, tokens


def each_alone(query, key, value, parts, scaling, sliding_window):
    """The expected result of `varlen.flash_attention`."""
    assert (parts.query_ends.dtype, parts.key_ends.dtype) == (torch.int32, torch.int32)
    assert parts.query_ends.diff().max() <= parts.longest_query
    assert parts.key_ends.diff().max() <= parts.longest_key
    out = []
    ends = zip(parts.query_ends.tolist(), parts.key_ends.tolist(), strict=True)
    for (first, first_key), (end, end_key) in itertools.pairwise(ends):
        places = torch.arange(end_key - first_key)
        mask = causal(places[len(places) - (end - first) :], places, sliding_window)
        heads = (x.transpose(0, 1)[None] for x in (query[first:end], key[first_key:end_key], value[first_key:end_key]))
        one = torch.nn.functional.scaled_dot_product_attention(*heads, attn_mask=mask, scale=scaling, enable_gqa=True)
        out.append(one[0].transpose(0, 1))
    return torch.cat(out)


@pytest.fixture(autouse=True, scope="module")
def flash_on_a_cpu():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(varlen, "DTYPES", (torch.float64, torch.float32, torch.bfloat16))
        patch.setattr(varlen, "flash_attention", each_alone)
        yield


@settings(max_examples=150, deadline=None)
@given(layouts(), st.sampled_from([None, 1, 2, 4, 100]), st.sampled_from([None, 0.3]))
def test_outputs_and_gradients_equal_the_dense_oracles(case, sliding_window, scaling):
    layout, _ = case
    if layout.position_ids.shape[1] == 0:
        return  # neither a virtual nor a real token
    results = []
    for function in (varlen.packed_attention, reference.packed_attention):
        inputs = tokens(layout)
        out = function(*inputs, layout, scaling=scaling, sliding_window=sliding_window)
        weight = torch.arange(out.numel(), dtype=out.dtype).view(out.shape).sin()
        results.append([out, *torch.autograd.grad((out * weight).sum(), inputs)])
    for fast, slow in zip(*results, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-9, atol=1e-9)


@settings(max_examples=50, deadline=None)
@given(layouts())
def test_branches_with_kept_trunks_have_their_outputs_and_gradients(case):
    layout, _ = case
    if not len(layout.branch):
        return
    assert_equal_with_kept_trunks(varlen.packed_attention, layout)


def test_dropout_is_not_lost():
    layout = pack(torch.ones(2, 3), (4,))
    results = []
    for function in (varlen.packed_attention, sdpa.packed_attention):
        torch.manual_seed(0)
        results.append(function(*tokens(layout), layout, dropout=0.5))
    assert torch.equal(*results)


def test_unsupported_options_of_flash_attention_are_refused(monkeypatch):
    monkeypatch.undo()
    layout = pack(torch.ones(2, 3), (4,))
    with pytest.raises(NotImplementedError, match="soft-capping"):
        varlen.packed_attention(*tokens(layout), layout, softcap=3.0)
    with pytest.raises(NotImplementedError, match="sinks"):
        varlen.packed_attention(*tokens(layout), layout, sinks=torch.zeros(6))
    monkeypatch.setattr(varlen, "DTYPES", (torch.float16,))
    with pytest.raises(NotImplementedError, match=r"not torch\.float64"):
        varlen.packed_attention(*tokens(layout), layout)


@pytest.mark.parametrize("kind", ["right", "left", "holes"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3_text", "mistral"])
def test_models_give_each_rows_own_results(build_model, monkeypatch, architecture, kind):
    """The windows are 16: 13 virtual tokens and 11 real ones."""
    monkeypatch.setenv(select.VARIABLE, "varlen")
    model = prompted(build_model(architecture), "CAUSAL_LM", num_virtual_tokens=13)

    assert_rows_equal_those_alone(model, padded(kind, "CAUSAL_LM"), "CAUSAL_LM")

    assert engine_status(model).attention == "varlen"
