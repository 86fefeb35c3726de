"""`generate` with a prompt for each row, compared with each row alone with its own adapter."""

import copy
from contextlib import nullcontext

import pytest
import torch
from peft import get_peft_model

from peft_prompt_ext import PromptTuningExtConfig
from tests.helpers import one_thread, prompted  # noqa: F401
from tests.peft_models.decoding import (
    ARCHITECTURES,
    LEFT,
    MASKS,
    NEW,
    OPTIONS,
    TEXT,
    P,
    new_tokens,
    text,
)


NAMES = ["default", "long", "__base__"]
LONG = 8


@pytest.fixture
def mixed(pair):
    """A model with a second, longer prompt."""

    def build(architecture="llama", **changes):
        model, base = pair(architecture, **changes)
        config = copy.deepcopy(model.peft_config["default"])
        config.num_virtual_tokens = LONG
        model.add_adapter("long", config)
        words = base.get_input_embeddings()(torch.arange(40, 40 + LONG)).detach().clone()
        model.prompt_encoder["long"].embedding.weight.data = words
        return model

    return build


def each_alone(model, ids, mask, names=NAMES, **options):
    """The new tokens of each row without its pads, with its adapter active, where the prompt runs with the text."""
    found, active = [], model.active_adapter
    for row, real, name in zip(ids, mask.bool(), names, strict=True):
        with model.disable_adapter() if name == "__base__" else nullcontext():
            if name != "__base__":
                model.set_adapter(name)
            model.active_peft_config.shared_prefix = False
            found += new_tokens(model, row[real][None], **options)
            model.active_peft_config.shared_prefix = True
        model.set_adapter(active)
    return found


# bloom is not proved, and windows count pads behind the prompt
CASES = [(name, None) for name in ARCHITECTURES if name != "bloom"]
CASES += [(name, side) for name in ("llama", "gpt2", "opt") for side in MASKS]
WAYS = {
    "greedy": {},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "static": {"cache_implementation": "static"},
    "several sequences": {"do_sample": True, "top_k": 1, "num_return_sequences": 2},
}


@pytest.mark.parametrize(("architecture", "side"), CASES)
@pytest.mark.parametrize("way", WAYS)
def test_each_row_has_the_tokens_of_its_own_prompt(mixed, architecture, side, way):
    model = mixed(architecture)
    mask = torch.ones_like(LEFT) if side is None else MASKS[side]
    ids = text(3).masked_fill(mask == 0, 2)
    got = new_tokens(model, ids, attention_mask=mask, adapter_names=NAMES, **WAYS[way])
    assert got == each_alone(model, ids, mask, **WAYS[way])
    assert model.active_adapter == "default"


@pytest.mark.parametrize("names", ["__base__", "long", "default", "long default long"])
def test_any_names_are_taken(mixed, names):
    model, ids = mixed(), text(3)
    names = names.split() if " " in names else [names] * 3
    assert new_tokens(model, ids, adapter_names=names) == each_alone(model, ids, torch.ones_like(ids), names)


def test_embeddings_and_one_row_with_candidates_are_read_too(mixed):
    model = mixed()
    want = each_alone(model, text(3), torch.ones(3, TEXT))
    embeds = model.get_base_model().get_input_embeddings()(text(3)).detach()
    assert model.generate(inputs_embeds=embeds, adapter_names=NAMES, **OPTIONS).tolist() == want
    got = new_tokens(model, text(3)[1:2], adapter_names=["long"], prompt_lookup_num_tokens=3)
    assert got == want[1:2]


def test_names_that_do_not_fit_are_refused(mixed):
    model = mixed()
    with pytest.raises(ValueError, match="adapter_names has 2 names, the batch has 3 rows"):
        model.generate(text(3), adapter_names=NAMES[:2], **OPTIONS)
    with pytest.raises(ValueError, match=r"adapter_names has \['other'\]; the model's adapters are"):
        model.generate(text(3), adapter_names=[*NAMES[:2], "other"], **OPTIONS)
    with pytest.raises(ValueError, match="127 positions"):
        model.generate(text(3, 127 - P - 1), adapter_names=NAMES, **OPTIONS)


