import shutil

import pytest
import torch
from peft import PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, EarlyStoppingCallback

from peft_prompt_ext import PromptTuningExtConfig
from tests.helpers import losses_of, make_batch, make_trainer, prompt_of, prompted
from tests.zoo import AUTO_CLASSES, HIDDEN, POSITIONS, VOCAB_ROWS, tiny_config
from tests.zoo import CASES as ALL_CASES


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


# --- a head that the checkpoint does not have

HEADS = {
    ("deberta", "SEQ_CLS"): ["pooler"],
    ("deberta-v2", "SEQ_CLS"): ["pooler"],
    ("modernbert", "SEQ_CLS"): ["head"],
    ("modernbert", "TOKEN_CLS"): ["head"],
    ("modernbert", "QUESTION_ANS"): ["classifier", "head"],
    ("eurobert", "SEQ_CLS"): ["dense"],
    ("splinter", "QUESTION_ANS"): ["splinter_qass"],
    ("electra", "SEQ_CLS"): [],
    ("roberta", "SEQ_CLS"): [],
    ("llama", "SEQ_CLS"): [],
    ("bert", "TOKEN_CLS"): [],
    ("bert", "QUESTION_ANS"): [],
}
SECOND = {"num_virtual_tokens": 3, "prompt_tuning_init": "RANDOM_UNIFORM"}
heads = pytest.mark.parametrize(("architecture", "task_type"), HEADS)
SIZES = {
    "vocab_size": VOCAB_ROWS,
    "hidden_size": HIDDEN,
    "embedding_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 41,
    "max_position_embeddings": POSITIONS,
    "pad_token_id": 2,
    "sep_token_id": 1,
    "cls_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "question_token_id": 3,
}


@pytest.fixture
def without_head(tmp_path):
    """Saves the backbone of a model, and loads it with a new random head each time."""

    def save(architecture, task_type):
        config, cls = AutoConfig.for_model(architecture, **SIZES), AUTO_CLASSES[task_type]
        model = cls.from_config(config)
        getattr(model, model.base_model_prefix).save_pretrained(tmp_path / "backbone")
        return lambda: cls.from_pretrained(tmp_path / "backbone", config=config).eval()

    return save


def outputs(model, task_type):
    with torch.no_grad():
        output = model(input_ids=make_batch(task_type)["input_ids"])
    return torch.cat([output[name].flatten() for name in output if "logits" in name])


def outside(model):
    """Find the used parameters outside the backbone, and whether they are trained."""
    backbone = f"{model.base_model.base_model_prefix}."
    named = [(n, p) for n, p in model.base_model.named_parameters() if not n.startswith(backbone)]
    return {name: p.requires_grad for name, p in named if ".original_module." not in name}


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # DeBERTa, with torch 2.11
@heads
def test_all_outside_the_backbone_is_trained_saved_and_loaded(without_head, tmp_path, architecture, task_type):
    load = without_head(architecture, task_type)
    model = prompted(load(), task_type)
    assert outside(model) and all(outside(model).values())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()

    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(load(), tmp_path / "adapter").eval()

    assert torch.equal(outputs(again, task_type), outputs(model.eval(), task_type))
    usual = {"classifier", "score"} if task_type != "QUESTION_ANS" else {"qa_outputs"}
    assert sorted(set(model.peft_config["default"].modules_to_save) - usual) == [
        name for name in HEADS[architecture, task_type] if name not in usual
    ]


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # DeBERTa, with torch 2.11
@heads
def test_all_outside_the_backbone_is_trained_in_a_new_model(architecture, task_type):
    model = prompted(AUTO_CLASSES[task_type].from_config(AutoConfig.for_model(architecture, **SIZES)), task_type)

    assert outside(model) and all(outside(model).values())


