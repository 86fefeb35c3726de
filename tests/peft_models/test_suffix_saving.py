"""A saved suffix is loaded as a suffix, or refused with a readable error; never loaded as a prefix."""

import copy
import json
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
from dataclasses import asdict

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    PeftConfig,
    PeftModel,
    PromptTuningConfig,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file

from peft_prompt_ext import PromptTuningExtConfig
from peft_prompt_ext.saved_position import TENSORS
from tests.helpers import losses_of, make_batch, make_trainer, one_thread, prompt_of, prompted  # noqa: F401
from tests.peft_models.suffix import make_suffix_batch


SENTENCE = "Invalid task type: 'CAUSAL_LM, and the prompt stands behind the text: needs peft-prompt-ext >= 0.2 ("
WEIGHTS = "adapter_model.safetensors"


def suffixed(model, task_type="CAUSAL_LM", **changes):
    """A suffix whose prompt and modules are far from any initial value."""
    built = prompted(model, task_type, prompt_position="suffix", **changes)
    generator = torch.Generator().manual_seed(7)
    for parameter in built.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(generator=generator)
    return built.eval()


def logits(model, task_type="CAUSAL_LM"):
    batch = make_suffix_batch() if task_type == "CAUSAL_LM" else make_batch(task_type)
    with torch.no_grad():
        return model(**batch).logits


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture
def saved(build_model, tmp_path):
    """Folders of a suffix and of a prefix with the same vectors."""
    suffix = suffixed(build_model("llama"))
    prefix = prompted(build_model("llama"), "CAUSAL_LM")
    prompt_of(prefix).data = prompt_of(suffix).data.clone()
    suffix.save_pretrained(tmp_path / "suffix")
    prefix.save_pretrained(tmp_path / "prefix")
    return tmp_path


# --- the plugin loads what it saved


@pytest.mark.parametrize("safe_serialization", [True, False])
@pytest.mark.parametrize(
    ("task_type", "modules"), [("CAUSAL_LM", None), ("CAUSAL_LM", ["lm_head"]), ("SEQ_CLS", None)]
)
def test_a_round_trip(build_model, tmp_path, task_type, modules, safe_serialization):
    build = lambda: build_model("llama", task_type, tie_word_embeddings=False)  # noqa: E731
    model = suffixed(build(), task_type, modules_to_save=modules)

    model.save_pretrained(tmp_path, safe_serialization=safe_serialization)
    loaded = PeftModel.from_pretrained(build(), tmp_path).eval()

    loaded.save_pretrained(tmp_path / "again", safe_serialization=safe_serialization)

    ours, theirs = (asdict(part.peft_config["default"]) for part in (model, loaded))
    added = [{*(fields.pop("modules_to_save") or [])} for fields in (ours, theirs)]  # PEFT repeats names in a list
    assert added[0] == added[1]
    assert theirs == {**ours, "inference_mode": True}
    assert (theirs["task_type"], theirs["prompt_position"]) == (task_type, "suffix")
    first, again = (json.loads((path / "prompt_init.json").read_text()) for path in (tmp_path, tmp_path / "again"))
    assert first == again and first["prompt_position"] == "suffix" and first["base_model"]
    assert torch.equal(logits(loaded, task_type), logits(model, task_type))


def test_the_same_vectors_as_a_prefix_answer_otherwise(build_model, saved):
    prefix, suffix = (PeftModel.from_pretrained(build_model("llama"), saved / name) for name in ("prefix", "suffix"))

    assert torch.equal(prompt_of(prefix), prompt_of(suffix))
    assert not torch.allclose(logits(prefix), logits(suffix), atol=0.01)


def test_the_files_of_a_prefix_are_those_of_stock_peft(build_model, saved, tmp_path):
    config = json.loads((saved / "prefix" / "adapter_config.json").read_text())
    stock = PromptTuningConfig(**config)

    stock.save_pretrained(tmp_path / "stock")

    written = (tmp_path / "stock" / "adapter_config.json").read_bytes()
    assert config["task_type"] == "CAUSAL_LM" and (saved / "prefix" / "adapter_config.json").read_bytes() == written
    assert list(load_file(saved / "prefix" / WEIGHTS)) == ["prompt_embeddings"]
    assert list(load_file(saved / "suffix" / WEIGHTS)) == ["suffix_embeddings"]


