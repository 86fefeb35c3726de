import pytest
import torch
from peft import get_peft_model

from peft_prompt_ext import PromptTuningExtConfig, available_inits, register_init
from peft_prompt_ext.inits.base import SCHEMES
from tests.helpers import ids_of, prompt_of, rows, slots
from tests.zoo import CASES, HIDDEN, VOCAB_ROWS


SIZE = 7  # P
KWARGS = {
    "RANDOM": {},
    "RANDOM_UNIFORM": {"match_embeddings": True},
    "SAMPLE_VOCAB": {},
    "TEXT": {"fill": "sample_vocab"},
    "CLASS_LABELS": {"labels": ["great", "terrible"]},
    "ENDING": {"ending": " is great"},
    "TRANSFER": {"length_policy": "truncate_pad"},
}
LABELS = ["terrible acting", "great", "film"]
all_schemes = pytest.mark.parametrize("init", sorted(KWARGS))


# --- every scheme


def test_every_scheme_is_under_contract():
    assert sorted(KWARGS) == available_inits()


@all_schemes
def test_a_prompt_is_p_by_h_in_float32_and_trainable(make, init):
    prompt = prompt_of(make(init, **KWARGS[init]))

    assert prompt.shape == (SIZE, HIDDEN) and prompt.dtype == torch.float32
    assert prompt.requires_grad and torch.isfinite(prompt).all()


@pytest.fixture
def source(make, tmp_path):
    """An adapter of 3 virtual tokens, saved before the tests read the global random state."""
    make("RANDOM_UNIFORM", size=3, seed=5).save_pretrained(tmp_path / "made_before")
    return {"source": str(tmp_path / "made_before")}


@all_schemes
def test_the_seed_alone_decides_and_the_global_random_state_is_left_alone(make, build_model, source, init):
    models = [build_model("llama"), build_model("llama")]
    kwargs = {**KWARGS[init], **(source if init == "TRANSFER" else {})}
    torch.manual_seed(1)
    first = prompt_of(make(init, models[0], **kwargs))
    torch.manual_seed(2)
    before = torch.random.get_rng_state()

    second = prompt_of(make(init, models[1], **kwargs))

    assert torch.equal(first, second)
    assert torch.equal(torch.random.get_rng_state(), before)


@all_schemes
def test_another_seed_gives_another_prompt(make, source, init):
    kwargs = {**KWARGS[init], **(source if init == "TRANSFER" else {})}

    prompts = [prompt_of(make(init, seed=seed, **kwargs)) for seed in (0, 1)]

    assert not torch.equal(*prompts)


@all_schemes
def test_a_bfloat16_embedding_table_gives_a_float32_prompt(make, build_model, init):
    prompt = prompt_of(make(init, build_model("llama").to(torch.bfloat16), **KWARGS[init]))

    assert prompt.dtype == torch.float32 and torch.isfinite(prompt).all()


@all_schemes
@pytest.mark.parametrize(("architecture", "task_type"), CASES)
def test_every_scheme_works_on_every_architecture(make, build_model, architecture, task_type, init):
    base = build_model(architecture, task_type)
    table = base.get_input_embeddings().weight.clone()

    prompt = prompt_of(make(init, base, task_type=task_type, **KWARGS[init]))

    assert prompt.shape == (SIZE, HIDDEN) and torch.isfinite(prompt).all()
    assert torch.equal(base.get_input_embeddings().weight, table)


# --- the record


WORD_CASES = {
    "sample": ("SAMPLE_VOCAB", {}),
    "population": ("SAMPLE_VOCAB", {"population": 11}),
    "text": ("TEXT", {"fill": "repeat"}),
    "text_filled": ("TEXT", {"fill": "sample_vocab"}),
    "labels": ("CLASS_LABELS", {"labels": LABELS}),
    "labels_last": ("CLASS_LABELS", {"labels": LABELS, "position": "last"}),
    "labels_repeated": ("CLASS_LABELS", {"labels": LABELS, "repeat": True}),
    "labels_repeated_last": ("CLASS_LABELS", {"labels": LABELS, "repeat": True, "position": "last"}),
    "ending": ("ENDING", {"ending": " is great"}),
    "ending_and_labels": (
        "ENDING",
        {"ending": " is", "fallback": "CLASS_LABELS", "fallback_kwargs": {"labels": LABELS}},
    ),
    "ending_and_text": ("ENDING", {"ending": " is", "fallback": "TEXT"}),
    "labels_and_text": ("CLASS_LABELS", {"labels": LABELS, "position": "last", "fallback": "TEXT"}),
}


