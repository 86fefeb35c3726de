import copy

import peft
import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM

from tests.helpers import (
    ROWS,
    TEXT,
    VIRTUAL,
    make_batch,
    make_trainer,
    one_thread,  # noqa: F401
    prompt_of,
    prompted,
    weights_hash,
)
from tests.zoo import CASES, HIDDEN, POSITIONS


PER_TOKEN = {"TOKEN_CLS": ["logits"], "QUESTION_ANS": ["start_logits", "end_logits"]}
HEADS = {"SEQ_CLS": ["classifier", "score"], "TOKEN_CLS": ["classifier"], "QUESTION_ANS": ["qa_outputs"]}
cases = pytest.mark.parametrize(("architecture", "task_type"), CASES)
per_token = pytest.mark.parametrize(
    ("architecture", "task_type"), [(name, task) for name in ("bert", "roberta") for task in PER_TOKEN]
)
# PEFT's, in every generate
generates = pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning")


def cross_entropy(logits, targets):
    """The mean over all targets, written out."""
    return -logits.log_softmax(-1).gather(-1, targets[..., None]).mean()


def stock_twin(build_model, architecture, task_type, model):
    """Stock PEFT's model with the same base and the same prompt and head."""
    config = PromptTuningConfig(task_type=task_type, num_virtual_tokens=VIRTUAL, num_transformer_submodules=1)
    twin = get_peft_model(build_model(architecture, task_type), config)
    assert type(twin).__module__ == "peft.peft_model"
    twin.load_state_dict(model.state_dict())
    return twin


def without_targets(batch):
    return {key: batch[key] for key in ("input_ids", "attention_mask")}


@cases
def test_the_prompt_and_the_head_get_a_gradient_and_nothing_else_does(build_model, architecture, task_type):
    base = build_model(architecture, task_type)
    heads = [name for name, _ in base.named_parameters() if name.split(".")[0] in HEADS.get(task_type, [])]
    model = prompted(base, task_type)
    output = model(**make_batch(task_type))
    loss = output.last_hidden_state.square().mean() if task_type == "FEATURE_EXTRACTION" else output.loss

    loss.backward()

    saved = [name.replace(".", ".modules_to_save.default.", 1) for name in heads]
    expected = {"prompt_encoder.default.embedding.weight", *(f"base_model.{name}" for name in saved)}
    assert {name for name, p in model.named_parameters() if p.grad is not None} == expected
    assert {name for name, p in model.named_parameters() if p.requires_grad} == expected
    assert torch.isfinite(loss) and bool(heads) == (task_type in HEADS)


@cases
def test_every_row_of_the_prompt_gets_a_gradient(build_model, architecture, task_type):
    model = prompted(build_model(architecture, task_type), task_type)
    output = model(**make_batch(task_type))

    (output.last_hidden_state.square().mean() if task_type == "FEATURE_EXTRACTION" else output.loss).backward()

    assert prompt_of(model).shape == (VIRTUAL, HIDDEN)
    assert (prompt_of(model).grad.abs().sum(1) > 0).all()


@cases
def test_without_the_engine_outputs_are_those_of_stock_peft_bit_by_bit(build_model, architecture, task_type):
    model = prompted(build_model(architecture, task_type), task_type, shared_prefix=False)
    twin = stock_twin(build_model, architecture, task_type, model)
    batch = make_batch(task_type)
    if task_type in PER_TOKEN:  # stock PEFT cannot take the targets of the text
        batch = without_targets(batch)

    ours, stock = model(**batch), twin(**batch)

    names = PER_TOKEN.get(task_type, [key for key in stock if isinstance(stock[key], torch.Tensor)])
    assert names
    for name in names:
        expected = stock[name][:, VIRTUAL:] if task_type in PER_TOKEN else stock[name]
        assert torch.equal(ours[name], expected), name


# --- one output for each text token


@pytest.mark.parametrize("architecture", ["bert", "roberta"])
def test_token_labels_belong_to_the_text_tokens(build_model, architecture):
    model, batch = prompted(build_model(architecture, "TOKEN_CLS"), "TOKEN_CLS"), make_batch("TOKEN_CLS")

    output = model(**batch)

    assert output.logits.shape == (ROWS, TEXT, 2)
    torch.testing.assert_close(output.loss, cross_entropy(output.logits, batch["labels"]))


