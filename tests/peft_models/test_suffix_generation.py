"""`generate` with a prompt behind the text: each row gives what plain transformers gives for it alone."""

import copy

import pytest
import torch
from transformers import DynamicCache, LogitsProcessor, RepetitionPenaltyLogitsProcessor, StaticCache

from peft_prompt_ext import PromptTuningExtConfig
from tests.helpers import one_thread, prompt_of, prompted  # noqa: F401
from tests.peft_models.suffix import MASKS
from tests.zoo import DECODERS


P, TEXT, NEW = 5, 12, 6
WORDS = torch.tensor([11, 12, 13, 14, 15])
OPTIONS = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 2, "eos_token_id": None}
PADDED = {kind: torch.tensor(mask) for kind, mask in MASKS.items()}
two = pytest.mark.parametrize("architecture", ["llama", "gpt2"])
kinds = pytest.mark.parametrize("kind", PADDED)


@pytest.fixture
def pair(build_model):
    """A model whose prompt behind the text has the embeddings of words, and a base model without a prompt."""

    def build(architecture="llama", **changes):
        base = build_model(architecture, **changes)
        torch.manual_seed(1)
        for parameter in base.parameters():
            if parameter.dim() > 1:  # so that answers differ
                torch.nn.init.normal_(parameter, std=0.3)
        model = prompted(copy.deepcopy(base), "CAUSAL_LM", num_virtual_tokens=P, prompt_position="suffix").eval()
        prompt_of(model).data = base.get_input_embeddings()(WORDS).detach().clone()
        return model, base

    return build


def text(mask=PADDED["none"], seed=3):
    ids = torch.randint(20, 300, mask.shape, generator=torch.Generator().manual_seed(seed))
    return ids.masked_fill(mask == 0, 2)


def embed_row(base, ids, mask):
    """`[text | prompt]` of one row without pads, [1, columns, H]."""
    return base.get_input_embeddings()(torch.cat([ids[mask.bool()], WORDS]))[None].detach()


def run_alone(base, ids, mask, **options):
    """What plain transformers generates for each row alone."""
    options = {**OPTIONS, "return_dict_in_generate": True, "output_scores": True, **options}
    return [
        base.generate(inputs_embeds=embed_row(base, *row), attention_mask=None, **options)
        for row in zip(ids, mask, strict=True)
    ]


def new_tokens(model, ids, **options):
    return model.generate(ids, **{**OPTIONS, **options})[:, ids.shape[1] :].tolist()


def new_tokens_alone(base, ids, mask, **options):
    return [sequence for out in run_alone(base, ids, mask, **options) for sequence in out.sequences.tolist()]


# --- decoding


@kinds
@pytest.mark.parametrize("architecture", DECODERS)
def test_each_row_decodes_as_it_does_alone(pair, architecture, kind):
    model, base = pair(architecture)
    mask = PADDED[kind]
    ids = text(mask)

    out = model.generate(ids, attention_mask=mask, return_dict_in_generate=True, output_scores=True, **OPTIONS)

    wanted = run_alone(base, ids, mask)
    assert torch.equal(out.sequences[:, :TEXT], ids)  # [text | new tokens], without virtual tokens
    assert torch.equal(out.sequences[:, TEXT:], torch.cat([one.sequences for one in wanted]))
    for step in range(NEW):
        scores = torch.cat([one.scores[step] for one in wanted])
        torch.testing.assert_close(out.scores[step], scores, rtol=0, atol=2e-4)


WAYS = {
    "without a cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
    "3 beams": {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.3},
    "3 beams without a cache": {"num_beams": 3, "use_cache": False},
}


@two
@kinds
@pytest.mark.parametrize("way", WAYS)
def test_other_ways_decode_as_each_row_alone(pair, architecture, kind, way):
    model, base = pair(architecture)
    mask, options = PADDED[kind], WAYS[way]
    ids = text(mask)
    assert new_tokens(model, ids, attention_mask=mask, **options) == new_tokens_alone(base, ids, mask, **options)


