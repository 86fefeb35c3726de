"""Decoding with a prompt, compared with the base model that reads words in place of the prompt."""

import copy
import pickle
import threading
from functools import wraps
from inspect import signature

import pytest
import torch
import transformers
from packaging.version import Version
from peft import get_peft_model
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    DynamicCache,
    GenerationConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    PreTrainedTokenizerFast,
    StaticCache,
    StoppingCriteria,
    pipeline,
)
from transformers.generation import CompileConfig
from transformers.generation.streamers import BaseStreamer

from peft_prompt_ext import PromptTuningExtConfig, engine_status
from tests.helpers import one_thread, prompt_of, prompted  # noqa: F401
from tests.peft_models.decoding import (
    LEFT,
    MASKS,
    NEW,
    OPTIONS,
    POSITIONS_OF,
    TEXT,
    WORDS,
    P,
    alone,
    architectures,
    loop,
    new_tokens,
    old_name,
    text,
    with_words,
)


def first_turn(model, ids, **options):
    """The whole text of a second turn, and the cache of the first."""
    one = model.generate(ids, return_dict_in_generate=True, **{**OPTIONS, **options})
    return torch.cat([one.sequences, text(len(one.sequences), 3, seed=5)], dim=1), one.past_key_values


# --- decoding modes

WAYS = {
    "greedy": {},
    "without a cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
    "longer static cache": {"cache_implementation": "static", "max_cache_len": 61},
    "beams": {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.3},
    "sampling": {"do_sample": True, "num_return_sequences": 3, "temperature": 0.7},
    "sampled beams": {"do_sample": True, "num_beams": 2},
    "chunks": {"prefill_chunk_size": 3},
    "guidance": {"guidance_scale": 1.7},
    "processors": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_new_tokens": 3},
    "max_length": {"max_length": TEXT + NEW, "max_new_tokens": None},
}


@architectures
@pytest.mark.parametrize("way", WAYS)
def test_a_prompt_decodes_as_its_words_do(pair, architecture, way):
    model, base = pair(architecture)
    ids, options = text(), {**OPTIONS, **WAYS[way]}
    wanted = {**options, "max_length": P + TEXT + NEW} if way == "max_length" else options
    if way == "processors":  # processors see the words, so words must not matter
        wanted = {
            **options,
            "logits_processor": [WithoutWords()],
            "repetition_penalty": None,
            "no_repeat_ngram_size": 0,
        }

    torch.manual_seed(0)
    got = model.generate(ids, **options)[:, TEXT:]
    torch.manual_seed(0)
    want = base.generate(with_words(ids), **wanted)[:, P + TEXT :]

    assert got.tolist() == want.tolist()


class WithoutWords(LogitsProcessor):
    def __call__(self, ids, scores):
        from transformers import NoRepeatNGramLogitsProcessor, RepetitionPenaltyLogitsProcessor

        scores = RepetitionPenaltyLogitsProcessor(1.3)(ids[:, P:], scores)
        return NoRepeatNGramLogitsProcessor(2)(ids[:, P:], scores)


@architectures
@pytest.mark.parametrize("way", ["assistant", "the base model assists", "lookup", "sampled lookup", "dynamic cache"])
def test_candidates_are_accepted_as_they_are_behind_the_words(pair, architecture, way):
    model, base = pair(architecture)
    ids = text(1).repeat(1, 3)
    options = {
        "assistant": {"assistant_model": base},
        "the base model assists": {"assistant_model": model.get_base_model()},
        "lookup": {"prompt_lookup_num_tokens": 3},
        "sampled lookup": {"prompt_lookup_num_tokens": 3, "do_sample": True, "top_k": 1},
        "dynamic cache": {"prompt_lookup_num_tokens": 3, "cache_implementation": "dynamic"},
    }[way]

    assert new_tokens(model, ids, max_new_tokens=11, **options) == new_tokens(base, with_words(ids), max_new_tokens=11)


def test_an_assistant_gets_the_mask_of_the_text(pair):
    model, base = pair()
    seen, ids, forward = [], text(1).masked_fill(LEFT[:1] == 0, 2), base.forward

    @wraps(forward)
    def noting(*args, **kwargs):
        seen.append(kwargs.get("attention_mask"))
        return forward(*args, **kwargs)

    base.forward = noting
    for mask in (LEFT[:1], torch.cat([LEFT.new_ones(1, P), LEFT[:1]], dim=1)):
        seen.clear()
        got = new_tokens(model, ids, attention_mask=mask, assistant_model=base)
        assert torch.equal(seen[0], LEFT[:1]) and got == alone(model, ids, LEFT[:1])


@pytest.mark.parametrize("side", MASKS)
def test_candidates_of_a_padded_row_are_accepted_as_without_its_pads(pair, side):
    model, _ = pair()
    mask = MASKS[side][:1]
    ids = (text(1) % 2 + 20).masked_fill(mask == 0, 2)  # repeated words, so that lookup finds some
    got = new_tokens(model, ids, attention_mask=mask, prompt_lookup_num_tokens=3)
    assert got == alone(model, ids, mask)


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "top_k": 1}], ids=str)
def test_an_assistant_may_have_a_tokenizer_of_its_own(pair, build_model, tokenizer, options, monkeypatch):
    # transformers pairs both vocabularies in their order, which tokenizers draws anew at each call; in some orders its
    # candidates have no logit, and its own models fail too
    kind, get_vocab = PreTrainedTokenizerFast, PreTrainedTokenizerFast.get_vocab
    monkeypatch.setattr(kind, "get_vocab", lambda self: dict(sorted(get_vocab(self).items(), key=lambda one: one[1])))
    bpe = ByteLevelBPETokenizer()
    words = ["fine actors and grim endings", "a grim plot, a fine cast"] * 3
    bpe.train_from_iterator(words, 270, special_tokens=["<s>", "</s>", "<pad>"], show_progress=False)
    own = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, bos_token="<s>", eos_token="</s>")
    model, base = pair()
    ids = tokenizer("a great film with a fine cast", return_tensors="pt").input_ids
    options |= {"assistant_model": build_model("llama", vocab_size=277, max_position_embeddings=127)}

    got = new_tokens(model, ids, tokenizer=tokenizer, assistant_tokenizer=own, **options)

    assert got == new_tokens(base, with_words(ids))


@architectures
@pytest.mark.parametrize("side", MASKS)
@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"cache_implementation": "static"}], ids=str)
def test_padded_rows_decode_as_each_does_alone(pair, architecture, side, options):
    model, _ = pair(architecture)
    mask = MASKS[side]
    ids = text(3).masked_fill(mask == 0, 2)

    wide = torch.cat([mask.new_ones(3, P), mask], dim=1)

    assert new_tokens(model, ids, attention_mask=mask, **options) == alone(model, ids, mask)
    assert new_tokens(model, ids, attention_mask=wide, **options) == alone(model, ids, mask)


def test_embeddings_decode_as_their_ids_do(pair):
    model, base = pair()
    ids = text()
    embeds = base.get_input_embeddings()(ids).detach()
    want = new_tokens(model, ids)

    assert model.generate(inputs_embeds=embeds, **OPTIONS).tolist() == want
    assert model.generate(ids, inputs_embeds=embeds, **OPTIONS)[:, TEXT:].tolist() == want
    assert model.generate(inputs_embeds=embeds, cache_implementation="static", **OPTIONS).tolist() == want


