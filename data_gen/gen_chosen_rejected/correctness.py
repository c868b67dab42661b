"""Whether an answer is right in other words, and how much two answers differ: what keeps right answers from rejection.

Doubt counts as right: a pair that is lost costs less than a right answer that is taught to be wrong.
"""

import re
from collections.abc import Sequence

from rapidfuzz.distance import Levenshtein

from llava.scorers import RIGHT, UNPARSED, contains, normalise, score

NUMBERS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
).split()
DIGITS = {word: str(number) for number, word in enumerate(NUMBERS)}
LETTER = re.compile(r"\(?[A-H]\)?\.?")  # the true answer to a question that lists its options itself


def is_right(text: str, answer: str, choices: Sequence[str] = ()) -> bool | None:
    """Whether `text` says what `answer` says; None where a multiple-choice answer names no option, or several.

    Free text is right if either contains the other in whole words, or if both have the same words.
    """
    if choices or LETTER.fullmatch(answer.strip()):
        verdict = score("choice", text, answer, choices).verdict
        return None if verdict == UNPARSED else verdict == RIGHT
    given, true = canonical(text), canonical(answer)
    return contains(given, true) or contains(true, given) or sorted(given.split()) == sorted(true.split())


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
