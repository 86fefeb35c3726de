"""Lengths at which a model changes its computation, far beyond the probe's."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaModel, LlamaRotaryEmbedding

from peft_prompt_ext import engine_status
from tests.helpers import make_batch, one_thread, prompted  # noqa: F401
from tests.shared_prefix.causal_models import THRESHOLD, tiny_model
from tests.shared_prefix.helpers import P


LIMIT = 43  # far from the other numbers of the config
NEXT = 37  # the largest number below it


def llama(dtype=torch.float32, **changes):
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": NEXT}
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=331, max_position_embeddings=997, pad_token_id=2, **sizes, **changes)
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.to(dtype)


def check(model, rows, text, packed):
    """Run a batch of rows of one length, and compare each row with the row alone. Returns whether it ran packed."""
    ids = make_batch("CAUSAL_LM", rows=rows, text=text)["input_ids"]
    with torch.no_grad():
        got, alone = model(input_ids=ids).logits, [model(input_ids=row[None]).logits[0] for row in ids]
        model(input_ids=ids)
    assert engine_status(model).packed == packed, engine_status(model)
    torch.testing.assert_close(got, torch.stack(alone), rtol=0, atol=1e-3)


LONG = {"short_factor": [1.0] * 6, "long_factor": [4.0] * 6, "original_max_position_embeddings": LIMIT}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("rope", "limit"),
    [
        ({"rope_type": "longrope", **LONG}, LIMIT),
        ({"rope_type": "dynamic", "factor": 4.0}, None),  # it begins after the last position
        ({"rope_type": "linear", "factor": 4.0}, None),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": LIMIT}, None),
    ],
)
def test_positions_that_depend_on_the_longest_row_limit_the_rows(rope, limit, dtype):
    model = prompted(llama(dtype, rope_parameters={"rope_theta": 1e4, **rope}), "CAUSAL_LM").eval()

    assert engine_status(model).max_tokens == limit
    assert engine_status(model).max_packed_tokens is None
    if dtype == torch.float32:
        check(model, 3, LIMIT - P, packed=True)
        check(model, 3, LIMIT - P + 1, packed=limit is None)


def test_positions_that_change_at_a_number_which_the_config_lacks_stop_at_one_it_has(monkeypatch):
    def forward(self, x, position_ids):
        factor = 1 + (position_ids.max() >= LIMIT)
        return own(self, x, position_ids * factor)

    own = LlamaRotaryEmbedding.forward
    monkeypatch.setattr(LlamaRotaryEmbedding, "forward", forward)
    assert engine_status(prompted(llama(), "CAUSAL_LM")).max_tokens == NEXT


def by_arange(hidden, limit):
    return torch.arange(hidden.shape[1]) >= limit


def by_float(hidden, limit):
    return torch.log1p(torch.floor((torch.arange(hidden.shape[1]).float() + 1) / (limit + 1)))


def by_cumsum(hidden, limit):
    return torch.ones(hidden.shape[:2], dtype=torch.long).cumsum(-1)[0].sub(limit).clamp(min=0).float()


def by_another_name(hidden, limit):
    places = torch.arange(0, hidden.shape[1], device=hidden.device)[None].expand(1, -1) + 0
    return torch.where(torch.gt(places, limit - 1), 2.0, 0.0)[0]


def in_place(hidden, limit):
    places = torch.arange(hidden.shape[1]).add_(3)
    return torch.zeros(hidden.shape[1]).add_(places).sub(limit + 3 - 1).clamp_(min=0)


def as_an_index(hidden, limit):
    return hidden[:, torch.arange(hidden.shape[1])][0, :, 0] * 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("count", "limit"),
    [
        (by_arange, LIMIT),
        (by_float, LIMIT),
        (by_cumsum, LIMIT),
        (by_another_name, LIMIT),
        (in_place, LIMIT),
        (as_an_index, None),
    ],
)
def test_places_counted_in_the_sequence_limit_the_pack(monkeypatch, count, limit, dtype):
    def forward(self, hidden_states, *args, **kwargs):
        factor = 1 + count(hidden_states, LIMIT).to(hidden_states.dtype)
        return own(self, hidden_states + factor[None, :, None] * hidden_states.sin(), *args, **kwargs)

    own = LlamaDecoderLayer.forward
    monkeypatch.setattr(LlamaDecoderLayer, "forward", forward)
    model = prompted(llama(dtype, somewhere={"deep": [LIMIT]}), "CAUSAL_LM").eval()

    assert engine_status(model).max_packed_tokens == limit
    assert engine_status(model).max_tokens is None
    if dtype == torch.float32:
        check(model, 2, (LIMIT - P) // 2, packed=True)
        check(model, 2, (LIMIT - P) // 2 + 1, packed=limit is None)


def test_places_that_count_from_the_first_token_on_are_refused(monkeypatch):
    def forward(self, hidden_states, *args, **kwargs):
        return own(
            self, hidden_states * (1 + torch.arange(hidden_states.shape[1])[None, :, None] / 7), *args, **kwargs
        )

    own = LlamaDecoderLayer.forward
    monkeypatch.setattr(LlamaDecoderLayer, "forward", forward)
    assert not engine_status(prompted(llama(), "CAUSAL_LM")).packed


@pytest.mark.parametrize(
    ("model_type", "row", "pack"),
    [
        ("llama4_text", THRESHOLD, THRESHOLD - 1),  # chunks that attention does not get; floor_scale
        ("qwen2_moe", THRESHOLD, None),  # a window that attention does not get
        ("phimoe", THRESHOLD, None),
        ("mistral", None, None),
        ("gemma3_text", None, None),
        ("ministral3", None, None),  # scales by position_ids
    ],
)
def test_limits_of_models(model_type, row, pack):
    status = engine_status(prompted(tiny_model(model_type), "CAUSAL_LM"))

    assert status.packed
    assert (status.max_tokens, status.max_packed_tokens) == (row, pack)


def test_a_mask_of_the_models_own_making_is_refused(monkeypatch):
    def forward(self, *args, attention_mask=None, inputs_embeds=None, **kwargs):
        if attention_mask is None:
            count = inputs_embeds.shape[1]
            attention_mask = torch.ones(1, 1, count, count, dtype=torch.bool).tril()
        return own(self, *args, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs)

    own = LlamaModel.forward
    monkeypatch.setattr(LlamaModel, "forward", forward)
    status = engine_status(prompted(llama(), "CAUSAL_LM"))

    assert not status.packed
    assert "mask of its own" in status.reason


def test_the_last_row_of_a_proof_is_a_short_one(monkeypatch):
    """It restores rotary embeddings that a long row changed."""
    last = []

    def forward(self, x, position_ids):
        last.append(int(position_ids.max()))
        return own(self, x, position_ids)

    own = LlamaRotaryEmbedding.forward
    monkeypatch.setattr(LlamaRotaryEmbedding, "forward", forward)
    assert engine_status(prompted(llama(), "CAUSAL_LM")).packed

    assert max(last) == 996
    assert last[-1] < 18
