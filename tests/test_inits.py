import pytest
import torch

from peft_prompt_ext import available_inits, register_init
from peft_prompt_ext.inits.base import SCHEMES
from tests.helpers import prompt_of
from tests.zoo import CASES, HIDDEN


SIZE = 7  # P
KWARGS = {
    "RANDOM": {},
    "RANDOM_UNIFORM": {"match_embeddings": True},
    "SAMPLE_VOCAB": {},
    "TEXT": {"fill": "sample_vocab"},
    "CLASS_LABELS": {"labels": ["great", "terrible"]},
    "TRANSFER": {"length_policy": "truncate_pad"},
}
all_schemes = pytest.mark.parametrize("init", sorted(KWARGS))


# --- what holds for every scheme


def test_every_scheme_is_under_contract():
    assert sorted(KWARGS) == available_inits()


@all_schemes
def test_a_prompt_is_p_by_h_in_float32_and_trainable(make, init):
    prompt = prompt_of(make(init, **KWARGS[init]))

    assert prompt.shape == (SIZE, HIDDEN) and prompt.dtype == torch.float32
    assert prompt.requires_grad and torch.isfinite(prompt).all()


@all_schemes
def test_the_seed_alone_decides_and_the_global_random_state_is_left_alone(make, build_model, init):
    models = [build_model("llama"), build_model("llama")]
    torch.manual_seed(1)
    first = prompt_of(make(init, models[0], **KWARGS[init]))
    torch.manual_seed(2)
    before = torch.random.get_rng_state()

    second = prompt_of(make(init, models[1], **KWARGS[init])) if init != "TRANSFER" else first

    assert torch.equal(first, second)
    if init != "TRANSFER":  # building its source is what draws
        assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("init", sorted(set(KWARGS) - {"TRANSFER"}))
def test_another_seed_gives_another_prompt(make, init):
    prompts = [prompt_of(make(init, seed=seed, **KWARGS[init])) for seed in (0, 1)]

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


@pytest.mark.parametrize(
    ("result", "message"),
    [(torch.zeros(HIDDEN, SIZE), r"shape \(24, 7\).*\(7, 24\)"), (torch.full((SIZE, HIDDEN), torch.nan), "gave NaN")],
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