SAMPLING = {"do_sample": True, "num_return_sequences": 2, "temperature": 0.9, "top_k": 0}


@two
@kinds
def test_sampling_draws_as_plain_transformers_does(pair, architecture, kind):
    model, base = pair(architecture)
    mask = PADDED[kind]
    ids = text(mask)
    rows = [embed_row(base, *row)[0] for row in zip(ids, mask, strict=True)]
    embeds = torch.stack([torch.nn.functional.pad(row, (0, 0, TEXT + P - len(row), 0)) for row in rows])
    real = torch.stack([torch.arange(TEXT + P) >= TEXT + P - len(row) for row in rows]).long()

    torch.manual_seed(0)
    got = new_tokens(model, ids, attention_mask=mask, **SAMPLING)
    torch.manual_seed(0)
    want = base.generate(inputs_embeds=embeds, attention_mask=real, **{**OPTIONS, **SAMPLING}).tolist()

    assert got == want
    assert got[0] != got[1]


@two
def test_sampling_of_one_row(pair, architecture):
    model, base = pair(architecture)
    for ids, mask in zip(text(PADDED["holes"]), PADDED["holes"], strict=True):
        torch.manual_seed(0)
        got = new_tokens(model, ids[None], attention_mask=mask[None], **SAMPLING)
        torch.manual_seed(0)
        assert got == new_tokens_alone(base, ids[None], mask[None], **SAMPLING)


@two
@kinds
@pytest.mark.parametrize("way", ["assistant", "the base model assists", "lookup"])
def test_candidates_stand_behind_the_prompt(pair, architecture, kind, way):
    model, base = pair(architecture)
    options = {
        "assistant": {"assistant_model": base},
        "the base model assists": {"assistant_model": model.get_base_model()},
        "lookup": {"prompt_lookup_num_tokens": 3},
    }[way]
    for ids, mask in zip(text(PADDED[kind])[:2], PADDED[kind][:2], strict=True):
        ids = ids.clone()
        ids[3:] = torch.where(mask[3:].bool(), ids[3:] % 3 + 20, 2)  # repeated words, so that lookup finds some
        got = new_tokens(model, ids[None], attention_mask=mask[None], max_new_tokens=11, **options)
        assert got == new_tokens_alone(base, ids[None], mask[None], max_new_tokens=11)


def test_embeddings_in_place_of_ids(pair):
    model, base = pair()
    for kind, mask in PADDED.items():
        ids = text(mask)
        embeds, want = base.get_input_embeddings()(ids).detach(), new_tokens_alone(base, ids, mask)
        for options in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
            got = model.generate(inputs_embeds=embeds, attention_mask=mask, **OPTIONS, **options)
            assert got.tolist() == want, (kind, options)
        assert model.generate(ids, inputs_embeds=embeds, attention_mask=mask, **OPTIONS)[:, TEXT:].tolist() == want


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "bloom"])
def test_no_mask_means_no_pads(pair, architecture):
    model, base = pair(architecture)
    ids, mask = text(), PADDED["none"]
    want = new_tokens_alone(base, ids, mask)
    assert new_tokens(model, ids) == want
    assert model.generate(inputs_embeds=base.get_input_embeddings()(ids).detach(), **OPTIONS).tolist() == want


def test_pads_are_found_without_a_mask(pair):
    model, base = pair()
    ids = text(PADDED["left"])  # generate looks for the pad token
    assert new_tokens(model, ids, eos_token_id=1) == new_tokens_alone(base, ids, PADDED["left"], eos_token_id=1)


def test_no_text_begins_with_the_bos_token(pair):
    model, base = pair()
    ids = torch.tensor([[0]])
    assert model.generate(**OPTIONS)[:, 1:].tolist() == new_tokens_alone(base, ids, torch.ones_like(ids))


