"""Stock in, stock out: adapters load in PEFT without the plugin, and adapters of stock PEFT load here."""

import json
import os
import subprocess
import sys
from dataclasses import fields

import pytest
import torch
from peft import PeftModel, PromptTuningConfig
from safetensors.torch import load_file

from peft_prompt_ext import PromptTuningExtConfig
from tests.helpers import VIRTUAL, make_batch, make_trainer, one_thread, prompt_of, prompted  # noqa: F401
from tests.zoo import AUTO_CLASSES, tiny_config


TOKENIZER = {"padding_side": "left"}
CASES = {
    "llama-CAUSAL_LM": {
        "prompt_tuning_init": "CLASS_LABELS",
        "prompt_tuning_init_kwargs": {"labels": ["great", "terrible"]},
        "tokenizer_kwargs": TOKENIZER,
    },
    "gpt2-CAUSAL_LM": {
        "prompt_tuning_init": "TEXT",
        "prompt_tuning_init_text": "great film",
        "tokenizer_kwargs": TOKENIZER,
    },
    "bert-SEQ_CLS": {"prompt_tuning_init": "SAMPLE_VOCAB", "tokenizer_kwargs": TOKENIZER},
    "bert-TOKEN_CLS": {"prompt_tuning_init": "RANDOM_UNIFORM"},
    "t5-SEQ_2_SEQ_LM": {"prompt_tuning_init": "SAMPLE_VOCAB", "prompt_tuning_init_kwargs": {"population": 20}},
}
HEADS = {"bert-SEQ_CLS", "bert-TOKEN_CLS"}

STOCK_PROCESS = """
import sys, warnings

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "peft_prompt_ext":
            raise ImportError("blocked")

sys.meta_path.insert(0, Block())
import torch
from peft import PeftModel, PromptTuningConfig, get_peft_model
from tests.zoo import AUTO_CLASSES

warnings.filterwarnings("error")
# stock PEFT warns for every model
warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
folder, cases = sys.argv[1], sys.argv[2:]
outputs = {}
for case in cases:
    task = case.split("-")[1]
    load = lambda: AUTO_CLASSES[task].from_pretrained(f"{folder}/{case}/base").eval()
    inputs = torch.load(f"{folder}/{case}/inputs.pt")
    ours = PeftModel.from_pretrained(load(), f"{folder}/{case}/adapter")
    torch.manual_seed(5)
    stock = get_peft_model(load(), PromptTuningConfig(task_type=task, num_virtual_tokens=5)).eval()
    optimizer = torch.optim.AdamW(stock.parameters(), lr=0.05)
    for _ in range(3):
        stock(**inputs).logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    stock.save_pretrained(f"{folder}/{case}/stock")
    with torch.no_grad():
        outputs[case] = {"adapter": ours(**inputs).logits, "stock": stock(**inputs).logits}
torch.save(outputs, f"{folder}/outputs.pt")
try:
    import peft_prompt_ext
except ImportError:
    print("the plugin was not there")
"""


def inputs_of(task_type):
    batch = make_batch(task_type)
    decoder = {"decoder_input_ids": batch["labels"]} if task_type == "SEQ_2_SEQ_LM" else {}
    return {"input_ids": batch["input_ids"], **decoder}


@pytest.fixture(scope="module")
def crossed(tmp_path_factory, tokenizer_folder, pytestconfig):
    """Adapters trained here, their results in a process without the plugin, and its own stock adapters."""
    folder = tmp_path_factory.mktemp("crossed")
    for case, changes in CASES.items():
        architecture, task_type = case.split("-")
        torch.manual_seed(0)
        AUTO_CLASSES[task_type].from_config(tiny_config(architecture)).save_pretrained(folder / case / "base")
        base = AUTO_CLASSES[task_type].from_pretrained(folder / case / "base")
        model = prompted(base, task_type, tokenizer_name_or_path=tokenizer_folder, **changes)
        make_trainer(model, task_type, folder / case / "run", max_steps=3, save_strategy="no").train()
        model.save_pretrained(folder / case / "adapter")
        torch.save(inputs_of(task_type), folder / case / "inputs.pt")
    command = [sys.executable, "-c", STOCK_PROCESS, str(folder), *CASES]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, capture_output=True, text=True, cwd=pytestconfig.rootpath, env=environment)
    assert ran.returncode == 0, ran.stderr
    assert "the plugin was not there" in ran.stdout
    return folder, torch.load(folder / "outputs.pt", weights_only=True)


def load_here(folder, case, adapter, **kwargs):
    task_type = case.split("-")[1]
    base = AUTO_CLASSES[task_type].from_pretrained(folder / case / "base").eval()
    return PeftModel.from_pretrained(base, folder / case / adapter, **kwargs)


def logits_of(model, case):
    with torch.no_grad():
        return model(**inputs_of(case.split("-")[1])).logits


