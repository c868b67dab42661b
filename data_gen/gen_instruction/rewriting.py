"""Texts of prompts: which picture a question is about, said in front of it."""

import re
from collections.abc import Iterable
from itertools import product

import numpy as np

_NOUNS = ("image", "picture", "photo", "photograph", "scene", "shot")
_ADJECTIVES = ("inner", "central", "middle", "centre", "smaller", "inset", "embedded")
_PLACES = ("in the middle", "at the centre", "inside the other one", "surrounded by the larger one", "placed on top")
# Names of a picture that is pasted into the centre of another one.
CENTRE_PHRASES = (
    *(f"In the {adjective} {noun}" for adjective, noun in product(_ADJECTIVES, _NOUNS)),
    *(f"In the {noun} {place}" for noun, place in product(_NOUNS, _PLACES)),
)

Turn = tuple[str, str]  # question, answer


def numbered(position: int) -> str:
    """What points at the picture of a 0-based position."""
    return f"In Image{position + 1}"


def centre_phrase(rng: np.random.Generator) -> str:
    """What points at the picture in the centre of another one."""
    return CENTRE_PHRASES[rng.integers(len(CENTRE_PHRASES))]


def ask(where: str, question: str) -> str:
    """The question about the picture that `where` names."""
    return f"{where}, {lower_first(question)}"


def lower_first(text: str) -> str:
    """The text with a small first letter, unless its first word is "I" or has several capitals (USA, McDonald).

    Other names lose their capital: telling "Paris" from "Please" takes more than a rule.
    """
    word = re.match(r"\w*", text)[0]
    if word == "I" or sum(letter.isupper() for letter in word) > 1:
        return text
    return text[:1].lower() + text[1:]


def conversation(head: str, turns: Iterable[Turn]) -> list[dict[str, str]]:
    """Turns as they are written, `head` before the first question."""
    written = []
    for question, answer in turns:
        written.append({"from": "human", "value": head + question})
        written.append({"from": "gpt", "value": answer})
        head = ""
    return written


def refusal(num_images: int) -> str:
    """The true answer to a question about the picture after the last one."""
    return f"There is no Image{num_images + 1} to look at: only {num_images} images were given."
