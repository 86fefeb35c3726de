"""A prompt trains, generates and loads on a base model that accelerate offloads."""

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from peft import PeftModel

from peft_prompt_ext import engine_status
from peft_prompt_ext.devices import device_of
from tests.helpers import make_batch, one_thread, prompt_of, prompted  # noqa: F401
from tests.zoo import AUTO_CLASSES


OFFLOADS = {
    "cpu_offload": lambda base, folder: cpu_offload(base, execution_device="cpu"),
    "disk_offload": lambda base, folder: disk_offload(base, str(folder), execution_device="cpu"),
    "dispatched to disk": lambda base, folder: dispatch_model(
        base, mapped(base, "disk"), main_device="cpu", offload_dir=str(folder), force_hooks=True
    ),
    "dispatched with hooks": lambda base, folder: dispatch_model(base, mapped(base, "cpu"), "cpu", force_hooks=True),
}
MODELS = [
    ("llama", "CAUSAL_LM"),
    ("gpt2", "CAUSAL_LM"),
    ("llama", "SEQ_CLS"),
    ("bert", "SEQ_CLS"),
    ("bert", "QUESTION_ANS"),
    ("t5", "SEQ_2_SEQ_LM"),
]
offloads = pytest.mark.parametrize("offload", OFFLOADS)
models = pytest.mark.parametrize(("architecture", "task_type"), MODELS)
pytestmark = pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning")


def mapped(base, first):
    """Put the first part of a model on a device, the others on the CPU."""
    return {name: first if number == 0 else "cpu" for number, (name, _) in enumerate(base.named_children())}


def outputs_of(model, task_type):
    batch = make_batch(task_type)
    if model.config.model_type == "bert":
        batch["token_type_ids"] = batch["input_ids"] % 2
    output = model(**batch)
    return output.loss, output[1]


@pytest.mark.filterwarnings("ignore:.*`input_ids` being on a device type")  # transformers 5.17 warns for all inputs
@models
@offloads
@pytest.mark.parametrize("when", ["before", "after"])
def test_an_offloaded_model_gives_and_trains_what_it_gives_in_memory(
    build_model, tmp_path, architecture, task_type, offload, when
):
    wanted = prompted(build_model(architecture, task_type), task_type).eval()
    base = build_model(architecture, task_type)
    if when == "before":
        OFFLOADS[offload](base, tmp_path)
    model = prompted(base, task_type).eval()
    if when == "after":
        OFFLOADS[offload](base, tmp_path)

    (loss, logits), (wanted_loss, wanted_logits) = (outputs_of(m, task_type) for m in (model, wanted))
    loss.backward()
    wanted_loss.backward()

    torch.testing.assert_close(logits, wanted_logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(prompt_of(model).grad, prompt_of(wanted).grad, rtol=1e-4, atol=1e-7)
    if when == "before":  # a head that is loaded for one pass gets no gradient
        assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
    if task_type == "CAUSAL_LM":
        assert engine_status(model).packed == engine_status(wanted).packed
        ids = make_batch(task_type)["input_ids"]
        options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 4, "do_sample": False}
        assert torch.equal(model.generate(input_ids=ids, **options), wanted.generate(input_ids=ids, **options))


@pytest.mark.parametrize(("architecture", "task_type"), [case for case in MODELS if case[0] in ("llama", "bert")])
@pytest.mark.parametrize("is_trainable", [False, True])
def test_a_prompt_loads_on_a_model_that_transformers_dispatched(
    build_model, tmp_path, architecture, task_type, is_trainable
):
    source = prompted(build_model(architecture, task_type), task_type).eval()
    source.save_pretrained(tmp_path / "adapter")
    wanted = outputs_of(source, task_type)[1]
    plain = build_model(architecture, task_type)
    plain.save_pretrained(tmp_path / "base")
    device_map, load = mapped(plain, "disk"), AUTO_CLASSES[task_type].from_pretrained
    base = load(tmp_path / "base", device_map=device_map, offload_folder=str(tmp_path / "offloaded"))

    model = PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=is_trainable).eval()

    torch.testing.assert_close(outputs_of(model, task_type)[1], wanted, rtol=0, atol=1e-5)
    assert base.hf_device_map == device_map
    model.save_pretrained(tmp_path / "again")


def test_weights_written_while_they_are_offloaded_are_seen(build_model):
    """Prefixes are kept only if changes of the weights are detected."""
    base = build_model("llama")
    model = prompted(base, "CAUSAL_LM").eval()
    cpu_offload(base, execution_device="cpu")
    batch = make_batch("CAUSAL_LM")
    with torch.no_grad():
        before = model(**batch).logits
        base.model.layers[0].mlp.up_proj._hf_hook.weights_map["weight"].mul_(3)
        after = model(**batch).logits
    model.train()

    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, model(**batch).logits, rtol=0, atol=1e-5)


def test_a_module_computes_where_its_hook_loads_its_weights():
    layer = torch.nn.Linear(2, 3)
    assert device_of(layer) == torch.device("cpu")

    cpu_offload(layer, execution_device="cpu")

    assert layer.weight.is_meta and device_of(layer) == torch.device("cpu")
    assert device_of(torch.nn.Linear(2, 3, device="meta")) == torch.device("meta")