def test_a_token_without_a_label_does_not_count(build_model):
    model, batch = prompted(build_model("bert", "TOKEN_CLS"), "TOKEN_CLS"), make_batch("TOKEN_CLS")
    labels = batch["labels"].clone()
    labels[:, 2:] = -100

    output = model(**{**batch, "labels": labels})

    torch.testing.assert_close(output.loss, cross_entropy(output.logits[:, :2], batch["labels"][:, :2]))


@pytest.mark.parametrize("architecture", ["bert", "roberta"])
def test_answer_positions_count_text_tokens(build_model, architecture):
    model, batch = prompted(build_model(architecture, "QUESTION_ANS"), "QUESTION_ANS"), make_batch("QUESTION_ANS")
    stock = stock_twin(build_model, architecture, "QUESTION_ANS", model)(**without_targets(batch))

    output = model(**batch)

    start = cross_entropy(stock.start_logits, batch["start_positions"] + VIRTUAL)
    end = cross_entropy(stock.end_logits, batch["end_positions"] + VIRTUAL)
    torch.testing.assert_close(output.loss, (start + end) / 2)
    assert output.start_logits.shape == output.end_logits.shape == (ROWS, TEXT)


def test_an_answer_beyond_the_text_does_not_count(build_model):
    model, batch = prompted(build_model("bert", "QUESTION_ANS"), "QUESTION_ANS"), make_batch("QUESTION_ANS")
    first = {key: value[:1] for key, value in batch.items()}
    cut = torch.tensor([0, TEXT, TEXT])  # of three answers, only the first is in the text

    output = model(**{**batch, "start_positions": cut, "end_positions": cut})

    zeros = torch.zeros(1, dtype=torch.long)
    expected = model(**{**first, "start_positions": zeros, "end_positions": zeros})
    torch.testing.assert_close(output.loss, expected.loss)


@per_token
def test_the_callers_targets_are_left_as_they_are(build_model, architecture, task_type):
    model, batch = prompted(build_model(architecture, task_type), task_type), make_batch(task_type)
    before = copy.deepcopy(batch)

    model(**batch)

    assert all(torch.equal(batch[key], before[key]) for key in before)


@per_token
def test_a_tuple_is_returned_when_asked_for(build_model, architecture, task_type):
    model, batch = prompted(build_model(architecture, task_type), task_type), make_batch(task_type)
    expected = model(**batch)

    output = model(**batch, return_dict=False)

    assert type(output) is tuple and len(output) == 1 + len(PER_TOKEN[task_type])
    assert all(torch.equal(*pair) for pair in zip(output, expected.to_tuple(), strict=True))


@per_token
def test_a_tuple_is_returned_when_the_base_models_config_asks_for_it(build_model, architecture, task_type):
    base = build_model(architecture, task_type)
    base.config.return_dict = False

    output = prompted(base, task_type)(**make_batch(task_type))

    assert type(output) is tuple


@pytest.mark.parametrize(("task_type", "between"), [("TOKEN_CLS", 1), ("QUESTION_ANS", 3)])
def test_targets_given_by_position_are_those_given_by_name(build_model, task_type, between):
    model, batch = prompted(build_model("bert", task_type), task_type), make_batch(task_type)
    inputs = without_targets(batch)
    targets = [value for key, value in batch.items() if key not in inputs]

    output = model(*inputs.values(), *[None] * between, *targets)  # as PEFT's class takes them

    assert torch.equal(output.loss, model(**batch).loss)


@per_token
def test_the_trainer_predicts_one_value_for_each_label(build_model, tmp_path, architecture, task_type):
    trainer = make_trainer(prompted(build_model(architecture, task_type), task_type), task_type, tmp_path)

    predicted = trainer.predict(trainer.eval_dataset)

    rows = len(trainer.eval_dataset)
    if task_type == "TOKEN_CLS":
        assert predicted.predictions.shape == (rows, TEXT, 2) and predicted.label_ids.shape == (rows, TEXT)
    else:
        assert [p.shape for p in predicted.predictions] == [(rows, TEXT)] * 2
        assert [p.shape for p in predicted.label_ids] == [(rows,)] * 2


# --- how long prompt and text may be


