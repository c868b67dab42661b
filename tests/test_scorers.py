"""Each scorer against answers judged by hand."""

import pytest

from inference.llava_hound_dpo.compat_scorers import COMPATIBLE, score_compatible
from llava.scorers import (
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

# Why a public rule reads an answer otherwise than a person.
MARK = "lmms-eval: a letter needs a blank, a full stop or round brackets beside it"
CASE = "both: labels are capitals, or in VLMEvalKit follow `answer is`"
SHORT = "lmms-eval: an option's text counts only in answers of more than five words"
LAST = "lmms-eval: of several labels the last counts; VLMEvalKit: `answer is` decides, the rest is none"
PART = "VLMEvalKit: an option's text counts inside another option's, or inside a word"
LETTER = "both: a label counts whatever is said of it or beside it"

# Answer, the letter it deserves with the options above (None: refused), then what lmms-eval's rule of MMMU and
# Q-Bench2 makes of it (None: it draws an option at random) and VLMEvalKit's, and why where the three differ.
ANSWERS = [
    # labels, alone or first
    ("A", "A", "A", "A", ""),
    ("B.", "B", "B", "B", ""),
    ("C)", "C", None, "C", MARK),
    ("(D)", "D", "D", "D", ""),
    ("**A**", "A", None, "A", MARK),
    ("**B.**", "B", "B", "B", ""),
    ("[C]", "C", None, "C", MARK),
    ("b", "B", None, None, CASE),
    ("(b)", "B", None, None, CASE),
    ("a.", "A", None, None, CASE),
    ("Ａ", "A", None, None, "both: a full-width letter is no label"),
    ("b) blue", "B", None, "B", SHORT),
    ("B. blue", "B", "B", "B", ""),
    ("(B) blue", "B", "B", "B", ""),
    ("B: blue", "B", None, "B", MARK),
    ("B - blue", "B", "B", "B", ""),
    ("B (blue)", "B", "B", "B", ""),
    ("B, because it is blue.", "B", None, "B", MARK),
    ("B. It is not red.", "B", "B", "A", "VLMEvalKit: the label is not among the last five words, `red` is an option"),
    ("blue (B)", "B", "B", "B", ""),
    ("B\nThe car in Image2 is blue.", "B", "B", "B", ""),
    ("The car in Image2 is blue.\nB", "B", "B", "B", ""),
    # sentences that name the answer
    ("The answer is A", "A", "A", "A", ""),
    ("the answer is A.", "A", "A", "A", ""),
    ("The answer is b", "B", None, "B", CASE),
    ("The answer is B because the car is blue.", "B", "B", "B", ""),
    ("Answer: A", "A", "A", "A", ""),
    ("ANSWER: C", "C", "C", "C", ""),
    ("Answer:D", "D", "D", "D", ""),
    ("Final answer: **B**", "B", None, "B", MARK),
    ("The correct answer is (C).", "C", "C", "C", ""),
    ("The correct option is D", "D", "D", "D", ""),
    ("The answer is option (A).", "A", "A", "A", ""),
    ("Option B", "B", "B", "B", ""),
    ("Answer B", "B", "B", "B", ""),
    ("B is correct.", "B", "B", "B", ""),
    ("(B) is the correct answer", "B", "B", None, "VLMEvalKit: the label is not among the last five words"),
    ("I choose B", "B", "B", "B", ""),
    ("I would go with C.", "C", "C", "C", ""),
    ("It's (A).", "A", "A", "A", ""),
    ("\\boxed{D}", "D", None, "D", MARK),
    ("<answer>C</answer>", "C", None, None, "both: a letter between tags does not stand alone"),
    ("It is not A, the answer is B.", "B", "B", "B", ""),
    ("(A) red (B) blue (C) dark red (D) green. The answer is B.", "B", "D", "B", LAST),
    ("A. red\nB. blue\nC. dark red\nD. green\nAnswer: D", "D", "D", None, "VLMEvalKit: four labels are none"),
    # the text of an option
    ("blue", "B", None, "B", SHORT),
    ("Blue.", "B", None, "B", SHORT),
    ("the blue one", "B", None, "B", SHORT),
    ("It is blue.", "B", None, "B", SHORT),
    ("The answer is blue.", "B", None, "B", SHORT),
    ("The answer is dark red.", "C", None, "D", "VLMEvalKit: the first letter after `answer is`, here of `dark`"),
    ("dark red", "C", None, None, PART),
    ("The car is dark red.", "C", None, None, PART),
    ("The car in Image2 is green", "D", "D", "D", ""),
    ("A red car", "A", "A", "A", ""),
    ("A blue car is in the middle of the picture.", "B", "A", None, "both: the article is a label"),
    ("The answer is a red car", "A", "A", "A", ""),
    # ties and contradictions
    ("A or B", None, "B", None, LAST),
    ("A, B", None, "B", None, LAST),
    ("A and C", None, "C", None, LAST),
    ("A/B", None, "B", None, LAST),
    ("(A) or (D)", None, "D", None, LAST),
    ("A (B)", None, "B", None, LAST),
    ("The answer is A or B.", None, "B", "A", LAST),
    ("The answer is A. No, the answer is B.", None, "B", "A", LAST),
    ("A\nB", None, "B", None, LAST),
    ("red or blue", None, None, None, ""),
    ("Both cars are red and blue", None, "B", None, "lmms-eval: of several option texts the last counts"),
    ("A. blue", None, "A", "A", LETTER),
    ("(A) green", None, "A", "A", LETTER),
    ("green (A)", None, "A", "A", LETTER),
    ("The answer is B, green.", None, None, "B", LETTER),
    ("The answer is (C) red", None, "C", "C", LETTER),
    # nothing that can be read
    ("", None, None, None, ""),
    ("   ", None, None, None, ""),
    ("...", None, None, None, ""),
    ("E", None, None, None, ""),
    ("The answer is E", None, None, None, ""),
    ("(F)", None, None, None, ""),
    ("I don't know.", None, None, None, ""),
    ("None of the above", None, None, None, ""),
    ("Sorry, I cannot see the picture.", None, None, None, ""),
    ("The answer is clear.", None, None, "C", "VLMEvalKit: the first letter after `answer is`, here of `clear`"),
    ("purple", None, None, None, ""),
    ("reddish", None, None, "A", PART),
    ("a car", None, None, None, ""),
    ("A dark horse", None, "A", "A", LETTER),
    ("ABCD", None, "D", None, "lmms-eval: a label may end a word"),
    ("Group B", None, "B", "B", LETTER),
    ("vitamin B", None, "B", "B", LETTER),
    ("It is not red.", None, None, "A", "VLMEvalKit: a denied option counts"),
    ("The answer is not A.", None, "A", "A", LETTER),
    ("I don't think the answer is B.", None, "B", "B", LETTER),
    ("Neither A nor B is correct.", None, "B", None, LAST),
    ("(A) is wrong.", None, "A", "A", LETTER),
]


def letter_of(number):
    return None if number is None else "ABCD"[number]


@pytest.mark.parametrize(("text", "letter"), [row[:2] for row in ANSWERS], ids=repr)
def test_multiple_choice(text, letter):
    assert letter_of(parse_choice(text, len(COLOURS), COLOURS)) == letter


@pytest.mark.parametrize(("text", "lmms_eval", "vlmevalkit"), [(r[0], r[2], r[3]) for r in ANSWERS], ids=repr)
def test_the_rules_of_other_harnesses(text, lmms_eval, vlmevalkit):
    given = [letter_of(COMPATIBLE[rule](text, COLOURS)) for rule in ("lmms_eval", "vlmevalkit")]
    assert given == [lmms_eval, vlmevalkit]


def test_the_table_is_large_each_answer_once_and_each_difference_explained():
    assert len({text for text, *_ in ANSWERS}) == len(ANSWERS) >= 60
    assert all(bool(reason) == (len({ours, *theirs}) > 1) for _, ours, *theirs, reason in ANSWERS)


def test_a_plain_label_is_read_alike_by_all():
    """The rows without a reason, the format that the prompts ask for among them."""
    alike = [text for text, *_, reason in ANSWERS if not reason]
    assert {"A", "B.", "(D)", "(B) blue", "The answer is A", "Answer: A", "", "red or blue"} <= set(alike)
    assert len(alike) >= 35


@pytest.mark.parametrize(
    ("text", "blink", "muirbench"),
    [
        ("A", "A", "A"),
        (" b ", "B", "B"),
        ("(C)", "C", None),
        ("D.", "D", "D"),
        ("d.", "D", None),
        ("B. blue", "B", "B"),
        ("B) blue", "B", None),
        ("The answer is B", None, None),  # T, in BLINK's rule
        ("blue", "B", None),
        ("a red car", "A", None),
        ("dark red", "D", None),
        ("E.", None, None),
        ("**A**", None, None),
        ("", None, None),
    ],
)
def test_letter_rules_of_lmms_eval(text, blink, muirbench):
    given = [letter_of(COMPATIBLE[rule](text, COLOURS)) for rule in ("lmms_eval_blink", "lmms_eval_muirbench")]
    assert given == [blink, muirbench]


def test_verdicts_of_the_rules_of_other_harnesses():
    """lmms-eval's random draw scores what it is worth on average; all else that is not read scores 0."""
    assert score_compatible("lmms_eval", "(B)", "blue", COLOURS) == Result(1.0, RIGHT)
    assert score_compatible("lmms_eval", "(A)", "B", COLOURS) == Result(0.0, WRONG)
    assert score_compatible("lmms_eval", "purple", "B", COLOURS) == Result(1 / 4, UNPARSED)
    for rule in ("vlmevalkit", "lmms_eval_blink", "lmms_eval_muirbench"):
        assert score_compatible(rule, "purple", "B", COLOURS) == Result(0.0, UNPARSED)
    with pytest.raises(ValueError, match="not one of"):
        score_compatible("vlmevalkit", "A", "pink", COLOURS)


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("I'm sorry, but without the image provided, B", None),
        ("Failed to obtain answer via API: B blue", "B"),  # the letter is not looked at, the text is
        ("Z", None),
        ("blue " * 20, None),  # longer than twice all options
        ("The answer is *B", "B"),
    ],
)
def test_refusals_and_long_answers_in_vlmevalkit(text, letter):
    assert letter_of(COMPATIBLE["vlmevalkit"](text, COLOURS)) == letter


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
