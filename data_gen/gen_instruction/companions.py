"""The pictures beside the one that is asked about: of the same subset, and all different."""

from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from data_gen.drops import Drop, Unusable
from data_gen.pictures import Picture, fingerprint
from data_gen.sources import Source, Sources

MAX_PASSED = 100  # companions tried in vain for one prompt before it is dropped: bounds the work in a broken folder


@dataclass(frozen=True)
class Member:
    """A picture of a prompt and the record that it comes from."""

    index: int  # of the record in the sources
    source: Source
    picture: Picture
    fingerprint: bytes


@dataclass(frozen=True)
class Pool:
    """Where companions come from until a prompt has `count` pictures."""

    count: int
    records: Iterable[int]
    few: str = ""  # what else is asked of them, where there may be too few without anything being wrong


def any_companions(sources: Sources, index: int, count: int, rng: np.random.Generator) -> Pool:
    """Those of a record's group, in random order; where it has too few, those of the next one in the subset follow."""
    return Pool(count, chain.from_iterable(shuffled(group, rng) for group in sources.companions(index)))


def members(
    sources: Sources, index: int, pools: Sequence[Pool], passed: list[Drop], prompt: str,
    forbidden: Container[bytes] = frozenset(),
) -> Iterator[Member]:  # fmt: skip
    """The record itself, then companions from one pool after the other; no two of the same content.

    One picture at a time, so that a caller that shrinks each holds one large picture only. Companions that cannot be
    read are passed over and appended to `passed`. No fingerprint of a picture is in `forbidden`.
    Raises Unusable if the record's own picture cannot be used, or if its subset has too few different pictures.
    """
    first = _member(sources, index)
    if first.fingerprint in forbidden:
        raise Unusable("excluded picture", f"{first.source.path} is among the pictures that must not be used", False)
    seen, num_vain = {first.fingerprint}, 0
    yield first
    for pool in pools:
        for candidate in pool.records:
            if len(seen) == pool.count or num_vain == MAX_PASSED:
                break
            if sources.same_path(index, candidate):
                continue
            num_vain += 1
            try:
                member = _member(sources, candidate)
            except Unusable as error:
                passed.append(Drop.of(error, sources[candidate], prompt))
                continue
            if member.fingerprint not in seen and member.fingerprint not in forbidden:
                seen.add(member.fingerprint)
                num_vain -= 1
                yield member
        if len(seen) < pool.count:
            found = f"{pool.count} different pictures are needed, subset {first.source.subset} gave {len(seen)}"
            reason = "no other answer" if pool.few else "too few pictures"
            raise Unusable(reason, found + pool.few, is_bad=not pool.few)


def shuffled(pool: np.ndarray, rng: np.random.Generator) -> Iterator[int]:
    """The pool's elements in random order, each once, at a cost per element that does not grow with the pool."""
    moved: dict[int, int] = {}  # a Fisher-Yates shuffle that remembers only the places it has touched
    for place in range(len(pool)):
        chosen = int(rng.integers(place, len(pool)))
        yield int(pool[moved.get(chosen, chosen)])
        moved[chosen] = moved.pop(place, place)


def _member(sources: Sources, index: int) -> Member:
    source = sources[index]
    picture = sources.picture(index, source)
    return Member(index, source, picture, fingerprint(picture.pixels))
