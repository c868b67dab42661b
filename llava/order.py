"""The same question with its pictures in another order: targets, and numbers in its texts, follow the pictures.

An order has for each place the picture that comes there, both from 0. One that changes nothing gives the record itself.
"""

import logging
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from math import factorial
from typing import Any, TypeVar

from llava.asked import AND, IMAGE
from llava.records import Prompt, Question

logger = logging.getLogger(__name__)

Order = tuple[int, ...]
Record = TypeVar("Record", bound=Prompt)

TRUE = ("chosen", "answer")  # what records call the right answer
PICTURE = r"(?:image|picture|photo)"
ROW = rf"\d{{1,3}}(?:\s*,\s*\d{{1,3}})*{AND}\d{{1,3}}"  # "1, 2 and 3"
LABEL = rf"{PICTURE}\s*(?P<label>\d{{1,3}})[^\w<]{{0,4}}{IMAGE}"  # "Image1:<image>"
NAMED = rf"(?<![\w.-])(?:{PICTURE}s\s*{ROW}|{PICTURE}\s*#?\d{{1,3}})(?!\w|[./]\d|\.(?:png|jpe?g|gif|webp|bmp|tiff?)\b)"
MENTION = re.compile(rf"{LABEL}|(?P<named>{NAMED})", re.IGNORECASE)
BARE = re.compile(rf"\W*(?:{ROW}|\d{{1,3}})\W*")  # an answer that is a number
WHICH = re.compile(rf"\bwhich\s+(?:(?:one|two|three|of|the|these|those|other|\d)\s+)*{PICTURE}s?\b", re.IGNORECASE)
_COUNTED = "first|second|third|(?:four|fif|six|seven|eigh|nin|ten)th|last|final|previous|preceding|next|former|latter"
_WORDS = "one|two|three|four|five|six|seven|eight|nine|ten"
BY_PLACE = re.compile(  # what follows no number, "the last image", "Images 1 to 3", or may be none, "the image 2 men"
    rf"\b(?:(?:{_COUNTED}|\d+(?:st|nd|rd|th))(?:\s+(?!to\b)\w+){{0,2}}?\s+(?:{PICTURE}s?|ones?)"
    rf"|{PICTURE}s?\s+(?:{_WORDS})|{PICTURE}s?\s*\d+\s*(?:to|through|[-–—/])\s*(?:{PICTURE}\s*)?\d+"
    rf"|{PICTURE}\s*\d+(?:\s*,\s*\d+)*{AND}\d+|(?:the|this|that|an|each|every|same)\s+{PICTURE}\s+\d+)\b",
    re.IGNORECASE,
)


def why_fixed(record: Prompt) -> str | None:
    """Why the pictures of a record cannot change places without changing what is asked; None if they can."""
    if record.image_type != "sequence" or len(record.images) < 2:
        return "no sequence"
    before, options = [text for _, text in record.context], [str(text) for text in _listed(record, "choices")]
    asked, answers = [*before, record.prompt], [text for name in TRUE if (text := getattr(record, name, ""))]
    if any(map(BY_PLACE.search, (*asked, *answers, *getattr(record, "rejected", ()), *options))):
        return "speaks of an order"
    is_which = WHICH.search(record.prompt) is not None
    alone = [text for text in (*before, *(options if is_which else ())) if BARE.fullmatch(text)]
    if alone or any(int(label["label"]) != place for place, label in _labels(asked)):
        return "numbers its images otherwise"
    named = any(match["named"] for text in asked for match in MENTION.finditer(text))
    said = is_which and all(BARE.fullmatch(text) or MENTION.search(text) for text in answers)
    return None if named or said else "names no image by its number"


def _labels(asked: Sequence[str]) -> Iterator[tuple[int, re.Match]]:
    """The labels before pictures, each with its picture's place from 1."""
    text = "\0".join(asked)
    for label in re.finditer(LABEL, text, re.IGNORECASE):
        yield text.count(IMAGE, 0, label.end()), label