def test_max_length_does_not_count_the_prompt(pair):
    model, base = pair()
    options = {**OPTIONS, "max_new_tokens": None, "max_length": TEXT + NEW}
    assert model.generate(text(), **options)[:, TEXT:].tolist() == new_tokens_alone(base, text(), PADDED["none"])


def test_an_empty_cache_is_filled(pair):
    model, base = pair()
    mask = PADDED["left"]
    ids = text(mask)
    for cache in (DynamicCache(), StaticCache(base.config, max_cache_len=P + TEXT + NEW)):
        got = new_tokens(model, ids, attention_mask=mask, past_key_values=cache)
        assert got == new_tokens_alone(base, ids, mask) and cache.get_seq_length() == P + TEXT + NEW - 1
    with pytest.raises(ValueError, match="room for 14 tokens"):
        new_tokens(model, ids, past_key_values=StaticCache(base.config, max_cache_len=14))


class WithText(LogitsProcessor):
    """Penalises words of the text too: plain transformers has no ids for embeddings."""

    def __init__(self, ids):
        self.ids = ids

    def __call__(self, ids, scores):
        return RepetitionPenaltyLogitsProcessor(1.9)(torch.cat([self.ids, ids], dim=1), scores)


@two
def test_processors_see_the_text_and_no_virtual_tokens(pair, architecture):
    model, base = pair(architecture)
    ids, seen = text(), []

    class Note(LogitsProcessor):
        def __call__(self, ids, scores):
            seen.append(ids.clone())
            return scores

    got = new_tokens(model, ids, repetition_penalty=1.9, logits_processor=[Note()])

    for row in range(3):
        one = ids[row][None]
        assert [got[row]] == new_tokens_alone(base, one, one.new_ones(1, TEXT), logits_processor=[WithText(one)])
    assert got != new_tokens(model, ids)
    for step, given in enumerate(seen):
        assert torch.equal(given, torch.cat([ids, torch.tensor(got)[:, :step]], dim=1))


@kinds
def test_real_tokens_have_their_count_in_the_row_as_position(pair, kind):
    model, _ = pair("gpt2")
    mask, noted = PADDED[kind], []
    words = model.get_base_model().transformer.wpe
    words.register_forward_pre_hook(lambda _, args: noted.append(args[0].expand(3, -1)))

    new_tokens(model, text(mask), attention_mask=mask)

    noted = noted[-NEW:]  # the first calls of a model are probes
    for row, count in enumerate(mask.sum(1).tolist()):
        assert noted[0][row, TEXT - count :].tolist() == list(range(count + P))  # [pads | text | prompt]
        assert [int(at[row, -1]) for at in noted[1:]] == list(range(count + P, count + P + NEW - 1))


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"use_cache": False}], ids=str)
@kinds
def test_hidden_states_and_weights_have_text_then_prompt(pair, kind, options):
    model, base = pair(attn_implementation="eager")
    mask = PADDED[kind]
    ids = text(mask)
    asked = {"return_dict_in_generate": True, "output_hidden_states": True, "output_attentions": True, **options}

    together = model.generate(ids, attention_mask=mask, **{**OPTIONS, **asked})

    steps = 1 if "num_beams" in options else NEW  # beams of a row begin alike
    for row in range(3):
        number = row * options.get("num_beams", 1)
        answer = together.sequences[row, TEXT : TEXT + steps - 1]
        embeds = torch.cat([embed_row(base, ids[row], mask[row]), base.get_input_embeddings()(answer)[None]], dim=1)
        alone = base(inputs_embeds=embeds, output_hidden_states=True, output_attentions=True)
        places = torch.cat([mask[row].nonzero()[:, 0], TEXT + torch.arange(P + steps - 1)])
        for step in range(steps):
            keys = places[: len(places) - steps + 1 + step]
            hidden, weights = together.hidden_states[step][-1][number], together.attentions[step][-1][number]
            new = step > 0 and "use_cache" not in options
            queries, counted = (
                (torch.tensor([0]), slice(len(keys) - 1, len(keys))) if new else (keys, slice(len(keys)))
            )
            torch.testing.assert_close(hidden[queries], alone.hidden_states[-1][0, counted])
            want = alone.attentions[-1][0, :, counted, : len(keys)]
            torch.testing.assert_close(weights[:, queries][:, :, keys], want)


