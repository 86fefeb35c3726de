import json

import pytest
import torch
from peft import PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file

from tests.helpers import prompt_of, prompted
from tests.zoo import HIDDEN


# PEFT looks up an unknown base name on the Hub when it saves
pytestmark = pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning")

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def source(build_model, tmp_path):
    """Saves a prompt of ones, twos, ... and gives its folder: `source(3.0, size=5)`."""

    def save(value=1.0, size=5, name="source", base_name=None):
        model = prompted(build_model("llama"), "CAUSAL_LM", num_virtual_tokens=size)
        ramp = torch.arange(size).float()[:, None] * torch.arange(1, HIDDEN + 1)
        prompt_of(model).data = value * ramp
        if base_name:
            model.peft_config["default"].base_model_name_or_path = base_name
        model.save_pretrained(tmp_path / f"{name}{value}-{size}")
        return str(tmp_path / f"{name}{value}-{size}")

    return save


@pytest.fixture
def transfer(build_model):
    def build(source, size=5, architecture="llama", task_type="CAUSAL_LM", base_name=None, changes=None, **kwargs):
        base = build_model(architecture, task_type, **(changes or {}))
        base.name_or_path = base_name
        return prompted(
            base,
            task_type,
            num_virtual_tokens=size,
            prompt_tuning_init="TRANSFER",
            prompt_tuning_init_kwargs={"source": source, **kwargs},
        )

    return build


def ramp(size):
    return torch.arange(size).float()[:, None] * torch.arange(1, HIDDEN + 1)


def test_a_prompt_saved_here_is_taken_as_it_is(source, transfer):
    model = transfer(source(3.0))

    assert torch.equal(prompt_of(model), 3 * ramp(5))
    record = model.peft_config["default"].init_record["sources"]
    assert record == [{"source": record[0]["source"], "weight": 1.0, "num_virtual_tokens": 5}]


def test_a_prompt_of_stock_peft_is_taken(build_model, transfer, tmp_path):
    stock = get_peft_model(build_model("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5))
    stock.save_pretrained(tmp_path / "stock")

    assert torch.equal(prompt_of(transfer(str(tmp_path / "stock"))), prompt_of(stock))


def test_the_half_of_a_stock_t5_prompt_that_is_read_is_taken(build_model, transfer, tmp_path):
    config = PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=5)
    stock = get_peft_model(build_model("t5", "SEQ_2_SEQ_LM"), config)
    stock.save_pretrained(tmp_path / "stock")

    model = transfer(str(tmp_path / "stock"), architecture="t5", task_type="SEQ_2_SEQ_LM")

    assert len(prompt_of(stock)) == 10
    assert torch.equal(prompt_of(model), prompt_of(stock)[:5])


def test_several_prompts_are_averaged_by_weight(source, transfer):
    model = transfer([source(1.0), source(4.0)], weights=[3, 1])

    assert torch.equal(prompt_of(model), 1.75 * ramp(5))


def test_several_prompts_without_weights_count_alike(source, transfer):
    assert torch.equal(prompt_of(transfer([source(1.0), source(4.0)])), 2.5 * ramp(5))


def test_another_length_is_refused_unless_a_policy_is_set(source, transfer):
    with pytest.raises(ValueError, match=r"has 5 virtual tokens; num_virtual_tokens is 7.*'truncate_pad' or 'interp"):
        transfer(source(), size=7)


def test_truncate_pad_cuts_a_longer_prompt(source, transfer):
    assert torch.equal(prompt_of(transfer(source(), size=3, length_policy="truncate_pad")), ramp(5)[:3])


@pytest.mark.filterwarnings("ignore:No tokenizer for the base model:UserWarning")
def test_truncate_pad_fills_a_shorter_prompt_with_sampled_words(source, transfer):
    prompt = prompt_of(transfer(source(), size=7, length_policy="truncate_pad"))

    assert torch.equal(prompt[:5], ramp(5))
    assert 0 < prompt[5:].abs().max() < 1  # rows of the embedding table, not of the ramp


@pytest.mark.parametrize("size", [3, 9])
def test_interpolation_keeps_the_ends_and_a_straight_line(source, transfer, size):
    prompt = prompt_of(transfer(source(), size=size, length_policy="interpolate"))

    torch.testing.assert_close(prompt, torch.linspace(0, 4, size)[:, None] * torch.arange(1, HIDDEN + 1))


def test_another_hidden_size_is_refused_and_both_are_named(source, transfer):
    with pytest.raises(ValueError, match=r"base model 'one'\) has hidden size 24; the base model \('two'\) has 36"):
        transfer(
            source(base_name="one"),
            base_name="two",
            changes={"hidden_size": 36, "head_dim": 18},
            check_base_model=False,
        )


def test_another_base_model_is_refused_and_both_are_named(source, transfer):
    with pytest.raises(ValueError, match=r"was trained on 'org/one'; the base model is 'org/two'"):
        transfer(source(base_name="org/one"), base_name="org/two")


@pytest.mark.parametrize(
    ("base_name", "kwargs"), [("/models/One", {}), ("org/two", {"check_base_model": False}), (None, {})]
)
def test_the_same_model_under_another_path_or_by_choice_is_taken(source, transfer, base_name, kwargs):
    assert torch.equal(prompt_of(transfer(source(base_name="org/one"), base_name=base_name, **kwargs)), ramp(5))


def test_nan_is_refused(source, transfer):
    with pytest.raises(ValueError, match="has NaN or infinite numbers"):
        transfer(source(float("nan")))


def test_a_pickle_is_not_read(source, transfer, tmp_path):
    folder = source()
    torch.save(load_file(f"{folder}/{WEIGHTS}"), f"{folder}/adapter_model.bin")
    (tmp_path / folder / WEIGHTS).unlink()

    with pytest.raises(ValueError, match=r"has no adapter_model\.safetensors.*a pickle can run code"):
        transfer(folder)


def test_a_broken_file_is_refused(source, transfer, tmp_path):
    folder = source()
    (tmp_path / folder / WEIGHTS).write_bytes(b"not safetensors")

    with pytest.raises(ValueError, match="is not a valid safetensors file"):
        transfer(folder)


def test_a_file_without_a_prompt_is_refused(source, transfer):
    folder = source()
    save_file({"other": torch.zeros(5, HIDDEN)}, f"{folder}/{WEIGHTS}")

    with pytest.raises(ValueError, match=r"has no `prompt_embeddings` of shape \[P, H\]"):
        transfer(folder)


def test_a_broken_config_is_refused(source, transfer, tmp_path):
    folder = source()
    config = json.loads((tmp_path / folder / "adapter_config.json").read_text())
    del config["peft_type"]
    (tmp_path / folder / "adapter_config.json").write_text(json.dumps(config))

    with pytest.raises(ValueError, match="only PROMPT_TUNING has a prompt"):
        transfer(folder)


def test_a_missing_source_is_one_clear_error(transfer):
    with pytest.raises(ValueError, match="source \\('org/nowhere'\\)"):
        transfer("org/nowhere")
