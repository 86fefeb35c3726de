"""The selection of an attention: proved once for each device and precision, and reported."""

import copy
import logging

import pytest
import torch

from peft_prompt_ext import engine_status
from peft_prompt_ext.shared_prefix import probe
from peft_prompt_ext.shared_prefix.attention import reference, select
from peft_prompt_ext.shared_prefix.attention.select import AttentionCall
from peft_prompt_ext.shared_prefix.precision import precision
from tests.helpers import one_thread, prompted  # noqa: F401
from tests.shared_prefix.helpers import assert_rows_equal_those_alone, padded


CPU = torch.device("cpu")


def call_of(dtype=torch.float32, **options):
    return AttentionCall(CPU, ((6, 10, dtype), (3, 10, dtype), (3, 7, dtype)), tuple(sorted(options.items())))


def fails(*args, **options):
    raise RuntimeError("no kernel for this\nand three pages more")


def forgets_the_scale(*args, scaling=None, **options):
    return reference.packed_attention(*args, **options)


def forgets_the_window(*args, sliding_window=None, **options):
    return reference.packed_attention(*args, **options)


def stops_the_gradient_of_the_keys(query, key, value, layout, **options):
    return reference.packed_attention(query, key.detach() + 0 * key, value, layout, **options)


def gives_nan(*args, **options):
    return reference.packed_attention(*args, **options) * torch.nan


def swaps_the_kept_keys_and_values(*args, kept=None, **options):
    if kept is not None:
        keys, values = kept
        kept = torch.nn.functional.pad(values, (0, keys.shape[3] - values.shape[3])), keys[..., : values.shape[3]]
    return reference.packed_attention(*args, kept=kept, **options)


def stops_the_gradient_beside_kept_trunks(query, key, value, layout, kept=None, **options):
    value = value if kept is None else value.detach() + 0 * value
    return reference.packed_attention(query, key, value, layout, kept=kept, **options)


WRONG = {
    fails: "RuntimeError: no kernel for this)",
    forgets_the_scale: "relative error",
    forgets_the_window: "relative error",
    stops_the_gradient_of_the_keys: "relative error",
    gives_nan: "relative error nan",
    swaps_the_kept_keys_and_values: "relative error",
    stops_the_gradient_beside_kept_trunks: "relative error",
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_attention_is_not_taken_and_its_reason_is_given(monkeypatch, wrong, dtype):
    monkeypatch.setitem(select.ATTENTIONS, "flex", wrong)
    calls = [call_of(dtype), call_of(dtype, scaling=0.3, sliding_window=4096)]

    name, (reason,) = select.select(["flex"], calls)

    assert name == "sdpa"
    assert reason.startswith("flex attention is not used (")
    assert WRONG[wrong] in reason
    assert "\n" not in reason


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["sdpa", "reference"])
def test_right_attentions_pass_the_proof(monkeypatch, name, dtype):
    monkeypatch.setitem(select.ATTENTIONS, "reference", reference.packed_attention)
    state = torch.get_rng_state()
    for options in ({}, {"scaling": 0.3, "sliding_window": 7}, {"softcap": 2.0}):
        assert select.differs(select.ATTENTIONS[name], call_of(dtype, **options)) is None
    with torch.inference_mode():  # as a user's batch may
        assert select.differs(select.ATTENTIONS[name], call_of(dtype)) is None
    assert torch.equal(torch.get_rng_state(), state)


def test_cuda_is_offered_varlen_and_flex_and_a_cpu_sdpa(build_model, monkeypatch):
    assert select.list_candidates(torch.device("cuda", 1)) == ("varlen", "flex")
    monkeypatch.setitem(select.ATTENTIONS, "flex", fails)
    status = engine_status(prompted(build_model("llama"), "CAUSAL_LM"))
    assert (status.attention, "flex" in status.reason) == ("sdpa", False)


def test_the_environment_decides_what_is_tried(monkeypatch):
    monkeypatch.setenv(select.VARIABLE, "sdpa")
    assert select.list_candidates(torch.device("cuda")) == ()
    monkeypatch.setenv(select.VARIABLE, "flex")
    assert select.list_candidates(CPU) == ("flex",)


def test_an_unknown_attention_is_an_error(build_model, monkeypatch):
    monkeypatch.setenv(select.VARIABLE, "flash")
    model = prompted(build_model("llama"), "CAUSAL_LM")
    with pytest.raises(ValueError, match="Set it to 'sdpa' or 'varlen' or 'flex'"):
        model(**padded("left", "CAUSAL_LM"))


@pytest.fixture
def offered(monkeypatch):
    """Adds an attention to the CPU's candidates; returns the query lengths of its calls after the proof."""

    def offer(function):
        seen = []

        def spy(query, key, value, layout, **options):
            seen.append(query.shape[2])
            return function(query, key, value, layout, **options)

        monkeypatch.setitem(select.ATTENTIONS, "flex", spy)
        monkeypatch.setitem(select.CANDIDATES, "cpu", ("flex",))
        return seen

    return offer


