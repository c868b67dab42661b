"""Each scorer against answers judged by hand."""

import pytest

from inference.llava_hound_dpo.scorers import (
    RIGHT,
    UNPARSED,
    WRONG,
    Result,
    contains,
    exact,
    normalise,
    parse_choice,
    rouge_l,
    score,
    token_f1,
    true_choice,
)

COLOURS = ["red", "blue", "dark red", "green"]

# The letter each answer deserves with the options above, None where it must be refused. Comments say what public rules
# make of it where they differ: lmms-eval's `parse_multi_choice_response` (from MMMU; fills failures at random, takes
# the last of several) and VLMEvalKit's `can_infer` (one letter among the last five words, else a part of an option).
ANSWERS = [
    # labels, alone or first
    ("A", "A"),
    ("B.", "B"),
    ("C)", "C"),  # lmms-eval draws at random
    ("(D)", "D"),
    ("**A**", "A"),  # lmms-eval draws at random
    ("**B.**", "B"),
    ("[C]", "C"),  # lmms-eval draws at random
    ("b", "B"),  # lmms-eval draws at random, VLMEvalKit none
    ("(b)", "B"),  # lmms-eval draws at random, VLMEvalKit none
    ("a.", "A"),  # lmms-eval draws at random, VLMEvalKit none
    ("Ａ", "A"),  # lmms-eval draws at random, VLMEvalKit none
    ("b) blue", "B"),  # lmms-eval draws at random
    ("B. blue", "B"),
    ("(B) blue", "B"),
    ("B: blue", "B"),  # lmms-eval draws at random
    ("B - blue", "B"),
    ("B (blue)", "B"),
    ("B, because it is blue.", "B"),  # lmms-eval draws at random
    ("B. It is not red.", "B"),  # VLMEvalKit A
    ("blue (B)", "B"),
    ("B\nThe car in Image2 is blue.", "B"),
    ("The car in Image2 is blue.\nB", "B"),
    # sentences that name the answer
    ("The answer is A", "A"),
    ("the answer is A.", "A"),
    ("The answer is b", "B"),  # lmms-eval draws at random, VLMEvalKit none
    ("The answer is B because the car is blue.", "B"),
    ("Answer: A", "A"),
    ("ANSWER: C", "C"),
    ("Answer:D", "D"),
    ("Final answer: **B**", "B"),  # lmms-eval draws at random
    ("The correct answer is (C).", "C"),
    ("The correct option is D", "D"),
    ("The answer is option (A).", "A"),
    ("Option B", "B"),
    ("Answer B", "B"),
    ("B is correct.", "B"),
    ("(B) is the correct answer", "B"),  # VLMEvalKit none
    ("I choose B", "B"),
    ("I would go with C.", "C"),
    ("It's (A).", "A"),
    ("\\boxed{D}", "D"),  # lmms-eval draws at random
    ("<answer>C</answer>", "C"),  # lmms-eval draws at random, VLMEvalKit none
    ("It is not A, the answer is B.", "B"),  # VLMEvalKit none
    ("(A) red (B) blue (C) dark red (D) green. The answer is B.", "B"),  # lmms-eval D, VLMEvalKit none
    ("A. red\nB. blue\nC. dark red\nD. green\nAnswer: D", "D"),  # VLMEvalKit none
    # the text of an option
    ("blue", "B"),  # lmms-eval draws at random
    ("Blue.", "B"),  # lmms-eval draws at random
    ("the blue one", "B"),  # lmms-eval draws at random
    ("It is blue.", "B"),  # lmms-eval draws at random
    ("The answer is blue.", "B"),  # lmms-eval draws at random
    ("dark red", "C"),  # lmms-eval draws at random, VLMEvalKit none
    ("The car is dark red.", "C"),  # lmms-eval draws at random, VLMEvalKit none
    ("The car in Image2 is green", "D"),
    ("A red car", "A"),
    ("A blue car is in the middle of the picture.", "B"),  # lmms-eval A, VLMEvalKit none
    ("The answer is a red car", "A"),
    # ties and contradictions
    ("A or B", None),  # lmms-eval B
    ("A, B", None),  # lmms-eval B
    ("A and C", None),  # lmms-eval C
    ("A/B", None),  # lmms-eval B
    ("(A) or (D)", None),  # lmms-eval D
    ("A (B)", None),  # lmms-eval B
    ("The answer is A or B.", None),  # lmms-eval B
    ("The answer is A. No, the answer is B.", None),  # lmms-eval B
    ("A\nB", None),  # lmms-eval B
    ("red or blue", None),  # lmms-eval draws at random
    ("Both cars are red and blue", None),  # lmms-eval B
    ("A. blue", None),  # lmms-eval A, VLMEvalKit A
    ("(A) green", None),  # lmms-eval A, VLMEvalKit A
    ("green (A)", None),  # lmms-eval A, VLMEvalKit A
    ("The answer is B, green.", None),  # lmms-eval draws at random, VLMEvalKit B
    ("The answer is (C) red", None),  # lmms-eval C, VLMEvalKit C
    # nothing that can be read
    ("", None),  # lmms-eval draws at random
    ("   ", None),  # lmms-eval draws at random
    ("...", None),  # lmms-eval draws at random
    ("E", None),  # lmms-eval draws at random
    ("The answer is E", None),  # lmms-eval draws at random
    ("(F)", None),  # lmms-eval draws at random
    ("I don't know.", None),  # lmms-eval draws at random
    ("None of the above", None),  # lmms-eval draws at random
    ("Sorry, I cannot see the picture.", None),  # lmms-eval draws at random
    ("purple", None),  # lmms-eval draws at random
    ("reddish", None),  # lmms-eval draws at random, VLMEvalKit A
    ("a car", None),  # lmms-eval draws at random
    ("A dark horse", None),  # lmms-eval A, VLMEvalKit A
    ("ABCD", None),  # lmms-eval D
    ("Group B", None),  # lmms-eval B, VLMEvalKit B
    ("vitamin B", None),  # lmms-eval B, VLMEvalKit B
    ("It is not red.", None),  # lmms-eval draws at random, VLMEvalKit A
    ("The answer is not A.", None),  # lmms-eval A, VLMEvalKit A
    ("I don't think the answer is B.", None),  # lmms-eval B, VLMEvalKit B
    ("Neither A nor B is correct.", None),  # lmms-eval B
    ("(A) is wrong.", None),  # lmms-eval A, VLMEvalKit A
]