def test_no_text_begins_with_the_bos_token(pair):
    model, _ = pair()
    assert model.generate(**OPTIONS).tolist() == model.generate(torch.tensor([[0]]), **OPTIONS).tolist()


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("side", [None, "left", "right"])
def test_scores_and_hidden_states_stand_where_the_caller_has_them(pair, side, use_cache):
    model, _ = pair(attn_implementation="eager")
    mask = torch.ones_like(LEFT) if side is None else MASKS[side]
    ids = text(3).masked_fill(mask == 0, 2)
    asked = {**OPTIONS, "return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    asked |= {"output_hidden_states": True, "output_attentions": True, "use_cache": use_cache}

    together = model.generate(ids, attention_mask=mask, **asked)

    for row, real in enumerate(mask.bool()):
        one = model.generate(ids[row, real][None], **asked)
        places = torch.cat([torch.arange(P), P + real.nonzero()[:, 0]])
        for step in range(NEW):
            torch.testing.assert_close(together.scores[step][row], one.scores[step][0])
            keys = torch.cat([places, torch.arange(P + TEXT, P + TEXT + step)])
            queries = keys if step == 0 or not use_cache else torch.tensor([0])
            hidden, weights = together.hidden_states[step][-1][row], together.attentions[step][-1][row]
            torch.testing.assert_close(hidden[queries], one.hidden_states[step][-1][0])
            torch.testing.assert_close(weights[:, queries][:, :, keys], one.attentions[step][-1][0])


def test_a_streamer_gets_the_text_and_each_new_token(pair):
    model, base = pair()

    class Collect(BaseStreamer):
        def __init__(self):
            self.got = []

        def put(self, value):
            self.got += value.flatten().tolist()

        def end(self):
            self.got.append("end")

    streamer = Collect()
    want = new_tokens(base, with_words(text(1)))
    model.generate(text(1), streamer=streamer, **OPTIONS)

    assert streamer.got == [*text(1)[0].tolist(), *want[0], "end"]


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"custom_generate": "transformers-community/dola"}, "custom_generate"),
        ({"custom_generate": lambda model, input_ids, **kwargs: input_ids}, "custom_generate"),
        ({"cache_implementation": "paged"}, "paged"),
        ({"generation_config": GenerationConfig(**OPTIONS, cache_implementation="paged")}, "paged"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "contrastive_search"),
        ({"dola_layers": "high"}, "dola_generation"),
        ({"num_beams": 4, "num_beam_groups": 2}, "group_beam_search"),
        ({"num_beams": 2, "force_words_ids": [[5]]}, "constrained_beam_search"),
        ({"cache_implementation": "offloaded"}, "offloaded"),
        ({"assistant_early_exit": 1}, "assistant_early_exit"),
        ({"use_mtp": True}, "use_mtp"),
        ({"speculation_type": "dflash"}, "speculation_type='dflash'"),
        ({"prompt_lookup_num_tokens": 2, "cache_implementation": "static"}, "static"),
        ({"prompt_lookup_num_tokens": 2, "cache_implementation": "quantized"}, "quantized"),
        (
            {"prompt_lookup_num_tokens": 2, "return_dict_in_generate": True, "output_hidden_states": True},
            "output_hidden_states",
        ),
        (
            {"prompt_lookup_num_tokens": 2, "return_dict_in_generate": True, "output_attentions": True},
            "output_attentions",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_unsupported_modes_are_refused_by_name(pair, options, name):
    model, _ = pair()
    with pytest.raises(NotImplementedError, match=name) as refused:
        model.generate(text(1), **(options if "generation_config" in options else {**OPTIONS, **options}))
    assert "peft_prompt_ext" in str(refused.traceback[-1].path)


def test_candidates_of_a_model_that_keeps_states_are_refused(pair):
    model, _ = pair()
    model.get_base_model()._is_stateful = True
    with pytest.raises(NotImplementedError, match="LlamaForCausalLM, which has states"):
        model.generate(text(1), prompt_lookup_num_tokens=2, **OPTIONS)


def test_candidates_behind_a_static_cache_that_is_given_are_refused(pair):
    model, base = pair()
    cache = StaticCache(base.config, max_cache_len=P + TEXT + NEW)
    with pytest.raises(NotImplementedError, match="static or quantized cache"):
        model.generate(text(1), prompt_lookup_num_tokens=2, past_key_values=cache, **OPTIONS)


def test_hidden_states_of_candidates_that_nobody_returns_are_no_reason_to_refuse(pair):
    model, _ = pair()
    assert new_tokens(model, text(1), prompt_lookup_num_tokens=2, output_hidden_states=True) == new_tokens(
        model, text(1)
    )


def test_a_model_with_states_outside_of_a_cache_generates_without_it_alone(pair, monkeypatch):
    from tests import zoo

    sizes = {"hidden_size": 24, "attention_hidden_size": 24, "num_hidden_layers": 2, "intermediate_size": 41}
    monkeypatch.setitem(zoo._SPECIFIC, "rwkv", {**sizes, "context_length": 67})
    model, base = pair("rwkv")
    with pytest.raises(NotImplementedError, match="outside a cache"):
        model.generate(text(), **OPTIONS)
    assert new_tokens(model, text(), use_cache=False) == new_tokens(base, with_words(text()), use_cache=False)
    assert "past_key_values" not in model(input_ids=text())


def test_a_generate_that_the_base_model_has_of_its_own_is_refused(pair):
    model, _ = pair()
    model.get_base_model().generate = lambda ids, **kwargs: ids
    with pytest.raises(NotImplementedError, match="LlamaForCausalLM's own generate"):
        model.generate(text(1), **OPTIONS)


def test_a_prompted_assistant_is_refused(pair):
    model, base = pair()
    with pytest.raises(NotImplementedError, match="assisting another model"):
        base.generate(text(1), assistant_model=model, **OPTIONS)


def test_candidates_from_elsewhere_are_refused(pair, monkeypatch):
    from transformers.generation import candidate_generator

    class Unknown(candidate_generator.PromptLookupCandidateGenerator):
        pass

    model, _ = pair()
    monkeypatch.setattr("transformers.generation.utils.PromptLookupCandidateGenerator", Unknown)
    with pytest.raises(NotImplementedError, match="Unknown"):
        model.generate(text(1), prompt_lookup_num_tokens=3, **OPTIONS)


@pytest.mark.parametrize(("architecture", "backend"), [("llama", "quanto"), ("llama", "hqq"), ("mistral", "fp8")])
def test_a_cache_that_cannot_be_made_here_is_refused(pair, architecture, backend):
    model, _ = pair(architecture)  # two packages are missing, and windows cannot be quantized
    options = {"cache_implementation": "quantized", "cache_config": {"backend": backend}}
    with pytest.raises(ValueError, match="cache_implementation='quantized' could not be created") as refused:
        model.generate(text(1), **options, **OPTIONS)
    assert "peft_prompt_ext" in str(refused.traceback[-1].path)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=str)
def test_a_quantized_cache_gives_what_it_gives_behind_the_words(pair, architecture, options):
    if not hasattr(transformers.cache_utils, "Fp8QuantizedLayer"):
        pytest.skip("in this transformers every quantized cache needs a library of its own")
    model, base = pair(architecture)
    options |= {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}}
    ids = text(1).repeat(1, 2)
    assert new_tokens(model, ids, **options) == new_tokens(base, with_words(ids), **options)


METHODS = ["generate_batch", "init_continuous_batching", "continuous_batching_context_manager"]
METHODS += ["heal_tokens", "_sample", "_beam_search", "_assisted_decoding", "_prefill", "get_compiled_call"]


@pytest.mark.parametrize("name", METHODS)
def test_methods_of_generation_that_would_leave_the_prompt_out_are_refused(pair, name):
    model, _ = pair()
    assert hasattr(model, name)
    with pytest.raises(NotImplementedError, match=name):
        getattr(model, name)([[1, 2]])
    with model.disable_adapter():
        assert getattr(model, name) == getattr(model.get_base_model(), name)


def test_harmless_methods_of_generation_work(pair):
    model, _ = pair()
    out = model.generate(text(), return_dict_in_generate=True, output_scores=True, **OPTIONS)
    scores = model.compute_transition_scores(out.sequences, out.scores, normalize_logits=True)
    assert scores.shape == (2, NEW) and model.can_generate()


def test_a_model_of_another_task_does_not_generate_without_its_prompt(build_model):
    model = prompted(build_model("llama", "CAUSAL_LM"), "FEATURE_EXTRACTION")
    with pytest.raises(NotImplementedError, match="generate"):
        model.generate(text())


# --- a second turn


@architectures
@pytest.mark.parametrize("given", ["whole", "whole and mask", "whole and wide mask", "new", "new and wide mask"])
def test_a_second_turn_goes_on_with_the_first_ones_cache(pair, architecture, given):
    model, base = pair(architecture)
    ids, cache = first_turn(model, text())
    new = ids[:, ids.shape[1] - 4 :]  # the last generated token has not been read
    mask = torch.ones(2, ids.shape[1], dtype=torch.long)
    wide = torch.cat([mask.new_ones(2, P), mask], dim=1)
    turn, options = {
        "whole": (ids, {}),
        "whole and mask": (ids, {"attention_mask": mask}),
        "whole and wide mask": (ids, {"attention_mask": wide}),
        "new": (new, {"attention_mask": mask}),
        "new and wide mask": (new, {"attention_mask": wide}),
    }[given]

    got = new_tokens(model, turn, past_key_values=cache, **options)

    assert got == new_tokens(model, ids) == new_tokens(base, with_words(ids))


@architectures
@pytest.mark.parametrize("side", MASKS)
def test_a_second_turn_of_padded_rows(pair, architecture, side):
    model, _ = pair(architecture)
    mask = MASKS[side]
    one = model.generate(
        text(3).masked_fill(mask == 0, 2), attention_mask=mask, return_dict_in_generate=True, **OPTIONS
    )
    ids = torch.cat([one.sequences, text(3, 3, seed=5)], dim=1)
    mask = torch.cat([mask, mask.new_ones(3, NEW + 3)], dim=1)

    assert new_tokens(model, ids, attention_mask=mask, past_key_values=one.past_key_values) == alone(model, ids, mask)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_second_turn_may_be_padded_too(pair, architecture, side):
    model, _ = pair(architecture)
    ids, cache = first_turn(model, text(3))
    mask = torch.ones_like(ids)
    mask[0, {"left": slice(TEXT + NEW, TEXT + NEW + 2), "right": slice(-2, None)}[side]] = 0

    got = new_tokens(model, ids, attention_mask=mask, past_key_values=cache)
    third = torch.cat([ids, torch.tensor(got), text(3, 2, seed=7)], dim=1)
    mask = torch.cat([mask, mask.new_ones(3, NEW + 2)], dim=1)

    assert got == alone(model, ids, mask[:, : ids.shape[1]])
    assert new_tokens(model, third, attention_mask=mask, past_key_values=cache) == alone(model, third, mask)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt"])
