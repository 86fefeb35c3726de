import functools
import json
import os
import subprocess
import sys

import peft
import pytest
from peft import LoraConfig, PeftModel, PeftType, PrefixTuningConfig, PromptTuningConfig, TaskType, get_peft_model

from peft_prompt_ext import peft_models
from peft_prompt_ext.encoder import PromptEmbedding
from tests.helpers import one_thread, prompted  # noqa: F401


# PEFT's results, one line for each model, in a process with or without the plugin.
PEFT_AT_WORK = """
import hashlib, json, sys, tempfile

def of_peft():
    # the names of every module of PEFT, the entries of its tables, the attributes of its classes
    found = {}
    for module_name, module in list(sys.modules.items()):
        if module_name.split(".")[0] == "peft":
            for name, value in vars(module).items():
                found[module_name, name] = value
                inside = value if isinstance(value, dict) else vars(value) if isinstance(value, type) else {}
                found |= {(module_name, name, str(key)): item for key, item in inside.items()}
    return found

def changes(before, after):
    return sorted({key[-1] for key in before | after if before.get(key) is not after.get(key)})

import peft
modules, stock = set(sys.modules), of_peft()
if sys.argv[1] == "with":
    import peft_prompt_ext
report = {"imported": sorted(set(sys.modules) - modules)}
report["changed"] = changes(stock, of_peft())

import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from tests.zoo import AUTO_CLASSES, tiny_config

def hash_of(tensors):
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(b"none" if tensor is None else tensor.detach().numpy().tobytes())
    return digest.hexdigest()

def at_work(model, inputs):
    initial = hash_of(model.state_dict().values())
    output = model(**inputs)
    output.loss.backward()
    gradients = hash_of(p.grad for p in model.parameters())
    return [type(model).__module__, type(model).__name__, initial, hash_of([output.logits]), gradients, model.training]

lines = report["lines"] = []
for task, name in [("CAUSAL_LM", "llama"), ("SEQ_CLS", "bert"), ("SEQ_2_SEQ_LM", "t5")]:
    target = {"target_modules": ["query"]} if name == "bert" else {}
    ids = torch.arange(3, 17).view(2, 7)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids % 2}
    if task == "SEQ_CLS":
        inputs["labels"] = ids[:, 0] % 2
    for config in (
        LoraConfig(task_type=task, init_lora_weights=False, **target),
        PromptTuningConfig(task_type=task, num_virtual_tokens=5),
        PromptTuningConfig(task_type=task, num_virtual_tokens=5, prompt_tuning_init="SAMPLE_VOCAB"),
    ):
        build = lambda: AUTO_CLASSES[task].from_config(tiny_config(name))
        torch.manual_seed(0)
        model = get_peft_model(build(), config)
        lines.append([str(config.peft_type), *at_work(model, inputs), hash_of([torch.get_rng_state()])])
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            further = {"is_trainable": True} if isinstance(config, LoraConfig) else {}
            torch.manual_seed(0)
            lines.append(["loaded", *at_work(PeftModel.from_pretrained(build(), folder, **further), inputs)])

assert ("peft_prompt_ext" in sys.modules) == (sys.argv[1] == "with")
if sys.argv[1] == "with":
    peft_prompt_ext._seam.deactivate()
report["left_over"] = changes(stock, {key: value for key, value in of_peft().items() if key in stock})
print(json.dumps(report))
"""

# As for a user: with byte code from an earlier import, also if the tests' environment disables it.
IMPORT = """
import sys, time, peft
sys.dont_write_bytecode, sys.pycache_prefix = False, sys.argv[1]
start = time.process_time()
import peft_prompt_ext
print(time.process_time() - start)
"""


def run(code, *arguments, root):
    command = [sys.executable, "-W", "ignore", "-c", code, *arguments]
    # threads could sum in another order in each process
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, capture_output=True, text=True, cwd=root, env=environment)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def without(pytestconfig):
    return run(PEFT_AT_WORK, "without", root=pytestconfig.rootpath)


