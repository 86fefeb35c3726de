"""The score of a choice, against a plain forward pass of each row alone."""

import math
import re

import pytest
import torch
from transformers import AutoTokenizer

from peft_prompt_ext.tasks import HIDDEN, Task, get_task
from peft_prompt_ext.tasks.families import FAMILIES, family_of
from tests.helpers import one_thread, prompted  # noqa: F401
from tests.zoo import AUTO_CLASSES, tiny_config


ROWS = [
    {"text": "a great film", "label": 1},
    {"text": "terrible acting and a worse script, and the plot is not great either", "label": 0},
    {"text": "x", "label": 2},
]
WORDS = (" great", " terrible", " a fine film")  # of different numbers of tokens
TASK = Task(name="t", template="Film: {text}\nIt is", texts=("{text}",), label_words=WORDS)


def sentence_choices(row):
    return [f" {text}" for text in row["options"]]


BY_ROW = Task(name="c", template="{text}", texts=("{text}", "{choice}"), choices=sentence_choices, answer=lambda r: 0)
BY_ROW_ROWS = [
    {"text": "the film is", "options": ["great", "terrible", "a fine cast"]},
    {"text": "this is", "options": ["not great", "positive"]},
]


@pytest.fixture
def kind(saved_model):
    """Builds a model and its family: `kind("llama", "CAUSAL_LM", TASK, prompt=True)`."""

    def build(architecture, task_type, task=TASK, prompt=False, max_length=200):
        folder = saved_model(architecture, task_type)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        family = FAMILIES[task_type](task, tokenizer, max_length)
        torch.manual_seed(1)
        model = AUTO_CLASSES[task_type].from_pretrained(folder, **family.model_options).eval()
        model.config.pad_token_id = tokenizer.pad_token_id
        return (prompted(model, task_type).eval() if prompt else model), family

    return build


def score(model, family, rows):
    batch = family.collate_choices([family.encode(row) for row in rows])
    with torch.no_grad():
        return family.score(model, batch)


def likelihood_alone(model, family, context, choice):
    """Log-probability of the choice's tokens, from one unpadded forward pass."""
    if family.task_type == "SEQ_2_SEQ_LM":
        start = model.config.decoder_start_token_id
        said = torch.tensor([[start, *choice[:-1]]])
        logits = model(input_ids=torch.tensor([context]), decoder_input_ids=said).logits[0]
    else:
        logits = model(input_ids=torch.tensor([context + choice])).logits[0][-len(choice) - 1 : -1]
    rows = logits.float().log_softmax(-1)
    return sum(rows[i, token].item() for i, token in enumerate(choice))


LANGUAGE_MODELS = [("llama", "CAUSAL_LM"), ("gpt2", "CAUSAL_LM"), ("bloom", "CAUSAL_LM"), ("t5", "SEQ_2_SEQ_LM")]


@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize(("task", "rows"), [(TASK, ROWS), (BY_ROW, BY_ROW_ROWS)])
@pytest.mark.parametrize(("architecture", "task_type"), LANGUAGE_MODELS)
def test_scores_are_the_likelihoods_of_each_answer_alone(kind, architecture, task_type, task, rows, prompt):
    model, family = kind(architecture, task_type, task, prompt)

    scores = score(model, family, rows)

    for i, row in enumerate(rows):
        encoded = family.encode(row)
        for j, choice in enumerate(encoded["choices"]):
            with torch.no_grad():
                alone = likelihood_alone(model, family, encoded["context"], choice)
            assert scores[i, j].item() == pytest.approx(alone, abs=1e-4)
    if task is BY_ROW:
        assert scores[1, 2] == -100


@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("architecture", ["bert", "llama", "gpt2"])
def test_scores_of_a_head_are_its_log_probabilities_of_each_row_alone(kind, architecture, prompt):
    model, family = kind(architecture, "SEQ_CLS", TASK, prompt)

    scores = score(model, family, ROWS)

    assert scores.shape == (3, 3)
    for i, row in enumerate(ROWS):
        text = family.tokenizer(row["text"], return_tensors="pt")
        with torch.no_grad():
            alone = model(**text).logits[0].log_softmax(-1)
        assert scores[i].tolist() == pytest.approx(alone.tolist(), abs=1e-4)


def test_choices_by_row_are_a_yes_no_question_each_to_a_head(kind):
    model, family = kind("bert", "SEQ_CLS", BY_ROW)

    scores = score(model, family, BY_ROW_ROWS)
    labels = family.collate([family.encode(row) for row in BY_ROW_ROWS])["labels"]

    assert labels.tolist() == [1, 0, 0, 1, 0]
    assert scores.shape == (2, 3)
    assert scores[1, 2] == -100
    pair = family.tokenizer("this is", "positive", return_tensors="pt")
    with torch.no_grad():
        alone = model(**pair).logits[0].log_softmax(-1)[1].item()
    assert scores[1, 1].item() == pytest.approx(alone, abs=1e-4)


