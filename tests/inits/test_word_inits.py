"""The schemes that use words (SAMPLE_VOCAB, TEXT, CLASS_LABELS, ENDING), and their tokenizer."""

import warnings
from collections import Counter

import pytest
import torch
from peft import get_peft_model

from peft_prompt_ext import PromptTuningExtConfig
from tests.helpers import ids_of, prompt_of, rows, slots
from tests.zoo import HIDDEN, VOCAB_ROWS


# --- the tokenizer


def test_a_named_tokenizer_that_is_missing_is_refused(make):
    with pytest.raises(ValueError, match=r"tokenizer_name_or_path \('no/such'\) could not be loaded"):
        make("SAMPLE_VOCAB", tokenizer="no/such")


def test_without_a_tokenizer_sampling_warns_and_works(build_model):
    with pytest.warns(UserWarning, match="No tokenizer for the base model"):
        model = get_peft_model(build_model("llama"), PromptTuningExtConfig(task_type="CAUSAL_LM"))

    assert prompt_of(model).shape == (20, HIDDEN)


def test_without_a_tokenizer_labels_are_refused(build_model):
    config = PromptTuningExtConfig(
        task_type="CAUSAL_LM", prompt_tuning_init="CLASS_LABELS", prompt_tuning_init_kwargs={"labels": ["a"]}
    )

    with pytest.raises(ValueError, match=r"'CLASS_LABELS' needs a tokenizer.*Set tokenizer_name_or_path"):
        get_peft_model(build_model("llama"), config)


def test_the_base_models_own_tokenizer_is_found(build_model, tokenizer_folder):
    base = build_model("llama")
    base.name_or_path = tokenizer_folder

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = get_peft_model(base, PromptTuningExtConfig(task_type="CAUSAL_LM"))

    assert model.peft_config["default"].init_record["tokenizer"] == tokenizer_folder


# --- SAMPLE_VOCAB


def readable(tokenizer):
    """List the ids of visible text that are neither special nor added, from the tokenizer."""
    texts = {i: tokenizer.decode([i]) for i in range(3, len(tokenizer) - 1)}
    return {i for i, text in texts.items() if text.strip() and "\ufffd" not in text and text.strip().isprintable()}


def test_sampling_draws_every_word_once_and_nothing_else(make, tokenizer):
    allowed = readable(tokenizer)

    model = make("SAMPLE_VOCAB", size=len(allowed))

    assert sorted(ids_of(model)) == sorted(allowed)
    assert torch.equal(prompt_of(model), rows(model, ids_of(model)))
    assert len(allowed) > 100 and len(tokenizer) < VOCAB_ROWS


def test_a_prompt_longer_than_the_vocabulary_is_refused(make, tokenizer):
    allowed = len(readable(tokenizer))

    with pytest.raises(ValueError, match=rf"num_virtual_tokens \({allowed + 1}\) is larger .* {allowed} tokens"):
        make("SAMPLE_VOCAB", size=allowed + 1)


def test_a_population_is_the_first_ids_of_a_bpe_tokenizer(make, tokenizer):
    first = sorted(readable(tokenizer))[:11]

    model = make("SAMPLE_VOCAB", size=11, population=11)

    assert sorted(ids_of(model)) == first


@pytest.mark.parametrize("form", ["list", "generator", "file"])
def test_a_population_is_counted_over_a_corpus(make, tokenizer, tmp_path, form):
    texts = ["a film a film a film", "great film"]
    path = tmp_path / "corpus.txt"
    path.write_text("\n".join(texts))
    corpus = {"list": texts, "generator": (text for text in texts), "file": str(path)}[form]

    model = make("SAMPLE_VOCAB", size=2, population=2, corpus=corpus)

    counts = Counter(i for text in texts for i in tokenizer(text)["input_ids"] if i in readable(tokenizer))
    (_, second), (_, third) = counts.most_common(3)[1:]
    assert second > third  # no tie at the limit
    assert set(ids_of(model)) == {i for i, _ in counts.most_common(2)}


@pytest.mark.parametrize("corpus", [None, ["great film"]])
def test_a_population_that_is_too_large_is_refused(make, corpus):
    with pytest.raises(ValueError, match=r"population \(5000\) is too large"):
        make("SAMPLE_VOCAB", population=5000, corpus=corpus)


