"""What a prompt asks beside one named picture: two that are compared, or which picture it is.

Source: S2H-DPO (arXiv 2604.18512), whose three levels these are. Here the truth is known of every picture that matters:
companions are records that answer the same question, and answer it otherwise.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, combinations
from typing import Any

import numpy as np

from data_gen.correctness import is_right
from data_gen.gen_instruction.companions import Pool, any_companions, shuffled
from data_gen.gen_instruction.rewriting import Turn, ask, numbered
from data_gen.sources import Source, Sources

NAMED, COMPARE, SEARCH = LEVELS = ("named", "compare", "search")
MIX = "mix"
SHORT = 4  # words at most of an answer that goes into one phrase with another
HOW = re.compile(r"\s*\nAnswer (?:the question|with)\b[^\n]*$")  # LLaVA's mixture says how to answer, in words


@dataclass(frozen=True)
class Asked:
    """A question of level 2 or 3."""

    turn: Turn
    others: list[str]  # wrong answers, each true of other pictures or of the same in another order
    is_search: bool = False

    @property
    def fields(self) -> dict[str, Any]:
        """What records say of it."""
        return ({"is_search": True} if self.is_search else {}) | ({"others": self.others} if self.others else {})


def question_of(source: Source, rng: np.random.Generator) -> Turn:
    """A question of a record that leans on no other: of a conversation the first, else one at random."""
    return source.turns[0 if source.is_conversation else rng.integers(len(source.turns))]


def pools(
    sources: Sources, index: int, turn: Turn | None, level: str, count: int, uncut: np.ndarray | None,
    rng: np.random.Generator,
) -> list[Pool]:  # fmt: skip
    """Companions: all that are searched, the second of those compared, answer the question of `turn` otherwise.

    The others of a comparison answer it too if they can; without a `turn`, of a named picture, any will do. Records
    that are `uncut` (None: none) must not be asked about.
    """
    if turn is None:
        return [any_companions(sources, index, count, rng)]
    question, few = turn[0], f" whose records answer {turn[0]!r} otherwise"
    alike = chain.from_iterable(shuffled(group, rng) for group in sources.alike(index, question))
    asking = alike if uncut is None else (other for other in alike if not uncut[other])
    differing = (other for other in asking if differ(sources[other].answer_to(question), turn[1]))
    if level == SEARCH:
        return [Pool(count, differing, few)]
    own = shuffled(next(sources.alike(index, question)), rng)  # not empty: the record itself is of it
    return [Pool(2, differing, few), Pool(count, chain(own, any_companions(sources, index, count, rng).records))]


def level_of(chosen: str, number: int) -> str:
    """The level of the prompt of that number, of a mix in turn."""
    return LEVELS[number % len(LEVELS)] if chosen == MIX else chosen


def first_of(level: str, target: int, num_pictures: int, rng: np.random.Generator) -> list[int]:
    """Positions of the pictures that are asked about, from 0, the target first; its partner is any other."""
    rest = [position for position in range(num_pictures) if position != target]
    return [target, rest[rng.integers(len(rest))]] if level == COMPARE else [target]


def differ(one: str, other: str) -> bool:
    """Whether two answers cannot mean the same, nor one a part of the other."""
    return is_right(one, other) is False and is_right(other, one) is False


def asked(level: str, first: Sequence[int], sources: Sequence[Source], turn: Turn) -> Asked:
    """What a prompt of level 2 or 3 about the pictures `first` of those from `sources` asks."""
    if level == SEARCH:
        return searched(first[0], len(sources), turn)
    return compared(sorted(first), sources, turn[0])


def compared(places: Sequence[int], sources: Sequence[Source], question: str) -> Asked:
    """A question about two pictures, `places` from 0, of a prompt's; the answer says both in the order of their names.

    "red and blue" of short answers, else "Image1: A dog runs. Image3: A cat sleeps."
    """
    known = {place: true for place, source in enumerate(sources) if (true := source.answer_to(question)) is not None}
    is_short = all(_is_short(known[place]) for place in places)

    def said(pair: Sequence[int]) -> str:
        if is_short:
            return " and ".join(known[place].rstrip(".") for place in pair)
        ended = (true if true.endswith((".", "!", "?")) else f"{true}." for true in (known[place] for place in pair))
        return " ".join(f"Image{place + 1}: {text}" for place, text in zip(places, ended, strict=True))

    usable = [place for place, true in known.items() if _is_short(true) or not is_short]
    pairs = [pair for pair in combinations(usable, 2) if differ(*(known[place] for place in pair))]
    answer, wrong = said(places), dict.fromkeys(map(said, [places[::-1], *pairs]))
    where = f"{numbered(places[0])} and Image{places[1] + 1}"
    return Asked((ask(where, question), answer), [text for text in wrong if not is_right(text, answer, in_order=True)])


def _is_short(answer: str) -> bool:
    """Whether two such answers, joined by "and", can be told apart."""
    return len(answer.split()) <= SHORT and not re.search(r"\band\b|[,;\n]", answer)


def searched(place: int, num_pictures: int, turn: Turn) -> Asked:
    """A question whose answer is the number of the picture, `place` from 0, of which the answer of `turn` is true."""
    question = f'"{HOW.sub("", turn[0])}" For which image is the answer "{turn[1].rstrip(".")}"?'
    numbers = [str(number + 1) for number in range(num_pictures)]
    return Asked((question, numbers.pop(place)), numbers, is_search=True)
