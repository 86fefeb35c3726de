"""Stock in, stock out: adapters cross between this plugin and a PEFT that has never heard of it."""

import subprocess
import sys

import pytest
import torch
from peft import PeftModel, PromptTuningConfig, get_peft_model

from peft_prompt_ext import PromptTuningExtConfig, _peft_seam
from tests.helpers import make_batch, make_trainer, prompted
from tests.zoo import AUTO_CLASSES


CASES = {
    "llama-CAUSAL_LM": {
        "prompt_tuning_init": "CLASS_LABELS",
        "prompt_tuning_init_kwargs": {"labels": ["great", "terrible"]},
    },
    "gpt2-CAUSAL_LM": {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "great film"},
    "bert-SEQ_CLS": {"prompt_tuning_init": "SAMPLE_VOCAB", "tokenizer_kwargs": {"padding_side": "left"}},
    "bert-TOKEN_CLS": {"prompt_tuning_init": "RANDOM_UNIFORM"},
    "t5-SEQ_2_SEQ_LM": {"prompt_tuning_init": "SAMPLE_VOCAB"},
}

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
from tests.helpers_stock import batch_ids

# stock PEFT's own, with every model
warnings.filterwarnings("error")
warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
folder, cases = sys.argv[1], sys.argv[2:]
outputs = {}
for case in cases:
    task = case.split("-")[1]
    load = lambda: AUTO_CLASSES[task].from_pretrained(f"{folder}/{case}/base").eval()
    ids, extra = batch_ids(task)
    ours = PeftModel.from_pretrained(load(), f"{folder}/{case}/adapter")
    torch.manual_seed(5)
    stock = get_peft_model(load(), PromptTuningConfig(task_type=task, num_virtual_tokens=5)).eval()
    stock.save_pretrained(f"{folder}/{case}/stock")
    with torch.no_grad():
        outputs[case] = [ours(input_ids=ids, **extra).logits, stock(input_ids=ids, **extra).logits]
torch.save(outputs, f"{folder}/outputs.pt")
try:
    import peft_prompt_ext
except ImportError:
    print("the plugin was not there")
"""


@pytest.fixture(scope="module")
def crossed(tmp_path_factory, tokenizer_folder, pytestconfig):
    """Adapters trained here, and what a process without the plugin made of them; and its own stock adapters."""
    from tests.zoo import tiny_config

    folder = tmp_path_factory.mktemp("crossed")
    for case, changes in CASES.items():
        architecture, task_type = case.split("-")
        torch.manual_seed(0)
        AUTO_CLASSES[task_type].from_config(tiny_config(architecture)).save_pretrained(folder / case / "base")
        base = AUTO_CLASSES[task_type].from_pretrained(folder / case / "base")
        model = prompted(base, task_type, tokenizer_name_or_path=tokenizer_folder, **changes)
        make_trainer(model, task_type, folder / case / "run", max_steps=3).train()
        model.save_pretrained(folder / case / "adapter")
    command = [sys.executable, "-c", STOCK_PROCESS, str(folder), *CASES]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=pytestconfig.rootpath)
    assert ran.returncode == 0, ran.stderr
    assert "the plugin was not there" in ran.stdout
    return folder, torch.load(folder / "outputs.pt", weights_only=True)


def logits_here(folder, case, adapter):
    task_type = case.split("-")[1]
    base = AUTO_CLASSES[task_type].from_pretrained(folder / case / "base").eval()
    model = PeftModel.from_pretrained(base, folder / case / adapter)
    batch = make_batch(task_type)
    extra = {"decoder_input_ids": batch["labels"]} if task_type == "SEQ_2_SEQ_LM" else {}
    with torch.no_grad():
        return model, model(input_ids=batch["input_ids"], **extra).logits


@pytest.mark.parametrize("case", CASES)
def test_an_adapter_trained_here_gives_the_same_logits_without_the_plugin(crossed, case):
    folder, outputs = crossed
    theirs, _ = outputs[case]

    model, ours = logits_here(folder, case, "adapter")

    assert isinstance(model.peft_config["default"], PromptTuningExtConfig)
    assert torch.equal(ours, theirs[:, 5:] if case.endswith("TOKEN_CLS") else theirs)


@pytest.mark.parametrize("case", CASES)
def test_an_adapter_of_stock_peft_gives_the_same_logits_here(crossed, case):
    folder, outputs = crossed
    _, theirs = outputs[case]

    model, ours = logits_here(folder, case, "stock")

    assert type(model.peft_config["default"]) is PromptTuningConfig
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("adapter", ["adapter", "stock"])
def test_both_kinds_of_adapter_are_trained_further(crossed, tmp_path, case, adapter):
    folder, _ = crossed
    task_type = case.split("-")[1]
    base = AUTO_CLASSES[task_type].from_pretrained(folder / case / "base")
    if task_type == "TOKEN_CLS" and adapter == "stock":
        pytest.skip("stock PEFT cannot take token labels at all")

    model = PeftModel.from_pretrained(base, folder / case / adapter, is_trainable=True)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    make_trainer(model, task_type, tmp_path, max_steps=2).train()

    assert "prompt_encoder.default.embedding.weight" in before
    for name, p in model.named_parameters():
        assert name not in before or not torch.equal(p, before[name]), name


def test_without_the_seam_stock_peft_refuses_to_train_further(crossed, seam):
    folder, _ = crossed
    seam.deactivate()

    base = AUTO_CLASSES["CAUSAL_LM"].from_pretrained(folder / "llama-CAUSAL_LM" / "base")
    with pytest.raises(ValueError, match="Cannot set a prompt learning adapter to trainable"):
        PeftModel.from_pretrained(base, folder / "llama-CAUSAL_LM" / "adapter", is_trainable=True)


def test_a_stock_config_makes_a_stock_model_here(build_model):
    assert _peft_seam._stock  # the seam is active
    model = get_peft_model(build_model("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5))

    assert type(model).__module__ == "peft.peft_model"