@pytest.mark.parametrize("is_trainable", [False, True])
def test_every_way_to_load_gives_a_suffix(build_model, saved, tmp_path, is_trainable):
    want = logits(PeftModel.from_pretrained(build_model("llama"), saved / "suffix"))
    build_model("llama").save_pretrained(tmp_path / "base")
    edit(saved / "suffix" / "adapter_config.json", base_model_name_or_path=str(tmp_path / "base"))
    folder, config = saved / "suffix", PromptTuningExtConfig.from_pretrained(saved / "suffix")
    second = prompted(build_model("llama"), "CAUSAL_LM")
    second.load_adapter(folder, "second", is_trainable=is_trainable)
    second.set_adapter("second")

    for model in (
        PeftModel.from_pretrained(build_model("llama"), folder, is_trainable=is_trainable),
        PeftModel.from_pretrained(build_model("llama"), folder, config=config, is_trainable=is_trainable),
        PeftModel.from_pretrained(build_model("llama"), folder, config=PeftConfig.from_pretrained(folder)),
        AutoPeftModelForCausalLM.from_pretrained(folder, is_trainable=is_trainable),
        second,
    ):
        assert torch.equal(logits(model.eval()), want)


def test_a_loaded_suffix_is_trained_further(build_model, saved):
    model = PeftModel.from_pretrained(build_model("llama"), saved / "suffix", is_trainable=True).train()

    model(**make_suffix_batch()).loss.backward()

    assert prompt_of(model).grad.abs().sum() > 0


@pytest.mark.parametrize("record", [None, "{", "[]"])
def test_without_its_record_it_is_still_a_suffix(build_model, saved, recwarn, record):
    want = logits(PeftModel.from_pretrained(build_model("llama"), saved / "suffix"))
    path = saved / "suffix" / "prompt_init.json"
    path.unlink() if record is None else path.write_text(record)

    model = PeftModel.from_pretrained(build_model("llama"), saved / "suffix").eval()
    model.save_pretrained(saved / "again")
    again = PeftModel.from_pretrained(build_model("llama"), saved / "again").eval()

    assert torch.equal(logits(model), want) and torch.equal(logits(again), want)
    assert any("prompt_init.json is broken" in str(w.message) for w in recwarn) is (record is not None)


def test_files_of_two_adapters_are_refused(build_model, saved):
    for target, source in (("suffix", "prefix"), ("prefix", "suffix")):
        shutil.copytree(saved / target, saved / "mixed", dirs_exist_ok=True)
        shutil.copy(saved / source / "prompt_init.json", saved / "mixed")

        with pytest.raises(ValueError, match=rf"files of two adapters: adapter_config\.json is of a {target}"):
            PeftModel.from_pretrained(build_model("llama"), saved / "mixed")


def test_copies_and_pickles_are_suffixes(build_model):
    model = suffixed(build_model("llama"))

    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert again.peft_config["default"] == model.peft_config["default"]
        assert torch.equal(logits(again), logits(model))


# --- prefixes and suffixes together