def for_text(logits, case, adapter):
    """Select the stock logits that this plugin returns for the adapter."""
    return logits[:, VIRTUAL:] if case.endswith("TOKEN_CLS") and adapter == "adapter" else logits


def assert_same_logits(model, outputs, case, adapter):
    """Compare bit by bit on PEFT's path; a packed batch sums in another order."""
    expected = for_text(outputs[case][adapter], case, adapter)
    torch.testing.assert_close(logits_of(model, case), expected, rtol=0, atol=1e-5)
    model.active_peft_config.shared_prefix = False
    assert torch.equal(logits_of(model, case), expected)


cases = pytest.mark.parametrize("case", CASES)
adapters = pytest.mark.parametrize("adapter", ["adapter", "stock"])


@cases
def test_an_adapter_trained_here_loads_without_a_warning_and_gives_the_same_logits_without_the_plugin(crossed, case):
    folder, outputs = crossed

    model = load_here(folder, case, "adapter")

    assert_same_logits(model, outputs, case, "adapter")


@cases
def test_an_adapter_of_stock_peft_gives_the_same_logits_here_and_stays_stock(crossed, case):
    folder, outputs = crossed

    model = load_here(folder, case, "stock")

    assert type(model.peft_config["default"]) is PromptTuningConfig
    assert type(model).__module__ == "peft.peft_model"
    assert torch.equal(logits_of(model, case), outputs[case]["stock"])


@cases
def test_an_adapter_trained_here_comes_back_with_its_config_and_record(crossed, case):
    folder, _ = crossed
    wanted = CASES[case]

    config = load_here(folder, case, "adapter").peft_config["default"]

    assert type(config) is PromptTuningExtConfig
    assert config.prompt_tuning_init == wanted["prompt_tuning_init"]
    assert config.prompt_tuning_init_kwargs == wanted.get("prompt_tuning_init_kwargs")
    assert config.init_record == json.loads((folder / case / "adapter" / "prompt_init.json").read_text())


@cases
def test_the_saved_config_has_the_keys_of_stock_peft_and_no_other(crossed, case):
    folder, _ = crossed

    ours, stock = (
        json.loads((folder / case / name / "adapter_config.json").read_text()) for name in ("adapter", "stock")
    )

    assert set(ours) == set(stock) == {f.name for f in fields(PromptTuningConfig)}


@cases
def test_the_saved_weights_have_the_names_of_stock_peft(crossed, case):
    folder, _ = crossed

    ours, stock = (load_file(folder / case / name / "adapter_model.safetensors") for name in ("adapter", "stock"))

    assert set(ours) == set(stock) and len(ours) == (3 if case in HEADS else 1)
    assert ours["prompt_embeddings"].shape[0] == VIRTUAL  # stock PEFT saves twice as many for an encoder-decoder


@cases
@adapters
def test_an_adapter_loaded_to_be_trained_begins_where_it_was_saved(crossed, case, adapter):
    folder, outputs = crossed

    model = load_here(folder, case, adapter, is_trainable=True)

    assert_same_logits(model, outputs, case, adapter)
    assert model.peft_config["default"].inference_mode is False


@pytest.mark.parametrize(
    ("case", "adapter"),
    [
        (case, adapter)
        for case in CASES
        for adapter in ("adapter", "stock")
        if (case, adapter) != ("bert-TOKEN_CLS", "stock")  # stock PEFT fails with labels per token
    ],
)
def test_an_adapter_loaded_to_be_trained_is_trained_with_its_head_and_nothing_else(crossed, tmp_path, case, adapter):
    folder, _ = crossed
    model = load_here(folder, case, adapter, is_trainable=True)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}

    make_trainer(model, case.split("-")[1], tmp_path, max_steps=2, save_strategy="no").train()

    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    head = {f"base_model.classifier.modules_to_save.default.{name}" for name in ("weight", "bias")}
    assert changed == {"prompt_encoder.default.embedding.weight", *(head if case in HEADS else ())}


def test_an_adapter_of_stock_peft_can_be_a_second_one_beside_ours(crossed):
    folder, outputs = crossed
    case = "llama-CAUSAL_LM"
    model = load_here(folder, case, "adapter")

    model.load_adapter(folder / case / "stock", "second")
    model.set_adapter("second")

    torch.testing.assert_close(logits_of(model, case), outputs[case]["stock"], rtol=0, atol=1e-5)
    assert torch.equal(prompt_of(model), prompt_of(load_here(folder, case, "adapter")))


def test_without_the_seam_stock_peft_refuses_to_train_further(crossed, seam):
    folder, _ = crossed
    seam.deactivate()

    with pytest.raises(ValueError, match="Cannot set a prompt learning adapter to trainable"):
        load_here(folder, "llama-CAUSAL_LM", "adapter", is_trainable=True)