@pytest.fixture(scope="module")
def with_plugin(pytestconfig):
    return run(PEFT_AT_WORK, "with", root=pytestconfig.rootpath)


def test_lora_and_stock_prompts_are_bit_identical_with_and_without_the_plugin(without, with_plugin):
    assert len(without["lines"]) == 2 * 3 * 3  # created and loaded, three tasks, three configs
    assert with_plugin["lines"] == without["lines"]


def test_the_import_changes_two_tables_three_methods_and_two_functions_of_peft(without, with_plugin):
    expected = {"PROMPT_TUNING", *(task.value for task in TaskType)}
    expected |= {"from_pretrained", "from_peft_type", "add_adapter"}
    expected |= {"get_peft_model_state_dict", "set_peft_model_state_dict"}

    assert without["changed"] == []
    assert {name.split(".")[-1] for name in with_plugin["changed"]} == expected


def test_deactivating_puts_back_the_very_same_objects(with_plugin):
    assert with_plugin["left_over"] == []


def test_the_import_brings_nothing_of_others(with_plugin):
    packages = {name.split(".")[0] for name in with_plugin["imported"]}

    assert "peft_prompt_ext" in packages
    assert packages - sys.stdlib_module_names - {"packaging"} == {"peft_prompt_ext"}


def test_the_import_costs_at_most_50_ms(tmp_path, pytestconfig):
    seconds = [run(IMPORT, str(tmp_path), root=pytestconfig.rootpath)]
    while min(seconds) > 0.05 and len(seconds) < 9:  # the first import compiles; a busy machine slows the others
        seconds.append(run(IMPORT, str(tmp_path), root=pytestconfig.rootpath))

    assert min(seconds) <= 0.05


def test_activating_twice_changes_nothing_more(seam):
    def tables():
        return [*peft.MODEL_TYPE_TO_PEFT_MODEL_MAPPING.values(), *peft.PEFT_TYPE_TO_TUNER_MAPPING.values()]

    before, method = tables(), PeftModel.__dict__["from_pretrained"]

    peft_models.register()

    assert all(now is then for now, then in zip(tables(), before, strict=True))
    assert PeftModel.__dict__["from_pretrained"] is method


def test_deactivating_puts_peft_back_even_after_activating_twice(seam):
    peft_models.register()

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
    stock = PeftModel.from_pretrained.__func__
    peft_models.register()
    peft_models.register()

    assert peft.PEFT_TYPE_TO_TUNER_MAPPING[PeftType.PROMPT_TUNING] is PromptEmbedding
    assert peft.MODEL_TYPE_TO_PEFT_MODEL_MAPPING["CAUSAL_LM"] is peft_models.PeftModelForCausalLM
    assert PeftModel.from_pretrained.__func__ is not stock


def test_a_function_that_another_library_has_wrapped_is_replaced_once(seam, build_model, monkeypatch):
    ours = peft.set_peft_model_state_dict
    monkeypatch.setattr(peft, "set_peft_model_state_dict", functools.wraps(ours)(lambda *a, **k: ours(*a, **k)))
    theirs = peft.set_peft_model_state_dict
    seam.deactivate()
    peft_models.register()
    model = prompted(build_model("llama"), "CAUSAL_LM", prompt_position="suffix")

    assert peft.set_peft_model_state_dict is theirs
    peft.set_peft_model_state_dict(model, peft.get_peft_model_state_dict(model))


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


def test_a_folder_without_an_adapter_gets_pefts_own_error(build_model, seam, tmp_path):
    def error():
        with pytest.raises(ValueError, match=r"Can't find 'adapter_config\.json'") as raised:
            PeftModel.from_pretrained(build_model("llama"), tmp_path)
        return str(raised.value)

    ours = error()
    seam.deactivate()

    assert ours == error()
