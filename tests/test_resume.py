import shutil

import pytest
import torch
from peft import PeftModel
from transformers import EarlyStoppingCallback

from tests.helpers import losses_of, make_batch, make_trainer, prompt_of, prompted


CASES = [
    ("llama", "CAUSAL_LM"),
    ("llama", "SEQ_CLS"),
    ("bert", "SEQ_CLS"),
    ("bert", "TOKEN_CLS"),
    ("t5", "SEQ_2_SEQ_LM"),
]


@pytest.mark.parametrize(("architecture", "task_type"), CASES)
def test_resuming_equals_the_uninterrupted_run(build_model, tmp_path, architecture, task_type):
    whole = make_trainer(prompted(build_model(architecture, task_type), task_type), task_type, tmp_path / "whole")
    whole.train()
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "resumed" / "checkpoint-3")
    resumed = make_trainer(prompted(build_model(architecture, task_type), task_type), task_type, tmp_path / "resumed")

    resumed.train(resume_from_checkpoint=True)

    assert losses_of(resumed) == losses_of(whole)
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name


def test_a_checkpoint_holds_the_prompt_and_its_record_and_not_the_backbone(build_model, tmp_path):
    make_trainer(prompted(build_model("llama"), "CAUSAL_LM"), "CAUSAL_LM", tmp_path).train()

    names = {path.name for path in (tmp_path / "checkpoint-3").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "prompt_init.json"} <= names
    assert not {"model.safetensors", "pytorch_model.bin"} & names


@pytest.mark.parametrize(("architecture", "task_type"), CASES)
def test_the_best_checkpoint_is_loaded_at_the_end(build_model, tmp_path, architecture, task_type):
    # the highest loss counts as the best, so that the best prompt is an early one
    trainer = make_trainer(
        prompted(build_model(architecture, task_type), task_type),
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


def test_early_stopping_stops_and_loads_the_best(build_model, tmp_path):
    trainer = make_trainer(
        prompted(build_model("llama"), "CAUSAL_LM"),
        "CAUSAL_LM",
        tmp_path,
        callbacks=[EarlyStoppingCallback(2)],
        max_steps=30,
        eval_strategy="steps",
        eval_steps=1,
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,
    )

    trainer.train()

    assert trainer.state.global_step < 30
    assert trainer.evaluate()["eval_loss"] == max(losses_of(trainer, "eval_loss"))


@pytest.mark.parametrize(("architecture", "head"), [("bert", "classifier"), ("llama", "score")])
def test_the_head_is_trained_saved_and_loaded(build_model, tmp_path, architecture, head):
    model = prompted(build_model(architecture, "SEQ_CLS"), "SEQ_CLS")
    before = getattr(model.get_base_model(), head).original_module.weight.clone()

    make_trainer(model, "SEQ_CLS", tmp_path).train()
    model.save_pretrained(tmp_path / "adapter")
    base = build_model(architecture, "SEQ_CLS")
    torch.nn.init.normal_(getattr(base, head).weight)
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter")

    trained = getattr(model.get_base_model(), head).modules_to_save["default"].weight
    assert not torch.equal(trained, before)
    assert torch.equal(getattr(loaded.get_base_model(), head).modules_to_save["default"].weight, trained)


@pytest.mark.parametrize(("architecture", "task_type"), CASES)
def test_a_saved_prompt_is_the_start_of_a_new_run(build_model, tmp_path, architecture, task_type):
    first = make_trainer(prompted(build_model(architecture, task_type), task_type), task_type, tmp_path / "first")
    first.train()
    first.save_model(tmp_path / "adapter")

    model = PeftModel.from_pretrained(build_model(architecture, task_type), tmp_path / "adapter", is_trainable=True)
    second = make_trainer(model, task_type, tmp_path / "second")
    start, begun = prompt_of(model).clone(), second.evaluate()["eval_loss"]
    second.train()

    assert begun == first.evaluate()["eval_loss"]
    assert not torch.equal(prompt_of(model), start)


def test_a_further_trained_adapter_keeps_the_mode_of_its_backbone(build_model, tmp_path):
    prompted(build_model("llama"), "CAUSAL_LM").save_pretrained(tmp_path)

    training = PeftModel.from_pretrained(build_model("llama").train(), tmp_path, is_trainable=True)
    evaluating = PeftModel.from_pretrained(build_model("llama").eval(), tmp_path, is_trainable=True)

    assert training.get_base_model().training and not evaluating.get_base_model().training


def test_a_second_adapter_is_loaded_to_be_trained(build_model, tmp_path):
    prompted(build_model("llama"), "CAUSAL_LM", prompt_tuning_init_seed=2).save_pretrained(tmp_path)
    alone = PeftModel.from_pretrained(build_model("llama"), tmp_path)
    model = prompted(build_model("llama"), "CAUSAL_LM")
    batch = make_batch("CAUSAL_LM")
    first = model(**batch).logits

    model.load_adapter(tmp_path, "second", is_trainable=True)
    model.set_adapter("second")
    second = model(**batch)
    second.loss.backward()
    model.set_adapter("default")

    assert torch.equal(second.logits, alone(**batch).logits)
    assert prompt_of(model, "second").grad.abs().sum() > 0
    assert torch.equal(model(**batch).logits, first)


@pytest.mark.parametrize("is_trainable", [False, True])
def test_loading_a_second_adapter_does_not_freeze_the_first_ones_head(build_model, tmp_path, is_trainable):
    prompted(build_model("llama", "SEQ_CLS"), "SEQ_CLS").save_pretrained(tmp_path)
    model = prompted(build_model("llama", "SEQ_CLS"), "SEQ_CLS")
    before = {name for name, parameter in model.named_parameters() if parameter.requires_grad}

    model.load_adapter(str(tmp_path), "second", is_trainable=is_trainable)

    now = {name for name, parameter in model.named_parameters() if parameter.requires_grad and "second" not in name}
    assert now == before
    assert any("score" in name for name in before)
