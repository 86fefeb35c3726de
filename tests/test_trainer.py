"""A Trainer with a prompt: label smoothing, compute_loss_func, the learning rate."""

import warnings
from unittest.mock import patch

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer
from transformers.trainer_pt_utils import LabelSmoother

from peft_prompt_ext import _seam
from tests.helpers import VIRTUAL, dataset, losses_of, make_batch, make_trainer, one_thread, prompted  # noqa: F401


def right_padded():
    rows = dataset("CAUSAL_LM", size=4)
    for number, row in enumerate(rows):
        real = len(row["labels"]) - number
        row["labels"][real:] = [-100] * number
        row["attention_mask"][real:] = [0] * number
    return rows


def smoothed(model, rows):
    """Compute the loss with torch's label smoothing on PEFT's path; the Trainer's count has no first tokens."""
    ids, mask, labels = (torch.tensor([row[k] for row in rows]) for k in ("input_ids", "attention_mask", "labels"))
    logits = model(input_ids=ids, attention_mask=mask, use_cache=True).logits[:, VIRTUAL - 1 : -1]
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), label_smoothing=0.3, reduction="sum"
    )
    return losses / (labels[:, 1:] != -100).sum()


@pytest.mark.parametrize("options", [{}, {"train_logits": "supervised"}, {"shared_prefix": False}], ids=str)
def test_it_is_right_in_training_and_evaluation(build_model, tmp_path, options):
    model = prompted(build_model("llama"), "CAUSAL_LM", **options)
    trainer = make_trainer(
        model, "CAUSAL_LM", tmp_path, label_smoothing_factor=0.3, max_steps=1, lr_scheduler_type="constant"
    )
    trainer.train_dataset = trainer.eval_dataset = rows = right_padded()
    wanted = smoothed(model.eval(), rows).item()

    before = trainer.evaluate()["eval_loss"]
    trainer.train()

    assert before == pytest.approx(wanted, rel=1e-5)
    assert losses_of(trainer) == [pytest.approx(wanted, rel=1e-5)]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(smoothed(model.eval(), rows).item(), rel=1e-5)


def test_logits_as_wide_as_the_labels_are_smoothed_as_before(build_model, tmp_path):
    lora = get_peft_model(build_model("llama"), LoraConfig(task_type="CAUSAL_LM"))
    trainer = make_trainer(lora, "CAUSAL_LM", tmp_path, label_smoothing_factor=0.3)
    batch = {key: torch.tensor([row[key] for row in right_padded()]) for key in right_padded()[0]}
    output, original = lora(**batch), LabelSmoother.__call__
    assert _seam.is_replaced(LabelSmoother, "__call__")
    wanted = torch.nn.functional.cross_entropy(
        output.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), label_smoothing=0.3
    )

    torch.testing.assert_close(trainer.compute_loss(lora, batch), wanted)
    _seam.prepare_trainer()
    assert LabelSmoother.__call__ is original


@pytest.mark.parametrize("smoothing", [0, 0.3])
def test_a_loss_of_ones_own_gets_pefts_logits(build_model, tmp_path, smoothing):
    model = prompted(build_model("llama"), "CAUSAL_LM", train_logits="supervised")
    trainer, seen = make_trainer(model, "CAUSAL_LM", tmp_path, label_smoothing_factor=smoothing, max_steps=1), []

    def loss(outputs, labels, num_items_in_batch=None):
        seen.append((outputs.logits.shape, labels.shape))
        return outputs.logits[:, VIRTUAL:].sum()

    trainer.compute_loss_func = loss
    trainer.train()

    assert seen == [((4, VIRTUAL + 7, 331), (4, 7))]


def smoothed_by_torch(logits, labels):
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, -2), labels.flatten(), label_smoothing=0.3, reduction="sum"
    )
    return losses / (labels != -100).sum()


@pytest.mark.parametrize(
    ("architecture", "task_type"),
    [
        *(("t5", "SEQ_2_SEQ_LM"), ("gpt2", "CAUSAL_LM"), ("gpt_neox", "CAUSAL_LM"), ("bloom", "CAUSAL_LM")),
        *(("bert", "TOKEN_CLS"), ("bert", "SEQ_CLS"), ("gpt2", "SEQ_CLS"), ("llama", "SEQ_CLS")),
    ],
)
def test_it_is_right_for_every_name_of_the_backbone(build_model, tmp_path, architecture, task_type):
    model = prompted(build_model(architecture, task_type), task_type).eval()
    trainer = make_trainer(model, task_type, tmp_path, label_smoothing_factor=0.3, max_steps=1)
    batch = make_batch(task_type)
    decoder = {"decoder_input_ids": batch["labels"]} if task_type == "SEQ_2_SEQ_LM" else {}
    logits = model(**{k: v for k, v in batch.items() if k != "labels"}, **decoder).logits
    if task_type == "CAUSAL_LM":
        logits = logits[:, VIRTUAL - 1 : -1]

    loss, output = trainer.compute_loss(model, {**batch, **decoder}, return_outputs=True)

    torch.testing.assert_close(loss, smoothed_by_torch(logits, batch["labels"]), rtol=1e-5, atol=0)
    assert output.logits.shape[0] == len(batch["labels"]) and trainer.compute_loss_func is None
    if task_type != "SEQ_2_SEQ_LM":  # these need decoder_input_ids of a collator
        trainer.train()


