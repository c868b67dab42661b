"""Multiple choice: which option an answer names, against answers judged by hand."""

import time

import pytest

from llava.choices import LONGEST, parse_choice
from tests.phrasings import COLOURS, FOUR, PHRASINGS, TRUE_FALSE, YES_NO

# Answer, and the letter it deserves with the options above (None: refused).
ANSWERS = [
    # labels, alone or first
    ("A", "A"),
    ("B.", "B"),
    ("C)", "C"),
    ("(D)", "D"),
    ("**A**", "A"),
    ("**B.**", "B"),
    ("[C]", "C"),
    ("b", "B"),
    ("(b)", "B"),
    ("a.", "A"),
    ("Ａ", "A"),
    ("b) blue", "B"),
    ("B. blue", "B"),
    ("(B) blue", "B"),
    ("B: blue", "B"),
    ("B - blue", "B"),
    ("B (blue)", "B"),
    ("B, because it is blue.", "B"),
    ("B. It is not red.", "B"),
    ("blue (B)", "B"),
    ("B\nThe car in Image2 is blue.", "B"),
    ("The car in Image2 is blue.\nB", "B"),
    # sentences that name the answer
    ("The answer is A", "A"),
    ("the answer is A.", "A"),
    ("The answer is b", "B"),
    ("The answer is B because the car is blue.", "B"),
    ("Answer: A", "A"),
    ("ANSWER: C", "C"),
    ("Answer:D", "D"),
    ("Final answer: **B**", "B"),
    ("The correct answer is (C).", "C"),
    ("The correct option is D", "D"),
    ("The answer is option (A).", "A"),
    ("Option B", "B"),
    ("Answer B", "B"),
    ("B is correct.", "B"),
    ("(B) is the correct answer", "B"),
    ("I choose B", "B"),
    ("I would go with C.", "C"),
    ("It's (A).", "A"),
    ("\\boxed{D}", "D"),
    ("<answer>C</answer>", "C"),
    ("It is not A, the answer is B.", "B"),
    ("(A) red (B) blue (C) dark red (D) green. The answer is B.", "B"),
    ("A. red\nB. blue\nC. dark red\nD. green\nAnswer: D", "D"),
    # the text of an option
    ("blue", "B"),
    ("Blue.", "B"),
    ("the blue one", "B"),
    ("It is blue.", "B"),
    ("The answer is blue.", "B"),
    ("The answer is dark red.", "C"),
    ("dark red", "C"),
    ("The car is dark red.", "C"),
    ("The car in Image2 is green", "D"),
    ("A red car", "A"),
    ("A blue car is in the middle of the picture.", "B"),
    ("The answer is a red car", "A"),
    # ties and contradictions
    ("A or B", None),
    ("A, B", None),
    ("A and C", None),
    ("A/B", None),
    ("(A) or (D)", None),
    ("A (B)", None),
    ("The answer is A or B.", None),
    ("The answer is A. No, the answer is B.", None),
    ("A\nB", None),
    ("red or blue", None),
    ("Both cars are red and blue", None),
    ("A. blue", None),
    ("(A) green", None),
    ("green (A)", None),
    ("The answer is B, green.", None),
    ("The answer is (C) red", None),
    # nothing that can be read
    ("", None),
    ("   ", None),
    ("...", None),
    ("E", None),
    ("The answer is E", None),
    ("(F)", None),
    ("I don't know.", None),
    ("None of the above", None),
    ("Sorry, I cannot see the picture.", None),
    ("The answer is clear.", None),
    ("purple", None),
    ("reddish", None),
    ("a car", None),
    ("A dark horse", None),
    ("ABCD", None),
    ("Group B", None),
    ("vitamin B", None),
    ("It is not red.", None),
    ("The answer is not A.", None),
    ("I don't think the answer is B.", None),
    ("Neither A nor B is correct.", None),
    ("(A) is wrong.", None),
]


