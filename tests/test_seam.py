import json
import subprocess
import sys

import peft
import pytest
from peft import LoraConfig, PeftModel, PeftType, PrefixTuningConfig, PromptTuningConfig, get_peft_model


OUTPUTS = """
import hashlib, sys
if sys.argv[1] == "with":
    import peft_prompt_ext
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from tests.zoo import AUTO_CLASSES, tiny_config

assert ("peft_prompt_ext" in sys.modules) == (sys.argv[1] == "with")
for task, name in [("CAUSAL_LM", "llama"), ("SEQ_CLS", "bert"), ("SEQ_2_SEQ_LM", "t5")]:
    target = {"target_modules": ["query"]} if name == "bert" else {}
    for config in (
        LoraConfig(task_type=task, init_lora_weights=False, **target),
        PromptTuningConfig(task_type=task, num_virtual_tokens=5),
        PromptTuningConfig(task_type=task, num_virtual_tokens=5, prompt_tuning_init="SAMPLE_VOCAB"),
    ):
        torch.manual_seed(0)
        model = get_peft_model(AUTO_CLASSES[task].from_config(tiny_config(name)).eval(), config)
        ids = torch.arange(3, 17).view(2, 7)
        labels = ids[:, 0] % 2 if task == "SEQ_CLS" else ids
        output = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels)
        output.loss.backward()
        digest = hashlib.sha256(output.logits.detach().numpy().tobytes())
        for _, p in model.named_parameters():
            digest.update(b"" if p.grad is None else p.grad.numpy().tobytes())
        print(type(model).__module__, type(model).__name__, config.peft_type, digest.hexdigest())
"""

IMPORTS = """
import json, sys, time
import peft
before, start = set(sys.modules), time.process_time()
import peft_prompt_ext
print(json.dumps([time.process_time() - start, sorted(set(sys.modules) - before)]))
"""


def run(code, *arguments, root):
    command = [sys.executable, "-W", "ignore", "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=root).stdout


def test_lora_and_stock_prompts_are_bit_identical_with_and_without_the_plugin(pytestconfig):
    without, with_plugin = (run(OUTPUTS, which, root=pytestconfig.rootpath) for which in ("without", "with"))

    assert len(without.splitlines()) == 9
    assert with_plugin == without


def test_the_import_costs_little_and_brings_nothing_of_others(pytestconfig):
    runs = [json.loads(run(IMPORTS, root=pytestconfig.rootpath)) for _ in range(3)]

    foreign = [name for name in runs[0][1] if name.split(".")[0] != "peft_prompt_ext"]
    assert not [name for name in foreign if name.split(".")[0] not in sys.stdlib_module_names]
    assert min(seconds for seconds, _ in runs) < 0.05


def test_activating_twice_changes_nothing_more(seam):
    before = dict(peft.MODEL_TYPE_TO_PEFT_MODEL_MAPPING)

    seam.activate()

    assert peft.MODEL_TYPE_TO_PEFT_MODEL_MAPPING == before


def test_deactivating_puts_peft_back(seam):
    seam.deactivate()

    classes = [
        *peft.MODEL_TYPE_TO_PEFT_MODEL_MAPPING.values(),
        peft.PEFT_TYPE_TO_TUNER_MAPPING[PeftType.PROMPT_TUNING],
    ]
    assert all(cls.__module__.startswith("peft.") for cls in classes)
    assert PeftModel.from_pretrained.__func__.__module__ == "peft.peft_model"


def test_deactivating_twice_and_activating_again_works(seam):
    seam.deactivate()
    seam.deactivate()
    seam.activate()

    assert peft.PEFT_TYPE_TO_TUNER_MAPPING[PeftType.PROMPT_TUNING] is seam.PromptEmbedding


@pytest.mark.parametrize(
    "config", [LoraConfig(task_type="CAUSAL_LM"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)]
)
def test_other_configs_get_exactly_pefts_class(build_model, config):
    assert type(get_peft_model(build_model("llama"), config)) is peft.PeftModelForCausalLM


def test_other_prompt_methods_still_cannot_be_loaded_to_be_trained(build_model, tmp_path):
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    get_peft_model(build_model("llama"), config).save_pretrained(tmp_path)

    with pytest.raises(ValueError, match="Cannot set a prompt learning adapter to trainable"):
        PeftModel.from_pretrained(build_model("llama"), tmp_path, is_trainable=True)