@pytest.mark.parametrize("case", WORD_CASES)
@pytest.mark.parametrize(
    ("architecture", "dtype"), [("llama", torch.float32), ("llama", torch.bfloat16), ("gemma3_text", torch.float32)]
)
def test_a_slot_is_the_mean_of_the_tokens_that_its_record_names(make, build_model, architecture, dtype, case):
    init, kwargs = WORD_CASES[case]

    model = make(init, build_model(architecture).to(dtype), **kwargs)

    expected = torch.stack([rows(model, slot["token_ids"]).float().mean(0) for slot in slots(model)])
    torch.testing.assert_close(prompt_of(model), expected)
    assert model.get_base_model().get_input_embeddings().weight.dtype == dtype


@pytest.mark.parametrize("case", WORD_CASES)
def test_the_record_names_the_tokens_in_words(make, tokenizer, tokenizer_folder, case):
    init, kwargs = WORD_CASES[case]

    record = make(init, **kwargs).peft_config["default"].init_record

    words = [slot.get("label") or slot["text"] for slot in record["slots"]]
    assert words == [tokenizer.decode(slot["token_ids"]) for slot in record["slots"]]
    assert record["tokenizer"] == tokenizer_folder and len(words) == SIZE


def test_the_record_names_sources_with_their_share_and_length(make, tmp_path):
    for name, size in (("one", 3), ("two", 5)):
        make("RANDOM_UNIFORM", size=size).save_pretrained(tmp_path / name)
    paths = [str(tmp_path / "one"), str(tmp_path / "two")]

    model = make("TRANSFER", source=paths, weights=[3, 1], length_policy="interpolate")

    assert model.peft_config["default"].init_record["sources"] == [
        {"source": paths[0], "weight": 0.75, "num_virtual_tokens": 3},
        {"source": paths[1], "weight": 0.25, "num_virtual_tokens": 5},
    ]


@pytest.mark.parametrize("init", ["RANDOM", "RANDOM_UNIFORM"])
def test_the_record_of_numbers_out_of_a_generator_names_no_token(make, init):
    assert make(init).peft_config["default"].init_record == {}


# --- the registry


def test_a_registered_scheme_works_and_its_kwargs_are_checked(make):
    @register_init("constant")
    def constant(ctx, *, value):
        ctx.record["value"] = value
        return torch.full((ctx.num_virtual_tokens, ctx.token_dim), value)

    try:
        model = make("CONSTANT", value=0.25)
        with pytest.raises(ValueError, match="CONSTANT needs 'value'"):
            make("CONSTANT")
    finally:
        del SCHEMES["CONSTANT"]

    assert (prompt_of(model) == 0.25).all() and model.peft_config["default"].init_record == {"value": 0.25}


