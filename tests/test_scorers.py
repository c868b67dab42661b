"""Each scorer against answers judged by hand."""

import pytest

from llava.choices import true_choice
from llava.scorers import (
    RIGHT,
    UNPARSED,
    WRONG,
    Result,
    contains,
    exact,
    rouge_l,
    score,
    token_f1,
)
from llava.words import normalise

COLOURS = ["red", "blue", "dark red", "green"]


def test_verdicts_of_multiple_choice():
    assert score("choice", "(B)", "blue", COLOURS) == Result(1.0, RIGHT)
    assert score("choice", "(B)", "B", COLOURS) == Result(1.0, RIGHT)
    assert score("choice", "(A)", "blue", COLOURS) == Result(0.0, WRONG)
    assert score("choice", "A or B", "blue", COLOURS) == Result(0.0, UNPARSED)
    assert score("choice", "C", "(C)") == Result(1.0, RIGHT)


@pytest.mark.parametrize(
    ("answer", "choices"), [("pink", COLOURS), ("E", COLOURS), ("a car", ()), ("red", ["red", "Red"])]
)
def test_a_true_answer_that_is_no_option_is_an_error(answer, choices):
    with pytest.raises(ValueError, match="not one of"):
        true_choice(answer, choices)


# ---- free text

EXACT = [
    ("red", "Red.", True),
    ("The red car", "a  red car!", True),
    ("red car", "car red", False),
    ("the", "a", False),
    ("It's", "its", True),
    ("1.5", "15", False),
    ("1,000", "1000", True),
    ("-5", "5", False),
    ("−5", "-5", True),
    ("−5", "5", False),
    ("t-shirt", "T shirt", True),
    ("３", "3", True),
    ("Größe", "GRÖSSE", True),
    ("नमस्ते", "नमस्त", False),
    ("red, blue", "red blue", True),
    ("Image3", "3", True),
    ("Image 3.", "3", True),
    ("image #3", "Image3", True),
    ("three", "3", True),
    ("13", "3", False),
    ("Image13", "3", False),
    ("Image 1 and 3", "3", False),
    ("red and blue", "blue and red", False),
]
CONTAINS = [
    ("The car is red.", "red", True),
    ("one hundred", "red", False),
    ("a dark red car", "Red Car", True),
    ("red sports car", "red car", False),
    ("reddish", "red", False),
    ("15", "5", False),
    ("It is Image3.", "3", True),
    ("It is Image13.", "3", False),
    ("my image3d", "3", False),
    ("The answer is: two dogs", "two dogs.", True),
]


@pytest.mark.parametrize(("text", "answer", "same"), EXACT)
def test_exact(text, answer, same):
    assert exact(text, answer) == exact(answer, text) == same


@pytest.mark.parametrize(("text", "answer", "inside"), CONTAINS)
def test_contains(text, answer, inside):
    assert contains(text, answer) == inside


def test_normalise():
    assert normalise(" The  man's hat, 2.5 m! ") == ("mans", "hat", "2.5", "m")


@pytest.mark.parametrize(
    ("text", "answer", "value"),
    [
        ("a red car", "the red car", 1.0),
        ("red car on road", "red car", 2 * (2 / 4) * 1 / (2 / 4 + 1)),  # precision 2/4, recall 1
        ("red red", "red", 2 / 3),  # a repeated word counts once: precision 1/2, recall 1
        ("car red", "red car", 1.0),  # the order does not matter
        ("green", "red", 0.0),
    ],
)
def test_token_f1(text, answer, value):
    assert token_f1(text, answer) == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize(
    ("text", "answer", "value"),
    [
        ("police kill the gunman", "police killed the gunman", 3 / 4),  # Lin 2004's example: 3 of 4 words
        ("the gunman kill police", "police killed the gunman", 2 / 4),
        ("a b c d", "b d", 2 * (2 / 4) * 1 / (2 / 4 + 1)),
        ("c b a", "a b c", 1 / 3),
        ("x a y b z a", "a b a", 2 * 3 / 9),
        ("green", "red", 0.0),
    ],
)
def test_rouge_l(text, answer, value):
    assert rouge_l(text, answer) == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize("scorer", ["exact", "contains", "f1", "rouge"])
@pytest.mark.parametrize("text", ["", "  ", "?!", "**"])
def test_an_empty_answer_is_unparsed(scorer, text):
    assert score(scorer, text, "red") == Result(0.0, UNPARSED)


def test_graded_scores_have_a_verdict():
    assert score("f1", "red red", "red") == Result(2 / 3, RIGHT)
    assert score("rouge", "c b a", "a b c") == Result(1 / 3, WRONG)
