"""Whether an answer is right in other words, and how much two answers differ: what keeps right answers from rejection.

Doubt counts as right: a pair that is lost costs less than a right answer that is taught to be wrong.
"""

import re
from collections.abc import Sequence

from rapidfuzz.distance import Levenshtein

from llava.scorers import RIGHT, UNPARSED, contains, normalise, score, spoken

NUMBERS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
).split()
DIGITS = {word: str(number) for number, word in enumerate(NUMBERS)}
ORDINALS = {word: str(number) for number, word in enumerate(
    "first second third fourth fifth sixth seventh eighth ninth".split(), 1
)}  # fmt: skip
LINKS = re.compile(r"\band\b|\bimage ?\d+\b")  # between what is said of several images
LETTER = re.compile(r"\(?[A-H]\)?\.?")  # the true answer to a question that lists its options itself


def is_right(text: str, answer: str, choices: Sequence[str] = (), in_order: bool = False) -> bool | None:
    """Whether `text` says what `answer` says; None where a multiple-choice answer names no option, or several.

    Free text is right if either contains the other in whole words, or if both have the same words. With `in_order`,
    of an answer about several images in turn: if either has all words of the other in their order, whatever is between.
    """
    if choices or LETTER.fullmatch(answer.strip()):
        verdict = score("choice", text, answer, choices).verdict
        return None if verdict == UNPARSED else verdict == RIGHT
    given, true = canonical(text), canonical(answer)
    if in_order:
        given, true = (LINKS.sub(" ", words).split() for words in (given, true))
        return _within(given, true) or _within(true, given)
    return contains(given, true) or contains(true, given) or sorted(given.split()) == sorted(true.split())


def _within(few: Sequence[str], many: Sequence[str]) -> bool:
    """Whether all of the words stand among the others in the same order."""
    rest = iter(many)
    return all(word in rest for word in few)


def numbers_in(text: str) -> set[str]:
    """Numbers of the images that a text may name: "3", "three", "Image3", "the third"."""
    said = spoken(text)
    return {word for word in said if word.isdecimal()} | {ORDINALS[word] for word in said if word in ORDINALS}


def canonical(text: str) -> str:
    """The text's words without articles, number words as digits, without a plural's s."""
    return " ".join(DIGITS.get(word) or _singular(word) for word in normalise(text))


def _singular(word: str) -> str:
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word


def length_ratio(first: str, second: str) -> float:
    """Words of the longer text per word of the shorter one, articles included; at least 1."""
    lengths = sorted(max(1, len(text.split())) for text in (first, second))
    return lengths[1] / lengths[0]


def edit_distance(first: str, second: str) -> float:
    """Levenshtein distance of characters, case ignored, as a share (0..1) of the longer text's length."""
    return Levenshtein.normalized_distance(first.casefold(), second.casefold())