# RoBERTa starts to count at padding_idx + 1
LIMITS = [
    ("gpt2", "CAUSAL_LM", POSITIONS),
    ("opt", "CAUSAL_LM", POSITIONS),
    ("llama", "CAUSAL_LM", POSITIONS),
    ("bert", "SEQ_CLS", POSITIONS),
    ("roberta", "SEQ_CLS", POSITIONS - 2),
    ("roberta", "TOKEN_CLS", POSITIONS - 2),
]
limits = pytest.mark.parametrize(("architecture", "task_type", "limit"), LIMITS)


@limits
def test_prompt_and_text_may_fill_the_positions(build_model, architecture, task_type, limit):
    model = prompted(build_model(architecture, task_type), task_type)

    assert torch.isfinite(model(**make_batch(task_type, text=limit - VIRTUAL)).loss)


@limits
def test_prompt_and_text_beyond_the_positions_are_refused(build_model, architecture, task_type, limit):
    model = prompted(build_model(architecture, task_type), task_type)
    most = limit - VIRTUAL

    with pytest.raises(ValueError, match=rf"{most + 1} text tokens .* {limit} positions.* to {most} tok"):
        model(**make_batch(task_type, text=most + 1))


def test_text_given_as_embeddings_is_counted_too(build_model):
    model = prompted(build_model("gpt2"), "CAUSAL_LM")

    with pytest.raises(ValueError, match=rf"{POSITIONS} positions"):
        model(inputs_embeds=torch.zeros(1, POSITIONS - VIRTUAL + 1, HIDDEN))


def test_a_prompt_that_leaves_no_room_says_so(build_model):
    model = prompted(build_model("gpt2"), "CAUSAL_LM", num_virtual_tokens=POSITIONS)

    with pytest.raises(ValueError, match="to 0 tokens or lower num_virtual_tokens"):
        model(**make_batch("CAUSAL_LM"))


@generates
def test_a_text_too_long_to_generate_from_is_refused(build_model):
    model = prompted(build_model("gpt2"), "CAUSAL_LM")
    ids = make_batch("CAUSAL_LM", rows=1, text=POSITIONS - VIRTUAL + 1)["input_ids"]

    with pytest.raises(ValueError, match=rf"{POSITIONS} positions"):
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=1)


def test_a_disabled_prompt_takes_no_room(build_model):
    model, batch = prompted(build_model("gpt2"), "CAUSAL_LM"), make_batch("CAUSAL_LM", rows=1, text=POSITIONS)

    with model.disable_adapter():
        loss = model(**batch).loss
        generated = model.generate(**without_targets(batch), max_new_tokens=1)

    assert torch.isfinite(loss) and generated.shape == (1, POSITIONS + 1)


@pytest.mark.parametrize(("architecture", "task_type"), [("bloom", "CAUSAL_LM"), ("t5", "SEQ_2_SEQ_LM")])
def test_relative_positions_have_no_end(build_model, architecture, task_type):
    model = prompted(build_model(architecture, task_type), task_type)

    assert torch.isfinite(model(**make_batch(task_type, text=600)).loss)


# --- what else a PEFT model can do


def test_a_disabled_adapter_leaves_the_base_model(build_model):
    model, batch = prompted(build_model("llama"), "CAUSAL_LM"), make_batch("CAUSAL_LM")
    expected = build_model("llama")(**batch)

    with model.disable_adapter():
        output = model(**batch)

    assert torch.equal(output.logits, expected.logits) and torch.equal(output.loss, expected.loss)
    assert model(**batch).logits.shape[1] == VIRTUAL + TEXT


@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_a_disabled_adapter_leaves_the_base_models_head_too(build_model, architecture):
    model, batch = prompted(build_model(architecture, "SEQ_CLS"), "SEQ_CLS").eval(), make_batch("SEQ_CLS")
    expected = build_model(architecture, "SEQ_CLS").eval()(**batch)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.ones_(parameter)
    trained = model(**batch).logits

    with pytest.raises(KeyboardInterrupt), model.disable_adapter():
        with model.disable_adapter():
            pass
        output = model(**batch)
        raise KeyboardInterrupt

    assert torch.equal(output.logits, expected.logits) and torch.equal(output.loss, expected.loss)
    assert torch.equal(model(**batch).logits, trained)


def test_a_copy_of_a_model_is_its_own(build_model):
    model, batch = prompted(build_model("llama"), "CAUSAL_LM"), make_batch("CAUSAL_LM")
    expected = model(**batch).logits

    twin = copy.deepcopy(model)

    assert type(twin) is type(model) and torch.equal(twin(**batch).logits, expected)
    with torch.no_grad():
        prompt_of(twin).zero_()
    assert torch.equal(model(**batch).logits, expected)


