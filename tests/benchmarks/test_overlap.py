"""Which rows of a source share text with the scored ones."""

import pytest

from benchmarks.harness.source import without_overlap


SCORED = [{"premise": "The quick, brown fox jumps over the lazy dog.", "hypothesis": "A fox jumps."}]


@pytest.mark.parametrize(
    ("text", "stays"),
    [
        ("the quick brown fox jumps over the lazy dog", False),
        ("  Brown FOX jumps over -- the LAZY dog!", False),  # a part of the scored text
        ("They say the quick brown fox jumps over the lazy dog, again and again", False),  # holds it
        ("A fox jumps.", True),  # too short to say anything
        ("fox jumps over the", True),
        ("rown fox jumps over the lazy dog", True),  # another word
        ("the quick brown fox sleeps beside the lazy dog", True),
        ("", True),
    ],
)
def test_a_row_stays_unless_a_text_of_five_words_is_in_both(text, stays):
    rows = [{"sentence": "something else that is long enough"}, {"sentence": text}]
    kept = without_overlap(rows, ["sentence"], SCORED, ["premise", "hypothesis"])
    assert kept == ([0, 1] if stays else [0])


def test_every_text_of_a_row_is_looked_at():
    row = {"sentence1": "nothing of this is known", "sentence2": SCORED[0]["premise"]}
    assert without_overlap([row], ["sentence1", "sentence2"], SCORED, ["premise", "hypothesis"]) == []
    assert without_overlap([row], ["sentence1"], SCORED, ["premise", "hypothesis"]) == [0]
