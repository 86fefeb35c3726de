import copy

import peft
import pytest
import torch
from peft import AutoPeftModelForCausalLM, PromptTuningConfig, get_peft_model

from tests.helpers import TEXT, VIRTUAL, make_batch, make_trainer, prompt_of, prompted, weights_hash
from tests.zoo import CASES, POSITIONS


PER_TOKEN = {"TOKEN_CLS": ["logits"], "QUESTION_ANS": ["start_logits", "end_logits"]}
cases = pytest.mark.parametrize(("architecture", "task_type"), CASES)


def stock_twin(build_model, architecture, task_type, model):
    """Stock PEFT's model with the same base and the same prompt and head."""
    config = PromptTuningConfig(task_type=task_type, num_virtual_tokens=VIRTUAL, num_transformer_submodules=1)
    twin = get_peft_model(build_model(architecture, task_type), config)
    assert type(twin).__module__ == "peft.peft_model"
    twin.load_state_dict(model.state_dict())
    return twin


@cases
def test_the_loss_is_finite_and_every_row_of_the_prompt_and_nothing_of_the_backbone_gets_a_gradient(
    build_model, architecture, task_type
):
    model = prompted(build_model(architecture, task_type), task_type)
    output = model(**make_batch(task_type))
    loss = output.last_hidden_state.square().mean() if task_type == "FEATURE_EXTRACTION" else output.loss

    loss.backward()

    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert torch.isfinite(loss)
    assert prompt_of(model).shape == (VIRTUAL, 24)
    assert (prompt_of(model).grad.abs().sum(1) > 0).all()
    assert {name for name in trained if "modules_to_save" not in name} == {"prompt_encoder.default.embedding.weight"}


@cases
def test_outputs_are_those_of_stock_peft(build_model, architecture, task_type):
    model = prompted(build_model(architecture, task_type), task_type)
    twin = stock_twin(build_model, architecture, task_type, model)
    batch = make_batch(task_type)
    if task_type in PER_TOKEN:  # stock PEFT cannot take the targets of the text
        batch = {key: batch[key] for key in ("input_ids", "attention_mask")}

    ours, stock = model(**batch), twin(**batch)

    for name in PER_TOKEN.get(task_type, [key for key in stock if isinstance(stock[key], torch.Tensor)]):
        expected = stock[name][:, VIRTUAL:] if task_type in PER_TOKEN else stock[name]
        assert torch.equal(ours[name], expected), name


@pytest.mark.parametrize("architecture", ["bert", "roberta"])
def test_token_labels_belong_to_the_text_tokens(build_model, architecture):
    model, batch = prompted(build_model(architecture, "TOKEN_CLS"), "TOKEN_CLS"), make_batch("TOKEN_CLS")

    output = model(**batch)

    expected = torch.nn.functional.cross_entropy(output.logits.flatten(0, 1), batch["labels"].flatten())
    assert output.logits.shape == (3, TEXT, 2)
    torch.testing.assert_close(output.loss, expected)


@pytest.mark.parametrize("architecture", ["bert", "roberta"])
def test_answer_positions_count_text_tokens(build_model, architecture):
    model, batch = prompted(build_model(architecture, "QUESTION_ANS"), "QUESTION_ANS"), make_batch("QUESTION_ANS")
    twin = stock_twin(build_model, architecture, "QUESTION_ANS", model)
    stock = twin(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])

    output = model(**batch)

    cross_entropy = torch.nn.functional.cross_entropy
    expected = cross_entropy(stock.start_logits, batch["start_positions"] + VIRTUAL) / 2
    expected = expected + cross_entropy(stock.end_logits, batch["end_positions"] + VIRTUAL) / 2
    torch.testing.assert_close(output.loss, expected)
    assert output.start_logits.shape == output.end_logits.shape == (3, TEXT)


def test_a_tuple_is_returned_when_asked_for(build_model):
    model, batch = prompted(build_model("bert", "TOKEN_CLS"), "TOKEN_CLS"), make_batch("TOKEN_CLS")

    loss, logits = model(**batch, return_dict=False)

    assert torch.equal(loss, model(**batch).loss) and logits.shape == (3, TEXT, 2)


