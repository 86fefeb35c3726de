"""A loaded prompt is compared with the base model that it was trained on."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file

from tests.helpers import make_batch, prompt_of, prompted
from tests.zoo import AUTO_CLASSES, HIDDEN, VOCAB_ROWS, tiny_config


WEIGHTS = "adapter_model.safetensors"
CHANGES = {"gpt2": "n_embd", "bert": "hidden_size", "llama": "hidden_size"}


@pytest.fixture
def saved(build_model, tmp_path):
    """Saves a prompt of the plugin on a tiny model of a seed: `saved("llama", "CAUSAL_LM")` gives its folder."""

    def save(architecture="llama", task_type="CAUSAL_LM", dtype=torch.float32):
        model = prompted(build_model(architecture, task_type).to(dtype), task_type)
        model.save_pretrained(tmp_path / "adapter")
        return str(tmp_path / "adapter")

    return save


@pytest.fixture
def stock(build_model, tmp_path):
    """Saves a prompt of stock PEFT: word embeddings times `scale`."""

    def save(architecture="gemma", scale=1.0, base=None):
        config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
        model = get_peft_model(base or build_model(architecture), config)
        words = model.get_base_model().get_input_embeddings().weight[3:8].detach()
        prompt_of(model).data = scale * words
        model.save_pretrained(tmp_path / "stock")
        return str(tmp_path / "stock")

    return save


def record_of(folder):
    return json.loads(Path(folder, "prompt_init.json").read_text())


def write_record(folder, record):
    Path(folder, "prompt_init.json").write_text(json.dumps(record))


def from_pretrained(base, folder, task_type):
    return PeftModel.from_pretrained(base, folder)


def load_adapter(base, folder, task_type):
    return prompted(base, task_type).load_adapter(folder, "second")


def to_train_further(base, folder, task_type):
    return PeftModel.from_pretrained(base, folder, is_trainable=True)


def over_an_adapter(base, folder, task_type):
    return prompted(base, task_type).load_adapter(folder, "default")


def transfer(base, folder, task_type):
    kwargs = {"source": folder, "check_base_model": False}
    return prompted(base, task_type, prompt_tuning_init="TRANSFER", prompt_tuning_init_kwargs=kwargs)


every_load = pytest.mark.parametrize(
    "load", [from_pretrained, load_adapter, to_train_further, over_an_adapter, transfer]
)
tasks = pytest.mark.parametrize(
    ("architecture", "task_type"), [("llama", "CAUSAL_LM"), ("gpt2", "CAUSAL_LM"), ("bert", "SEQ_CLS")]
)


# --- the record


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_the_record_holds_sizes_and_norms_of_embeddings_as_they_enter_the_model(saved, build_model, architecture):
    record = record_of(saved(architecture))["base_model"]

    rows = [20, 62, 103, 144, 186, 227, 268, 310]
    with torch.no_grad():
        embeds = build_model(architecture).get_input_embeddings()(torch.tensor(rows))
    assert (record["model_type"], record["hidden_size"]) == (architecture, HIDDEN)
    assert record["vocab_size"] == VOCAB_ROWS
    assert record["row_norms"] == pytest.approx(embeds.norm(dim=1).tolist(), rel=1e-5)
    assert record["embedding_scale"] == pytest.approx(float(embeds.square().mean().sqrt()), rel=1e-5)


def test_a_prompt_that_is_trained_further_belongs_to_the_model_it_is_trained_on(saved, build_model, tmp_path):
    folder = saved()
    with pytest.warns(UserWarning, match="another base model"):
        model = PeftModel.from_pretrained(build_model("llama", seed=1), folder, is_trainable=True)
    model.save_pretrained(tmp_path / "further")

    PeftModel.from_pretrained(build_model("llama", seed=1), tmp_path / "further")  # warnings are errors


# --- the same base model: no warning


@tasks
@every_load
def test_the_same_base_model_is_loaded_without_a_warning(saved, build_model, architecture, task_type, load):
    assert load(build_model(architecture, task_type), saved(architecture, task_type), task_type)


@pytest.mark.parametrize("saved_in", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loaded_in", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_another_precision_is_the_same_base_model(saved, build_model, saved_in, loaded_in, architecture):
    folder = saved(architecture, dtype=saved_in)

    assert PeftModel.from_pretrained(build_model(architecture).to(loaded_in), folder)


def test_further_rows_for_added_tokens_are_the_same_base_model(saved, build_model):
    base = build_model("llama")
    base.resize_token_embeddings(VOCAB_ROWS + 11)

    assert PeftModel.from_pretrained(base, saved())


# --- another base model: a warning or an error


@tasks
@every_load
def test_other_weights_are_warned_of(saved, build_model, architecture, task_type, load):
    folder, base = saved(architecture, task_type), build_model(architecture, task_type, seed=1)

    with pytest.warns(UserWarning, match=rf"'{folder}'.* another base model \(a .*\): its word embeddings differ"):
        load(base, folder, task_type)


@every_load
def test_a_smaller_vocabulary_is_warned_of(saved, build_model, load):
    base = build_model("llama")
    base.resize_token_embeddings(211)

    with pytest.warns(UserWarning, match=r"another base model \(a llama with 331 words\): this one has 211 words"):
        load(base, saved(), "CAUSAL_LM")


def test_another_architecture_with_the_same_table_is_warned_of(saved, build_model):
    base, table = build_model("qwen3"), build_model("llama").get_input_embeddings().weight
    base.get_input_embeddings().weight.data = table.data

    with pytest.warns(UserWarning, match=r"another base model \(a llama with 331 words\): this one is a qwen3"):
        PeftModel.from_pretrained(base, saved())


@every_load
def test_the_same_model_at_another_scale_is_warned_of_with_the_factor(saved, build_model, load):
    base = build_model("llama")
    base.get_input_embeddings().weight.data *= 6.0  # as a module that scales

    with pytest.warns(UserWarning, match=r"another scale: here they are 6 times as large.*Multiply the prompt by 6"):
        load(base, saved(), "CAUSAL_LM")


@tasks
@pytest.mark.parametrize("load", [from_pretrained, load_adapter, to_train_further])
def test_another_width_is_an_error_before_anything_is_loaded(saved, build_model, architecture, task_type, load):
    wider = {CHANGES[architecture]: 48, **({"head_dim": 24} if architecture == "llama" else {})}
    base = build_model(architecture, task_type, **wider)

    with pytest.raises(ValueError, match=r"trained for word embeddings of width 24 .* this base model has 48"):
        load(base, saved(architecture, task_type), task_type)


def test_a_prompt_of_another_width_leaves_a_model_as_it_was(saved, build_model):
    model = prompted(build_model("llama", hidden_size=48, head_dim=24), "CAUSAL_LM")
    folder = saved()

    with pytest.raises(ValueError, match="of width 24"):
        model.load_adapter(folder, "second")

    assert list(model.peft_config) == ["default"] and list(model.prompt_encoder) == ["default"]
    assert torch.isfinite(model(**make_batch("CAUSAL_LM")).loss)


def test_a_stock_prompt_of_another_width_is_an_error_too(stock, build_model):
    with pytest.raises(ValueError, match="of width 24"):
        PeftModel.from_pretrained(build_model("llama", hidden_size=48, head_dim=24), stock("llama"))


@pytest.mark.parametrize(
    "broken",
    [{}, {"row_norms": [1.0]}, {"row_norms": [1.0], "vocab_size": 331}, {"row_norms": 3, "vocab_size": 3}, [1]],
)
def test_an_incomplete_fingerprint_does_not_lose_the_prompt(saved, build_model, broken):
    folder = saved()
    write_record(folder, {**record_of(folder), "base_model": broken})

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(build_model("llama"), folder)

    assert prompt_of(model).shape == (5, HIDDEN)
    assert any("incomplete" in str(warning.message) for warning in caught) == bool(broken)


# --- prompts without a fingerprint, where the model scales its embeddings


@every_load
@pytest.mark.parametrize("architecture", ["gemma", "gemma2", "gemma3_text"])
def test_a_prompt_of_the_size_of_the_table_is_warned_of_where_embeddings_are_scaled(
    stock, build_model, architecture, load
):
    folder = stock(architecture)

    with pytest.warns(
        UserWarning, match=rf"enter the model {HIDDEN**0.5:.4g} times.*multiply it by {HIDDEN**0.5:.4g}"
    ):
        load(build_model(architecture), folder, "CAUSAL_LM")


@every_load
@pytest.mark.parametrize("scale", [HIDDEN**0.5, 3 * HIDDEN**0.5])
def test_a_prompt_of_the_size_of_entering_embeddings_is_not(stock, build_model, scale, load):
    assert load(build_model("gemma"), stock("gemma", scale), "CAUSAL_LM")


@every_load
@pytest.mark.parametrize("scale", [0.02, 1.0, 50.0])
def test_no_size_is_wrong_where_nothing_is_scaled(stock, build_model, scale, load):
    assert load(build_model("llama"), stock("llama", scale), "CAUSAL_LM")


def test_a_little_more_or_less_is_no_scale(stock, build_model):
    base = build_model("gemma")
    base.get_input_embeddings().embed_scale.fill_(1.2)

    assert PeftModel.from_pretrained(base, stock())  # without a warning


@every_load
def test_a_prompt_that_an_older_version_of_the_plugin_saved_is_like_a_stock_one(saved, build_model, load):
    folder = saved("gemma")
    write_record(folder, {key: value for key, value in record_of(folder).items() if key != "base_model"})
    words = build_model("gemma").get_input_embeddings().weight[3:8].detach().clone()
    save_file({**load_file(f"{folder}/{WEIGHTS}"), "prompt_embeddings": words}, f"{folder}/{WEIGHTS}")

    with pytest.warns(UserWarning, match="scale"):
        load(build_model("gemma"), folder, "CAUSAL_LM")


def test_an_offloaded_table_is_compared_as_well(saved):
    from accelerate import cpu_offload

    folder = saved()
    for seed in (0, 1):
        torch.manual_seed(seed)
        base = AUTO_CLASSES["CAUSAL_LM"].from_config(tiny_config("llama")).eval()
        cpu_offload(base, execution_device="cpu")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            PeftModel.from_pretrained(base, folder)
        assert any("another base model" in str(warning.message) for warning in caught) == bool(seed)