def test_rows_that_ended_early_go_on_too(pair, architecture):
    model, _ = pair(architecture)
    first = model.generate(text(3), **OPTIONS)
    options = {
        **OPTIONS,
        "eos_token_id": int(first[1, TEXT + 2]),
        "min_new_tokens": None,
        "return_dict_in_generate": True,
    }
    one = model.generate(text(3), **options)
    mask = (one.sequences != 2).long()
    assert 0 < (mask.sum(1) < mask.shape[1]).sum() < 3
    ids = torch.cat([one.sequences, text(3, 3, seed=5)], dim=1)
    mask = torch.cat([mask, mask.new_ones(3, 3)], dim=1)

    asked = {
        **OPTIONS,
        "max_new_tokens": 1,
        "min_new_tokens": 1,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    together = model.generate(ids, attention_mask=mask, past_key_values=copy.deepcopy(one.past_key_values), **asked)
    for row, real in enumerate(mask.bool()):
        (by_itself,) = model.generate(ids[row, real][None], **asked).logits
        torch.testing.assert_close(together.logits[0][row], by_itself[0], rtol=1e-4, atol=1e-4)
    assert new_tokens(model, ids, attention_mask=mask, past_key_values=one.past_key_values) == alone(model, ids, mask)


@old_name
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt"])
def test_tokens_that_are_masked_later_are_masked_as_behind_the_words(pair, architecture):
    model, base = pair(architecture)
    asked = {**OPTIONS, "output_logits": True, "return_dict_in_generate": True}
    logits = []
    for reader, front in ((model, 0), (base, P)):
        ids, cache = first_turn(reader, with_words(text()) if front else text())
        mask = torch.ones_like(ids)
        mask[0, front + 2 : front + 6] = 0
        logits.append(reader.generate(ids, attention_mask=mask, past_key_values=cache, **asked).logits)
    torch.testing.assert_close(*map(torch.stack, logits), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", ["gemma3_text", "mistral", "bloom"])
def test_pads_between_two_turns_are_refused_where_a_window_counts_them(pair, architecture):
    model, _ = pair(architecture)
    ids, cache = first_turn(model, text(2))
    mask = torch.ones_like(ids)
    mask[0, TEXT + NEW] = 0
    with pytest.raises(NotImplementedError, match="rows of one length"):
        model.generate(ids, attention_mask=mask, past_key_values=cache, **OPTIONS)


@pytest.mark.parametrize(
    "options", [{"prompt_lookup_num_tokens": 3}, {"assistant_model": None}, {"num_beams": 1}], ids=str
)
def test_other_ways_go_on_as_well(pair, options):
    model, base = pair()
    options = {name: base if value is None else value for name, value in options.items()}
    ids, cache = first_turn(model, text(1))
    assert new_tokens(model, ids, past_key_values=cache, **options) == new_tokens(model, ids)


@pytest.mark.parametrize(
    "first", [{"prompt_lookup_num_tokens": 3}, {"cache_implementation": "static", "max_cache_len": 61}], ids=str
)
def test_caches_of_other_ways_go_on_as_well(pair, first):
    model, _ = pair()
    ids, cache = first_turn(model, text(1), **first)
    assert new_tokens(model, ids, past_key_values=cache) == new_tokens(model, ids)


def test_a_conversation_of_many_turns(pair):
    model, base = pair("gemma3_text")
    cache, ids = DynamicCache(config=base.config), text()
    for turn in range(4):
        out = model.generate(ids, past_key_values=cache, **OPTIONS)
        assert out.tolist() == base.generate(with_words(ids), **OPTIONS)[:, P:].tolist()
        ids = torch.cat([out, text(2, 2, seed=turn)], dim=1)


def test_sampled_sequences_go_on_each_with_its_own_rows(pair):
    model, _ = pair()
    torch.manual_seed(0)
    ids, cache = first_turn(model, text(), do_sample=True, num_return_sequences=3)
    assert new_tokens(model, ids, past_key_values=cache) == new_tokens(model, ids)


# --- the caller's own loop


@architectures
@pytest.mark.parametrize("cache", ["none", "dynamic", "static"])
@pytest.mark.parametrize("mask", ["none", "text", "wide"])
def test_ones_own_loop_is_generate(pair, architecture, cache, mask):
    model, base = pair(architecture)
    stored = {
        "none": lambda: None,
        "dynamic": lambda: DynamicCache(config=base.config),
        "static": lambda: StaticCache(config=base.config, max_cache_len=P + TEXT + NEW),
    }[cache]()
    given = {"none": None, "text": torch.ones(2, TEXT), "wide": torch.ones(2, P + TEXT)}[mask]
    if architecture == "bloom" and cache == "static" and Version(transformers.__version__) < Version("5.23"):
        pytest.skip("bloom does not run in a static cache without a mask as wide as that is")

    assert loop(model, text(), stored, given)[0] == new_tokens(base, with_words(text()))


@architectures
@pytest.mark.parametrize("side", MASKS)
@pytest.mark.parametrize("wide", [False, True])
def test_ones_own_loop_over_padded_rows(pair, architecture, side, wide):
    model, _ = pair(architecture)
    mask = MASKS[side]
    ids = text(3).masked_fill(mask == 0, 2)
    last = mask.cumsum(1).argmax(1)
    given = torch.cat([mask.new_ones(3, P), mask], dim=1) if wide else mask

    first = model(input_ids=ids, attention_mask=given, use_cache=True)
    begin = first.logits[torch.arange(3), P + last].argmax(-1)[:, None]  # logits are in the caller's order
    rest, _ = loop(model, begin, first.past_key_values, torch.cat([given, given.new_ones(3, 1)], 1), NEW - 1)

    want = alone(model, ids, mask)
    assert begin[:, 0].tolist() == [row[0] for row in want] and rest == [row[1:] for row in want]


@architectures
def test_a_loop_may_read_several_tokens_at_a_time(pair, architecture):
    model, base = pair(architecture)
    ids, cache = text(2, 11), None
    want = base(input_ids=with_words(ids)).logits[:, P:]
    got = []
    for part in ids.split((4, 1, 6), dim=1):
        out = model(input_ids=part, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        got.append(out.logits[:, -part.shape[1] :])
    torch.testing.assert_close(torch.cat(got, dim=1), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("embeddings", [False, True])
def test_a_loop_that_relies_on_the_base_models_default(pair, embeddings):
    model, base = pair()
    ids, cache, taken = text(), None, []
    embed = base.get_input_embeddings()
    for _ in range(NEW):
        inputs = {"inputs_embeds": embed(ids)} if embeddings else {"input_ids": ids}
        out = model(**inputs, past_key_values=cache)
        cache, ids = out.past_key_values, out.logits[:, -1:].argmax(-1)
        taken.append(ids)
    assert torch.cat(taken, 1).tolist() == new_tokens(model, text())


@pytest.mark.parametrize("through", ["model", "base model"])
@pytest.mark.parametrize("cached", ["none", "dynamic", "static", "padded"])
@pytest.mark.parametrize("known", ["by the mask", "by the length", "by the text"])
def test_prepared_inputs_have_the_prompt_once(pair, through, cached, known):
    model, base = pair()
    mask = LEFT if cached == "padded" else torch.ones(3, TEXT, dtype=torch.long)
    ids = text(3).masked_fill(mask == 0, 2)
    want = alone(model, ids, mask)
    if cached == "padded" and known == "by the text":
        pytest.skip("pads need the mask")
    cache = None
    if cached != "none":
        cache = StaticCache(base.config, P + TEXT + NEW) if cached == "static" else DynamicCache(config=base.config)
    for step in range(NEW):
        options = {} if known == "by the text" else {"attention_mask": mask}
        if known == "by the length" and step:
            options["next_sequence_length"] = 1
        inputs = model.prepare_inputs_for_generation(
            ids, past_key_values=cache, is_first_iteration=step == 0, use_cache=True, **options
        )
        out = (model if through == "model" else model.base_model)(**inputs)
        cache = out.past_key_values
        ids = torch.cat([ids, out.logits[:, -1:].argmax(-1)], dim=1)
        mask = torch.cat([mask, mask.new_ones(3, 1)], dim=1)
    assert ids[:, TEXT:].tolist() == want


@pytest.mark.parametrize("how", ["new ids", "many new ids", "embeddings of all", "ids after embeddings"])
def test_prepared_inputs_go_on_with_what_is_new(pair, how):
    model, base = pair()
    seen, new = (3, 5) if how == "many new ids" else (TEXT, 2)
    ids = text(2, seen + new)
    embeds = base.get_input_embeddings()(ids)
    cache = loop(model, ids[:, :seen], steps=1)[1]
    given, options = {
        "new ids": (ids[:, seen:], {}),
        "many new ids": (ids[:, seen:], {"next_sequence_length": new}),
        "embeddings of all": (ids[:, :0], {"inputs_embeds": embeds, "is_first_iteration": True}),
        "ids after embeddings": (ids, {"inputs_embeds": embeds[:, :seen]}),
    }[how]

    inputs = model.prepare_inputs_for_generation(given, past_key_values=cache, **options)

    got, want = model(**inputs).logits[:, -1], base(input_ids=with_words(ids)).logits[:, -1]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_prepared_inputs_refuse_what_does_not_fit_the_cache(pair):
    model, _ = pair()
    cache = loop(model, text(), steps=1)[1]
    prepare, ids = model.prepare_inputs_for_generation, text(2, 1)
    with pytest.raises(ValueError, match="has 2 rows, the call has 1"):
        prepare(ids[:1], past_key_values=cache)
    with pytest.raises(ValueError, match="position_ids"):
        prepare(ids, past_key_values=cache, position_ids=torch.zeros_like(ids))
    with pytest.warns(UserWarning, match="Token type ids"):
        assert prepare(ids, past_key_values=cache, token_type_ids=ids).get("token_type_ids") is None


def test_prepared_inputs_without_a_cache_have_the_whole_text(pair):
    model, _ = pair()
    ids = text()
    for _ in range(NEW):
        inputs = model.prepare_inputs_for_generation(ids, use_cache=False)
        ids = torch.cat([ids, model(**inputs).logits[:, -1:].argmax(-1)], dim=1)
    assert ids[:, TEXT:].tolist() == new_tokens(model, text())


def test_the_prompt_learns_through_a_step_with_a_cache(pair):
    model, _ = pair()
    ids = text()
    want = model(input_ids=ids, labels=ids).loss
    got = model(input_ids=ids, labels=ids, use_cache=True).loss
    torch.testing.assert_close(got, want)
    gradients = [torch.autograd.grad(loss, prompt_of(model))[0] for loss in (want, got)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("side", MASKS)
def test_padded_labels_have_the_loss_of_a_call_without_a_cache(pair, side):
    model, _ = pair()
    mask = MASKS[side]
    batch = {"input_ids": text(3), "attention_mask": mask, "labels": text(3)}
    torch.testing.assert_close(model(**batch, use_cache=True).loss, model(**batch).loss)
    whole = model(**batch, use_cache=True).logits
    for keep, columns in ((3, [-3, -2, -1]), (torch.tensor([0, 7]), [0, 7]), (torch.tensor([0]), [0])):
        kept = model(**batch, use_cache=True, logits_to_keep=keep).logits
        torch.testing.assert_close(kept, whole[:, columns])


def test_a_step_takes_what_a_call_without_a_cache_takes(pair):
    model, _ = pair()
    ids = text()
    want = model(input_ids=ids, use_cache=True)
    logits, cache = model(input_ids=ids, use_cache=True, return_dict=False)
    assert torch.equal(logits, want.logits) and cache.get_seq_length() == P + TEXT
    with pytest.warns(UserWarning, match="Token type ids"):
        got = model(input_ids=ids, use_cache=True, token_type_ids=torch.zeros_like(ids))
    others = {"task_ids": torch.zeros(2), "cache_position": torch.arange(TEXT)}
    for logits in (got.logits, model(input_ids=ids, use_cache=True, **others).logits):
        assert torch.equal(logits, want.logits)
    positional = model(ids, None, None, None, None, True, None, None, use_cache=True)
    assert positional.hidden_states is not None and positional.attentions is None


def test_a_step_refuses_what_it_cannot_place(pair):
    model, base = pair()
    ids = text()
    both = {"input_ids": ids, "inputs_embeds": base.get_input_embeddings()(ids)}
    for inputs in ({}, both):
        with pytest.raises(ValueError, match="Pass one of them"):
            model(**inputs, use_cache=True)
    with pytest.raises(ValueError, match="shift_labels"):
        model(input_ids=ids, shift_labels=ids, use_cache=True)
    cache = loop(model, text(2, 119), steps=1)[1]
    model(input_ids=text(2, 3), past_key_values=copy.deepcopy(cache))
    with pytest.raises(ValueError, match="has 127 positions"):
        model(input_ids=text(2, 4), past_key_values=cache)


@architectures
def test_a_step_returns_a_cache_whatever_the_base_models_default(pair, architecture):
    model, _ = pair(architecture)
    cache = loop(model, text(), steps=1)[1]
    model.get_base_model().config.use_cache = False
    assert model(input_ids=text(2, 1), past_key_values=cache).past_key_values is cache


def test_a_call_that_asks_for_no_cache_is_no_step(pair):
    model, _ = pair()
    model(input_ids=text(), past_key_values=None, use_cache=False)
    assert engine_status(model).packed
    model.get_base_model().config.use_cache = False
    model(input_ids=text(), past_key_values=None)
    assert engine_status(model).packed


@pytest.mark.parametrize("side", ["left", "right"])
def test_new_tokens_of_a_step_may_be_padded(pair, side):
    model, _ = pair()
    cache = loop(model, text(3), steps=1)[1]
    mask = torch.cat([torch.ones_like(LEFT), MASKS[side]], dim=1)
    got = model(input_ids=text(3, TEXT, seed=5), attention_mask=mask, past_key_values=cache).logits
    for row, real in enumerate(MASKS[side].bool()):
        one = loop(model, text(3)[row][None], steps=1)[1]
        want = model(input_ids=text(3, TEXT, seed=5)[row, real][None], past_key_values=one).logits[0]
        torch.testing.assert_close(got[row, real], want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cropped", [0, 2])
def test_generate_knows_the_text_of_ones_own_loop(pair, cropped):
    model, _ = pair()
    cache = loop(model, text(1), steps=1)[1]
    if cropped:
        cache.crop(-cropped)
    loop(model, text(1, 3, seed=9), cache, steps=1)
    ids = torch.cat([text(1)[:, : TEXT - cropped], text(1, 3, seed=9), text(1, 2, seed=7)], dim=1)
    for place in (1, TEXT - cropped + 1):
        wrong = ids.clone()
        wrong[0, place] += 1
        with pytest.raises(ValueError, match="does not begin with"):
            model.generate(wrong, past_key_values=cache, **OPTIONS)
    assert new_tokens(model, ids, past_key_values=cache) == new_tokens(model, ids)


# --- names of the cache


def takes_cache(kind):
    return "cache" in signature(kind.forward).parameters


@pytest.mark.parametrize("name", ["past_key_values", "cache", "cache_params"])
def test_a_cache_may_have_each_name_that_transformers_takes(pair, name):
    model, base = pair()
    if name != "past_key_values" and not takes_cache(base):
        pytest.skip("in this transformers llama's cache has one name")
    ids, cache = first_turn(model, text())
    want = new_tokens(base, with_words(ids))
    assert new_tokens(model, ids, **{name: copy.deepcopy(cache)}) == want
    prepared = model.prepare_inputs_for_generation(ids, **{name: copy.deepcopy(cache)})
    for inputs in (prepared, {"input_ids": ids[:, -4:], name: cache}):
        assert model(**inputs).logits[:, -1].argmax(-1).tolist() == [row[0] for row in want]


def test_two_caches_are_refused(pair):
    model, _ = pair()
    ids, cache = first_turn(model, text())
    given = {"past_key_values": cache, "cache_params": copy.deepcopy(cache)}
    for call in (model.generate, model.prepare_inputs_for_generation):
        with pytest.raises(ValueError, match="cache_params"):
            call(ids, **given)
    with pytest.raises(ValueError, match="cache_params"):
        model(input_ids=ids[:, -4:], **given)


def test_a_base_model_gets_the_cache_under_the_name_of_its_own_forward(pair):
    class Own(LlamaForCausalLM):  # written for transformers before 5.24
        def forward(self, input_ids=None, past_key_values=None, position_ids=None, inputs_embeds=None, **kwargs):
            assert kwargs.get("cache") is None
            kwargs["cache" if takes_cache(LlamaForCausalLM) else "past_key_values"] = past_key_values
            return super().forward(input_ids, position_ids=position_ids, inputs_embeds=inputs_embeds, **kwargs)

    model, base = pair()
    model.get_base_model().__class__ = Own
    want = new_tokens(base, with_words(text()))
    assert new_tokens(model, text()) == want
    assert loop(model, text())[0] == want


# --- the content of a cache


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "crop", "select", "repeat", "reorder", "reset"])
def test_a_changed_cache_keeps_its_content_known(pair, how):
    model, base = pair()
    rows, ids = torch.tensor([2, 0]), text(3)
    _, cache = loop(model, ids, steps=1)
    if how in {"deepcopy", "pickle"}:
        kept = copy.deepcopy(cache) if how == "deepcopy" else pickle.loads(pickle.dumps(cache))
        loop(model, text(3, 2, seed=9), cache)  # a copy continues alone
        cache = kept
    elif how == "crop":
        cache.crop(-2)
        ids = ids[:, :-2]
    elif how == "select":
        cache.batch_select_indices(rows)
        ids = ids[rows]
    elif how == "repeat":
        cache.batch_repeat_interleave(2)
        ids = ids.repeat_interleave(2, dim=0)
    elif how == "reorder":
        cache.reorder_cache(torch.tensor([2, 2, 0]))
        ids = ids[[2, 2, 0]]
    else:
        cache.reset()
        if cache.get_seq_length():
            pytest.skip("in this transformers a cache that was reset has its length, and zeros")
        ids = ids[:, :0]
    ids = torch.cat([ids, text(len(ids), 3, seed=5)], dim=1)
    assert new_tokens(model, ids, past_key_values=copy.deepcopy(cache)) == new_tokens(base, with_words(ids))
    got, _ = loop(model, ids[:, -3:], cache)
    assert got == new_tokens(base, with_words(ids))


def test_the_row_that_was_chosen_may_have_no_pads(pair):
    model, _ = pair()
    ids = text(3).masked_fill(LEFT == 0, 2)
    _, cache = loop(model, ids, mask=LEFT, steps=1)
    cache.batch_select_indices(torch.tensor([1]))
    ids = torch.cat([ids[1:2], text(1, 3, seed=5)], dim=1)
    got = new_tokens(model, ids, attention_mask=torch.ones_like(ids), past_key_values=cache)
    assert got == new_tokens(model, ids)


@pytest.mark.parametrize("how", ["crop", "select"])
def test_padded_rows_of_a_cache_may_be_cropped_and_chosen(pair, how):
    model, _ = pair()
    mask = LEFT
    ids = text(3).masked_fill(mask == 0, 2)
    _, cache = loop(model, ids, mask=mask, steps=1)
    if how == "crop":
        cache.crop(-2)
        ids, mask = ids[:, :-2], mask[:, :-2]
    else:
        cache.batch_select_indices(torch.tensor([2, 0]))
        ids, mask = ids[[2, 0]], mask[[2, 0]]
    ids = torch.cat([ids, text(len(ids), 3, seed=5)], dim=1)
    mask = torch.cat([mask, mask.new_ones(len(mask), 3)], dim=1)
    assert new_tokens(model, ids, attention_mask=mask, past_key_values=cache) == alone(model, ids, mask)


def assert_cache_is_refused(model, cache, match, ids=None, **options):
    """Assert that both ways to continue a cache are refused."""
    ids = text(2, 3) if ids is None else ids
    calls = [lambda: model(input_ids=ids, past_key_values=cache, use_cache=True, **options)]
    calls.append(lambda: model.generate(torch.cat([text(), ids], 1), past_key_values=cache, **OPTIONS, **options))
    for call in calls:
        with pytest.raises(ValueError, match=match) as refused:
            call()
        assert "peft_prompt_ext" in str(refused.traceback[-1].path)


def test_a_cache_of_another_prompt_is_refused(pair):
    model, _ = pair()
    model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
    _, cache = loop(model, text(), steps=1)
    model.set_adapter("other")
    assert_cache_is_refused(model, cache, "another prompt")
    model.set_adapter("default")
    loop(model, text(2, 3), cache)


def test_a_cache_of_a_prompt_that_was_trained_since_is_refused(pair):
    model, _ = pair()
    _, cache = loop(model, text(), steps=1)
    with torch.no_grad():
        prompt_of(model)[0] += 0.01
    assert_cache_is_refused(model, cache, "changed since")


@old_name
def test_a_cache_with_a_prompt_is_refused_without_the_adapter(pair):
    model, base = pair()
    _, cache = loop(model, text(), steps=1)
    with model.disable_adapter():
        assert_cache_is_refused(model, cache, "the adapter is disabled")
        own = loop(model, text(), steps=1)[1]
    assert_cache_is_refused(model, own, "of another model, without the prompt")
    with model.disable_adapter():
        assert loop(model, text())[0] == new_tokens(model, text()) == new_tokens(base, text())


def test_a_cropped_prompt_is_refused(pair):
    model, _ = pair()
    _, cache = loop(model, text(), steps=1)
    cache.crop(-TEXT - 1)
    assert_cache_is_refused(model, cache, "part of the prompt was cropped")


def test_cropping_into_moved_pads_is_refused(pair):
    model, _ = pair()
    mask = MASKS["right"]
    _, cache = loop(model, text(3), mask=mask, steps=1)
    cache.crop(-2)
    with pytest.raises(ValueError, match="cropped to 5 text tokens"):
        model(input_ids=text(3, 1), attention_mask=mask[:, :6], past_key_values=cache)


def test_a_cropped_prompt_of_a_padded_row_is_refused(pair):
    model, _ = pair()
    _, cache = loop(model, text(3), mask=LEFT, steps=1)
    cache.crop(-5)  # the first row has 4 real tokens
    mask = torch.cat([LEFT[:, :2], torch.ones(3, 1, dtype=torch.long)], dim=1)
    with pytest.raises(ValueError, match="cropped to 2 text tokens"):
        model(input_ids=text(3, 1), attention_mask=mask, past_key_values=cache)


def test_a_cache_with_pads_needs_its_mask(pair):
    model, _ = pair()
    _, cache = loop(model, text(3), mask=LEFT, steps=1)
    with pytest.raises(ValueError, match="rows with pads"):
        model(input_ids=text(3, 1), past_key_values=cache)


@pytest.mark.parametrize("width", [1, 3, TEXT + 2, TEXT + 4, P + TEXT, P + TEXT + 4])
def test_masks_of_other_widths_are_refused(pair, width):
    model, _ = pair()
    _, cache = loop(model, text(), steps=1)
    assert_cache_is_refused(model, cache, "attention_mask", attention_mask=torch.ones(2, width, dtype=torch.long))


def test_a_mask_that_hides_virtual_tokens_is_refused(pair):
    model, _ = pair()
    mask = torch.ones(2, P + TEXT, dtype=torch.long)
    mask[0, 2] = 0
    with pytest.raises(ValueError, match="masks virtual tokens"):
        model.generate(text(), attention_mask=mask, **OPTIONS)


def test_a_tuple_is_no_cache(pair):
    model, _ = pair()
    assert_cache_is_refused(model, ((torch.zeros(2, 1, P, 12),) * 2,) * 2, "is of type tuple")


def test_the_cache_of_a_packed_batch_is_refused(pair):
    model, _ = pair()
    out = model(input_ids=text())
    assert engine_status(model).packed
    assert_cache_is_refused(model, out.past_key_values, "use_cache=True")


def test_a_cache_that_came_by_default_goes_on_or_is_refused(pair):
    model, _ = pair()
    ids, embed = torch.cat([text(), text(2, 3)], 1), model.get_base_model().get_input_embeddings()
    for inputs in ({"input_ids": text()}, {"inputs_embeds": embed(text())}):
        out = model(**inputs, output_hidden_states=True)
        assert new_tokens(model, ids, past_key_values=out.past_key_values) == new_tokens(model, ids)
    out = model(input_ids=text(3), attention_mask=LEFT, output_hidden_states=True)
    assert_cache_is_refused(model, out.past_key_values, "use_cache=True")


@old_name
@pytest.mark.parametrize("way", ["pads", "labels", "training", "training and pads"])
@pytest.mark.parametrize("return_dict", [True, False])
def test_a_cache_that_came_by_default_has_its_prompt_whatever_the_call_was(pair, way, return_dict):
    model, _ = pair()
    batch = {"input_ids": text(), "labels": text()} if way == "labels" else {"input_ids": text()}
    if "pads" in way:
        batch["attention_mask"] = LEFT[:2]
    out = model.train("training" in way)(**batch, output_hidden_states=True, return_dict=return_dict)
    cache = out.past_key_values if return_dict else out[-2]
    model.eval()
    assert_cache_is_refused(model, cache, "with labels or with pads")
    with model.disable_adapter():
        assert_cache_is_refused(model, cache, "the adapter is disabled")


def test_a_cache_in_a_tuple_goes_on(pair):
    model, _ = pair()
    _, cache, _ = model(input_ids=text(), output_hidden_states=True, return_dict=False)
    assert loop(model, text(2, 3), cache)[0] == new_tokens(model, torch.cat([text(), text(2, 3)], 1))


def test_a_packed_batch_has_no_cache_where_the_base_model_has_none(pair):
    model, _ = pair()
    ids = text()
    for options in ({"use_cache": False}, {"labels": ids}):
        assert model(input_ids=ids, **options).past_key_values is None
    assert len(model(input_ids=ids, return_dict=False)) == 1
    assert model.train()(input_ids=ids).past_key_values is None
    model.eval().get_base_model().config.use_cache = False
    assert model(input_ids=ids).past_key_values is None and engine_status(model).packed


def test_the_cache_of_a_beam_search_is_refused(pair):
    model, _ = pair()
    ids, cache = first_turn(model, text(), num_beams=2, num_return_sequences=2)
    given = DynamicCache()
    model.generate(text(), past_key_values=given, num_beams=2, num_return_sequences=2, **OPTIONS)
    for held in (cache, given):
        with pytest.raises(ValueError, match="beam search"):
            model.generate(ids, past_key_values=held, **OPTIONS)


@pytest.mark.parametrize("option", [{"prefill_chunk_size": 3}, {"token_healing": True}], ids=str)
def test_what_reads_a_text_from_its_beginning_is_refused_behind_a_cache(pair, option):
    model, _ = pair()
    ids, cache = first_turn(model, text())
    with pytest.raises(ValueError, match="need the whole text"):
        model.generate(ids, past_key_values=cache, **option, **OPTIONS)


def test_a_cache_with_other_rows_is_refused(pair):
    model, _ = pair()
    ids, cache = first_turn(model, text())
    with pytest.raises(ValueError, match="has 2 rows, the call has 1"):
        model.generate(ids[:1], past_key_values=cache, **OPTIONS)
    with pytest.raises(ValueError, match="has 2 rows, the call has 4"):
        model.generate(ids, past_key_values=cache, num_beams=2, **OPTIONS)
    with pytest.raises(ValueError, match="has 2 rows, the call has 1"):
        model(input_ids=text(1, 1), past_key_values=cache)
    cache.batch_repeat_interleave(2)
    assert new_tokens(model, ids, past_key_values=cache, num_beams=2) == new_tokens(model, ids, num_beams=2)


def test_sequences_of_a_text_go_on_behind_its_rows(pair):
    model, _ = pair()
    ids, cache = first_turn(model, text())
    cache.batch_repeat_interleave(2)
    options = {"do_sample": True, "top_k": 1, "num_return_sequences": 2}
    assert new_tokens(model, ids, past_key_values=cache, **options) == new_tokens(model, ids, **options)


def test_beams_behind_sequences_that_differ_are_refused(pair):
    model, _ = pair()
    torch.manual_seed(0)
    ids, cache = first_turn(model, text(1), do_sample=True, num_return_sequences=2)
    with pytest.raises(ValueError, match="other texts in the 2 rows"):
        model.generate(ids[:1], past_key_values=cache, num_beams=2, **OPTIONS)


@pytest.mark.parametrize("length", [9, 13])
def test_a_window_that_is_shorter_than_the_models_is_no_room(pair, length):
    model, base = pair("mistral")  # its window has 16 tokens
    with pytest.raises(ValueError, match=f"room for {length} tokens"):
        loop(model, text(), StaticCache(base.config, max_cache_len=length))
    assert loop(model, text(), StaticCache(base.config, max_cache_len=16))[0] == new_tokens(base, with_words(text()))


def test_a_step_of_continuous_batching_is_refused(pair):
    model, _ = pair()
    with pytest.raises(
        ValueError, match=r"takes no cache|Pass a Cache of transformers"
    ):  # from 5.24 on, every cache has this name
        model(input_ids=text(1), cache=object(), position_ids=torch.arange(TEXT)[None])


def test_a_model_without_a_cache_raises_in_a_loop(pair, monkeypatch):
    from tests import zoo

    monkeypatch.setitem(zoo._SPECIFIC, "openai-gpt", zoo._GPT2)
    monkeypatch.setitem(POSITIONS_OF, "openai-gpt", "n_positions")
    model, base = pair("openai-gpt")
    assert new_tokens(model, text()) == new_tokens(base, with_words(text()))
    with pytest.raises(NotImplementedError, match="returned no cache"):
        loop(model, text())


def test_positions_that_do_not_begin_at_0(pair, monkeypatch):
    from tests import zoo

    monkeypatch.setitem(zoo._SPECIFIC, "roberta", {**zoo._BERT, "is_decoder": True, "pad_token_id": 1})
    model, _ = pair("roberta")
    ids = text(3).masked_fill(LEFT == 0, 1)
    want = [loop(model, row[real.bool()][None])[0][0] for row, real in zip(ids, LEFT, strict=True)]
    whole = ids[1][None]
    for token in want[1]:
        assert int(model(input_ids=whole, use_cache=False).logits[0, -1].argmax()) == token
        whole = torch.cat([whole, torch.tensor([[token]])], dim=1)
    assert new_tokens(model, ids, attention_mask=LEFT) == want
    assert loop(model, ids, mask=LEFT)[0] == want
    assert new_tokens(model, ids, attention_mask=LEFT, cache_implementation="static") == want


def test_a_text_without_new_tokens_is_refused(pair):
    model, base = pair()
    cache = loop(model, text(), steps=1)[1]
    for given in ({}, {"inputs_embeds": base.get_input_embeddings()(text())}):
        with pytest.raises(ValueError, match="none is new"):
            model.generate(past_key_values=cache, **given, **OPTIONS)


def test_another_text_than_the_caches_is_refused(pair):
    model, _ = pair()
    ids, cache = first_turn(model, text())
    changed = ids.clone()
    changed[1, 2] += 1
    for wrong in (changed, text(2, 29)):
        with pytest.raises(ValueError, match="does not begin with"):
            model.generate(wrong, past_key_values=cache, **OPTIONS)
    for wrong in (ids[:, -3:], ids[:, : TEXT + NEW - 1]):
        with pytest.raises(ValueError, match="nothing is new"):
            model.generate(wrong, past_key_values=cache, **OPTIONS)


def test_a_static_cache_without_room_for_the_prompt_is_refused(pair):
    model, base = pair()
    cache = StaticCache(base.config, max_cache_len=TEXT + NEW)
    with pytest.raises(ValueError, match="room for 13 tokens"):
        model.generate(text(), past_key_values=cache, **OPTIONS)


def test_positions_are_the_texts_own(pair):
    model, _ = pair()
    mask = LEFT
    ids = text(3).masked_fill(mask == 0, 2)
    positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)  # positions of pads do not matter
    want = new_tokens(model, ids, attention_mask=mask)
    assert new_tokens(model, ids, attention_mask=mask, position_ids=positions) == want
    assert new_tokens(model, ids, attention_mask=mask, position_ids=positions + P) == want
    for wrong in (positions + 1, torch.zeros_like(ids), torch.arange(TEXT).flip(0).expand(3, -1)):
        with pytest.raises(ValueError, match="position_ids"):
            model.generate(ids, attention_mask=mask, position_ids=wrong, **OPTIONS)
        with pytest.raises(ValueError, match="position_ids"):
            model(input_ids=ids, attention_mask=mask, position_ids=wrong, use_cache=True)


def test_values_per_token_without_one_for_the_prompt_are_refused(pair):
    model, _ = pair()
    zeros = torch.zeros(2, TEXT, dtype=torch.long)
    others = {"labels": zeros, "task_ids": torch.zeros(2)}
    assert new_tokens(model, text(), mm_token_type_ids=zeros, **others) == new_tokens(model, text())
    with pytest.warns(UserWarning, match="Token type ids"):
        assert new_tokens(model, text(), token_type_ids=zeros + 1) == new_tokens(model, text())
    for name in ("mm_token_type_ids", "weights_of_tokens"):
        with pytest.raises(ValueError, match=name):
            model.generate(text(), **{name: zeros + 1}, **OPTIONS)


# --- calls that overlap


class Criteria(StoppingCriteria):
    """Runs something in the middle of a call."""

    def __init__(self, run):
        self.run = run

    def __call__(self, ids, scores, **kwargs):
        self.run()
        return torch.zeros(len(ids), dtype=torch.bool)


class Processor(LogitsProcessor):
    def __init__(self, run):
        self.run = run

    def __call__(self, ids, scores):
        self.run()
        return scores


class Streamer(BaseStreamer):
    def __init__(self, run):
        self.run = run

    def put(self, value):
        self.run()

    def end(self):
        self.run()


PLACES = {
    "criteria": lambda run: {"stopping_criteria": [Criteria(run)]},
    "processor": lambda run: {"logits_processor": [Processor(run)]},
    "streamer": lambda run: {"streamer": Streamer(run)},
    "allowed tokens": lambda run: {"prefix_allowed_tokens_fn": lambda row, ids: (run(), list(range(331)))[1]},
}


def raise_inside(model):
    with pytest.raises(ZeroDivisionError):
        model.generate(text(1, 4), stopping_criteria=[Criteria(lambda: 1 / 0)], **OPTIONS)


def run_other(model):
    model.set_adapter("other")
    model.generate(text(1, 3), max_new_tokens=2)
    model.set_adapter("default")


def run_without(model):
    with model.disable_adapter():
        model.generate(text(1, 3), max_new_tokens=2)
        model(input_ids=text())


RUNS = {
    "a shorter text": lambda model: model.generate(text(1, 3), max_new_tokens=1),
    "a static cache": lambda model: model.generate(text(1, 19), max_new_tokens=3, cache_implementation="static"),
    "beams": lambda model: model.generate(text(3), num_beams=3, max_new_tokens=2),
    "a forward pass": lambda model: model(input_ids=text()),
    "the base model": lambda model: model.get_base_model().generate(text(1, 3), max_new_tokens=2),
    "an error": raise_inside,
    "another adapter": run_other,
    "no adapter": run_without,
    "an adapter left switched": lambda model: model.set_adapter("other"),
}


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("run", RUNS)
def test_what_runs_inside_a_call_changes_nothing_of_it(pair, where, run):
    model, _ = pair()
    model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
    want = new_tokens(model, text(1))

    assert new_tokens(model, text(1), **PLACES[where](lambda: RUNS[run](model))) == want
    model.set_adapter("default")
    assert new_tokens(model, text(1)) == want


def test_a_call_that_runs_inside_another_one_is_right_itself(pair):
    model, base = pair()
    inside = []
    new_tokens(model, text(1), **PLACES["criteria"](lambda: inside.append(new_tokens(model, text(2, 4)))))
    assert len(inside) == NEW and all(got == new_tokens(base, with_words(text(2, 4))) for got in inside)


def test_a_head_that_is_switched_inside_a_call_is_refused(pair, build_model):
    _, base = pair()
    config = {"modules_to_save": ["lm_head"], "num_virtual_tokens": P, "prompt_tuning_init": "RANDOM_UNIFORM"}
    model = get_peft_model(base, PromptTuningExtConfig(task_type="CAUSAL_LM", **config))
    model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
    switched = PLACES["criteria"](lambda: model.set_adapter("other"))
    with pytest.raises(ValueError, match="switched while generate ran"):
        model.generate(text(1), **OPTIONS, **switched)
    model.set_adapter("default")
    model.generate(text(1), **OPTIONS, **PLACES["criteria"](lambda: run_other(model)))


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"num_beams": 2}], ids=str)
def test_calls_in_threads_do_not_disturb_each_other(pair, options):
    model, _ = pair()
    texts = [text(1 + i % 3, 3 + i, seed=i) for i in range(6)]
    want = [new_tokens(model, ids, **options) for ids in texts]
    got, barrier = [None] * len(texts), threading.Barrier(len(texts))

    def run(i):
        criteria = Criteria(lambda: threading.Event().wait(0.002))  # lets other threads run meanwhile
        barrier.wait()
        got[i] = new_tokens(model, texts[i], stopping_criteria=[criteria], **options)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(texts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert got == want


@pytest.mark.parametrize("way", ["greedy", "static cache", "beams", "sampling", "fails"])
def test_the_base_model_keeps_no_trace_of_a_call(pair, way):
    model, _ = pair()
    model.generation_config = GenerationConfig(max_new_tokens=3, pad_token_id=2)
    base = model.get_base_model()
    before = {key: id(value) for key, value in vars(base).items()}, set(base._modules), vars(base.config).copy()

    if way == "fails":
        raise_inside(model)
    else:
        model.generate(text(), **WAYS[way])

    assert ({key: id(value) for key, value in vars(base).items()}, set(base._modules), vars(base.config)) == before


def test_copies_and_pickles_generate(pair):
    model, _ = pair()
    want = new_tokens(model, text(), cache_implementation="static")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert new_tokens(other, text(), cache_implementation="static") == want
    assert set(model.state_dict()) == set(copy.deepcopy(model).state_dict())
    assert not any("_views" in name for name, _ in model.named_modules())


@pytest.mark.filterwarnings("ignore:.*`input_ids` being on a device type")  # transformers 5.17 warns for all inputs
def test_an_offloaded_base_model_generates(pair):
    from accelerate import cpu_offload

    model, _ = pair()
    want = new_tokens(model, text())
    cpu_offload(model.get_base_model(), execution_device="cpu")
    assert new_tokens(model, text()) == want
    assert loop(model, text())[0] == want


def test_a_compiled_step_is_compiled_once_for_all_calls(pair, monkeypatch):
    model, _ = pair()
    ran, compiled_calls = [], []
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *args, **kw: compiled_calls.append(1) or compile(*args, **kw))

    def backend(graph, inputs):
        ran.append(graph)
        return graph.forward

    compiled = CompileConfig(backend=backend, fullgraph=False, mode=None)
    compiled._compile_all_devices = True
    options = {"cache_implementation": "static", "compile_config": compiled}
    want = new_tokens(model, text())

    assert new_tokens(model, text(), **options) == want
    graphs = len(ran)
    assert graphs > 0 and "_compiled_call" not in vars(model.get_base_model())
    for _ in range(2):
        assert new_tokens(model, text(), **options) == want
    assert new_tokens(model, text(2, 4), **options) == new_tokens(model, text(2, 4))  # a cache of the same length
    assert len(ran) == graphs and len(compiled_calls) == 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_base_model_keeps_its_prompt(pair):
    _, base = pair()
    config = PromptTuningExtConfig(task_type="CAUSAL_LM", num_virtual_tokens=P, prompt_tuning_init="RANDOM_UNIFORM")
    model = get_peft_model(torch.compile(copy.deepcopy(base), backend="eager"), config).eval()
    prompt_of(model).data = base.get_input_embeddings()(WORDS).detach().clone()
    assert new_tokens(model, text()) == new_tokens(base, with_words(text()))


