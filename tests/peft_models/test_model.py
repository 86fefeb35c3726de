import copy

import peft
import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PromptTuningConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForTokenClassification
from transformers.utils import ModelOutput

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
# PEFT warns in every generate
generates = pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning")


def cross_entropy(logits, targets):
    """Compute the mean over all targets."""
    return -logits.log_softmax(-1).gather(-1, targets[..., None]).mean()


def stock_twin(build_model, architecture, task_type, model):
    """Make stock PEFT's model with the same base model, prompt and head."""
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
    cut = torch.tensor([0, TEXT, TEXT])  # only the first answer is in the text

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

    output = model(*inputs.values(), *[None] * between, *targets)  # in the order of PEFT's class

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


# --- the length of prompt and text


# RoBERTa counts from padding_idx + 1
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


def test_a_disabled_prompt_takes_no_positions(build_model):
    model, batch = prompted(build_model("gpt2"), "CAUSAL_LM"), make_batch("CAUSAL_LM", rows=1, text=POSITIONS)

    with model.disable_adapter():
        loss = model(**batch).loss
        generated = model.generate(**without_targets(batch), max_new_tokens=1)

    assert torch.isfinite(loss) and generated.shape == (1, POSITIONS + 1)


@pytest.mark.parametrize(("architecture", "task_type"), [("gpt2", "CAUSAL_LM"), ("bert", "SEQ_CLS")])
def test_a_table_that_is_shorter_than_the_config_says_is_the_limit(build_model, architecture, task_type):
    base = build_model(architecture, task_type)
    base.config.update({"n_positions" if architecture == "gpt2" else "max_position_embeddings": 997})

    with pytest.raises(ValueError, match=rf"{POSITIONS} positions"):
        prompted(base, task_type)(**make_batch(task_type, text=POSITIONS - VIRTUAL + 1))


@pytest.mark.parametrize(("architecture", "task_type"), [("bloom", "CAUSAL_LM"), ("t5", "SEQ_2_SEQ_LM")])
def test_relative_positions_have_no_end(build_model, architecture, task_type):
    model = prompted(build_model(architecture, task_type), task_type)

    assert torch.isfinite(model(**make_batch(task_type, text=600)).loss)


# --- other methods of a PEFT model


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
    for _ in range(new):  # greedy, with the whole sequence for each token
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


# --- arguments and outputs of each token


def types_and_pads(task_type):
    """Make a batch with token types, and pads in front, behind and inside."""
    batch = make_batch(task_type)
    batch["token_type_ids"] = batch["input_ids"] % 2
    batch["attention_mask"] = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1] * 7, [0, 1, 1, 0, 0, 1, 0]])
    return batch


