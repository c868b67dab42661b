"""How sure a comparison of training runs is: intervals over seeds, and resampling of seeds and questions together.

Letters: S seeds, Q questions, C draws.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from llava.statistics import LEVEL, SAMPLES

DRAWS_AT_ONCE = 500  # counts of every question held in memory at a time


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval; no interval (None) of fewer than two values."""

    mean: float
    low: float | None
    high: float | None
    values: tuple[float, ...] = ()  # of each seed


def seed_interval(values: Sequence[float], least: float = 0.0, most: float = 1.0) -> Interval:
    """Mean over seeds with Student's t interval: what another set of seeds would give, the data being the same.

    The interval ends where the quantity does, at `least` and `most`: of few seeds it is wide.
    """
    if not len(values):
        raise ValueError("an interval needs at least one value")
    own, mean = tuple(map(float, values)), float(np.mean(values))
    if len(own) < 2:
        return Interval(mean, None, None, own)
    half = float(stats.t.ppf((1 + LEVEL) / 2, len(own) - 1) * stats.sem(own))
    return Interval(mean, max(least, mean - half), min(most, mean + half), own)


def mean_of_groups(scores: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """(S,) mean over groups of the mean in each group: every format counts the same. `scores` (S, Q), `groups` (Q,)."""
    return np.stack([scores[:, groups == group].mean(axis=1) for group in np.unique(groups)]).mean(axis=0)


def resampled(
    matrices: Sequence[np.ndarray], groups: np.ndarray, samples: int = SAMPLES, seed: int = 0
) -> list[np.ndarray]:
    """For each (S, Q) matrix (C,) means of groups when seeds, and questions within each group, are drawn again.

    All matrices share each draw: they are paired by seed and by question. A percentile interval of five seeds is
    somewhat narrow; `seed_interval` of the differences stands beside it.
    """
    assert len({matrix.shape for matrix in matrices}) == 1, "paired matrices have the same seeds and questions"
    rng = np.random.default_rng(seed)
    num_seeds, parts = len(matrices[0]), [np.flatnonzero(groups == group) for group in np.unique(groups)]
    drawn: list[list[np.ndarray]] = [[] for _ in matrices]
    for start in range(0, samples, DRAWS_AT_ONCE):
        size = min(DRAWS_AT_ONCE, samples - start)
        seeds = rng.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), size) / num_seeds  # (C, S)
        weights = np.zeros((size, len(groups)))  # (C, Q)
        for part in parts:
            weights[:, part] = rng.multinomial(len(part), np.full(len(part), 1 / len(part)), size) / len(part)
        for own, matrix in zip(drawn, matrices, strict=True):
            own.append(((weights @ matrix.T) * seeds).sum(axis=1) / len(parts))
    return [np.concatenate(own) for own in drawn]


@dataclass(frozen=True)
class Comparison:
    """Second - first, paired by seed and by question."""

    over_seeds: Interval  # t interval of the differences of each seed
    low: float  # percentiles of the resampled difference
    high: float
    p: float  # two-sided, of the resampled difference
    relative: Interval | None  # second / first - 1, resampled; None of a first that is 0


def compare(first: np.ndarray, second: np.ndarray, groups: np.ndarray, samples: int = SAMPLES) -> Comparison:
    """Two models (or sets of models) on the same questions: (S, Q) scores each, groups (Q,) of equal weight."""
    means = mean_of_groups(first, groups), mean_of_groups(second, groups)
    before, after = resampled([first, second], groups, samples)
    ends = [(1 - LEVEL) / 2, (1 + LEVEL) / 2]
    low, high = map(float, np.quantile(after - before, ends))
    relative = None
    if means[0].mean() > 0:
        ratio = np.quantile(after / np.maximum(before, 1e-9) - 1, ends)
        relative = Interval(float(means[1].mean() / means[0].mean() - 1), *map(float, ratio))
    return Comparison(seed_interval(means[1] - means[0], -1), low, high, two_sided_p(after - before), relative)


def two_sided_p(draws: np.ndarray) -> float:
    """Twice the smaller share of draws on one side of 0, at most 1; never 0, because draws are finite."""
    smaller = min(np.count_nonzero(draws <= 0), np.count_nonzero(draws >= 0))
    return min(1.0, 2 * (1 + smaller) / (len(draws) + 1))