NUMBERS = ["1", "2", "3", "-2"]
TOLD = ["a man on the moon", "no car", "not visible", "red, white and blue"]

# Answer, the options, the letter it deserves: what a clause does to the label or the option in it.
CLAUSES = [
    # a reason names nothing, and what it denies does not matter
    ("Option C because not A", COLOURS, "C"),
    ("C because the car is blue, not red", COLOURS, "C"),
    ("C since A shows another car", COLOURS, "C"),
    ("B, since (A) is the other car.", COLOURS, "B"),
    ("The answer is B, because A is the colour of the other car.", COLOURS, "B"),
    ("Because it is blue.", COLOURS, "B"),
    ("It is green because the red one is in Image1.", COLOURS, "D"),
    ("I cannot tell because the red car hides it.", COLOURS, None),
    ("Option B as it is the only blue one", COLOURS, "B"),
    ("D due to the green paint, whereas A is in Image1", COLOURS, "D"),
    # denied options
    ("The car is blue, not red.", COLOURS, "B"),
    ("The car is not red but blue.", COLOURS, "B"),
    ("It isn't red, it's green.", COLOURS, "D"),
    ("There is no blue car, only a green one.", COLOURS, "D"),
    ("blue rather than green", COLOURS, "B"),
    ("Blue instead of red", COLOURS, "B"),
    ("It is more blue than green.", COLOURS, "B"),
    ("Unlike the red car, this one is green.", COLOURS, "D"),
    ("Blue and not green", COLOURS, "B"),
    ("Red is wrong; blue is right.", COLOURS, "B"),
    ("Red, blue and dark red are wrong, it is green.", COLOURS, "D"),
    ("blue is not the colour of the car", COLOURS, None),
    ("Blue is wrong.", COLOURS, None),
    ("Red can be ruled out.", COLOURS, None),
    ("blue, no", COLOURS, None),
    ("Blue? No, green.", COLOURS, "D"),
    ("No, it is blue.", COLOURS, "B"),
    ("There is no doubt that it is blue.", COLOURS, "B"),
    ("It is blue without any doubt", COLOURS, "B"),
    ("It is red. It is not red.", COLOURS, None),
    ("neither red nor blue", COLOURS, None),
    ("Neither red nor blue, but green.", COLOURS, "D"),
    ("I don't think it is blue", COLOURS, None),
    ("I'm not sure, but I think it is blue", COLOURS, "B"),
    ("What colour, red or blue? It is blue.", COLOURS, "B"),
    ("Is it red?", COLOURS, "A"),
    # denied labels
    ("B, not A", COLOURS, "B"),
    ("B not A", COLOURS, "B"),
    ("Not A but B", COLOURS, "B"),
    ("not B", COLOURS, None),
    ("A is not correct but B is.", COLOURS, "B"),
    ("A is wrong, B is right.", COLOURS, "B"),
    ("It is not (A) but (B).", COLOURS, "B"),
    ("(A) isn't right.", COLOURS, None),
    ("A can't be the answer", COLOURS, None),
    ("B rather than C", COLOURS, "B"),
    ("B instead of A", COLOURS, "B"),
    ("Option B is wrong.", COLOURS, None),
    ("The answer cannot be B.", COLOURS, None),
    ("I don't know, but B is correct.", COLOURS, "B"),
    ("The answer is B, as A is wrong.", COLOURS, "B"),
    ("A? No, it is B.", COLOURS, "B"),
    # other ways to name one
    ("C。", COLOURS, "C"),
    ("C、", COLOURS, "C"),
    ("【C】", COLOURS, "C"),
    ("C！", COLOURS, "C"),
    ("B!", COLOURS, "B"),
    ("B;", COLOURS, "B"),
    ("B?", COLOURS, "B"),
    ("So, B.", COLOURS, "B"),
    ("Therefore B", COLOURS, "B"),
    ("Probably C.", COLOURS, "C"),
    ("I think B.", COLOURS, "B"),
    ("I think it is B", COLOURS, "B"),
    ("I'd say D.", COLOURS, "D"),
    ("My guess is C", COLOURS, "C"),
    ("It must be B.", COLOURS, "B"),
    ("B it is", COLOURS, "B"),
    ("the answer is b because of the paint", COLOURS, "B"),
    ("option b.", COLOURS, "B"),
    ("The answer to the question is B.", COLOURS, "B"),
    ("The correct answer for Image2 is (D)", COLOURS, "D"),
    ("The car is coloured. B.", COLOURS, "B"),
    ("B fits best", COLOURS, "B"),
    ("(B) is definitely the right one.", COLOURS, "B"),
    # options that are only repeated
    ("A. red B. green C. blue D. yellow", FOUR, None),
    ("A) red, B) green, C) blue, D) yellow", FOUR, None),
    ("A: red, B: green", FOUR, None),
    ("(A) red (B) green (C) blue (D) yellow", FOUR, None),
    ("Options: A. red B. green C. blue D. yellow", FOUR, None),
    ("A. red\nB. green\nC. blue\nD. yellow", FOUR, None),
    ("A. red\nB. green\nC. blue\nD. yellow\nC", FOUR, "C"),
    ("A. red B. green C. blue D. yellow\nThe answer is C.", FOUR, "C"),
    ("red, green, blue or yellow", FOUR, None),
    ("The options are A, B, C and D.", FOUR, None),
    ("Choose the right option: A, B, C, D", FOUR, None),
    # options that hold negations, articles, commas, numbers
    ("No, there isn't.", YES_NO, "B"),
    ("Yes, not only that.", YES_NO, "A"),
    ("It is not there, so no.", YES_NO, "B"),
    ("B, No", YES_NO, "B"),
    ("That is not true.", TRUE_FALSE, "B"),
    ("The statement is false.", TRUE_FALSE, "B"),
    ("It isn't false", TRUE_FALSE, "A"),
    ("There is no car.", TOLD, "B"),
    ("The car is not visible.", TOLD, "C"),
    ("It shows the man on a moon.", TOLD, "A"),
    ("The flag is red, white and blue.", TOLD, "D"),
    ("The number in Image 2 is 3.", NUMBERS, "C"),
    ("It is −2.", NUMBERS, "D"),
    ("about 1.5", NUMBERS, None),
    ("It is 2, not 3.", NUMBERS, "B"),
]