@pytest.fixture
def word_piece(tmp_path):
    from tokenizers import Tokenizer
    from tokenizers.models import WordPiece
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[unused0]", "[unused1]", "great", "film", "cast", "##s"]
    model = WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]"
    )
    fast.save_pretrained(tmp_path / "wordpiece")
    return str(tmp_path / "wordpiece")


def test_unused_rows_are_never_drawn(make, word_piece):
    assert sorted(ids_of(make("SAMPLE_VOCAB", size=4, tokenizer=word_piece))) == [6, 7, 8, 9]


def test_a_tokenizer_without_an_order_needs_a_corpus(make, word_piece):
    with pytest.raises(ValueError, match="population needs `corpus` with this tokenizer"):
        make("SAMPLE_VOCAB", size=2, population=2, tokenizer=word_piece)


# --- TEXT


@pytest.fixture
def bracketing(tokenizer_folder, tmp_path):
    """The tokenizer with <s> and </s> around every text, as in Llama and BERT."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    tokenizer.save_pretrained(tmp_path / "bracketing")
    assert tokenizer("great")["input_ids"][0] == 0
    return str(tmp_path / "bracketing")


@pytest.mark.parametrize(("init", "kwargs"), [("TEXT", {}), ("CLASS_LABELS", {"labels": ["great", "film"]})])
def test_no_bos_or_eos_leaks_in(make, bracketing, init, kwargs):
    model = make(init, tokenizer=bracketing, **kwargs)

    assert not {0, 1} & {i for slot in slots(model) for i in slot["token_ids"]}


def test_a_short_text_is_repeated(make, tokenizer):
    ids = tokenizer("great film")["input_ids"]
    size = 2 * len(ids) + 1

    model = make("TEXT", size=size, fill="repeat")

    assert torch.equal(prompt_of(model), rows(model, ids + ids + ids[:1]))


def test_a_short_text_is_filled_from_the_vocabulary(make, tokenizer):
    ids = tokenizer("great film")["input_ids"]

    model, sampled = make("TEXT", fill="sample_vocab"), make("SAMPLE_VOCAB")

    assert torch.equal(prompt_of(model)[: len(ids)], rows(model, ids))
    assert torch.equal(prompt_of(model)[len(ids) :], prompt_of(sampled)[len(ids) :])
    assert ids_of(model) == ids + ids_of(sampled)[len(ids) :]


def test_a_long_text_warns_what_was_cut(make, tokenizer):
    ids = tokenizer("great film and terrible acting")["input_ids"]
    cut = tokenizer.decode(ids[2:])

    with pytest.warns(UserWarning, match=rf"has {len(ids)} tokens, more than num_virtual_tokens=2; cut off: '{cut}'"):
        model = make("TEXT", size=2, text="great film and terrible acting")

    assert torch.equal(prompt_of(model), rows(model, ids[:2]))


def test_a_text_without_tokens_is_refused(make, tokenizer_folder, tmp_path):
    from tokenizers.normalizers import Replace
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.backend_tokenizer.normalizer = Replace("x", "")
    tokenizer.save_pretrained(tmp_path / "empty")

    with pytest.raises(ValueError, match=r"prompt_tuning_init_text \('xx'\) has no tokens"):
        make("TEXT", text="xx", tokenizer=str(tmp_path / "empty"))
    with pytest.raises(ValueError, match="no token for the label 'xx'"):
        make("CLASS_LABELS", labels=["great", "xx"], tokenizer=str(tmp_path / "empty"))


# --- CLASS_LABELS

LABELS = ["terrible acting", "great", "film"]


def means(model, tokenizer):
    return torch.stack([rows(model, tokenizer(label)["input_ids"]).mean(0) for label in LABELS])


def test_a_slot_is_the_mean_of_its_labels_sub_tokens(make, tokenizer):
    model, fallback = make("CLASS_LABELS", labels=LABELS), make("SAMPLE_VOCAB")

    assert len(tokenizer(LABELS[0])["input_ids"]) > 1
    torch.testing.assert_close(prompt_of(model)[:3], means(model, tokenizer))
    assert torch.equal(prompt_of(model)[3:], prompt_of(fallback)[3:])
    assert [slot.get("label") for slot in slots(model)] == [*LABELS, None, None, None, None]


def test_labels_may_take_the_last_slots(make, tokenizer):
    model, fallback = make("CLASS_LABELS", labels=LABELS, position="last"), make("SAMPLE_VOCAB")

    torch.testing.assert_close(prompt_of(model)[4:], means(model, tokenizer))
    assert torch.equal(prompt_of(model)[:4], prompt_of(fallback)[:4])


@pytest.mark.parametrize(("position", "order"), [("first", [0, 1, 2, 0, 1, 2, 0]), ("last", [2, 0, 1, 2, 0, 1, 2])])
def test_repeated_labels_have_a_full_repetition_at_the_given_end(make, tokenizer, position, order):
    model = make("CLASS_LABELS", labels=LABELS, position=position, repeat=True)

    torch.testing.assert_close(prompt_of(model), means(model, tokenizer)[order])


def test_the_fallback_may_be_any_scheme(make):
    model, text = make("CLASS_LABELS", labels=LABELS, fallback="text"), make("TEXT")

    assert torch.equal(prompt_of(model)[3:], prompt_of(text)[3:])


def test_a_label_that_is_unknown_to_the_vocabulary_is_refused(make, word_piece):
    with pytest.raises(ValueError, match="the vocabulary has no token for the label 'zzz'"):
        make("CLASS_LABELS", labels=["great", "zzz"], tokenizer=word_piece)


# --- ENDING

ENDING = " is great"


def test_the_ending_takes_the_last_slots_and_the_fallback_is_a_shorter_prompt(make, tokenizer):
    ids = tokenizer(ENDING)["input_ids"]
    kwargs = {"labels": LABELS, "position": "last"}

    model = make("ENDING", ending=ENDING, fallback="class_labels", fallback_kwargs=kwargs)

    alone = make("CLASS_LABELS", size=7 - len(ids), **kwargs)
    assert torch.equal(prompt_of(model)[-len(ids) :], rows(model, ids))
    assert torch.equal(prompt_of(model)[: -len(ids)], prompt_of(alone))
    assert slots(model)[: -len(ids)] == slots(alone)
    assert model.peft_config["default"].num_virtual_tokens == len(slots(model)) == 7


def test_an_ending_may_be_the_whole_prompt_and_no_longer(make, tokenizer):
    ids = tokenizer(ENDING)["input_ids"]

    assert torch.equal(prompt_of(make("ENDING", ending=ENDING, size=len(ids))), rows(make("TEXT"), ids))
    with pytest.raises(ValueError, match=rf"' is great'\) has {len(ids)} tokens; num_virtual_tokens is 1. Raise"):
        make("ENDING", ending=ENDING, size=1)


def test_labels_that_do_not_fit_before_an_ending_are_refused(make, tokenizer):
    size = len(tokenizer(ENDING)["input_ids"]) + 2

    with pytest.raises(ValueError, match="3 labels need 3 slots; num_virtual_tokens is 2"):
        make("ENDING", size=size, ending=ENDING, fallback="CLASS_LABELS", fallback_kwargs={"labels": LABELS})


def test_labels_before_an_ending_that_can_be_read_once_are_a_list(make):
    kwargs = [{"labels": form} for form in (iter(LABELS), LABELS)]

    once, many = (make("ENDING", ending=" is", fallback="CLASS_LABELS", fallback_kwargs=k) for k in kwargs)

    assert torch.equal(prompt_of(once), prompt_of(many))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({}, "ENDING needs 'ending'"),
        ({"ending": ""}, r"ENDING: ending \(''\) must be a text"),
        ({"ending": " is", "fallback": "ending"}, "must be another scheme"),
        ({"ending": " is", "fallback": "SAMPLE_VOCABS"}, "did you mean 'SAMPLE_VOCAB'"),
        ({"ending": " is", "fallback": "TEXT", "fallback_kwargs": {"fil": "repeat"}}, "did you mean 'fill'"),
        ({"ending": " is", "fallback_kwargs": ["a"]}, "must be a dict"),
    ],
)
def test_wrong_arguments_of_an_ending_are_refused(make, kwargs, message):
    with pytest.raises(ValueError, match=message):
        make("ENDING", **kwargs)


def test_an_ending_falls_back_to_text_only_if_there_is_one(make):
    with pytest.raises(ValueError, match="prompt_tuning_init_text"):
        make("ENDING", text=None, ending=" is", fallback="TEXT")
