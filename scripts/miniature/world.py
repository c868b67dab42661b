"""The miniature world: scenes of five attributes, and which of them are held out.

A scene is a combination of attribute values and a seed that only moves pixels. Combinations, not pictures,
are split into train, validation and test, so that a test scene's combination is never drawn in training.
"""

import itertools
from dataclasses import dataclass

import numpy as np

ATTRIBUTES = {
    "colour": ("red", "green", "blue", "yellow", "purple", "orange"),
    "shape": ("circle", "square", "triangle", "cross", "ring"),
    "background": ("white", "grey", "black", "pink", "brown"),
    "count": ("one", "two", "three", "four"),
    "pattern": ("plain", "stripes", "dots", "checks"),
}
SHARES = {"train": 0.8, "validation": 0.1, "test": 0.1}
SPLIT_SEED = 0  # fixed: every data set and every base shares the same held-out combinations


@dataclass(frozen=True)
class Scene:
    """One value of each attribute, and the seed of everything that carries no meaning."""

    colour: str
    shape: str
    background: str
    count: str
    pattern: str
    seed: int

    @property
    def count_number(self) -> int:
        """The number of shapes."""
        return ATTRIBUTES["count"].index(self.count) + 1


def combinations(split: str) -> list[tuple[str, ...]]:
    """The attribute combinations of `train`, `validation` or `test`, in a fixed random order."""
    return _SPLITS[split]


def _split_combinations() -> dict[str, list[tuple[str, ...]]]:
    every = list(itertools.product(*ATTRIBUTES.values()))
    order = np.random.default_rng(SPLIT_SEED).permutation(len(every))
    bounds = np.cumsum([round(share * len(every)) for share in SHARES.values()])
    parts = np.split(order, bounds[:-1])
    return {split: [every[i] for i in part] for split, part in zip(SHARES, parts, strict=True)}


_SPLITS = _split_combinations()
