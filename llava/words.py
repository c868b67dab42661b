"""The words of a text, as answers are compared: up to case, punctuation, articles and the spelling of numbers."""

import re
import unicodedata
from functools import lru_cache

ARTICLES = {"a", "an", "the"}
NUMERALS = {"zero": "0", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7", "eight": "8",
            "nine": "9", "ten": "10", "eleven": "11", "twelve": "12"}  # fmt: skip


@lru_cache(maxsize=100_000)
def words(text: str) -> tuple[str, ...]:
    """Lower-case words without punctuation; a decimal point, a minus sign and digits grouped by commas survive."""
    text = unicodedata.normalize("NFKC", text).casefold().replace("’", "'").replace("'", "")
    text = re.sub("[−–]", "-", text)
    text = re.sub(r"(?<=\d),(?=\d{3}\b)", "", text)
    places = {match.start() for match in re.finditer(r"(?<=\d)\.(?=\d)|(?<![\w.])-(?=\d)", text)}
    plain = (c if i in places or unicodedata.category(c)[0] not in "PS" else " " for i, c in enumerate(text))
    return tuple("".join(plain).split())


def normalise(text: str) -> tuple[str, ...]:
    """Words without articles, unless nothing else is left; the words of small numbers as digits.

    Source: SQuAD v1.1 evaluate-v1.1.py (`normalize_answer`); there punctuation is deleted, so that "1.5" is "15".
    """
    every = words(text)
    if every == ("one",):
        return ("1",)  # among other words it is a pronoun
    return tuple(NUMERALS.get(word, word) for word in every if word not in ARTICLES) or every
