"""Which record is asked about in which format: every record once before any is asked about again."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from data_gen.drops import Unusable
from data_gen.gen_instruction.formats import FORMATS
from data_gen.sources import Source, Sources

SHARES = {"sequence": 62_461, "collage": 48_974, "pip": 48_975}  # published prompts of each format
SEQUENCE_SHARES = {2: 34_300, 3: 10_050, 4: 9_950, 5: 8_161}  # published sequences of each number of pictures
# Published collages of each size. One record asks: counted before those with bounding boxes were dropped.
COLLAGE_SHARES = {2: 26_000, 3: 7_500, 4: 7_500, 6: 6_300, 9: 6_519}
COLLAGE_SHARES_MIXED = {2: 48_000, 3: 14_000, 4: 14_000, 6: 7_000, 9: 7_000}
ASKING_MIXED = {2: 1, 3: 2, 4: 2, 6: 3, 9: 3}  # records that ask in a collage of each size
BOX_FILTERS = ("coco", "all", "none")
SCHEDULE, PROMPTS = 1, 2  # what is drawn from a seed: each has a random stream of its own


@dataclass(frozen=True)
class Task:
    """One prompt to be made."""

    index: int  # of the prompt
    image_type: str
    source: int  # index of the record that is asked about

    @property
    def id(self) -> str:
        """The prompt's name, unique in its file."""
        return f"{self.image_type}_{self.index:07d}"


class Schedule:
    """The tasks of a run, in order: `formats` and `sources` of every prompt, and the records left out by a rule."""

    def __init__(self, formats: np.ndarray, sources: np.ndarray, left_out: np.ndarray):
        self.formats, self.sources, self.left_out = formats, sources, left_out

    def __len__(self) -> int:
        return len(self.formats)

    def tasks(self, start: int) -> Iterator[Task]:
        """The tasks from number `start` on."""
        for index in range(start, len(self)):
            yield Task(index, FORMATS[self.formats[index]], int(self.sources[index]))


def plan(shares: dict[str, float], uncut: np.ndarray, num_sources: int, num_records: int | None, seed: int) -> Schedule:
    """A random order of the records, with a format drawn for each by `shares`.

    `uncut` marks records that may only be asked about in a sequence: where chance makes one a collage or a picture in
    a picture, it changes places with a sequence, so that shares stay exact; without sequences it is left out.
    """
    rng = np.random.default_rng([seed, SCHEDULE])
    may_ask = np.flatnonzero(~uncut) if not shares["sequence"] else np.arange(num_sources)
    left_out = np.flatnonzero(uncut) if not shares["sequence"] else np.empty(0, dtype=np.int64)
    total = len(may_ask) if num_records is None else num_records
    if not len(may_ask):
        raise ValueError("no record may be asked about: --bbox_filter and --exclude_subsets leave out all of them")
    rounds = [rng.permutation(may_ask) for _ in range(-(-total // len(may_ask)))]
    sources = np.concatenate(rounds)[:total].astype(np.int32)
    weights = np.array([shares[name] for name in FORMATS], dtype=float)
    formats = rng.choice(len(FORMATS), size=total, p=weights / weights.sum()).astype(np.uint8)
    misplaced = np.flatnonzero(uncut[sources] & (formats != 0))
    room = np.flatnonzero(~uncut[sources] & (formats == 0))
    swapped = min(len(misplaced), len(room))
    formats[room[:swapped]], formats[misplaced[:swapped]] = formats[misplaced[:swapped]], 0
    kept = np.ones(total, dtype=bool)
    kept[misplaced[swapped:]] = False
    left_out = np.unique(np.concatenate([left_out, sources[~kept]]))
    return Schedule(formats[kept], sources[kept], left_out)


def only_in_sequences(sources: Sources, bbox_filter: str, excluded_subsets: list[str]) -> np.ndarray:
    """Which records collages and pictures in pictures leave out, as an array of bool.

    Raises ValueError if a subset does not exist.
    """
    if unknown := set(excluded_subsets) - set(sources.subsets):
        raise ValueError(
            f"--exclude_subsets {' '.join(sorted(unknown))}: no such subset; there are {', '.join(sources.subsets)}"
        )
    with_box = {"none": False, "all": sources.has_box, "coco": sources.has_box & sources.in_subset("coco")}
    found = np.zeros(len(sources), dtype=bool) | with_box[bbox_filter]
    for subset in excluded_subsets:
        found |= sources.in_subset(subset)
    return found


def why_left_out(source: Source, excluded_subsets: list[str]) -> Unusable:
    """The rule that leaves a record out."""
    if source.subset in excluded_subsets:
        return Unusable("excluded subset", f"--exclude_subsets has {source.subset}", is_bad=False)
    return Unusable("bounding box", "its numbers are of the original picture (--bbox_filter)", is_bad=False)