# --- the model's own generation_config


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])  # PEFT writes it to a `.model`, or to the base model
def test_the_models_own_generation_config_is_used(pair, architecture):
    model, _ = pair(architecture)
    own = {"eos_token_id": None, "pad_token_id": 2}
    short, long = GenerationConfig(max_new_tokens=2, **own), GenerationConfig(max_new_tokens=9, **own)
    model.get_base_model().generation_config = short
    assert model.generate(text()).shape[1] == TEXT + 2
    model.generation_config = long
    assert model.generate(text()).shape[1] == TEXT + 9
    assert (
        model.generate(text(), short).shape[1] == model.generate(text(), generation_config=short).shape[1] == TEXT + 2
    )
    assert model.generate(text(), max_new_tokens=4).shape[1] == TEXT + 4
    assert model.get_base_model().generation_config is short
    model.generation_config = GenerationConfig(penalty_alpha=0.5, top_k=3, **own)
    with pytest.raises(NotImplementedError, match="contrastive"):
        model.generate(text())


def test_a_pipeline_generates_behind_the_prompt(pair, tokenizer):
    model, base = pair()
    want = new_tokens(base, with_words(tokenizer("a great film", return_tensors="pt").input_ids))
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
    got = pipe("a great film", return_tensors=True, generation_config=GenerationConfig(**OPTIONS))
    assert got[0]["generated_token_ids"][-NEW:] == want[0]