@generates
@pytest.mark.parametrize(("text", "new"), [(TEXT, 4), (POSITIONS - VIRTUAL - 1, 4)])
def test_generate_is_greedy_decoding_after_the_prompt_also_past_the_positions(build_model, text, new):
    model = prompted(build_model("llama"), "CAUSAL_LM", prompt_tuning_init_kwargs={"scale": 5.0})
    ids = make_batch("CAUSAL_LM", rows=1, text=text)["input_ids"]
    embed, expected = model.get_base_model().get_input_embeddings(), ids
    for _ in range(new):  # greedy, the whole sequence through the base model for each token
        whole = torch.cat([prompt_of(model)[None], embed(expected)], dim=1)
        logits = model.get_base_model()(inputs_embeds=whole).logits
        expected = torch.cat([expected, logits[:, -1:].argmax(-1)], dim=1)

    generated = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, do_sample=False
    )

    assert generated.tolist() == expected.tolist()


@generates
@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "way", ["chunks", "guesses", "cache of 8", "cache of 10", "cache of 12", "the rest alone", "beams"]
)
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bloom"])
def test_several_new_tokens_after_cached_ones_give_what_the_whole_text_gives(build_model, architecture, way):
    model = prompted(build_model(architecture), "CAUSAL_LM", prompt_tuning_init_kwargs={"scale": 5.0})
    ids = make_batch("CAUSAL_LM", rows=1, text=5)["input_ids"].repeat(1, 3)  # repeats, so that a guess can be right
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 7, "do_sample": False, "eos_token_id": None}
    options |= {"pad_token_id": 2, "num_beams": 3 if way == "beams" else 1}
    expected = model.generate(input_ids=ids, use_cache=False, **options)

    if way in {"chunks", "guesses"}:
        options |= {"prefill_chunk_size": 4} if way == "chunks" else {"prompt_lookup_num_tokens": 3}
    given = ids
    if way.startswith("cache") or way == "the rest alone":
        seen = int(way.split()[-1]) if way.startswith("cache") else 8
        first = {**options, "attention_mask": options["attention_mask"][:, :seen], "max_new_tokens": 1}
        output = model.generate(input_ids=ids[:, :seen], return_dict_in_generate=True, **first)
        options["past_key_values"] = output.past_key_values
        given = ids[:, seen:] if way == "the rest alone" else ids
    generated = model.generate(input_ids=given, **options)

    assert generated[:, given.shape[1] :].tolist() == expected[:, ids.shape[1] :].tolist()


@pytest.mark.parametrize("is_trainable", [False, True])
def test_auto_peft_model_finds_base_model_and_class(build_model, tmp_path, is_trainable):
    build_model("llama").save_pretrained(tmp_path / "base")
    model = prompted(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), "CAUSAL_LM")
    model.save_pretrained(tmp_path / "adapter")

    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", is_trainable=is_trainable)

    batch = make_batch("CAUSAL_LM")
    assert type(loaded) is type(model) and isinstance(loaded, peft.PeftModelForCausalLM)
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    assert loaded.peft_config["default"].inference_mode is not is_trainable


@pytest.mark.parametrize(
    ("architecture", "task_type"),
    [("llama", "CAUSAL_LM"), ("gpt2", "CAUSAL_LM"), ("bert", "SEQ_CLS"), ("t5", "SEQ_2_SEQ_LM")],
)
def test_the_hash_of_the_backbone_is_the_same_after_training(build_model, tmp_path, architecture, task_type):
    base = build_model(architecture, task_type)
    before = weights_hash(base)
    model = prompted(base, task_type)
    start = prompt_of(model).clone()

    make_trainer(model, task_type, tmp_path, max_steps=3).train()

    assert weights_hash(model.get_base_model()) == before
    assert not torch.equal(prompt_of(model), start)


def test_a_lora_folder_is_not_taken_for_a_prompt(build_model, tmp_path):
    get_peft_model(build_model("llama"), LoraConfig(task_type="CAUSAL_LM")).save_pretrained(tmp_path)
    model = prompted(build_model("llama"), "CAUSAL_LM")

    with pytest.raises(ValueError, match="is a LORA adapter, not PROMPT_TUNING"):
        model.load_adapter(tmp_path, "other")

    assert list(model.peft_config) == ["default"]