def test_weights_of_a_window_need_no_pads(pair):
    model, base = pair("gemma3_text", attn_implementation="eager")
    asked = {"return_dict_in_generate": True, "output_attentions": True}
    out = model.generate(text(), **{**OPTIONS, **asked})
    for row, one in enumerate(run_alone(base, text(), PADDED["none"], **asked)):
        for got, want in zip(out.attentions[-1], one.attentions[-1], strict=True):
            torch.testing.assert_close(got[row], want[0])
    with pytest.raises(ValueError, match="sliding window"):
        model.generate(text(), attention_mask=PADDED["right"], **{**OPTIONS, **asked})


# --- adapters


def add_prefix(model, prompt):
    values = {"num_virtual_tokens": len(prompt), "prompt_tuning_init": "RANDOM_UNIFORM"}
    model.add_adapter("prefix", PromptTuningExtConfig(task_type="CAUSAL_LM", **values))
    prompt_of(model, "prefix").data = prompt.detach().clone()


def test_a_prefix_and_a_suffix_take_turns(pair):
    model, base = pair()
    add_prefix(model, base.get_input_embeddings()(WORDS[:3]))
    ids = text()
    in_front = base.generate(torch.cat([WORDS[:3].expand(3, -1), ids], dim=1), **OPTIONS)[:, 3 + TEXT :].tolist()
    for _ in range(2):
        model.set_adapter("default")
        assert new_tokens(model, ids) == new_tokens_alone(base, ids, PADDED["none"])
        model.set_adapter("prefix")
        assert new_tokens(model, ids) == in_front


def test_without_the_adapter_the_base_model_generates(pair):
    model, base = pair()
    with model.disable_adapter():
        assert new_tokens(model, text()) == new_tokens(base, text())
        assert model.prepare_inputs_for_generation(text())["input_ids"].shape == (3, TEXT)
    assert new_tokens(model, text()) == new_tokens_alone(base, text(), PADDED["none"])


# --- what is refused


def generate_cache(model, **options):
    out = model.generate(text(), return_dict_in_generate=True, **OPTIONS, **options)
    return torch.cat([out.sequences, text()[:, :3]], dim=1), out.past_key_values


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"num_beams": 2}], ids=str)
def test_a_cache_of_generate_is_not_continued(pair, options):
    model, _ = pair()
    ids, cache = generate_cache(model, **options)
    match = "does not support past_key_values|cannot be continued"
    with pytest.raises((NotImplementedError, ValueError), match=match):
        model.generate(ids, past_key_values=cache, **OPTIONS)
    with pytest.raises(NotImplementedError, match="past_key_values"):
        model(input_ids=ids[:, -3:], past_key_values=cache)
    with model.disable_adapter(), pytest.raises(ValueError, match="the adapter is disabled"):
        model.generate(ids, past_key_values=cache, **OPTIONS)


def test_a_prefix_does_not_continue_the_cache_of_a_suffix_nor_the_other_way_round(pair):
    model, _ = pair()
    add_prefix(model, prompt_of(model))  # only the place differs
    ids, cache = generate_cache(model)
    model.set_adapter("prefix")
    with pytest.raises(ValueError, match="stands behind the text of one call"):
        model.generate(ids, past_key_values=cache, **OPTIONS)
    with pytest.raises(ValueError, match="stands behind the text of one call"):
        model(input_ids=ids[:, -3:], past_key_values=cache)
    ids, cache = generate_cache(model)
    model.set_adapter("default")
    with pytest.raises(NotImplementedError, match="does not support past_key_values with 17 text tokens"):
        model.generate(ids, past_key_values=cache, **OPTIONS)