# --- states, and positions that change


@pytest.mark.parametrize("tokens", [12, 17])
def test_a_model_that_reads_its_text_again_where_its_positions_change(build_model, pair, monkeypatch, tokens):
    from tests import zoo

    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 6, "long_factor": [3.0] * 6}
    phi3 = {**zoo._LLAMA, "original_max_position_embeddings": 20, "rope_parameters": rope, "pad_token_id": 2}
    del phi3["head_dim"]
    monkeypatch.setitem(zoo._SPECIFIC, "phi3", phi3)
    model, base = pair("phi3")
    ids = text(2, tokens)
    # without a cache, because with one phi3 of transformers 5.17 reads only the new token at the change
    want = new_tokens(base, with_words(ids), max_new_tokens=9, use_cache=False)
    assert new_tokens(model, ids, max_new_tokens=9) == want
    for last in range(1, 9):  # also at the last token
        assert new_tokens(model, ids, max_new_tokens=last, min_new_tokens=last) == [row[:last] for row in want]


STATES = {
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "num_experts": 2,
        "mamba_d_state": 4,
        "mamba_dt_rank": 4,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_multiple_of": 1},
}


@pytest.mark.parametrize(("architecture", "goes_on"), [("jamba", False), ("lfm2", True)])
def test_several_tokens_behind_a_state_are_right_or_refused(pair, monkeypatch, architecture, goes_on):
    from tests import zoo

    sizes = {key: value for key, value in zoo._LLAMA.items() if key != "head_dim"} | {
        "hidden_size": 32,
        "intermediate_size": 64,
    }
    monkeypatch.setitem(zoo._SPECIFIC, architecture, {**sizes, **STATES[architecture]})
    model, base = pair(architecture)
    ids, cache = first_turn(model, text())
    assert new_tokens(model, text()) == new_tokens(base, with_words(text())) == loop(model, text())[0]
    if goes_on:
        assert new_tokens(model, ids, past_key_values=cache) == new_tokens(base, with_words(ids))
    else:
        with pytest.raises(NotImplementedError, match="several tokens at once"):
            model.generate(ids, past_key_values=cache, **OPTIONS)