def test_a_wrapped_model_is_smoothed_as_the_model_inside(build_model, tmp_path):
    model, batch = prompted(build_model("gpt2"), "CAUSAL_LM").eval(), make_batch("CAUSAL_LM")
    trainer = make_trainer(model, "CAUSAL_LM", tmp_path, label_smoothing_factor=0.3)

    loss = trainer.compute_loss(torch.nn.DataParallel(model), dict(batch))

    torch.testing.assert_close(loss, trainer.compute_loss(model, dict(batch)))


def test_the_base_model_alone_has_its_labels_shifted(build_model, tmp_path):
    model, batch = prompted(build_model("llama"), "CAUSAL_LM"), make_batch("CAUSAL_LM")
    trainer = make_trainer(model, "CAUSAL_LM", tmp_path, label_smoothing_factor=0.3)

    with model.disable_adapter():
        loss = trainer.compute_loss(model, dict(batch))

    logits = build_model("llama")(input_ids=batch["input_ids"]).logits
    torch.testing.assert_close(loss, smoothed_by_torch(logits[:, :-1], batch["labels"][:, 1:]))


def test_an_encoder_decoder_is_trained_with_a_collators_decoder_inputs(build_model, tmp_path, tokenizer):
    from transformers import DataCollatorForSeq2Seq

    model = prompted(build_model("t5", "SEQ_2_SEQ_LM"), "SEQ_2_SEQ_LM")
    trainer = make_trainer(model, "SEQ_2_SEQ_LM", tmp_path, label_smoothing_factor=0.3, max_steps=2)
    trainer.data_collator = DataCollatorForSeq2Seq(tokenizer, model=model)

    trainer.train()

    assert all(loss > 0 for loss in losses_of(trainer))


def trained(model, folder, **arguments):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_trainer(model, "CAUSAL_LM", folder, max_steps=2, **arguments).train()
    return [str(w.message) for w in caught if "learning rate" in str(w.message)]


@pytest.mark.parametrize("options", [{}, {"shared_prefix": False}], ids=str)
def test_a_rate_for_full_fine_tuning_is_warned_of_once(build_model, tmp_path, options):
    model = prompted(build_model("llama"), "CAUSAL_LM", **options)

    (warning,) = trained(model, tmp_path, learning_rate=5e-5, warmup_steps=1)

    assert "AdamW at a learning rate of 5e-05" in warning and "learning_rate=0.01" in warning


@pytest.mark.parametrize(
    "arguments", [{"learning_rate": 0.01, "warmup_steps": 1}, {"learning_rate": 5e-5, "optim": "sgd"}], ids=str
)
def test_other_rates_and_optimizers_are_not_warned_of(build_model, tmp_path, arguments):
    assert not trained(prompted(build_model("llama"), "CAUSAL_LM"), tmp_path, **arguments)


def test_another_adapters_rate_is_its_own(build_model, tmp_path):
    assert not trained(get_peft_model(build_model("llama"), LoraConfig(task_type="CAUSAL_LM")), tmp_path)


@pytest.mark.parametrize("name", ["compute_loss", "LabelSmoother"])
def test_what_another_library_puts_in_place_is_wrapped_again(build_model, tmp_path, name):
    """Its own function knows no prompts: without the plugin's around it the loss would be another."""
    batch = {key: torch.tensor([row[key] for row in right_padded()]) for key in right_padded()[0]}
    # with virtual columns compute_loss alone would be enough, without them the smoother
    model = prompted(build_model("llama"), "CAUSAL_LM", virtual_columns=name == "LabelSmoother").eval()
    wanted = make_trainer(model, "CAUSAL_LM", tmp_path, label_smoothing_factor=0.3).compute_loss(model, dict(batch))
    owner, attribute = (Trainer, "compute_loss") if name == "compute_loss" else (LabelSmoother, "__call__")
    stock = _seam._originals[owner, attribute][0]

    with patch.object(owner, attribute, lambda *args, **kwargs: stock(*args, **kwargs)):
        trainer = make_trainer(model, "CAUSAL_LM", tmp_path, label_smoothing_factor=0.3)
        torch.testing.assert_close(trainer.compute_loss(model, dict(batch)), wanted)


def test_a_compiled_wrapper_keeps_what_it_wraps(build_model, tmp_path):
    prompted(build_model("llama"), "CAUSAL_LM").get_base_model()
    wrapper = torch.nn.DataParallel(build_model("llama"))
    compiled = torch.compile(wrapper, backend="eager")
    trainer = make_trainer(build_model("llama"), "CAUSAL_LM", tmp_path)

    trainer.compute_loss(compiled, {"input_ids": torch.arange(3, 9)[None], "labels": torch.arange(3, 9)[None]})

    assert compiled._orig_mod is wrapper