@pytest.mark.parametrize(
    ("architecture", "options", "reason"),
    [
        ("bloom", {}, "ALiBi"),
        ("llama", {"use_cache": False}, "use_cache=False"),
        ("llama", {"prefill_chunk_size": 3}, "prefill_chunk_size"),
        ("llama", {"output_hidden_states": True, "return_dict_in_generate": True}, "hidden states"),
        ("mistral", {"attention_mask": LEFT}, "sliding windows"),
    ],
)
def test_rows_that_cannot_read_kept_prompts_are_refused_with_the_reason(mixed, architecture, options, reason):
    model = mixed(architecture)
    with pytest.raises(NotImplementedError, match=f"adapter_names .*{reason}.*set_adapter"):
        model.generate(text(3), adapter_names=NAMES, **OPTIONS, **options)


def test_a_cache_of_the_callers_is_refused_and_none_goes_on(mixed):
    model = mixed()
    one = model.generate(text(3), adapter_names=NAMES, return_dict_in_generate=True, **OPTIONS)
    ids = torch.cat([one.sequences, text(3, 2)], dim=1)
    with pytest.raises(ValueError, match="its rows have the prompts of several adapters"):
        model.generate(ids, past_key_values=one.past_key_values, **OPTIONS)
    own = model.generate(text(3), return_dict_in_generate=True, **OPTIONS)
    with pytest.raises(NotImplementedError, match="the caller gives a cache"):
        model.generate(ids, adapter_names=NAMES, past_key_values=own.past_key_values, **OPTIONS)


def test_adapters_with_modules_of_their_own_or_suffixes_are_refused(build_model):
    values = {"task_type": "CAUSAL_LM", "num_virtual_tokens": P, "prompt_tuning_init": "RANDOM_UNIFORM"}
    model = get_peft_model(build_model("llama"), PromptTuningExtConfig(**values, modules_to_save=["lm_head"])).eval()
    with pytest.raises(NotImplementedError, match="each adapter has its own lm_head"):
        model.generate(text(2), adapter_names=["default", "__base__"], **OPTIONS)
    model = prompted(build_model("llama"), "CAUSAL_LM").eval()
    model.add_adapter("behind", PromptTuningExtConfig(**values, prompt_position="suffix"))
    with pytest.raises(NotImplementedError, match="'behind' stands behind the text"):
        model.generate(text(2), adapter_names=["default", "behind"], **OPTIONS)


def test_prompts_run_once_for_all_calls_and_rows(mixed, monkeypatch):
    from peft_prompt_ext.peft_models.decoding import kept

    lengths, keep = [], kept.keep_cache
    monkeypatch.setattr(kept, "keep_cache", lambda model, prompt: lengths.append(len(prompt)) or keep(model, prompt))
    model = mixed()
    for _ in range(2):
        new_tokens(model, text(3), adapter_names=NAMES)
        new_tokens(model, text(3))
    assert lengths == [P, LONG]
    assert len(new_tokens(model, text(3), adapter_names=NAMES)[0]) == NEW


def test_a_model_that_reads_the_whole_text_again_is_refused(mixed, monkeypatch):
    from tests import zoo

    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 6, "long_factor": [3.0] * 6}
    rope |= {"original_max_position_embeddings": LONG + TEXT + 2, "partial_rotary_factor": 1.0}
    sizes = {"rope_parameters": rope, "original_max_position_embeddings": LONG + TEXT + 2, "pad_token_id": 2}
    monkeypatch.setitem(zoo._SPECIFIC, "phi3", {**zoo._LLAMA, **sizes})
    model = mixed("phi3")
    few = {**OPTIONS, "max_new_tokens": 2, "min_new_tokens": 2}
    assert model.generate(text(3), adapter_names=NAMES, **few).shape == (3, TEXT + 2)
    with pytest.raises(NotImplementedError, match="reads the whole text again"):
        model.generate(text(3), adapter_names=NAMES, **OPTIONS)


def test_names_have_no_effect_without_adapters(mixed):
    model = mixed()
    with model.disable_adapter():
        assert new_tokens(model, text(3), adapter_names=NAMES) == new_tokens(model, text(3))