SSM = {"hidden_size": 24, "num_hidden_layers": 2, "state_size": 4, "expand": 2}
SSM2 = {"num_heads": 4, "head_dim": 12, "n_groups": 1, "chunk_size": 8}


@pytest.mark.parametrize(
    ("architecture", "sizes", "goes_on"), [("mamba", {}, False), ("mamba2", SSM2, True), ("falcon_mamba", {}, False)]
)
def test_padded_rows_of_a_model_that_has_states_alone(pair, monkeypatch, architecture, sizes, goes_on):
    from tests import zoo

    monkeypatch.setitem(zoo._SPECIFIC, architecture, {**SSM, **sizes})
    model, base = pair(architecture)
    ids = text(3).masked_fill(LEFT == 0, 2)
    want = alone(model, ids, LEFT)
    assert want[1] == new_tokens(base, with_words(ids[1:2]))[0]
    assert new_tokens(model, ids, attention_mask=LEFT) == want
    whole = torch.cat([ids, torch.tensor(want), text(3, 2)], dim=1)
    name = "cache_params" if "cache_params" in signature(type(base).forward).parameters else "past_key_values"
    mask, cache, taken = LEFT, None, []
    for _ in range(NEW):
        out = model(input_ids=ids, attention_mask=mask, use_cache=True, **{name: cache})
        cache, ids = getattr(out, name), out.logits[:, -1:].argmax(-1)
        taken.append(ids)
        mask = torch.cat([mask, mask.new_ones(3, 1)], dim=1)
    assert torch.cat(taken, 1).tolist() == want
    later = {"input_ids": whole[:, -3:], "attention_mask": torch.cat([mask, mask[:, -2:]], dim=1), name: cache}
    if not goes_on:
        with pytest.raises(NotImplementedError, match="several tokens at once"):
            model(**later)
        return
    for row, got in enumerate(model(**later).logits[:, -1]):
        one = model(input_ids=whole[row][later["attention_mask"][row].bool()][None]).logits[0, -1]
        torch.testing.assert_close(got, one, rtol=1e-4, atol=1e-4)


