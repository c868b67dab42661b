"""Train and validation pairs that share no source picture."""

from collections.abc import Sequence

import numpy as np
from scipy.cluster.hierarchy import DisjointSet

OVERLAPS = ("error", "drop")


def groups(pictures: Sequence[frozenset[str]]) -> list[list[int]]:
    """Numbers of the pairs that are connected by shared pictures, directly or through others."""
    connected, first = DisjointSet(range(len(pictures))), {}
    for number, own in enumerate(pictures):
        for picture in own:
            connected.merge(number, first.setdefault(picture, number))
    return [sorted(group) for group in connected.subsets()]


def split(
    pictures: Sequence[frozenset[str]], share: float, seed: int, overlap: str
) -> tuple[list[int], list[int], list[int]]:
    """(train, validation, dropped) numbers in random order; no picture is in both of the first two.

    Whole groups go to validation, at least half and at most twice as many pairs as `share` says. Where they are too
    large for that, `overlap` says what happens: `error`, or `drop` the training pairs that share a picture with a
    random choice of validation pairs.
    """
    rng = np.random.default_rng(seed)
    order = [int(number) for number in rng.permutation(len(pictures))]
    wanted = round(share * len(pictures))
    if share and not 0 < wanted < len(pictures):
        raise ValueError(
            f"--validation {share} of {len(pictures)} pairs is {wanted} pairs: none, or nothing to train on"
        )
    found = groups(pictures)
    validation: set[int] = set()
    for place in rng.permutation(len(found)):
        if len(validation) + len(found[place]) <= wanted:
            validation |= set(found[place])
    smallest = min(found, key=len)
    if not validation and len(smallest) <= 2 * wanted:
        validation = set(smallest)
    dropped: set[int] = set()
    if len(validation) < wanted / 2:
        if overlap == "error":
            raise ValueError(_too_connected(len(pictures), wanted, len(validation), max(map(len, found))))
        validation = set(order[:wanted])
        held_out = set().union(*(pictures[number] for number in validation))
        dropped = {number for number in order[wanted:] if pictures[number] & held_out}
    train = [number for number in order if number not in validation and number not in dropped]
    if not train:
        raise ValueError("every pair shares a picture with the validation pairs: take a smaller --validation")
    return train, [number for number in order if number in validation], sorted(dropped)


def _too_connected(total: int, wanted: int, found: int, largest: int) -> str:
    return (
        f"--validation wants {wanted} of {total} pairs, but {largest} of them are connected by shared source pictures: "
        f"only {found} can be held out without a picture in both parts. Make validation pairs of sources of their own, "
        "give the sources smaller subsets (companions are of one subset), or drop what overlaps with --overlap drop"
    )