@pytest.mark.parametrize(("text", "letter"), ANSWERS, ids=lambda value: repr(value))
def test_multiple_choice(text, letter):
    number = parse_choice(text, len(COLOURS), COLOURS)
    assert (None if number is None else "ABCD"[number]) == letter


def test_the_table_is_large_and_each_answer_once():
    assert len({text for text, _ in ANSWERS}) == len(ANSWERS) >= 60


@pytest.mark.parametrize(
    ("text", "number"),
    [("Yes", 0), ("No.", 1), ("No, there is not.", 1), ("Yes, there is no car", 0), ("yes or no", None), ("B", 1)],
)
def test_yes_and_no_as_options(text, number):
    """`no` is a negation and an option here."""
    assert parse_choice(text, 2, ["Yes", "No"]) == number


def test_options_of_the_same_text_cannot_be_told_apart():
    assert parse_choice("red", 3, ["red", "Red.", "blue"]) is None
    assert parse_choice("B", 3, ["red", "Red.", "blue"]) == 1


def test_letters_without_known_options():
    assert parse_choice("The answer is H.", 8) == 7
    assert parse_choice("I think so", 8) is None


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
    ("t-shirt", "T shirt", True),
    ("３", "3", True),
    ("Größe", "GRÖSSE", True),
    ("नमस्ते", "नमस्त", False),
    ("red, blue", "red blue", True),
]
CONTAINS = [
    ("The car is red.", "red", True),
    ("one hundred", "red", False),
    ("a dark red car", "Red Car", True),
    ("red sports car", "red car", False),
    ("reddish", "red", False),
    ("15", "5", False),
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