def test_a_registered_scheme_has_rules_of_its_own_for_its_text_and_for_plain_arguments():
    def check_text(text, *, values):
        if not text:
            raise ValueError(f"SPELLED needs a text for {values}")

    @register_init("spelled", check_text=check_text, plain=lambda kwargs: {**kwargs, "values": list(kwargs["values"])})
    def spelled(ctx, *, values):
        return torch.zeros(ctx.num_virtual_tokens, ctx.token_dim)

    def config(init="SPELLED", text="a", **kwargs):
        return PromptTuningExtConfig(
            task_type="CAUSAL_LM",
            prompt_tuning_init=init,
            prompt_tuning_init_kwargs=kwargs,
            prompt_tuning_init_text=text,
        )

    try:
        assert config(values=iter([1, 2])).prompt_tuning_init_kwargs == {"values": [1, 2]}
        with pytest.raises(ValueError, match=r"SPELLED needs a text for \[1\]"):
            config(values=iter([1]), text=None)
        fallback = {"fallback": "spelled", "fallback_kwargs": {"values": [3]}}
        with pytest.raises(ValueError, match=r"SPELLED needs a text for \[3\]"):
            config("CLASS_LABELS", None, labels=["a"], **fallback)
    finally:
        del SCHEMES["SPELLED"]


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (torch.zeros(HIDDEN, SIZE), r"shape \(24, 7\).*\(7, 24\)"),
        (torch.full((SIZE, HIDDEN), torch.nan), "returned NaN"),
    ],
)
def test_a_scheme_that_returns_something_else_is_refused(make, result, message):
    register_init("WRONG")(lambda ctx: result)
    try:
        with pytest.raises(ValueError, match=message):
            make("WRONG")
    finally:
        del SCHEMES["WRONG"]


def test_a_taken_name_is_refused_and_both_functions_are_named():
    with pytest.raises(ValueError, match=r"'TEXT' is registered already by \S+\.text\.text; .*<lambda>"):
        register_init("text")(lambda ctx: None)


# --- RANDOM, RANDOM_UNIFORM


def test_random_is_standard_normal(make):
    prompt = prompt_of(make("RANDOM", size=997))

    assert abs(prompt.mean()) < 0.02 and abs(prompt.std() - 1) < 0.02


@pytest.mark.parametrize("scale", [0.5, 3.0])
def test_random_uniform_fills_its_symmetric_range(make, scale):
    prompt = prompt_of(make("RANDOM_UNIFORM", size=997, scale=scale))

    assert prompt.abs().max() <= scale
    assert prompt.max() > 0.99 * scale and prompt.min() < -0.99 * scale


def test_random_uniform_matches_mean_and_spread_of_the_words(make, build_model, tokenizer):
    base = build_model("llama")
    with torch.no_grad():
        base.get_input_embeddings().weight.mul_(torch.linspace(1, 9, HIDDEN)).add_(torch.linspace(-2, 2, HIDDEN))
        base.get_input_embeddings().weight[len(tokenizer) :] = 1e6  # rows beyond the tokenizer do not count
    words = base.get_input_embeddings().weight[3 : len(tokenizer) - 1]

    prompt = prompt_of(make("RANDOM_UNIFORM", base, size=9973, match_embeddings=True))

    torch.testing.assert_close(prompt.mean(0), words.mean(0), atol=0.02, rtol=0)
    torch.testing.assert_close(prompt.std(0), words.std(0), atol=0, rtol=0.03)


# --- CLASS_LABELS, SAMPLE_VOCAB, TRANSFER: more tests are in test_word_inits.py and test_transfer.py


@pytest.mark.parametrize(("position", "free"), [("first", slice(3, None)), ("last", slice(None, -3))])
@pytest.mark.parametrize(
    ("fallback", "kwargs"), [("RANDOM", {}), ("RANDOM_UNIFORM", {"scale": 3.0}), ("SAMPLE_VOCAB", {"population": 11})]
)
def test_a_fallback_fills_its_slots_as_it_would_alone(make, position, free, fallback, kwargs):
    alone = make(fallback, **kwargs)

    model = make("CLASS_LABELS", labels=LABELS, position=position, fallback=fallback, fallback_kwargs=kwargs)

    assert torch.equal(prompt_of(model)[free], prompt_of(alone)[free])
    unnamed = [{"fallback": fallback}] * SIZE  # RANDOM and RANDOM_UNIFORM take no tokens
    assert slots(model)[free] == alone.peft_config["default"].init_record.get("slots", unnamed)[free]


def test_a_class_label_feature_is_its_names(make):
    datasets = pytest.importorskip("datasets")

    feature, names = (make("CLASS_LABELS", labels=form) for form in (datasets.ClassLabel(names=LABELS), LABELS))

    assert torch.equal(prompt_of(feature), prompt_of(names))


