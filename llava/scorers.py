"""How an answer is judged against the true one: pure functions of text.

An answer nothing can be read from (empty; no option, or several, in multiple choice) is UNPARSED, a verdict of its own:
it scores 0, stays in the denominator and is counted. Nothing is ever filled in at random.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from rapidfuzz.distance import LCSseq

from llava.choices import NUM_LETTERS, parse_choice, true_choice
from llava.words import normalise, words

SCORERS = ("exact", "contains", "choice", "f1", "rouge")
RIGHT, WRONG, UNPARSED, MISSING = "right", "wrong", "unparsed", "missing"
IMAGE_BEFORE_NUMBER = re.compile(r"(?<!\w)image\s*#?(?=\d)", re.IGNORECASE)
RIGHT_FROM = 0.5  # a graded score (F1, ROUGE-L) from here counts as right where right or wrong is asked


@dataclass(frozen=True)
class Result:
    """Score (0 to 1) and verdict of one answer."""

    score: float
    verdict: str  # RIGHT, WRONG, UNPARSED or MISSING


def resolve(scorer: str, choices: Sequence[str]) -> str:
    """The scorer itself; `auto` is `choice` for a question with choices, else `exact`."""
    return ("choice" if choices else "exact") if scorer == "auto" else scorer


def score(scorer: str, text: str, answer: str, choices: Sequence[str] = ()) -> Result:
    """Judge `text` against the true `answer` by the named scorer.

    Raises ValueError where a multiple-choice record's true answer is none of its options.
    """
    if scorer == "choice":
        return _score_choice(text, answer, choices)
    if not words(text):
        return Result(0.0, UNPARSED)
    value = float({"exact": exact, "contains": contains, "f1": token_f1, "rouge": rouge_l}[scorer](text, answer))
    return Result(value, RIGHT if value >= RIGHT_FROM else WRONG)


def _score_choice(text: str, answer: str, choices: Sequence[str]) -> Result:
    true = true_choice(answer, choices)
    given = parse_choice(text, len(choices) or NUM_LETTERS, choices)
    if given is None:
        return Result(0.0, UNPARSED)
    return Result(float(given == true), RIGHT if given == true else WRONG)


# ---- free text


def spoken(text: str) -> tuple[str, ...]:
    """The words as they are compared: of "Image3" the number alone, as an answer to "which image" may have it."""
    return normalise(IMAGE_BEFORE_NUMBER.sub("", text))


def exact(text: str, answer: str) -> bool:
    """Whether both are the same up to case, articles, punctuation, spaces and "Image" before a number."""
    return spoken(text) == spoken(answer)


def contains(text: str, answer: str) -> bool:
    """Whether the answer's words stand in the text, in order and whole ("red" is not in "a hundred")."""
    given, wanted = spoken(text), spoken(answer)
    return bool(wanted) and f" {' '.join(wanted)} " in f" {' '.join(given)} "


def token_f1(text: str, answer: str) -> float:
    """Harmonic mean of precision and recall over normalised words, repeated words counted.

    Source: Rajpurkar et al. 2016 (SQuAD), section 6.1.
    """
    given, true = normalise(text), normalise(answer)
    return _f1((Counter(given) & Counter(true)).total(), len(given), len(true))


def rouge_l(text: str, answer: str) -> float:
    """F1 over the longest common subsequence of words, articles included.

    Source: Lin 2004 (ROUGE), section 3, with beta = 1 and no stemming, as the package rouge-score has it.
    """
    given, true = words(text), words(answer)
    return _f1(LCSseq.similarity(given, true), len(given), len(true))


def _f1(common: int, given: int, true: int) -> float:
    return 2 * common / (given + true) if common else 0.0