# --- encoder-decoders


@pytest.fixture
def translator(build_model):
    base = build_model("t5", "SEQ_2_SEQ_LM")
    torch.manual_seed(1)
    for parameter in base.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    model = prompted(copy.deepcopy(base), "SEQ_2_SEQ_LM").eval()
    prompt_of(model).data = base.get_input_embeddings()(WORDS).detach().clone()
    return model, base


SEQ2SEQ = {name: WAYS[name] for name in ("greedy", "without a cache", "static cache", "beams", "sampling")}


@pytest.mark.parametrize("way", SEQ2SEQ)
def test_an_encoder_decoder_decodes_as_behind_the_words(translator, way):
    model, base = translator
    options = {**OPTIONS, **SEQ2SEQ[way]}
    torch.manual_seed(0)
    got = model.generate(input_ids=text(), **options)
    torch.manual_seed(0)
    assert got.tolist() == base.generate(with_words(text()), **options).tolist()
    assert "prepare_inputs_for_generation" not in vars(model.get_base_model())


@pytest.mark.parametrize("side", MASKS)
def test_padded_texts_of_an_encoder_decoder(translator, side):
    model, _ = translator
    mask = MASKS[side]
    want = [
        model.generate(input_ids=row[real.bool()][None], **OPTIONS)[0].tolist()
        for row, real in zip(text(3), mask, strict=True)
    ]
    wide = torch.cat([mask.new_ones(3, P), mask], dim=1)
    for given in (mask, wide):
        assert model.generate(input_ids=text(3), attention_mask=given, **OPTIONS).tolist() == want
    embeds = model.get_base_model().get_input_embeddings()(text(3))
    assert model.generate(inputs_embeds=embeds, attention_mask=mask, **OPTIONS).tolist() == want


