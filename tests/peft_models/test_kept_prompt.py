"""`generate` with a prompt that is computed once, compared with one that runs with the text of each row."""

import copy
import logging
import threading
import time
from contextlib import contextmanager

import pytest
import torch
from transformers import DynamicCache, StaticCache

from peft_prompt_ext import engine_status
from peft_prompt_ext.peft_models.decoding import kept
from tests.helpers import one_thread, prompt_of  # noqa: F401
from tests.peft_models.decoding import (
    LEFT,
    MASKS,
    NEW,
    OPTIONS,
    TEXT,
    P,
    alone,
    architectures,
    loop,
    new_tokens,
    text,
)


WINDOWS = {"gemma3_text", "mistral"}
UNPROVED = {"bloom"}


@pytest.fixture
def computed(monkeypatch):
    """The number of virtual tokens in each kept prompt that was computed, in their order."""
    lengths, keep = [], kept.keep_cache

    def counting(base_model, prompt):
        lengths.append(len(prompt))
        return keep(base_model, prompt)

    monkeypatch.setattr(kept, "keep_cache", counting)
    return lengths


@contextmanager
def recomputing(model):
    """Run the prompt with each row's text inside."""
    config = model.active_peft_config
    config.shared_prefix = False
    yield
    config.shared_prefix = True


def reasons(caplog):
    """The reasons for which prompts ran with texts."""
    return [r.args[0] for r in caplog.records if r.name == kept.__name__]


def run_both(model, ids, **options):
    """The output with a kept prompt, and with one that runs with each text."""
    options = {**OPTIONS, "return_dict_in_generate": True, "output_logits": True, **options}
    torch.manual_seed(0)
    got = model.generate(ids, **options)
    with recomputing(model):
        torch.manual_seed(0)
        return got, model.generate(ids, **options)


# --- the same tokens

WAYS = {
    "greedy": {},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "sampling": {"do_sample": True, "num_return_sequences": 2, "temperature": 0.8},
    "static": {"cache_implementation": "static"},
    "processors": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    "lookup": {"prompt_lookup_num_tokens": 3},
}


@architectures
@pytest.mark.parametrize("side", [None, *MASKS])
@pytest.mark.parametrize("way", WAYS)
def test_a_kept_prompt_gives_the_tokens_of_one_that_runs_with_each_text(
    pair, computed, caplog, architecture, side, way
):
    caplog.set_level(logging.DEBUG, kept.__name__)
    model, _ = pair(architecture)
    rows = 1 if way == "lookup" else 3
    mask = torch.ones_like(LEFT[:rows]) if side is None else MASKS[side][:rows]
    ids = text(rows).masked_fill(mask == 0, 2)

    got, want = run_both(model, ids, attention_mask=mask, **WAYS[way])

    assert got.sequences.tolist() == want.sequences.tolist()
    torch.testing.assert_close(got.logits, want.logits, rtol=1e-4, atol=1e-4)
    is_kept = architecture not in UNPROVED and (side is None or architecture not in WINDOWS)
    assert computed == [P] * is_kept and len(reasons(caplog)) == 2 - is_kept


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("side", [None, "left"])
def test_embeddings_and_wide_masks_read_a_kept_prompt_too(pair, computed, architecture, side):
    model, base = pair(architecture)
    mask = torch.ones_like(LEFT) if side is None else MASKS[side]
    ids = text(3).masked_fill(mask == 0, 2)
    with recomputing(model):
        want = alone(model, ids, mask)
    embeds = base.get_input_embeddings()(ids).detach()
    wide = torch.cat([mask.new_ones(3, P), mask], dim=1)

    assert model.generate(inputs_embeds=embeds, attention_mask=mask, **OPTIONS).tolist() == want
    assert model.generate(ids, inputs_embeds=embeds, attention_mask=wide, **OPTIONS)[:, TEXT:].tolist() == want
    assert new_tokens(model, ids, attention_mask=wide) == want
    assert computed == [P]


def test_a_call_with_an_assistant_or_without_text_reads_a_kept_prompt(pair, computed, caplog):
    caplog.set_level(logging.DEBUG, kept.__name__)
    model, base = pair()
    with recomputing(model):
        want = new_tokens(model, text(1))
    caplog.clear()
    assert new_tokens(model, text(1), assistant_model=base) == want
    assert new_tokens(model, text(1), assistant_model=model.get_base_model()) == want
    assert model.generate(**OPTIONS).shape == (1, 1 + NEW)  # begins with the bos token
    assert computed == [P] and not reasons(caplog)


# --- computed once


