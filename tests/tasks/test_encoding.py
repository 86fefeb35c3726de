import pytest

from peft_prompt_ext.tasks import Task
from peft_prompt_ext.tasks.encoding import answer_ids, fit, pad, split_template


def test_an_answer_is_tokenised_as_it_stands_behind_the_template(tokenizer):
    ids = answer_ids(tokenizer, "Film: {text}\nIt is", [" great", " terrible"])

    for answer, words in zip(ids, (" great", " terrible"), strict=True):
        assert tokenizer("It is" + words, add_special_tokens=False)["input_ids"][-len(answer) :] == answer
        assert tokenizer.decode(answer) == words


def test_an_answer_that_opens_another_one_is_closed(tokenizer):
    ids = answer_ids(tokenizer, "It is", [" great", " great film"])

    assert [answer[-1] for answer in ids] == [tokenizer.eos_token_id] * 2
    assert tokenizer.decode(ids[0][:-1]) == " great"


def test_an_answer_that_opens_another_one_needs_an_end_of_text(tokenizer):
    tokenizer.eos_token = None
    try:
        with pytest.raises(ValueError, match=r"' great', ' great film' opens another"):
            answer_ids(tokenizer, "It is", [" great", " great film"])
    finally:
        tokenizer.eos_token = "</s>"


def test_answers_with_the_same_tokens_are_an_error(tokenizer):
    with pytest.raises(ValueError, match=r"' great' and ' great' have the same tokens"):
        answer_ids(tokenizer, "It is", [" great", " great"])


def test_an_empty_answer_is_an_error(tokenizer):
    with pytest.raises(ValueError, match="'' has no tokens"):
        answer_ids(tokenizer, "It is", ["", " great"])


@pytest.mark.parametrize("limit", range(12, 40))
def test_cutting_shortens_the_longest_columns_and_stops_at_the_limit(tokenizer, limit):
    task = Task(name="t", template="{a} | {b} | {c}", texts=("{a}",), truncate=("a", "b"), label_words=(" x",))
    row = {"a": "great film " * 15, "b": "fine cast " * 8, "c": "plot"}

    encoded, cut = fit(task, row, lambda v: tokenizer(task.template.format(**v)), tokenizer, limit)

    text = tokenizer.decode(encoded["input_ids"])
    a, b, c = text.split("|")
    assert cut
    assert limit - 4 <= len(encoded["input_ids"]) <= limit  # a decoded end may tokenise shorter
    assert c.strip() == "plot"
    assert abs(len(tokenizer(a)["input_ids"]) - len(tokenizer(b)["input_ids"])) <= 15


def test_padding_stands_behind():
    assert pad([[5], [7, 11, 13]], 2).tolist() == [[5, 2, 2], [7, 11, 13]]


def test_a_column_of_numbers_is_text_when_a_row_is_cut(tokenizer):
    task = Task(name="own", template="{text} {amount}", texts=("{text}", "{amount}"), label_words=(" yes", " no"))
    row = {"text": "a very long film " * 9, "amount": 12}
    encoded, cut = fit(task, row, lambda row: tokenizer(task.template.format_map(row)), tokenizer, 20)
    assert cut and len(encoded["input_ids"]) == 20


@pytest.mark.parametrize(
    ("template", "text", "ending"),
    [
        ("Review: {text}\nSentiment:", "Review: {text}", "\nSentiment:"),
        ("{a}\n{b}\nSame? Answer:", "{a}\n{b}", "\nSame? Answer:"),
        ("{opening}", "{opening}", ""),
        ("{{{text}}} in {{braces}}:", "{{{text}", "} in {braces}:"),
        ("Answer:", "", "Answer:"),
    ],
)
def test_a_template_is_split_behind_its_last_column(template, text, ending):
    assert split_template(template) == (text, ending)
    row = {"a": "x", "b": "y", "text": "z", "opening": "o"}
    assert template.format(**row) == text.format(**row) + ending