def letter_of(number):
    return None if number is None else "ABCD"[number]


@pytest.mark.parametrize(("text", "letter"), ANSWERS, ids=repr)
def test_multiple_choice(text, letter):
    assert letter_of(parse_choice(text, len(COLOURS), COLOURS)) == letter


@pytest.mark.parametrize(("text", "options", "letter"), CLAUSES, ids=repr)
def test_clauses(text, options, letter):
    assert letter_of(parse_choice(text, len(options), options)) == letter


def test_the_table_is_large_and_has_each_answer_once():
    assert len({text for text, _ in ANSWERS}) == len(ANSWERS) >= 60
    assert len({(text, *options) for text, options, _ in CLAUSES}) == len(CLAUSES) >= 60


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


FURTHER = [(text, options, letter) for options, letter, texts in PHRASINGS for text in texts]


@pytest.mark.parametrize(("text", "options", "letter"), FURTHER, ids=repr)
def test_further_phrasings(text, options, letter):
    assert letter_of(parse_choice(text, len(options), options)) == letter


REPEATED = ["A", "A ", "(", "A, ", "A and ", "no ", "the answer is ", "\\boxed{", "wait, ", "不A", "xly", "A: no, "]


@pytest.mark.parametrize("part", REPEATED)
def test_long_answers_are_read_in_little_time(part):
    began = time.process_time()
    parse_choice(part * (2 * LONGEST // len(part)), len(COLOURS), COLOURS)
    assert time.process_time() - began < 2
