"""A prompt behind the text: each row gives what it gives alone as `[text | prompt | answer]`."""

import copy

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import Trainer, TrainingArguments

from peft_prompt_ext import PromptTuningExtConfig, engine_status
from peft_prompt_ext._versions import checkpoint_activations
from peft_prompt_ext.shared_prefix import probe, text_state
from peft_prompt_ext.shared_prefix.layout import pack_behind
from peft_prompt_ext.shared_prefix.texts import Texts
from tests.helpers import VIRTUAL, make_batch, one_thread, prompt_of, prompted  # noqa: F401
from tests.peft_models.suffix import MASKS, assert_equals_rows_alone, make_suffix_batch, run_alone
from tests.zoo import DECODERS


@pytest.mark.parametrize("shared_prefix", [True, False])
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("architecture", DECODERS)
def test_each_row_equals_it_alone(build_model, architecture, kind, shared_prefix):
    model = prompted(build_model(architecture), "CAUSAL_LM", prompt_position="suffix", shared_prefix=shared_prefix)
    assert_equals_rows_alone(model, make_suffix_batch(kind))
    assert engine_status(model).packed == (shared_prefix and architecture != "bloom")


@pytest.mark.parametrize("size", [1, 100])
def test_short_and_long_prompts(build_model, size):
    base_model = build_model("llama", max_position_embeddings=200)
    model = prompted(base_model, "CAUSAL_LM", prompt_position="suffix", num_virtual_tokens=size)
    assert_equals_rows_alone(model, make_suffix_batch("holes", answers=(1, 2, 1)))


@pytest.mark.parametrize(
    ("architecture", "task_type"), [("bert", "SEQ_CLS"), ("bert", "CAUSAL_LM"), ("roberta", "CAUSAL_LM")]
)
def test_encoders_are_refused_when_the_model_is_made(build_model, architecture, task_type):
    with pytest.raises(ValueError, match="needs a decoder"):
        prompted(build_model(architecture, task_type), task_type, prompt_position="suffix")