@pytest.mark.parametrize(("architecture", "task_type"), [("deberta-v2", "SEQ_CLS"), ("modernbert", "TOKEN_CLS")])
def test_every_adapter_has_all_outside_the_backbone(without_head, tmp_path, architecture, task_type):
    load, seeds = without_head(architecture, task_type), {"default": 1, "second": 2}
    model = prompted(load(), task_type)
    model.add_adapter("second", PromptTuningExtConfig(**SECOND, task_type=task_type))
    for name, seed in seeds.items():
        generator = torch.Generator().manual_seed(seed)
        for path, parameter in model.named_parameters():
            if f".{name}." in path:
                parameter.data.normal_(generator=generator)

    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(load(), tmp_path)
    again.load_adapter(tmp_path / "second", "second")

    for name in seeds:
        model.set_adapter(name)
        again.set_adapter(name)
        assert torch.equal(outputs(again.eval(), task_type), outputs(model.eval(), task_type))


@pytest.mark.parametrize("task_type", ["SEQ_CLS", "FEATURE_EXTRACTION"])
def test_a_new_layer_of_the_backbone_is_trained_and_saved(build_model, tmp_path, task_type):
    AutoModelForMaskedLM.from_config(tiny_config("bert")).save_pretrained(tmp_path / "base")  # without a pooler
    load, ids = lambda: AUTO_CLASSES[task_type].from_pretrained(tmp_path / "base").eval(), torch.arange(3, 9)[None]
    model = prompted(load(), task_type).eval()
    pooler = "bert.pooler.dense" if task_type == "SEQ_CLS" else "pooler.dense"
    assert pooler in model.peft_config["default"].modules_to_save
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert f"base_model.{pooler}.modules_to_save.default.weight" in trained

    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(load(), tmp_path / "adapter").eval()

    for got, want in zip(again(input_ids=ids).to_tuple(), model(input_ids=ids).to_tuple(), strict=True):
        assert torch.equal(got, want)


def test_a_prompt_without_the_weights_of_a_new_head_is_warned_of(without_head, tmp_path):
    load = without_head("deberta-v2", "SEQ_CLS")
    stock = get_peft_model(load(), PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=5))
    stock.save_pretrained(tmp_path / "stock")

    with pytest.warns(UserWarning, match=r"has no weights for pooler, and neither has the base model's checkpoint"):
        PeftModel.from_pretrained(load(), tmp_path / "stock")
    with pytest.warns(UserWarning, match=r"has no weights for pooler"):
        prompted(load(), "SEQ_CLS").load_adapter(tmp_path / "stock", "second")


def test_an_output_table_that_is_new_is_warned_of_unless_it_is_saved(build_model, tmp_path):
    build_model("llama", tie_word_embeddings=False).model.save_pretrained(tmp_path)
    load = lambda: AutoModelForCausalLM.from_pretrained(tmp_path)  # noqa: E731

    with pytest.warns(UserWarning, match=r"lm_head differs from its checkpoint: it is new, or was resized"):
        prompted(load(), "CAUSAL_LM")
    model = prompted(load(), "CAUSAL_LM", modules_to_save=["lm_head"])

    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(load(), tmp_path / "adapter")
    batch = make_batch("CAUSAL_LM")
    assert torch.equal(again.eval()(**batch).logits, model.eval()(**batch).logits)


@pytest.mark.parametrize(("architecture", "task_type"), [*ALL_CASES, ("xlnet", "FEATURE_EXTRACTION")])
def test_what_is_trained_is_what_is_saved(build_model, tmp_path, architecture, task_type):
    if architecture == "xlnet":  # has a parameter outside of any module
        config = AutoConfig.for_model("xlnet", vocab_size=VOCAB_ROWS, d_model=HIDDEN, n_layer=1, n_head=2, d_inner=41)
        base = AUTO_CLASSES[task_type].from_config(config)
        assert base.mask_emb.requires_grad
    else:
        base = build_model(architecture, task_type)
    model = prompted(base, task_type)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)

    model.save_pretrained(tmp_path)

    assert sum(x.numel() for x in load_file(tmp_path / "adapter_model.safetensors").values()) == trained


def test_what_is_trained_and_not_saved_is_warned_of(build_model, tmp_path):
    model = prompted(build_model("llama"), "CAUSAL_LM")
    model.get_base_model().model.norm.weight.requires_grad = True

    with pytest.warns(UserWarning, match=r"model\.norm\.weight can be trained but belong to no adapter"):
        model.save_pretrained(tmp_path)


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