def test_the_proved_attention_runs_in_every_layer_and_is_logged(build_model, offered, caplog):
    seen = offered(reference.packed_attention)
    model = prompted(build_model("gemma2"), "CAUSAL_LM", num_virtual_tokens=13)
    with caplog.at_level(logging.INFO, "peft_prompt_ext"):
        assert engine_status(model).attention == "flex"
    assert "run packed, with flex attention: relative error" in caplog.text
    seen.clear()

    assert_rows_equal_those_alone(model, padded("holes", "CAUSAL_LM"), "CAUSAL_LM")

    assert seen == [13 + 6 + 11 + 1] * 2


@pytest.mark.parametrize("wrong", [fails, stops_the_gradient_of_the_keys])
def test_a_model_whose_attention_is_not_proved_takes_sdpa(build_model, offered, caplog, wrong):
    seen = offered(wrong)
    model = prompted(build_model("llama"), "CAUSAL_LM")
    with caplog.at_level(logging.INFO, "peft_prompt_ext"):
        status = engine_status(model)
    assert (status.packed, status.attention) == (True, "sdpa")
    assert "flex attention is not used (" in status.reason
    assert status.reason in caplog.text
    seen.clear()

    assert_rows_equal_those_alone(model, padded("holes", "CAUSAL_LM"), "CAUSAL_LM")

    assert not seen


def test_a_refused_model_has_no_attention_and_an_unproved_one_sdpa(build_model, offered):
    offered(reference.packed_attention)
    assert engine_status(prompted(build_model("bloom"), "CAUSAL_LM")).attention is None
    unproved = prompted(build_model("llama"), "CAUSAL_LM", shared_prefix_probe=False)
    assert engine_status(unproved).attention == "sdpa"


def test_selection_runs_once_for_each_precision_and_the_status_is_of_the_last_batch(build_model, offered, monkeypatch):
    def exact_alone(query, *args, **options):
        if query.dtype == torch.bfloat16 or torch.is_autocast_enabled("cpu"):
            raise RuntimeError("not in bfloat16")
        return reference.packed_attention(query, *args, **options)

    offered(exact_alone)
    choices, batch = [], padded("left", "CAUSAL_LM")
    monkeypatch.setattr(probe, "select", lambda *args: choices.append(1) or select.select(*args))
    model = prompted(build_model("llama"), "CAUSAL_LM")
    for _ in range(2):
        model(**batch)
        assert engine_status(model).attention == "flex"
        with torch.autocast("cpu", torch.bfloat16):
            model(**batch)
        assert engine_status(model).attention == "sdpa"
        assert "not in bfloat16" in engine_status(model).reason
    assert len(choices) == 2
    model.bfloat16()(**batch)
    assert (engine_status(model).attention, len(choices)) == ("sdpa", 3)


def test_what_was_proved_here_is_not_copied_to_another_machine(build_model, offered, monkeypatch):
    offered(reference.packed_attention)
    model = prompted(build_model("llama"), "CAUSAL_LM")
    assert engine_status(model).attention == "flex"
    monkeypatch.setitem(select.ATTENTIONS, "flex", fails)
    assert engine_status(copy.deepcopy(model)).attention == "sdpa"


def wrong_for_few_queries(query, *args, **options):
    out = reference.packed_attention(query, *args, **options)
    return out * 2 if query.shape[2] < 128 else out


def wrong_without_a_prompt(query, key, value, layout, **options):
    out = reference.packed_attention(query, key, value, layout, **options)
    return out * 2 if 0 in layout.trunk_lengths else out


@pytest.mark.parametrize("wrong", [wrong_for_few_queries, wrong_without_a_prompt])
def test_an_attention_that_is_wrong_for_some_batches_alone_is_not_taken(wrong):
    assert "tokens" in select.differs(wrong, call_of())
    assert select.differs(reference.packed_attention, call_of()) is None


@pytest.mark.parametrize("allowed", ["high", "medium"])
def test_rounded_products_are_a_precision_of_their_own(build_model, offered, allowed):
    seen = offered(reference.packed_attention)
    model, batch = prompted(build_model("llama"), "CAUSAL_LM"), padded("left", "CAUSAL_LM")
    model(**batch)
    exact, seen[:] = precision(torch.zeros(1)), []
    try:
        torch.set_float32_matmul_precision(allowed)
        assert precision(torch.zeros(1)) != exact
        assert select.TOLERANCE.of(CPU, torch.float32) == select.TOLERANCE.reduced
        assert select.TOLERANCE.of(CPU, torch.float64) == select.TOLERANCE.float32
        model(**batch)
        assert len(seen) > len(model.get_base_model().model.layers)  # it was proved again
    finally:
        torch.set_float32_matmul_precision("highest")
    assert precision(torch.zeros(1)) == exact
    assert select.TOLERANCE.of(CPU, torch.float32) == select.TOLERANCE.float32