def test_calls_of_an_encoder_decoder_may_overlap(translator):
    model, _ = translator
    want = model.generate(input_ids=text(), **OPTIONS).tolist()
    nested = [Criteria(lambda: model.generate(input_ids=text(1, 3), max_new_tokens=1))]
    assert model.generate(input_ids=text(), stopping_criteria=nested, **OPTIONS).tolist() == want
    model.generation_config = GenerationConfig(
        max_new_tokens=2, eos_token_id=None, pad_token_id=2, decoder_start_token_id=2
    )
    assert model.generate(input_ids=text()).shape == (2, 3)


def test_an_encoder_decoders_cache_of_another_prompt_is_refused(translator):
    model, base = translator
    out = model.generate(input_ids=text(), return_dict_in_generate=True, **OPTIONS)
    options = {"past_key_values": out.past_key_values, "decoder_input_ids": out.sequences}
    want = model.generate(input_ids=text(), decoder_input_ids=out.sequences, **OPTIONS).tolist()
    assert model.generate(input_ids=text(), **copy.deepcopy(options), **OPTIONS).tolist() == want
    with torch.no_grad():
        prompt_of(model)[0] += 1
    with pytest.raises(ValueError, match="another prompt"):
        model.generate(input_ids=text(), **options, **OPTIONS)
    with pytest.raises(ValueError, match="another prompt"):
        model(input_ids=text(), **options)
    with model.disable_adapter(), pytest.raises(ValueError, match="the adapter is disabled"):
        model.generate(input_ids=text(), **options, **OPTIONS)
    with model.disable_adapter():
        assert model.generate(input_ids=text(), **OPTIONS).tolist() == base.generate(text(), **OPTIONS).tolist()


def test_an_encoder_decoders_cache_goes_on_with_all_tokens_of_the_decoder(translator):
    model, _ = translator
    out = model.generate(input_ids=text(), return_dict_in_generate=True, **OPTIONS)
    ids, cache = out.sequences, out.past_key_values
    want = model.generate(input_ids=text(), decoder_input_ids=ids, **OPTIONS).tolist()
    new, mask = {"decoder_input_ids": ids[:, -1:]}, {"decoder_attention_mask": torch.ones_like(ids)}
    long = torch.cat([ids[:, -1:], ids], dim=1)
    for wrong in ({}, mask, new, {**new, **mask}, {"decoder_input_ids": long, **mask}):
        with pytest.raises(ValueError, match=f"has {NEW} tokens of the decoder"):
            model.generate(input_ids=text(), past_key_values=cache, **wrong, **OPTIONS)
    for given in ({}, mask):
        options = {**OPTIONS, **given, "past_key_values": copy.deepcopy(cache)}
        assert model.generate(input_ids=text(), decoder_input_ids=ids, **options).tolist() == want


def test_a_step_of_an_encoder_decoder_notes_its_prompt(translator):
    model, _ = translator
    ids, mask, first = text(), torch.ones(2, TEXT), torch.full((2, 1), 2)
    out = model(ids, mask, None, first)
    parts = model(ids, mask, None, first, return_dict=False)
    assert type(parts) is tuple and torch.equal(parts[0], out.logits)
    with torch.no_grad():
        prompt_of(model)[0] += 1
    for held in (parts[1], out.past_key_values):
        with pytest.raises(ValueError, match="another prompt"):
            model(input_ids=ids, decoder_input_ids=first, past_key_values=held)


def test_an_encoder_decoder_refuses_what_would_leave_the_prompt_out(translator):
    model, _ = translator
    with pytest.raises(NotImplementedError, match="leave the prompt out"):
        model.generate(input_ids=text(), cache_implementation="paged")
    with pytest.raises(NotImplementedError, match="generate_batch"):
        model.generate_batch([[1, 2]])
    embeds = model.get_base_model().get_input_embeddings()(text())
    for none_or_both in ({}, {"input_ids": text(), "inputs_embeds": embeds}):
        with pytest.raises(ValueError, match="input_ids"):
            model.generate(max_new_tokens=2, **none_or_both)
    model.get_base_model().generate = lambda **kwargs: text()
    with pytest.raises(NotImplementedError, match="leave the prompt out"):
        model.generate(input_ids=text())


def test_an_encoder_decoder_does_not_read_what_has_no_prompt(translator):
    model, _ = translator
    want = model.generate(input_ids=text(), **OPTIONS).tolist()
    encoded = model.get_base_model().get_encoder()(text())
    with pytest.warns(UserWarning, match="encoder_outputs are ignored"):
        assert model.generate(input_ids=text(), encoder_outputs=encoded, **OPTIONS).tolist() == want
    with pytest.warns(UserWarning, match="Token type ids"):
        types = torch.zeros_like(text())
        assert model.generate(input_ids=text(), token_type_ids=types, **OPTIONS).tolist() == want
    assert model.generate(input_ids=text(), task_ids=torch.zeros(2), **OPTIONS).tolist() == want


def test_an_encoder_decoder_is_no_causal_model(build_model):
    with pytest.raises(ValueError, match="SEQ_2_SEQ_LM"):
        prompted(build_model("t5", "SEQ_2_SEQ_LM"), "CAUSAL_LM")