@pytest.mark.parametrize("task_type", ["SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"])
def test_token_types_are_the_texts_and_the_prompts_are_0(build_model, task_type):
    model, batch = prompted(build_model("bert", task_type), task_type).eval(), types_and_pads(task_type)
    asked = {name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids")}

    together = model(**asked)[0]

    embed = model.get_base_model().get_input_embeddings()
    for row, real in enumerate(batch["attention_mask"].bool()):
        text = embed(batch["input_ids"][row, real])[None]
        types = torch.nn.functional.pad(batch["token_type_ids"][row, real][None], (VIRTUAL, 0))
        whole = torch.cat([prompt_of(model)[None], text], 1)
        wanted = model.get_base_model()(inputs_embeds=whole, token_type_ids=types)[0][0]
        got = together[row]
        if task_type == "FEATURE_EXTRACTION":
            got = torch.cat([got[:VIRTUAL], got[VIRTUAL:][real]])
        elif task_type != "SEQ_CLS":
            got, wanted = got[real], wanted[VIRTUAL:]
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(together, model(**{**asked, "token_type_ids": None})[0])


def test_token_types_of_a_base_model_that_has_none_are_left_out_with_a_warning(build_model):
    model, batch = prompted(build_model("t5", "SEQ_2_SEQ_LM"), "SEQ_2_SEQ_LM"), make_batch("SEQ_2_SEQ_LM")

    with pytest.warns(UserWarning, match="no token types"):
        loss = model(**batch, token_type_ids=torch.zeros_like(batch["input_ids"])).loss

    assert torch.equal(loss, model(**batch).loss)


@cases
def test_a_mask_of_another_width_is_refused_on_every_path(build_model, architecture, task_type):
    for shared_prefix in (True, False):
        model = prompted(build_model(architecture, task_type), task_type, shared_prefix=shared_prefix)
        for shape in ((ROWS, TEXT + 1), (ROWS, VIRTUAL + TEXT), (ROWS, 1, TEXT, TEXT)):
            with pytest.raises(ValueError, match=r"attention_mask is .*\[3, 7\]"):
                model(**{**make_batch(task_type), "attention_mask": torch.ones(shape)})


@pytest.mark.parametrize(("architecture", "task_type"), [("t5", "SEQ_2_SEQ_LM"), ("llama", "CAUSAL_LM")])
def test_generate_refuses_a_mask_of_another_width(build_model, architecture, task_type):
    model, batch = prompted(build_model(architecture, task_type), task_type), make_batch(task_type)

    with pytest.raises(ValueError, match=r"attention_mask has the shape \(3, 8\)"):
        model.generate(input_ids=batch["input_ids"], attention_mask=torch.ones(ROWS, TEXT + 1))


@cases
def test_an_unknown_argument_is_refused_if_it_is_as_long_as_the_text(build_model, architecture, task_type):
    model, batch = prompted(build_model(architecture, task_type), task_type), make_batch(task_type)

    with pytest.raises(ValueError, match="loss_weights"):
        model(**batch, loss_weights=torch.ones(ROWS, TEXT))


def test_labels_of_a_row_may_be_as_many_as_the_columns(build_model):
    """By its shape, [B, C] could be per token."""
    labels = TEXT
    base = build_model("bert", "SEQ_CLS", num_labels=labels, problem_type="multi_label_classification")
    wide = build_model("bert", "SEQ_CLS", num_labels=VIRTUAL + TEXT)
    batch = types_and_pads("SEQ_CLS")

    assert torch.isfinite(prompted(base, "SEQ_CLS")(**{**batch, "labels": torch.ones(ROWS, labels)}).loss)
    model = prompted(wide, "SEQ_CLS").eval()
    alone = {name: batch[name][:1, 3:] for name in ("input_ids", "attention_mask", "token_type_ids")}
    torch.testing.assert_close(model(**batch).logits[0], model(**alone).logits[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("architecture", "task_type"), [("bert", "TOKEN_CLS"), ("roberta", "SEQ_CLS")])
def test_positions_that_say_what_the_model_does_change_nothing(build_model, architecture, task_type):
    model, batch = prompted(build_model(architecture, task_type), task_type).eval(), make_batch(task_type)
    first = 2 if architecture == "roberta" else 0
    positions = first + torch.arange(TEXT)[None]

    assert torch.equal(model(**batch, position_ids=positions).loss, model(**batch).loss)


def test_positions_that_begin_elsewhere_are_the_texts_with_the_prompt_in_front(build_model):
    model, batch = prompted(build_model("bert", "TOKEN_CLS"), "TOKEN_CLS").eval(), make_batch("TOKEN_CLS")
    whole = torch.cat([prompt_of(model).expand(ROWS, -1, -1), model.word_embeddings(batch["input_ids"])], 1)
    positions = (11 + torch.arange(VIRTUAL + TEXT)).expand(ROWS, -1)
    wanted = model.get_base_model()(inputs_embeds=whole, position_ids=positions).logits[:, VIRTUAL:]

    got = model(**batch, position_ids=(11 + torch.arange(TEXT)).expand(ROWS, -1)).logits

    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("task_type", ["TOKEN_CLS", "QUESTION_ANS", "SEQ_CLS", "FEATURE_EXTRACTION"])
def test_several_texts_in_a_row_are_refused(build_model, task_type):
    model, batch = prompted(build_model("bert", task_type), task_type), make_batch(task_type)

    with pytest.raises(ValueError, match=r"position_ids .* one by one"):
        model(**batch, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2, 3]]))


def test_encoder_outputs_are_refused(build_model):
    model, batch = prompted(build_model("t5", "SEQ_2_SEQ_LM"), "SEQ_2_SEQ_LM"), make_batch("SEQ_2_SEQ_LM")
    read = model.get_base_model().encoder(batch["input_ids"])

    with pytest.raises(ValueError, match="encoder_outputs"):
        model(**batch, encoder_outputs=read)


@pytest.mark.parametrize("task_type", ["CAUSAL_LM", "TOKEN_CLS", "SEQ_CLS"])
def test_a_call_without_a_text_is_refused(build_model, task_type):
    model = prompted(build_model("llama" if task_type != "TOKEN_CLS" else "bert", task_type), task_type)

    with pytest.raises(ValueError, match="neither input_ids nor inputs_embeds"):
        model(attention_mask=torch.ones(ROWS, TEXT))


@pytest.mark.parametrize("task_type", ["CAUSAL_LM", "SEQ_CLS", "TOKEN_CLS"])
def test_a_mask_given_by_position_is_one_given_by_name(build_model, task_type):
    architecture = "bert" if task_type == "TOKEN_CLS" else "llama"
    model, batch = (
        prompted(build_model(architecture, task_type), task_type, shared_prefix=False),
        types_and_pads(task_type),
    )
    inputs = batch["input_ids"], batch["attention_mask"]

    assert torch.equal(model(*inputs).logits, model(input_ids=inputs[0], attention_mask=inputs[1]).logits)