def count_tokens(monkeypatch, model):
    """Count the tokens in every row of each pass of a model's first layer."""
    counted, kind = [], type(model.get_base_model().model.layers[0].mlp)
    first, forward = model.get_base_model().model.layers[0].mlp, kind.forward

    def counting(self, x):
        if self is first:
            counted.append(x.shape[0] * x.shape[1])
        return forward(self, x)

    monkeypatch.setattr(kind, "forward", counting)
    return counted


def test_the_prompt_runs_once_for_several_calls(pair, monkeypatch):
    model, _ = pair()
    new_tokens(model, text(1))
    model.eval()  # drops the kept prompt; the proofs stay
    counted = count_tokens(monkeypatch, model)
    for rows in (3, 2, 4):
        new_tokens(model, text(rows), num_beams=2)
    decoded = sum(2 * rows * (TEXT + NEW - 1) for rows in (3, 2, 4))
    assert sum(counted) == P + decoded

    counted.clear()
    with recomputing(model):
        new_tokens(model, text(3))
    assert sum(counted) == 3 * (P + TEXT + NEW - 1)


def change_prompt(model):
    with torch.no_grad():
        prompt_of(model)[1] += 1.0


def change_weight(model):
    with torch.no_grad():
        model.get_base_model().model.layers[0].self_attn.v_proj.weight.mul_(1.5)


def change_data(model):
    """Write past torch's versions, as some optimizers do."""
    model.train()
    model.get_base_model().model.layers[0].self_attn.v_proj.weight.data.mul_(1.5)
    model.eval()


def change_adapter(model):
    model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
    model.set_adapter("other")