def test_a_regression_by_label_words_learns_the_nearest_word_and_by_a_head_the_number(kind):
    rows = [{"sentence1": "a", "sentence2": "b", "label": 3.4}, {"sentence1": "a", "sentence2": "c", "label": 4.6}]
    _, words = kind("llama", "CAUSAL_LM", get_task("stsb"))
    model, head = kind("bert", "SEQ_CLS", get_task("stsb"))

    assert [words.encode(row)["target"] for row in rows] == [3, 5]
    batch = head.collate_choices([head.encode(row) for row in rows])
    assert head.collate([head.encode(row) for row in rows])["labels"].tolist() == pytest.approx([3.4, 4.6])
    scores = head.score(model, batch)
    assert scores.shape == (2, 1)
    expected = ((scores[0, 0] - 3.4) ** 2 + (scores[1, 0] - 4.6) ** 2) / 2
    assert head.loss(scores, batch).item() == pytest.approx(expected.item(), rel=1e-5)


def test_split_label_words_are_said(kind, caplog):
    with caplog.at_level("INFO"):
        kind("llama", "CAUSAL_LM")

    assert re.search(r"' a fine film' \(\d tokens\)", caplog.text)
    assert "' great'" not in caplog.text


@pytest.mark.parametrize(("architecture", "task_type"), LANGUAGE_MODELS)
def test_training_batches_label_the_right_answer_alone(kind, architecture, task_type):
    model, family = kind(architecture, task_type)
    encoded = [family.encode(row) for row in ROWS]

    batch = family.collate(encoded)

    for labels, row in zip(batch["labels"], encoded, strict=True):
        answer = row["choices"][row["target"]]
        end = [family.tokenizer.eos_token_id] * (task_type == "SEQ_2_SEQ_LM")
        assert labels[labels != -100].tolist() == answer + end
    loss = model(**batch).loss
    assert math.isfinite(loss.item())


def test_logits_where_labels_are_give_the_same_loss_and_gradients(kind):
    model, family = kind("llama", "CAUSAL_LM")
    encoded = [family.encode(row) for row in ROWS]

    whole, kept = (model(**collate(encoded)) for collate in (family.collate, family.collate_labelled_logits))

    assert kept.logits.shape[1] < whole.logits.shape[1]
    assert kept.loss.item() == pytest.approx(whole.loss.item(), rel=1e-5)


@pytest.mark.parametrize("label", [HIDDEN, "?"])
@pytest.mark.parametrize(
    ("architecture", "task_type"), [("llama", "CAUSAL_LM"), ("bert", "SEQ_CLS"), ("t5", "SEQ_2_SEQ_LM")]
)
def test_a_row_without_a_label_is_encoded_and_cannot_be_trained_on(kind, architecture, task_type, label):
    _, family = kind(architecture, task_type)
    row = family.encode({"text": "a", "label": label})

    assert family.collate_choices([row])["target"].tolist() == [HIDDEN]

    with pytest.raises(ValueError, match="without a label"):
        family.collate([row])


@pytest.mark.parametrize(
    ("architecture", "task_type"), [("llama", "CAUSAL_LM"), ("bert", "SEQ_CLS"), ("t5", "SEQ_2_SEQ_LM")]
)
def test_a_long_row_is_cut_in_the_column_that_may_be_cut(kind, architecture, task_type):
    task = Task(
        name="t",
        template="{long}\nQuestion: {short}\nAnswer:",
        texts=("{long}", "{short}"),
        truncate=("long",),
        label_words=(" great", " terrible"),
    )
    _, family = kind(architecture, task_type, task, max_length=60)
    row = {"long": "a great film with a fine cast " * 20, "short": "this film is not great", "label": 0}

    encoded = family.encode(row)

    ids = encoded["context"] if "context" in encoded else encoded["inputs"][0]["input_ids"]
    text = family.tokenizer.decode(ids)
    assert encoded["truncated"]
    assert 55 <= len(ids) <= 60
    assert "this film is not great" in text
    assert text.count("a great film") > 1
    assert not family.encode({**row, "long": "short"})["truncated"]


def test_a_row_that_cannot_be_cut_short_enough_is_an_error(kind):
    _, family = kind("llama", "CAUSAL_LM", max_length=5)

    with pytest.raises(ValueError, match=r"longer than the limit of .* Raise --max_seq_length"):
        family.encode(ROWS[0])


def test_a_tokenizer_without_padding_is_an_error(kind, saved_model):
    tokenizer = AutoTokenizer.from_pretrained(saved_model("llama"))
    tokenizer.pad_token = None

    with pytest.raises(ValueError, match="no padding token: set"):
        FAMILIES["CAUSAL_LM"](TASK, tokenizer, 50)


KIND_OF = {"llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "bert": "SEQ_CLS", "roberta": "SEQ_CLS", "t5": "SEQ_2_SEQ_LM"}


@pytest.mark.parametrize(("architecture", "task_type"), KIND_OF.items())
def test_the_kind_of_a_checkpoint_is_known_from_its_config(architecture, task_type):
    assert family_of(tiny_config(architecture)) == task_type