@pytest.mark.parametrize("own", ["suffix", "prefix", "stock"])
def test_a_tensor_of_the_other_side_is_refused(build_model, saved, own):
    """Into an adapter that exists, and with a config of one's own."""
    if own == "stock":
        config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
        model = get_peft_model(build_model("llama"), config)
    else:
        model = PeftModel.from_pretrained(build_model("llama"), saved / own, is_trainable=True)
    before, config = prompt_of(model).clone(), copy.deepcopy(model.peft_config["default"])
    position, source = ("suffix", "prefix") if own == "suffix" else ("prefix", "suffix")
    message = (
        f"'default' is a {position} of the text and wants `{TENSORS[position]}`, but the saved prompt is "
        f"`{TENSORS[source]}`"
    )

    for call in (
        lambda: model.load_adapter(saved / source, "default"),
        lambda: set_peft_model_state_dict(model, load_file(saved / source / WEIGHTS)),
        lambda: PeftModel.from_pretrained(build_model("llama"), saved / source, config=config),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert torch.equal(prompt_of(model), before)


def test_pefts_functions_that_get_and_set_tensors_use_the_names_of_the_files(build_model, saved):
    model = suffixed(build_model("llama"))
    tensors = get_peft_model_state_dict(model)
    assert list(tensors) == ["suffix_embeddings"]
    other = PeftModel.from_pretrained(build_model("llama"), saved / "suffix")
    prompt_of(other).data.zero_()

    set_peft_model_state_dict(other, tensors)

    assert torch.equal(prompt_of(other), prompt_of(model))
    assert list(tensors) == ["suffix_embeddings"]


def test_a_model_of_stock_peft_refuses_a_suffix(build_model, saved):
    stock = get_peft_model(build_model("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5))
    suffix = PromptTuningExtConfig(task_type="CAUSAL_LM", num_virtual_tokens=5, prompt_position="suffix")

    for call in (
        lambda: stock.load_adapter(str(saved / "suffix"), "second"),
        lambda: stock.add_adapter("second", suffix),
        lambda: PeftModel(build_model("llama"), suffix),
    ):
        with pytest.raises(ValueError, match=r"behind the text.*PeftModel\w* would put it in front"):
            call()
    assert list(stock.peft_config) == ["default"]


@pytest.mark.parametrize("first", ["prefix", "suffix"])
@pytest.mark.parametrize("task_type", ["CAUSAL_LM", "SEQ_CLS"])
def test_a_prefix_and_a_suffix_in_one_model(build_model, tmp_path, task_type, first):
    bare = logits(build_model("llama", task_type), task_type)
    model = prompted(build_model("llama", task_type), task_type, prompt_position=first)
    second = "suffix" if first == "prefix" else "prefix"
    model.add_adapter(
        "second",
        PromptTuningExtConfig(
            task_type=task_type, num_virtual_tokens=3, prompt_tuning_init="RANDOM_UNIFORM", prompt_position=second
        ),
    )
    for name in ("default", "second"):
        model.set_adapter(name)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.normal_(generator=torch.Generator().manual_seed(len(name)))

    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(build_model("llama", task_type), tmp_path)
    again.load_adapter(tmp_path / "second", "second")

    seen = []
    for name in ("default", "second", "default"):
        for part in (model, again):
            part.set_adapter(name)
            seen.append(logits(part.eval(), task_type))
            with part.disable_adapter():
                assert torch.equal(logits(part, task_type), bare)
    assert all(torch.equal(one, two) for one, two in zip(seen[::2], seen[1::2], strict=True))
    assert torch.equal(seen[0], seen[4]) and not torch.equal(seen[0][:, -1:], seen[2][:, -1:])
    positions = [again.peft_config[name].prompt_position for name in ("default", "second")]
    assert positions == [first, second]


def test_a_weighted_sum_of_a_prefix_and_a_suffix_is_refused(build_model, saved):
    model = PeftModel.from_pretrained(build_model("llama"), saved / "prefix")
    model.load_adapter(saved / "suffix", "second")

    with pytest.raises(NotImplementedError, match="a weighted sum of prompts solves none of their tasks"):
        model.add_weighted_adapter(["default", "second"], [0.5, 0.5], "sum")


@pytest.mark.parametrize(("source", "position"), [("prefix", "suffix"), ("suffix", "prefix"), ("suffix", "suffix")])
def test_transfer_takes_the_vectors_of_either_side(build_model, saved, source, position):
    model = prompted(
        build_model("llama"),
        "CAUSAL_LM",
        prompt_position=position,
        prompt_tuning_init="TRANSFER",
        prompt_tuning_init_kwargs={"source": str(saved / source)},
    )

    (wanted,) = load_file(saved / source / WEIGHTS).values()
    assert torch.equal(prompt_of(model), wanted)
    assert model.peft_config["default"].prompt_position == position


# --- the Trainer


def suffix_trainer(build_model, task_type, folder, **changes):
    model = prompted(build_model("llama", task_type), task_type, prompt_position="suffix")
    trainer = make_trainer(model, task_type, folder, **changes)
    if task_type == "CAUSAL_LM":  # the answer is the end of a row
        rows = [{**row, "labels": [-100] * 4 + row["labels"][4:]} for row in trainer.train_dataset]
        trainer.train_dataset = trainer.eval_dataset = rows
    return trainer


@pytest.mark.parametrize("task_type", ["CAUSAL_LM", "SEQ_CLS"])
def test_resuming_equals_the_uninterrupted_run(build_model, tmp_path, task_type):
    whole = suffix_trainer(build_model, task_type, tmp_path / "whole")
    whole.train()
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "resumed" / "checkpoint-3")
    resumed = suffix_trainer(build_model, task_type, tmp_path / "resumed")

    resumed.train(resume_from_checkpoint=True)

    assert losses_of(resumed) == losses_of(whole)
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name


@pytest.mark.parametrize("task_type", ["CAUSAL_LM", "SEQ_CLS"])
def test_the_best_checkpoint_is_loaded_at_the_end(build_model, tmp_path, task_type):
    # the highest loss counts as the best, so that the best prompt is an early one
    trainer = suffix_trainer(
        build_model,
        task_type,
        tmp_path,
        eval_strategy="steps",
        eval_steps=1,
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,
    )

    trainer.train()

    history = losses_of(trainer, "eval_loss")
    assert history[-1] < max(history)
    assert trainer.evaluate()["eval_loss"] == max(history)


def test_a_checkpoint_of_a_prefix_is_not_resumed(build_model, tmp_path):
    make_trainer(prompted(build_model("llama"), "CAUSAL_LM"), "CAUSAL_LM", tmp_path).train()

    with pytest.raises(ValueError, match="wants `suffix_embeddings`, but the saved prompt is `prompt_embeddings`"):
        suffix_trainer(build_model, "CAUSAL_LM", tmp_path).train(resume_from_checkpoint=True)


# --- what does not know a suffix

# Each way to load a suffix, and its error, in a process with stock PEFT or an older version of the plugin.
REFUSALS = """
import json, sys

folder, older = sys.argv[1:]
if older:
    sys.path.insert(0, older)
    try:
        import peft_prompt_ext
    except ImportError as error:  # its own check of versions
        print(json.dumps({"unsupported": str(error)}))
        sys.exit()
    assert peft_prompt_ext.__file__.startswith(older)

import torch
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, PromptTuningConfig, get_peft_model
from tests.zoo import AUTO_CLASSES, tiny_config

cls = peft_prompt_ext.PromptTuningExtConfig if older else PromptTuningConfig

def build():
    return AUTO_CLASSES["CAUSAL_LM"].from_config(tiny_config("llama"))

def config():
    return cls(task_type="CAUSAL_LM", num_virtual_tokens=5)

model = get_peft_model(build(), config())
before = model.prompt_encoder["default"].embedding.weight.clone()
calls = {
    "the config": lambda: PeftConfig.from_pretrained(folder),
    "the model": lambda: PeftModel.from_pretrained(build(), folder),
    "the auto model": lambda: AutoPeftModelForCausalLM.from_pretrained(folder),
    "a new name": lambda: model.load_adapter(folder, "second"),
    "a name in use": lambda: model.load_adapter(folder, "default"),
    "a config of one's own": lambda: PeftModel.from_pretrained(build(), folder, config=config()),
}
errors = {}
for name, call in calls.items():
    try:
        call()
        errors[name] = None
    except Exception as error:
        errors[name] = [type(error).__name__, str(error)]
unchanged = torch.equal(before, model.prompt_encoder["default"].embedding.weight)
assert ("peft_prompt_ext" in sys.modules) == bool(older)
print(json.dumps({"errors": errors, "is_unchanged": unchanged, "adapters": list(model.peft_config)}))
"""


@pytest.fixture(params=["", "46ac7cc"], ids=["stock PEFT", "46ac7cc"])
def older(request, pytestconfig, tmp_path):
    """The folder of an older version of the plugin, or "" for none."""
    if not request.param:
        return ""
    archive = tmp_path / "older.tar"
    command = ["git", "archive", "-o", str(archive), request.param, "peft_prompt_ext"]
    try:
        got = subprocess.run(command, cwd=pytestconfig.rootpath, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("no git here, so the older version cannot be read")
    if got.returncode:
        pytest.skip(f"no git history with {request.param} here: {got.stderr.strip()}")
    with tarfile.open(archive) as opened:
        opened.extractall(tmp_path / "older", filter="data")
    return str(tmp_path / "older")


def test_stock_peft_and_older_versions_refuse_a_suffix(saved, older, pytestconfig):
    command = [sys.executable, "-W", "ignore", "-c", REFUSALS, str(saved / "suffix"), older]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    ran = subprocess.run(command, capture_output=True, text=True, cwd=pytestconfig.rootpath, env=environment)

    assert ran.returncode == 0, ran.stderr
    report = json.loads(ran.stdout.splitlines()[-1])
    if report.get("unsupported", "").startswith("peft_prompt_ext supports"):
        pytest.skip(f"the older version does not run here: {report['unsupported']}")
    errors = report.pop("errors")
    assert report == {"is_unchanged": True, "adapters": ["default"]}
    for name in ("the config", "the model", "the auto model", "a new name"):
        kind, message = errors.pop(name)
        assert kind == "ValueError" and message.startswith(SENTENCE), name
    # these read no config: PEFT does not find the tensor
    assert errors == {name: ["KeyError", "'prompt_embeddings'"] for name in ("a name in use", "a config of one's own")}