NO_DROPOUT = {
    "gpt2": {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
    "opt": {"dropout": 0.0, "attention_dropout": 0.0},
}


def texts_of(model):
    return engine_status(model).texts


@pytest.mark.parametrize("architecture", DECODERS)
def test_kept_texts_give_the_same(build_model, architecture):
    base_model = build_model(architecture, **NO_DROPOUT.get(architecture, {}))
    model = prompted(base_model, "CAUSAL_LM", prompt_position="suffix", train_logits="supervised")
    batch, runs = make_suffix_batch("holes"), []
    for _ in range(3):
        prompt_of(model).grad = None
        model.train()
        out = model(**batch)
        out.loss.backward()
        runs.append((out.loss.detach(), prompt_of(model).grad))
    if architecture == "bloom":
        assert texts_of(model) is None
        return
    assert (texts_of(model).hits, texts_of(model).misses) == (6, 3)
    assert texts_of(model).num_bytes > 0
    for loss, gradient in runs[1:]:
        torch.testing.assert_close(loss, runs[0][0], rtol=1e-6, atol=0)
        assert (gradient - runs[0][1]).norm() <= 1e-6 * gradient.norm()


def write_a_weight(model):
    with torch.no_grad():
        next(model.get_base_model().base_model.parameters()).mul_(1.5)


def write_data_and_change_the_mode(model):
    next(model.get_base_model().base_model.parameters()).data.mul_(1.5)
    model.eval()
    model.train()


def swap_rows_of_data_and_change_the_mode(model):
    weight = next(p for p in model.get_base_model().base_model.parameters() if p.dim() == 2)
    weight.data = weight.data.flip(0)
    model.eval()
    model.train()


def flip_signs_of_data_and_change_the_mode(model):
    model.get_base_model().model.layers[0].self_attn.v_proj.weight.data[1:3].neg_()
    model.eval()
    model.train()


def add_a_hook(model):
    model.get_base_model().base_model.layers[0].register_forward_hook(lambda *_: None)


def change_an_option(model):
    model.peft_config["default"].text_cache = "none"


def set_a_config(model):
    model.get_base_model().base_model.layers[0].self_attn.scaling *= 2


def change_a_lora_inside(model):
    for module in model.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("default", 4.0)


def switch_a_lora_inside_off(model):
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.enable_adapters(False)


CHANGES = [
    change_a_lora_inside,
    switch_a_lora_inside_off,
    write_a_weight,
    write_data_and_change_the_mode,
    swap_rows_of_data_and_change_the_mode,
    flip_signs_of_data_and_change_the_mode,
    add_a_hook,
    change_an_option,
    set_a_config,
]


@pytest.mark.filterwarnings("ignore:You are trying to modify a model")
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_the_model_drops_kept_texts(build_model, change):
    base_model = build_model("llama")
    if "lora" in change.__name__:
        inject_adapter_in_model(LoraConfig(target_modules=["v_proj"], init_lora_weights=False), base_model)
    model = prompted(base_model, "CAUSAL_LM", prompt_position="suffix", train_logits="supervised").train()
    batch = make_suffix_batch("left")
    model(**batch)
    model(**batch)
    assert texts_of(model).hits == 3
    change(model)
    out = model(**batch)
    assert texts_of(model) is None or texts_of(model).hits == 0
    fresh = prompted(copy.deepcopy(model.get_base_model()), "CAUSAL_LM", prompt_position="suffix")
    torch.testing.assert_close(out.loss, fresh(**batch).loss)


def test_a_trainers_steps_compare_no_checksums(build_model, tmp_path, monkeypatch):
    sums = []
    own = text_state._sum_weights
    monkeypatch.setattr(text_state, "_sum_weights", lambda backbone: sums.append(1) or own(backbone))
    model = prompted(build_model("llama"), "CAUSAL_LM", prompt_position="suffix")
    make_suffix_trainer(model, tmp_path, max_steps=6).train()
    assert texts_of(model).hits > 0
    assert len(sums) == 1


def test_evaluation_between_epochs_keeps_the_texts(build_model):
    model = prompted(build_model("llama"), "CAUSAL_LM", prompt_position="suffix", train_logits="supervised")
    batch = make_suffix_batch("left")
    model.train()
    model(**batch).loss.backward()
    model.eval()
    with torch.inference_mode():
        model(**batch, logits_to_keep=1)
    model.train()
    model(**batch).loss.backward()
    assert texts_of(model).hits == 6


def test_texts_of_inference_mode_can_be_trained_on(build_model):
    model = prompted(build_model("llama"), "CAUSAL_LM", prompt_position="suffix", train_logits="supervised").eval()
    batch = make_suffix_batch("left")
    with torch.inference_mode():
        model(
            input_ids=batch["input_ids"],
            labels=batch["labels"],
            attention_mask=batch["attention_mask"],
            logits_to_keep=6,
        )
    model.train()
    model(**batch).loss.backward()
    assert texts_of(model).hits == 3


def test_a_budget_keeps_what_fits(build_model):
    model = prompted(
        build_model("llama"), "CAUSAL_LM", prompt_position="suffix", train_logits="supervised", text_cache_bytes=3000
    ).train()
    batch = make_suffix_batch("none")
    losses = [model(**batch).loss for _ in range(2)]
    kept = texts_of(model)
    assert 0 < kept.num_bytes <= 3000
    assert 0 < kept.hits < 3
    torch.testing.assert_close(*losses)


def test_a_budget_below_one_text_is_an_error(build_model):
    model = prompted(build_model("llama"), "CAUSAL_LM", prompt_position="suffix", text_cache_bytes=100)
    with pytest.raises(ValueError, match=r"text_cache_bytes \(100\) is below one text"):
        model(**make_suffix_batch("none"), logits_to_keep=1)


@pytest.mark.parametrize("wrong", ["places", "keys"])
def test_a_wrong_layout_is_refused_and_its_results_are_pefts(build_model, monkeypatch, wrong):
    def from_zero(*args):
        layout = pack_behind(*args)
        layout.position_ids[:, layout.num_trunk_tokens :] -= 1
        return layout

    def others(self, module):
        keys, values = get(self, module)
        return keys.roll(1, 2), values

    get = Texts.get
    if wrong == "places":
        monkeypatch.setattr(probe, "pack_behind", from_zero)
    else:
        monkeypatch.setattr(Texts, "get", others)
    base_model = build_model("llama")
    for parameter in base_model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model = prompted(base_model, "CAUSAL_LM", prompt_position="suffix")
    assert_equals_rows_alone(model, make_suffix_batch("right"), atol=1e-3)
    assert not engine_status(model).packed
    assert "with the prompt behind" in engine_status(model).reason


def test_rows_that_share_a_text_read_it_once(build_model):
    model = prompted(build_model("llama"), "CAUSAL_LM", prompt_position="suffix", text_cache="none")
    batch = make_suffix_batch("none")
    batch["input_ids"][1, :7], batch["input_ids"][2, :7] = batch["input_ids"][0, :7], batch["input_ids"][0, :7]
    batch["labels"][:] = -100
    batch["labels"][:, 7:] = batch["input_ids"][:, 7:]
    model(**batch)
    counted = []
    hook = model.get_base_model().base_model.register_forward_pre_hook(
        lambda _, args, kwargs: counted.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    out = model(**batch)
    hook.remove()
    assert counted == [7, 3 * (VIRTUAL + 5)]
    assert_equals_rows_alone(model, batch)
    assert out.logits.shape == (3, VIRTUAL + 12, 331)


def suffix_rows(size=8):
    batch = make_suffix_batch("none", seed=4)
    return [{name: value[i % 3].tolist() for name, value in batch.items()} for i in range(size)]


def make_suffix_trainer(model, folder, kind=Trainer, **changes):
    values = {"max_steps": 2, "per_device_train_batch_size": 3, "learning_rate": 0.05, "report_to": "none"}
    values |= {"disable_tqdm": True, "use_cpu": True, "logging_steps": 1, "eval_strategy": "no"}
    compute_loss_func = changes.pop("compute_loss_func", None)
    args = TrainingArguments(str(folder), **{**values, **changes})
    extra = {} if compute_loss_func is None else {"compute_loss_func": compute_loss_func}
    return kind(model, args, train_dataset=suffix_rows(), eval_dataset=suffix_rows(), **extra)


def cross_entropy(outputs, labels, num_items_in_batch=None):
    logits = outputs["logits"][:, -labels.shape[1] - 1 : -1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


@pytest.mark.parametrize("how", [{"label_smoothing_factor": 1e-9}, {"compute_loss_func": cross_entropy}])
def test_losses_outside_the_model_put_the_prompt_in_front_of_the_answer(build_model, tmp_path, how):
    losses = []
    for changes in ({}, how):
        model = prompted(build_model("llama"), "CAUSAL_LM", prompt_position="suffix")
        trainer = make_suffix_trainer(model, tmp_path, **changes)
        evaluated = trainer.evaluate()["eval_loss"]
        trainer.train()
        losses.append([evaluated, *(row["loss"] for row in trainer.state.log_history if "loss" in row)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


class OwnLoss(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, **_):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = cross_entropy(outputs, labels)
        return (loss, outputs) if return_outputs else loss


@pytest.mark.parametrize("run", ["train", "evaluate"])
def test_a_trainer_that_keeps_the_labels_to_itself_is_refused(build_model, tmp_path, run):
    model = prompted(build_model("llama"), "CAUSAL_LM", prompt_position="suffix")
    with pytest.raises(ValueError, match="needs labels, or answer_start"):
        getattr(make_suffix_trainer(model, tmp_path, OwnLoss), run)()


def test_calls_without_labels(build_model):
    model = prompted(build_model("llama"), "CAUSAL_LM", prompt_position="suffix")
    batch = make_suffix_batch("left")
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    for mode in (True, False):
        model.train(mode)
        with pytest.raises(ValueError, match="needs labels, or answer_start"):
            model(**inputs)
    start = (batch["labels"] != -100).int().argmax(1)
    out = model(**inputs, answer_start=start)
    torch.testing.assert_close(out.logits, model(**batch).logits)
    with pytest.raises(ValueError, match="each 1 or more"):
        model(**inputs, answer_start=torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match="has a label at column"):
        model(**batch, answer_start=start + 1)
    with torch.no_grad():
        out = model(**inputs)
    behind = dict(batch, labels=torch.full_like(batch["labels"], -100))
    _, logits, columns = run_alone(model.get_base_model(), [prompt_of(model)] * 3, behind)
    for got, want, where in zip(out.logits, logits, columns, strict=True):
        torch.testing.assert_close(got[where], want, rtol=0, atol=1e-4)


def test_embeddings_beside_ids_are_the_text(build_model):
    model = prompted(build_model("llama"), "CAUSAL_LM", prompt_position="suffix", train_logits="supervised").train()
    batch = make_suffix_batch("none")
    embeds = model.get_base_model().get_input_embeddings()(batch["input_ids"]).detach() * 1.5
    model(**batch)
    wanted = model(inputs_embeds=embeds, labels=batch["labels"], attention_mask=batch["attention_mask"]).loss
    torch.testing.assert_close(model(**batch, inputs_embeds=embeds).loss, wanted)


@pytest.mark.parametrize(("architecture", "task_type"), [("bert", "TOKEN_CLS"), ("llama", "SEQ_CLS")])
def test_a_prefix_takes_no_answer_start(build_model, architecture, task_type):
    model = prompted(build_model(architecture, task_type), task_type)
    batch = make_batch(task_type)
    with pytest.raises(ValueError, match="answer_start"):
        model(**batch, answer_start=torch.tensor([2, 2, 2]))


@pytest.mark.parametrize("wrong", [[3, 3, 3], torch.tensor([3.5, 3.5, 3.5]), torch.tensor([3, 3])])
def test_an_answer_start_that_is_no_column_is_refused(build_model, wrong):
    model = prompted(build_model("llama"), "CAUSAL_LM", prompt_position="suffix")
    with pytest.raises(ValueError, match="wanted a tensor of 3 whole numbers"):
        model(input_ids=make_suffix_batch("none")["input_ids"], answer_start=wrong)


class OwnStep(OwnLoss):
    def prediction_step(self, model, inputs, *args, **kwargs):
        with torch.no_grad():
            return self.compute_loss(model, inputs), None, None


def test_a_prediction_step_of_ones_own_is_refused(build_model, tmp_path):
    model = prompted(build_model("llama"), "CAUSAL_LM", prompt_position="suffix")
    with pytest.raises(ValueError, match="needs labels, or answer_start"):
        make_suffix_trainer(model, tmp_path, OwnStep).evaluate()
    assert not model.has_answers


@pytest.mark.parametrize("labels", ["every token", "in front"])
def test_labels_without_a_text_in_front_are_refused(build_model, labels):
    model = prompted(build_model("llama"), "CAUSAL_LM", prompt_position="suffix")
    batch = make_suffix_batch("none")
    batch["labels"] = batch["input_ids"].clone()
    if labels == "in front":
        batch["labels"][:, 3:] = -100
    with pytest.raises(ValueError, match="Row 0 has no text in front of its answer"):
        model(**batch)


@pytest.mark.parametrize("what", ["shift_labels", "several texts"])
def test_what_a_suffix_does_not_take_is_refused(build_model, what):
    model = prompted(build_model("llama"), "CAUSAL_LM", prompt_position="suffix")
    batch = make_suffix_batch("none")
    if what == "shift_labels":
        batch["shift_labels"], wanted = batch.pop("labels"), "pass labels"
    else:
        batch["position_ids"], wanted = torch.arange(6).repeat(2).expand(3, -1), "holds several texts"
        del batch["attention_mask"]
    with pytest.raises(ValueError, match=wanted):
        model(**batch)


@pytest.mark.parametrize("shared_prefix", [True, False])
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_classifier_reads_the_last_virtual_token(build_model, architecture, kind, shared_prefix):
    base_model = build_model(architecture, "SEQ_CLS", **NO_DROPOUT.get(architecture, {}))
    model = prompted(base_model, "SEQ_CLS", prompt_position="suffix", shared_prefix=shared_prefix)
    batch = make_suffix_batch(kind)
    batch["labels"] = torch.tensor([0, 1, 1])
    logits = []
    for row in range(3):
        text = base_model.get_input_embeddings()(batch["input_ids"][row, batch["attention_mask"][row].bool()])
        logits.append(base_model(inputs_embeds=torch.cat([text, prompt_of(model)])[None]).logits[0])
    loss = torch.nn.functional.cross_entropy(torch.stack(logits), batch["labels"])
    trained = [prompt_of(model), *(p for n, p in model.named_parameters() if "modules_to_save" in n)]
    wanted = torch.autograd.grad(loss, trained)
    out = model(**batch)
    assert engine_status(model).packed == shared_prefix
    torch.testing.assert_close(out.logits, torch.stack(logits), rtol=0, atol=1e-4)
    got = torch.autograd.grad(out.loss, trained)
    assert abs(out.loss - loss) <= 1e-5 * loss
    for mine, other in zip(got, wanted, strict=True):
        assert (mine - other).norm() <= 1e-5 * other.norm()
    if shared_prefix:
        for _ in range(2):  # the first loss of all has set the config's problem_type, so its texts were dropped
            model(**batch)
        assert texts_of(model).hits == 3


def mixed_positions(build_model, architecture="llama"):
    model = prompted(build_model(architecture), "CAUSAL_LM", prompt_position="suffix", num_virtual_tokens=9)
    for name, position, size in (("b", "suffix", 3), ("c", "prefix", 9), ("d", "prefix", 2)):
        changes = {"num_virtual_tokens": size, "prompt_tuning_init_seed": size, "prompt_position": position}
        config = PromptTuningExtConfig(task_type="CAUSAL_LM", prompt_tuning_init="RANDOM_UNIFORM", **changes)
        model.add_adapter(name, config)
    model.set_requires_grad(["default", "b", "c", "d"])
    return model


@pytest.mark.parametrize("names", ["default b b", "default c b", "d c d", "default __base__ c", "b b b"])
@pytest.mark.parametrize("kind", ["left", "holes"])
def test_a_batch_of_both_positions_equals_each_row_alone(build_model, kind, names):
    model, batch, names = mixed_positions(build_model), make_suffix_batch(kind), names.split()
    used = [name for name in dict.fromkeys(names) if name != "__base__"]
    prompts = {name: prompt_of(model, name) for name in used}
    total, rows = 0.0, []
    for row, name in enumerate(names):
        real = batch["attention_mask"][row].bool()
        ids, labels = batch["input_ids"][row, real], batch["labels"][row, real]
        text = model.get_base_model().get_input_embeddings()(ids)
        prompt = prompts.get(name, text[:0])
        position = model.peft_config[name].prompt_position if name in prompts else "prefix"
        split = int((labels != -100).int().argmax()) if position == "suffix" else 0
        embeds = torch.cat([text[:split], prompt, text[split:]])[None]
        logits = model.get_base_model()(inputs_embeds=embeds).logits[0]
        places = (labels != -100).nonzero()[:, 0] + len(prompt) - 1
        total = total + torch.nn.functional.cross_entropy(logits[places], labels[labels != -100], reduction="sum")
        rows.append(logits[places])
    loss = total / (batch["labels"] != -100).sum()
    wanted = torch.autograd.grad(loss, list(prompts.values()))
    out = model(**batch, adapter_names=names)
    got = torch.autograd.grad(out.loss, list(prompts.values()))
    assert abs(out.loss - loss) <= 1e-5 * loss
    for mine, other in zip(got, wanted, strict=True):
        assert (mine - other).norm() <= 1e-5 * other.norm()
    longest = out.logits.shape[1] - 12
    for row, want in enumerate(rows):
        columns = (batch["labels"][row] != -100).nonzero()[:, 0] + longest - 1
        if kind != "holes":  # where a pad may stand in front of a label
            torch.testing.assert_close(out.logits[row, columns], want.detach(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("shared_prefix", [True, False])
def test_outputs_without_virtual_columns(build_model, shared_prefix):
    model = prompted(build_model("llama"), "CAUSAL_LM", prompt_position="suffix", shared_prefix=shared_prefix)
    batch = make_suffix_batch("holes")
    start = (batch["labels"] != -100).int().argmax(1)
    whole = model(**batch).logits
    model.peft_config["default"].virtual_columns = False
    out = model(**batch)
    assert out.logits.shape[1] == 12
    for row, begin in enumerate(start.tolist()):
        assert torch.equal(out.logits[row, : begin - 1], whole[row, : begin - 1])
        assert torch.equal(out.logits[row, begin - 1 :], whole[row, begin - 1 + VIRTUAL :])
    torch.testing.assert_close(model(**batch, logits_to_keep=3).logits, out.logits[:, -3:])
    named = torch.tensor([3, 0, 7])
    torch.testing.assert_close(model(**batch, logits_to_keep=named).logits, out.logits[:, named])


def test_what_trains_inside_the_base_model_gets_its_gradient(build_model):
    """A layer of the base model that trains sees the text, so the text runs with gradients and is not kept."""
    base_model = build_model("llama")
    model = prompted(base_model, "CAUSAL_LM", prompt_position="suffix")
    weight = base_model.model.layers[0].self_attn.q_proj.weight.requires_grad_()
    batch = make_suffix_batch("right")
    loss, *_ = run_alone(base_model, [prompt_of(model)] * 3, batch)
    wanted = torch.autograd.grad(loss, [weight, prompt_of(model)])
    got = torch.autograd.grad(model(**batch).loss, [weight, prompt_of(model)])
    for mine, other in zip(got, wanted, strict=True):
        assert (mine - other).norm() <= 1e-5 * other.norm()
    assert texts_of(model) is None


def test_noise_in_the_embeddings_is_new_in_each_step(build_model):
    model = prompted(build_model("llama"), "CAUSAL_LM", prompt_position="suffix").train()
    model.get_base_model().get_input_embeddings().register_forward_hook(
        lambda module, _, output: output + torch.randn_like(output) * module.training  # as NEFTune does
    )
    batch = make_suffix_batch("none")
    assert model(**batch).loss != model(**batch).loss
    assert texts_of(model) is None


def test_dropout_reaches_the_branches_and_leaves_the_texts_alone(build_model):
    model = prompted(build_model("gpt2"), "CAUSAL_LM", prompt_position="suffix", train_logits="supervised").train()
    batch = make_suffix_batch("none")
    assert model(**batch).loss != model(**batch).loss
    assert texts_of(model).hits == 3
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("how", ["hidden states", "attentions", "no engine"])
def test_peft_path_is_in_natural_order(build_model, how):
    model = prompted(build_model("llama"), "CAUSAL_LM", prompt_position="suffix")
    batch = make_suffix_batch("right")
    wanted = model(**batch)
    options = {"hidden states": {"output_hidden_states": True}, "attentions": {"output_attentions": True}}
    if how == "no engine":
        model.peft_config["default"].shared_prefix = False
    out = model(**batch, **options.get(how, {}))
    assert not engine_status(model).packed
    torch.testing.assert_close(out.loss, wanted.loss)
    start = (batch["labels"] != -100).int().argmax(1)
    for row, begin in enumerate(start.tolist()):
        real = batch["attention_mask"][row].bool()
        columns = torch.cat([real[:begin], torch.ones(VIRTUAL, dtype=torch.bool), real[begin:]])
        torch.testing.assert_close(out.logits[row, columns], wanted.logits[row, columns], rtol=0, atol=1e-4)
        if how == "hidden states":
            virtual = out.hidden_states[0][row, begin : begin + VIRTUAL]
            torch.testing.assert_close(virtual, prompt_of(model))


def test_gradient_checkpointing_gives_the_same_gradient(build_model):
    gradients = []
    for checkpointed in (False, True):
        model = prompted(build_model("llama"), "CAUSAL_LM", prompt_position="suffix").train()
        if checkpointed:
            checkpoint_activations(model.get_base_model())
        model(**make_suffix_batch("right")).loss.backward()
        gradients.append(prompt_of(model).grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_autocast_and_its_texts(build_model, low):
    model = prompted(build_model("llama"), "CAUSAL_LM", prompt_position="suffix", train_logits="supervised").train()
    batch = make_suffix_batch("right")
    exact = model(**batch).loss
    for hits in (0, 3):
        with torch.autocast("cpu", low):
            torch.testing.assert_close(model(**batch).loss.float(), exact, rtol=2e-2, atol=2e-2)
        assert texts_of(model).hits == hits  # those in float32 are of no use


@pytest.mark.parametrize("position", ["prefix", "suffix"])
def test_a_trainer_that_reads_the_loss_alone_runs_the_head_at_labels(build_model, tmp_path, position):
    model = prompted(build_model("llama"), "CAUSAL_LM", prompt_position=position)
    rows = []
    model.get_base_model().lm_head.register_forward_hook(lambda _, inputs, __: rows.append(inputs[0].shape[1]))
    trainer = make_suffix_trainer(model, tmp_path, max_steps=4)
    trainer.train()
    assert max(rows[-4:]) <= 15  # labels of three rows
    assert trainer.evaluate()["eval_loss"] > 0
    assert rows[-1] > 15
    model.train()
    assert model(**make_suffix_batch("none")).logits.shape == (3, VIRTUAL + 12, 331)
    assert (texts_of(model) is not None and texts_of(model).hits > 0) == (position == "suffix")


class ReadsOutputs(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        self.read = outputs["logits"].abs().amin(-1)
        return loss


@pytest.mark.parametrize("reader", ["a hook", "the trainer"])
def test_who_reads_outputs_beside_a_trainer_gets_all_logits(build_model, tmp_path, reader):
    model = prompted(build_model("llama"), "CAUSAL_LM", prompt_position="suffix")
    trainer = make_suffix_trainer(model, tmp_path, kind=ReadsOutputs if reader == "the trainer" else Trainer)
    if reader == "a hook":
        model.register_forward_hook(lambda _, __, outputs: setattr(trainer, "read", outputs.logits.abs().amin(-1)))
    trainer.train()
    assert trainer.read.shape == (3, VIRTUAL + 12)
    assert trainer.read.min() > 0