@pytest.mark.parametrize(
    ("options", "name"),
    [({"prefill_chunk_size": 4}, r"prefill_chunk_size \(4\)"), ({"token_healing": True}, "token_healing")],
    ids=["chunks", "healing"],
)
def test_modes_that_do_not_read_the_text_at_once_are_refused(pair, options, name):
    model, _ = pair()
    with pytest.raises(NotImplementedError, match=name):
        model.generate(text(), **OPTIONS, **options)


@pytest.mark.parametrize("given", ["use_cache", "past_key_values", "an empty cache"])
@pytest.mark.parametrize("learns", [True, False])
def test_a_loop_of_the_callers_own_is_refused(pair, given, learns):
    model, _ = pair()
    step = {
        "use_cache": {"use_cache": True},
        "past_key_values": {"past_key_values": None},
        "an empty cache": {"past_key_values": DynamicCache()},
    }[given]
    with torch.set_grad_enabled(learns), pytest.raises(NotImplementedError, match="Use generate"):
        model(input_ids=text(), **step)
    with pytest.raises(NotImplementedError, match=r"got prepare_inputs_for_generation\. Use generate"):
        model.prepare_inputs_for_generation(text())


@pytest.mark.parametrize("kind", [None, "none", "holes"])
@pytest.mark.parametrize("way", ["text", "labels", "training", "answer_start"])
@pytest.mark.parametrize("options", [{}, {"output_hidden_states": True}, {"return_dict": False}], ids=str)
def test_the_cache_that_comes_by_default_is_unusable(pair, kind, way, options):
    model, _ = pair()
    add_prefix(model, prompt_of(model))
    mask = None if kind is None else PADDED[kind]
    ids = text() if mask is None else text(mask)
    batch = {"text": {}, "answer_start": {"answer_start": torch.full((3,), TEXT)}}.get(way)
    if batch is None:
        batch = {"labels": ids.masked_fill(torch.arange(TEXT) < TEXT - 1, -100)}
    with torch.no_grad():
        out = model.train(way == "training")(input_ids=ids, attention_mask=mask, **batch, **options)
    model.eval()
    caches = [x for x in (out.values() if isinstance(out, dict) else out) if hasattr(x, "get_seq_length")]
    for cache in caches:
        model.set_adapter("default")
        with pytest.raises((ValueError, NotImplementedError), match="use generate"):
            model.generate(ids, past_key_values=cache, **OPTIONS)
        model.set_adapter("prefix")
        with pytest.raises(ValueError, match="stands behind the text"):
            model.generate(ids, past_key_values=cache, **OPTIONS)
        with pytest.raises(ValueError, match="stands behind the text"):
            model(input_ids=ids, past_key_values=cache)
    assert caches or way != "text" or options.get("return_dict") is False


def test_masks_and_positions_are_those_of_the_text(pair):
    model, base = pair()
    mask = PADDED["left"]
    ids = text(mask)
    counts = (mask.cumsum(1) - 1).clamp(min=0)
    want = new_tokens_alone(base, ids, mask)
    assert new_tokens(model, ids, attention_mask=mask, position_ids=counts) == want
    with pytest.raises(ValueError, match=r"from 0\. With generate"):
        new_tokens(model, ids, attention_mask=mask, position_ids=counts + P)
    with pytest.raises(ValueError, match=r"wanted \[B, 12\] for the text, including that in the cache\.$"):
        new_tokens(model, ids, attention_mask=torch.cat([mask.new_ones(3, P), mask], dim=1))


def test_a_text_that_is_too_long_is_refused(pair):
    model, _ = pair("gpt2")
    with pytest.raises(ValueError, match="the base model has 67 positions"):
        model.generate(torch.full((1, 63), 20), **OPTIONS)