@pytest.mark.parametrize(("init", "kwargs"), [("TEXT", {}), ("CLASS_LABELS", {"labels": ["<beyond399>"]})])
def test_an_added_token_beyond_the_table_is_refused(make, tokenizer_folder, tmp_path, init, kwargs):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.add_tokens([f"<beyond{i}>" for i in range(400)])
    tokenizer.save_pretrained(tmp_path / "larger")

    with pytest.raises(ValueError, match=str(VOCAB_ROWS)):
        make(init, text="<beyond399>", tokenizer=str(tmp_path / "larger"), **kwargs)


def test_without_a_tokenizer_every_row_but_padding_may_be_drawn(build_model):
    base = build_model("llama")
    config = PromptTuningExtConfig(task_type="CAUSAL_LM", num_virtual_tokens=VOCAB_ROWS - 1)

    with pytest.warns(UserWarning, match=f"sampled from all {VOCAB_ROWS} embedding rows"):
        model = get_peft_model(base, config)

    padding = base.get_input_embeddings().padding_idx
    assert padding == 2 and sorted(ids_of(model)) == [i for i in range(VOCAB_ROWS) if i != padding]


def test_a_population_needs_a_tokenizer(build_model):
    config = PromptTuningExtConfig(task_type="CAUSAL_LM", prompt_tuning_init_kwargs={"population": 20})

    with pytest.raises(ValueError, match=r"'SAMPLE_VOCAB' needs a tokenizer.*Set tokenizer_name_or_path"):
        get_peft_model(build_model("llama"), config)


def test_special_tokens_of_a_corpus_do_not_count(make, tokenizer):
    corpus = ["</s></s></s><added><added> film film great"]
    wanted = [tokenizer(" film")["input_ids"], tokenizer("great")["input_ids"]]

    model = make("SAMPLE_VOCAB", size=1, population=1, corpus=corpus)

    assert [ids_of(model)] == wanted[:1]


@pytest.mark.parametrize("form", ["not_texts", "not_utf8"])
def test_a_corpus_that_cannot_be_read_is_refused_by_name(make, tmp_path, form):
    path = tmp_path / "latin1.txt"
    path.write_bytes("ein großer film".encode("latin-1"))
    corpus = {"not_texts": ["great film", 3], "not_utf8": str(path)}[form]

    with pytest.raises(ValueError, match="SAMPLE_VOCAB: corpus"):
        make("SAMPLE_VOCAB", population=SIZE, corpus=corpus)


class RunsWhenUnpickled:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return self.path.touch, ()


def test_nothing_is_unpickled(make, source, tmp_path):
    folder = tmp_path / "made_before"
    (folder / "adapter_model.safetensors").unlink()
    torch.save({"prompt_embeddings": RunsWhenUnpickled(tmp_path / "ran")}, folder / "adapter_model.bin")

    with pytest.raises(ValueError, match=r"has no adapter_model\.safetensors"):
        make("TRANSFER", size=3, **source)

    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("org/nowhere", r"source \('org/nowhere'\) is no folder, and the Hub was not reached"),
        ("/no/such/folder", r"source \('/no/such/folder'\) is neither a folder nor on the Hub"),
    ],
)
def test_a_missing_source_is_refused_with_its_place(make, place, message):
    with pytest.raises(ValueError, match=message):
        make("TRANSFER", source=place)


@pytest.fixture
def own_scheme():
    @register_init("OWN")
    def own(ctx, *, labels, fallback="RANDOM"):
        return ctx.run(fallback)

    yield
    del SCHEMES["OWN"]


def test_an_own_schemes_labels_become_a_list_and_its_fallback_is_checked(own_scheme):
    def config(**kwargs):
        return PromptTuningExtConfig(
            task_type="CAUSAL_LM", prompt_tuning_init="OWN", prompt_tuning_init_kwargs={"labels": iter("ab"), **kwargs}
        )

    assert config().prompt_tuning_init_kwargs["labels"] == ["a", "b"]
    with pytest.raises(ValueError, match="prompt_tuning_init_text"):
        config(fallback="text")