def _listed(record: Prompt, name: str) -> list[Any]:
    return found if isinstance(found := record.extra.get(name), list) else []


def permuted(record: Record, order: Sequence[int]) -> Record:
    """The same question, none that is `why_fixed`, with its pictures in another order."""
    if list(order) == sorted(order):
        return record
    is_which, new = WHICH.search(record.prompt) is not None, {old + 1: place + 1 for place, old in enumerate(order)}
    extra = {
        name: [_renumbered(text, new, is_which) if isinstance(text, str) else text for text in own]
        for name in ("choices", "others") if (own := _listed(record, name))
    }  # fmt: skip
    answers: dict[str, Any] = {n: _renumbered(getattr(record, n), new, is_which) for n in TRUE if hasattr(record, n)}
    if hasattr(record, "rejected"):
        answers["rejected"] = tuple(_renumbered(text, new, is_which) for text in record.rejected)
    return replace(
        record,
        images=tuple(record.images[old] for old in order),
        prompt=_renumbered(record.prompt, new),
        context=tuple((role, _renumbered(text, new)) for role, text in record.context),
        targets=tuple(sorted(order.index(target) for target in record.targets)),
        extra=record.extra | extra,
        **answers,
    )


def _renumbered(text: str, new: Mapping[int, int], answers_which: bool = False) -> str:
    """All numbers of images at once, labels apart; of an answer to "which image" also a number that stands alone."""

    def digits(found: str) -> str:
        return re.sub(r"\d+", lambda match: str(new.get(int(match[0]), match[0])), found)

    if answers_which and BARE.fullmatch(text):
        return digits(text)
    return MENTION.sub(lambda match: digits(match[0]) if match["named"] else match[0], text)


def orders(num_images: int, key: str) -> Iterator[Order]:
    """Every order once, at random by `key`."""
    rng, found = random.Random(key), set()
    while len(found) < factorial(num_images):
        order = tuple(rng.sample(range(num_images), num_images))
        if order not in found:
            found.add(order)
            yield order


def of_epoch(record: Record, epoch: int, seed: int) -> Record:
    """In an order that follows from seed, id and epoch alone, the same again once every order was there.

    As it is if it is `why_fixed`.
    """
    if why_fixed(record):
        return record
    count = len(record.images)
    return permuted(record, next(islice(orders(count, f"{seed} {record.id}"), epoch % factorial(count), None)))


def in_other_orders(questions: Sequence[Question], number: int) -> list[Question]:
    """Those of the questions that can, each in up to `number` - 1 other orders, which follow from its id; new ids.

    Raises ValueError where there is none.
    """
    made, moved = [], [question for question in questions if number > 1 and not why_fixed(question)]
    if number > 1 and not moved:
        raise ValueError(f"--permutations {number}: no question is a sequence that tells its images by number alone")
    for question in moved:
        found = orders(len(question.images), question.id)
        for place, order in enumerate(islice((o for o in found if list(o) != sorted(o)), number - 1), 1):
            own, said = permuted(question, order), {"of": question.id, "order": [old + 1 for old in order]}
            made.append(replace(own, id=f"{question.id}#{place}", extra=own.extra | {"permutation": said}))
    if made:
        logger.info("%d of %d questions in other orders too: %d more prompts", len(moved), len(questions), len(made))
    return made


def permutation_of(extra: Mapping[str, Any], num_images: int) -> tuple[str, Order] | None:
    """(id of the question that was asked in another order, the order) of an answer's fields. Raises ValueError."""
    found = extra.get("permutation")
    if found is None:
        return None
    order = found.get("order") if isinstance(found, dict) else None
    places = sorted(map(repr, range(1, num_images + 1)))
    if not places or not isinstance(order, list) or sorted(map(repr, order)) != places:
        raise ValueError("`permutation` is of a sequence: a question's id `of`, and the `order` of its image numbers")
    return str(found.get("of")), tuple(place - 1 for place in order)