CHANGES = {
    "prompt": change_prompt,
    "weight": change_weight,
    "train and eval": lambda model: model.train().eval(),
    "eval": lambda model: model.eval(),
    "data": change_data,
    "dtype": lambda model: model.to(torch.float64),
    "option": lambda model: setattr(model.get_base_model().config, "rms_norm_eps", 0.5),
    "adapter": change_adapter,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_the_model_drops_the_kept_prompt(pair, computed, change):
    model, _ = pair()
    for _ in range(2):
        new_tokens(model, text())
    assert computed == [P]
    CHANGES[change](model)

    got, want = run_both(model, text())

    torch.testing.assert_close(got.logits, want.logits, rtol=1e-4, atol=1e-4)
    assert got.sequences.tolist() == want.sequences.tolist() and computed == [P, P]


def test_another_precision_drops_the_kept_prompt(pair, computed):
    model, _ = pair()
    want = new_tokens(model, text())
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            run_both(model, text())
    assert len(computed) == 2
    assert new_tokens(model, text()) == want
    assert len(computed) == 3


def test_each_adapter_has_its_kept_prompt(pair, computed):
    model, _ = pair()
    model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
    got = {}
    for name in ("default", "other", "default", "other"):
        model.set_adapter(name)
        tokens = new_tokens(model, text())
        assert got.setdefault(name, tokens) == tokens
    assert computed == [P, P] and got["default"] != got["other"]


def test_a_prompt_that_was_kept_in_inference_mode_is_read_outside(pair, computed):
    model, _ = pair()
    with recomputing(model):
        want = new_tokens(model, text())
    with torch.inference_mode():
        assert new_tokens(model, text()) == want
    got = model.generate(text(), **OPTIONS)
    assert got[:, TEXT:].tolist() == want and computed == [P]
    loss = model(input_ids=text(), labels=text()).loss
    loss.backward()
    assert prompt_of(model).grad.norm() > 0


def test_batches_and_generate_keep_their_prompts_beside_each_other(pair, computed):
    model, _ = pair()
    with recomputing(model):
        want = new_tokens(model, text())
    assert new_tokens(model, text()) == want
    with torch.no_grad():
        model(input_ids=text(), use_cache=False)
    assert new_tokens(model, text()) == want and computed == [P]
    assert set(model._engine.prefixes) == set(model._engine.caches) == {"default"}
    assert not copy.deepcopy(model)._engine.caches


def test_calls_in_threads_share_one_kept_prompt(pair, computed, monkeypatch):
    model, _ = pair()
    texts = [text(1 + i % 3, 3 + i, seed=i) for i in range(6)]
    with recomputing(model):
        want = [new_tokens(model, ids) for ids in texts]
    got, barrier, keep = [None] * len(texts), threading.Barrier(len(texts)), kept.keep_cache
    monkeypatch.setattr(kept, "keep_cache", lambda *args: time.sleep(0.3) or keep(*args))  # the others run meanwhile
    assert engine_status(model).packed  # so that none waits for the proof

    def run(i):
        barrier.wait()
        got[i] = [new_tokens(model, texts[i]) for _ in range(3)]

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(texts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert got == [[tokens] * 3 for tokens in want] and computed == [P]


# --- where the prompt runs with the text


def in_training(model):
    model.get_base_model().model.layers[0].mlp.train()


def with_hook(model):
    model.get_base_model().model.layers[0].register_forward_hook(lambda module, args, output: None)


def without_engine(model):
    model.active_peft_config.shared_prefix = False


@pytest.mark.parametrize(
    ("architecture", "change", "options", "reason"),
    [
        ("llama", None, {"use_cache": False}, "use_cache=False"),
        ("llama", None, {"prefill_chunk_size": 3}, "prefill_chunk_size"),
        ("llama", None, {"output_hidden_states": True, "return_dict_in_generate": True}, "hidden states"),
        ("gpt2", None, {"output_attentions": True, "return_dict_in_generate": True}, "attentions"),
        ("llama", in_training, {}, "in training mode or has hooks"),
        ("llama", with_hook, {}, "in training mode or has hooks"),
        ("llama", without_engine, {}, "shared_prefix=False in the config"),
        ("mistral", None, {"attention_mask": LEFT[:2]}, "sliding windows"),
        ("gemma3_text", None, {"attention_mask": MASKS["right"][:2]}, "sliding windows"),
        ("bloom", None, {"attention_mask": LEFT[:2]}, "takes no position_ids"),
        ("bloom", None, {}, "ALiBi"),
    ],
)
def test_what_needs_the_prompt_with_each_text_says_why(pair, computed, caplog, architecture, change, options, reason):
    caplog.set_level(logging.DEBUG, kept.__name__)
    model, _ = pair(architecture, **({"attn_implementation": "eager"} if architecture == "gpt2" else {}))
    if change is not None:
        change(model)
    model.generate(text(), **OPTIONS, **options)
    assert not computed
    assert len(reasons(caplog)) == 1 and reason in reasons(caplog)[0]


@pytest.mark.parametrize("architecture", ["mamba", "lfm2"])
def test_states_cannot_be_repeated(pair, computed, caplog, monkeypatch, architecture):
    from tests import zoo

    caplog.set_level(logging.DEBUG, kept.__name__)
    own = {"layer_types": ["conv", "full_attention"]} if architecture == "lfm2" else {"state_size": 4, "expand": 2}
    sizes = {key: value for key, value in zoo._LLAMA.items() if key != "head_dim"}
    monkeypatch.setitem(zoo._SPECIFIC, architecture, {**sizes, "hidden_size": 32, **own})
    model, _ = pair(architecture)
    got, want = run_both(model, text())
    assert got.sequences.tolist() == want.sequences.tolist() and not computed
    assert "cannot be repeated over rows" in reasons(caplog)[0]


def test_a_prompt_as_long_as_a_window_runs_with_the_text(pair, computed, caplog):
    caplog.set_level(logging.DEBUG, kept.__name__)
    for words, is_kept in ((15, True), (16, False), (19, False)):  # the window has 16 tokens
        model, _ = pair("mistral", words=torch.arange(20, 20 + words))
        caplog.clear()
        got, want = run_both(model, text(2, 9))
        assert got.sequences.tolist() == want.sequences.tolist()
        assert [reason for reason in reasons(caplog) if "sliding window" in reason] == [
            f"a sliding window is not longer than the prompt of {words} virtual tokens"
        ] * (not is_kept)


def test_a_row_behind_the_end_of_short_positions_runs_whole(pair, computed, caplog, monkeypatch):
    from tests import zoo

    caplog.set_level(logging.DEBUG, kept.__name__)
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 6, "long_factor": [3.0] * 6}
    rope |= {"original_max_position_embeddings": 20}
    monkeypatch.setitem(zoo._SPECIFIC, "llama", {**zoo._LLAMA, "rope_parameters": rope})
    model, _ = pair()
    for tokens, count in ((TEXT, 1), (29, 1)):
        got, want = run_both(model, text(2, tokens))
        torch.testing.assert_close(got.logits, want.logits, rtol=1e-4, atol=1e-4)
        assert len(computed) == count
    assert any("is longer than" in reason for reason in reasons(caplog))


@pytest.mark.parametrize("kind", ["dynamic", "static", "with text"])
def test_a_cache_that_the_caller_gives_is_never_taken_for_one_with_the_prompt(pair, computed, caplog, kind):
    caplog.set_level(logging.DEBUG, kept.__name__)
    model, base = pair()
    want = new_tokens(model, text())
    if kind == "with text":
        one = model.generate(text(), return_dict_in_generate=True, **OPTIONS)
        cache, ids = one.past_key_values, torch.cat([one.sequences, text(2, 3, seed=5)], dim=1)
        want = new_tokens(model, ids)
    else:
        cache, ids = (DynamicCache() if kind == "dynamic" else StaticCache(base.config, max_cache_len=40)), text()
    assert new_tokens(model, ids, past_key_values=cache) == want
    assert int(cache.get_seq_length()) == P + ids.shape[1] + NEW - 1
    assert len(computed) == 1 and reasons(caplog) == ["the caller gives a cache"] * (kind != "with text")
    foreign = base(text()).past_key_values  # the same number of tokens as a prompt and some text
    with pytest.raises(ValueError, match="of another model, without the prompt"):
        new_tokens(model, text(2, TEXT + 3), past_key_values=foreign)


# --- what is done with the cache afterwards


@pytest.mark.parametrize("side", [None, *MASKS])
@pytest.mark.parametrize("later", ["generate", "only new ids", "loop"])
def test_a_conversation_goes_on_behind_a_kept_prompt(pair, computed, side, later):
    model, _ = pair()
    mask = torch.ones_like(LEFT) if side is None else MASKS[side]
    ids = text(3).masked_fill(mask == 0, 2)
    one = model.generate(ids, attention_mask=mask, return_dict_in_generate=True, **OPTIONS)
    ids = torch.cat([one.sequences, text(3, 3, seed=5)], dim=1)
    mask = torch.cat([mask, mask.new_ones(3, NEW + 3)], dim=1)
    cache = one.past_key_values
    with recomputing(model):
        want = alone(model, ids, mask)
    if later == "loop":
        got = loop(model, ids[:, TEXT + NEW - 1 :], cache, mask)[0]
    else:
        given = ids if later == "generate" else ids[:, TEXT + NEW - 1 :]
        got = new_tokens(model, given, attention_mask=mask, past_key_values=cache)
    assert got == want and computed == [P]


def first_cache(model, mask):
    """The text and the cache of one step of `generate`."""
    ids = text(3).masked_fill(mask == 0, 2)
    options = {**OPTIONS, "max_new_tokens": 1, "min_new_tokens": 1, "return_dict_in_generate": True}
    return ids, model.generate(ids, attention_mask=mask, **options).past_key_values


@pytest.mark.parametrize("cropped", [2, 5, TEXT])
def test_left_pads_behind_a_kept_prompt_may_be_cropped_at_any_place(pair, cropped):
    model, _ = pair()
    ids, cache = first_cache(model, LEFT)
    cache.crop(-cropped)
    ids = torch.cat([ids[:, : TEXT - cropped], text(3, 4, seed=5)], dim=1)
    mask = torch.cat([LEFT[:, : TEXT - cropped], LEFT.new_ones(3, 4)], dim=1)
    assert new_tokens(model, ids, attention_mask=mask, past_key_values=cache) == alone(model, ids, mask)


def test_cropping_into_moved_pads_behind_a_kept_prompt_is_refused(pair):
    model, _ = pair()
    mask = MASKS["right"]
    _, cache = first_cache(model, mask)
    cache.crop(-2)
    with pytest.raises(ValueError, match="cropped to 5 text tokens"):
        model(input_ids=text(3, 1), attention_mask=mask[:, :6], past_key_values=cache)
    cache.crop(2 - TEXT)  # the prompt alone is left
    padded = text(3).masked_fill(LEFT == 0, 2)
    got = new_tokens(model, padded, attention_mask=LEFT, past_key_values=cache)
    assert got == alone(model, padded, LEFT)


@pytest.mark.parametrize("side", [None, "left"])
def test_a_loop_may_begin_again_behind_the_prompt_alone(pair, side):
    model, _ = pair()
    mask = torch.ones_like(LEFT) if side is None else MASKS[side]
    _, cache = loop(model, text(3), mask=mask, steps=1)
    cache.crop(-TEXT)
    padded = text(3).masked_fill(LEFT == 0, 2)
    if side is None:
        assert new_tokens(model, padded, attention_mask=LEFT, past_key_values=cache) == alone(model, padded, LEFT)
        return
    with pytest.raises(ValueError, match="cropped to 0 text tokens"):  # pads are left, and part of the prompt is not
        new_tokens(model, padded, attention_mask=LEFT, past_key_values=cache)