# RoBERTa starts to count at padding_idx + 1
@pytest.mark.parametrize(
    ("architecture", "task_type", "limit"),
    [
        ("gpt2", "CAUSAL_LM", POSITIONS),
        ("opt", "CAUSAL_LM", POSITIONS),
        ("llama", "CAUSAL_LM", POSITIONS),
        ("bert", "SEQ_CLS", POSITIONS),
        ("roberta", "SEQ_CLS", POSITIONS - 2),
    ],
)
def test_prompt_and_text_may_fill_the_positions_and_not_exceed_them(build_model, architecture, task_type, limit):
    model = prompted(build_model(architecture, task_type), task_type)
    most = limit - VIRTUAL

    model(**make_batch(task_type, text=most))
    with pytest.raises(ValueError, match=rf"{most + 1} text tokens .* {limit} positions.* to {most} tok"):
        model(**make_batch(task_type, text=most + 1))


@pytest.mark.parametrize(("architecture", "task_type"), [("bloom", "CAUSAL_LM"), ("t5", "SEQ_2_SEQ_LM")])
def test_relative_positions_have_no_end(build_model, architecture, task_type):
    model = prompted(build_model(architecture, task_type), task_type)

    assert torch.isfinite(model(**make_batch(task_type, text=600)).loss)


def test_a_disabled_adapter_leaves_the_base_model(build_model):
    model, batch = prompted(build_model("llama"), "CAUSAL_LM"), make_batch("CAUSAL_LM")
    expected = model.get_base_model()(**batch)

    with model.disable_adapter():
        output = model(**batch)

    assert torch.equal(output.logits, expected.logits) and torch.equal(output.loss, expected.loss)


def test_a_model_can_be_copied(build_model):
    model, batch = prompted(build_model("llama"), "CAUSAL_LM"), make_batch("CAUSAL_LM")

    twin = copy.deepcopy(model)

    assert torch.equal(twin(**batch).logits, model(**batch).logits)
    assert type(twin) is type(model) and prompt_of(twin) is not prompt_of(model)


@pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning")  # PEFT's, in every generate
def test_generate_uses_the_prompt(build_model):
    model = prompted(build_model("llama"), "CAUSAL_LM", prompt_tuning_init_kwargs={"scale": 5.0})
    ids = make_batch("CAUSAL_LM", rows=1)["input_ids"]
    expected = ids
    for _ in range(4):  # greedy, one forward a token
        expected = torch.cat([expected, model(input_ids=expected).logits[:, -1:].argmax(-1)], dim=1)

    generated = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, min_new_tokens=4, do_sample=False
    )

    assert generated.tolist() == expected.tolist()


def test_auto_peft_model_finds_the_class(build_model, tmp_path):
    build_model("llama").save_pretrained(tmp_path / "base")
    from transformers import AutoModelForCausalLM

    model = prompted(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), "CAUSAL_LM")
    model.save_pretrained(tmp_path / "adapter")

    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")

    batch = make_batch("CAUSAL_LM")
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize(
    ("architecture", "task_type"), [("llama", "CAUSAL_LM"), ("bert", "SEQ_CLS"), ("t5", "SEQ_2_SEQ_LM")]
)
def test_training_does_not_write_the_backbone(build_model, tmp_path, architecture, task_type):
    base = build_model(architecture, task_type)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = prompted(base, task_type)

    make_trainer(model, task_type, tmp_path, max_steps=3).train()

    after = model.get_base_model().state_dict()
    assert before
    for name, tensor in before.items():
        frozen = name.replace("classifier.", "classifier.original_module.")
        assert torch.equal(after[frozen if frozen in after else name], tensor), name


def test_the_hash_of_the_weights_stays(build_model, tmp_path):
    model = prompted(build_model("gpt2"), "CAUSAL_LM")
    before = weights_hash(model.get_base_model())

    make_trainer(model, "CAUSAL_LM", tmp_path, max_steps=3).train()

    assert weights_hash(model.get_base_model()) == before


def test_a_lora_folder_is_not_taken_for_a_prompt(build_model, tmp_path):
    get_peft_model(build_model("llama"), peft.LoraConfig(task_type="CAUSAL_LM")).save_pretrained(tmp_path)
    model = prompted(build_model("llama"), "CAUSAL_LM")

    with pytest.raises(ValueError, match="is a LORA adapter, not PROMPT_TUNING"):
        model.load_adapter(tmp_path, "other")