@pytest.mark.parametrize("name", ["log_probs", "anything"])
@pytest.mark.parametrize("layers", [False, True])
def test_an_output_without_logits_comes_back_in_the_callers_order(build_model, name, layers):
    base = build_model("llama")

    def forward(inputs_embeds, attention_mask, labels, fused, return_dict=True, use_cache=None):
        states = base.model(inputs_embeds=inputs_embeds, attention_mask=attention_mask).last_hidden_state
        scores = base.lm_head(states[:, :-1]).log_softmax(-1)
        each = scores.gather(-1, labels[:, 1:, None].clamp(min=0))[..., 0].masked_fill(labels[:, 1:] == -100, 0)
        return ModelOutput({name: (each, states) if layers else each, "loss": -each.sum()})

    base.forward = forward
    model, batch = prompted(base, "CAUSAL_LM"), types_and_pads("CAUSAL_LM")
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "labels")}

    together = model(**inputs, fused=True)

    total = 0.0
    for row, real in enumerate(batch["attention_mask"].bool()):
        alone = model(**{key: value[row, real][None] for key, value in inputs.items()}, fused=True)
        total += alone.loss
        got, wanted = (output[name][0] if layers else output[name] for output in (together, alone))
        torch.testing.assert_close(got[row, VIRTUAL - 1 :][real], wanted[0, VIRTUAL - 1 :], rtol=1e-4, atol=1e-5)
        if layers:
            states, states_alone = together[name][1][row], alone[name][1][0]
            torch.testing.assert_close(states[VIRTUAL:][real], states_alone[VIRTUAL:], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(together.loss, total, rtol=1e-4, atol=0)


@pytest.mark.parametrize("shared_prefix", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
def test_labels_shifted_already_are_what_each_token_predicts(build_model, shared_prefix, side):
    model = prompted(build_model("llama"), "CAUSAL_LM", shared_prefix=shared_prefix).eval()
    ids = make_batch("CAUSAL_LM")["input_ids"]
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1] * 7, [0, 1, 1, 1, 1, 1, 1]])
    mask = mask if side == "left" else mask.flip(1)
    labels = ids.masked_fill(mask == 0, -100)
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    first = mask.cumsum(1) == 1  # shift_labels have no label for the prompt's last column
    wanted = model(input_ids=ids, attention_mask=mask, labels=labels.masked_fill(first & (mask == 1), -100)).loss

    got = model(input_ids=ids, attention_mask=mask, labels=labels, shift_labels=shifted).loss

    torch.testing.assert_close(got, wanted)


# --- a decoder's classifier without a mask


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("shared_prefix", [True, False])
def test_a_decoder_finds_the_last_token_by_the_pad_token(build_model, architecture, shared_prefix):
    model = prompted(build_model(architecture, "SEQ_CLS"), "SEQ_CLS", shared_prefix=shared_prefix).eval()
    ids = make_batch("SEQ_CLS")["input_ids"]
    ids[0, 4:] = ids[1, 6:] = ids[2, 2] = 2  # the third is text: pads are only behind

    together = model(input_ids=ids).logits

    for row, length in enumerate((4, 6, 7)):
        torch.testing.assert_close(together[row], model(input_ids=ids[row : row + 1, :length]).logits[0])


@pytest.mark.parametrize("shared_prefix", [True, False])
def test_without_a_pad_token_and_a_mask_several_texts_are_refused(build_model, shared_prefix):
    base = build_model("llama", "SEQ_CLS", pad_token_id=None)
    model, ids = prompted(base, "SEQ_CLS", shared_prefix=shared_prefix).eval(), make_batch("SEQ_CLS")["input_ids"]

    with pytest.raises(ValueError, match=r"without attention_mask.*no pad_token_id"):
        model(input_ids=ids)

    one = model(input_ids=ids[:1]).logits
    torch.testing.assert_close(one, model(input_ids=ids[:1], attention_mask=torch.ones(1, TEXT)).logits)
    if shared_prefix:
        torch.testing.assert_close(model(input_ids=ids, attention_mask=torch.ones(ROWS, TEXT)).logits[:1], one)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # deberta-v2 of transformers 5.17
@pytest.mark.parametrize(("architecture", "changes"), [("deberta-v2", {"position_biased_input": False})])
def test_models_whose_config_has_no_absolute_positions_take_long_texts(architecture, changes):
    sizes = {"hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 41}
    config = AutoConfig.for_model(
        architecture, vocab_size=331, max_position_embeddings=POSITIONS, relative_attention=True, **sizes, **changes
    )
    model = prompted(AutoModelForTokenClassification.from_config(config), "TOKEN_CLS")

    assert torch.isfinite(model(**make_batch("TOKEN_CLS", text=POSITIONS + 3)).loss)


def test_a_classifier_does_not_put_its_prompt_behind_a_cache(build_model):
    model, batch = prompted(build_model("llama", "SEQ_CLS"), "SEQ_CLS"), make_batch("SEQ_CLS")
    del batch["labels"]
    stored = model.get_base_model()(**batch, use_cache=True).past_key_values

    with pytest.raises(ValueError, match="has 7 tokens"):
        model(input_ids=batch["input_ids"], past_key_values=stored)
