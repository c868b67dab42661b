"""How sure a score is: bootstrap intervals and paired tests, seeded; over questions, or over training runs too.

Letters: S seeds of training, Q questions, C draws.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.stats import binomtest, rankdata, sem
from scipy.stats import t as student

SAMPLES = 10_000
LEVEL = 0.95
DRAWS_AT_ONCE = 4_000_000  # counts held in memory at a time
PLACES_AT_ONCE = 500  # draws of seeds and questions held in memory at a time


def bootstrap_interval(values: Sequence[float], samples: int = SAMPLES, seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of the mean: (low, high), the same for the same values in any order.

    Resampled values only enter the mean by how often each occurs, so their counts are drawn, not their places.
    Source: Efron and Tibshirani 1993, chapter 13.
    """
    if not len(values):
        raise ValueError("an interval needs at least one value")
    distinct, counts = np.unique(np.asarray(values, dtype=float), return_counts=True)
    rng = np.random.default_rng(seed)
    part = max(1, DRAWS_AT_ONCE // len(distinct))
    means = [
        rng.multinomial(len(values), counts / len(values), size=min(part, samples - start)) @ distinct / len(values)
        for start in range(0, samples, part)
    ]
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail])
    return float(low), float(high)


def score_interval(scores: Sequence[float], samples: int = SAMPLES) -> tuple[float, float]:
    """95 % interval of a mean of scores in [0, 1].

    Where all scores are 0, or all are 1, a bootstrap has no width, however few they are; the exact binomial bound
    stands there instead (Clopper and Pearson 1934).
    """
    if len(scores) and min(scores) == max(scores) and scores[0] in (0, 1):
        bound = binomtest(len(scores) * int(scores[0]), len(scores)).proportion_ci(LEVEL, method="exact")
        return float(bound.low), float(bound.high)
    return bootstrap_interval(scores, samples)


def mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided exact p of McNemar's test: how likely a split of the disagreements at least this uneven is by chance.

    `only_first`, `only_second`: questions that only the one or only the other has right. 1.0 where there are none.
    Source: McNemar 1947; the exact form is the sign test.
    """
    total = only_first + only_second
    return float(binomtest(only_first, total).pvalue) if total else 1.0


def paired_difference(first: Sequence[float], second: Sequence[float]) -> tuple[float, float, float]:
    """Mean of second - first over the same questions, and its 95 % interval: (difference, low, high).

    Questions are resampled, so that one that is hard for both does not widen the interval.
    """
    if len(first) != len(second):
        raise ValueError(f"a paired difference needs the same questions, got {len(first)} and {len(second)} scores")
    differences = np.asarray(second, dtype=float) - np.asarray(first, dtype=float)
    return float(differences.mean()), *bootstrap_interval(differences)


def auc(scores: Sequence[float], is_positive: Sequence[bool]) -> float:
    """Chance that a positive has a higher score than a negative, ties half: the area under the ROC curve, exact.

    By the sum of the positives' ranks, tied scores at their mean rank. Source: Hanley and McNeil 1982; U of Mann and
    Whitney 1947 over the number of pairs.
    """
    scores, positive = np.asarray(scores, dtype=float), np.asarray(is_positive, dtype=bool)
    num_positive, num_negative = int(positive.sum()), int((~positive).sum())
    if not num_positive or not num_negative:
        raise ValueError(f"an AUC needs both classes, got {num_positive} positives and {num_negative} negatives")
    wins = rankdata(scores)[positive].sum() - num_positive * (num_positive + 1) / 2
    return float(wins / (num_positive * num_negative))


# ---- several seeds


def seed_interval(values: Sequence[float], least: float = 0.0, most: float = 1.0) -> dict[str, Any]:
    """Mean over seeds with Student's t interval: what another set of seeds would give, the data being the same.

    `mean`, `low` and `high` (None of one value), `values` of each seed. The interval ends where the quantity does, at
    `least` and `most`: of few seeds it is wide.
    """
    if not len(values):
        raise ValueError("an interval needs at least one value")
    own, mean = tuple(map(float, values)), float(np.mean(values))
    if len(own) < 2:
        return {"mean": mean, "low": None, "high": None, "values": own}
    half = float(student.ppf((1 + LEVEL) / 2, len(own) - 1) * sem(own))
    return {"mean": mean, "low": max(least, mean - half), "high": min(most, mean + half), "values": own}


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
    for start in range(0, samples, PLACES_AT_ONCE):
        size = min(PLACES_AT_ONCE, samples - start)
        seeds = rng.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), size) / num_seeds  # (C, S)
        weights = np.zeros((size, len(groups)))  # (C, Q)
        for part in parts:
            weights[:, part] = rng.multinomial(len(part), np.full(len(part), 1 / len(part)), size) / len(part)
        for own, matrix in zip(drawn, matrices, strict=True):
            own.append(((weights @ matrix.T) * seeds).sum(axis=1) / len(parts))
    return [np.concatenate(own) for own in drawn]


def compare_sets(first: np.ndarray, second: np.ndarray, groups: np.ndarray, samples: int = SAMPLES) -> dict[str, Any]:
    """Second - first of two models (or sets of models) on the same questions, paired by seed and by question.

    (S, Q) scores each, groups (Q,) of equal weight. `over_seeds`: t interval of the differences of each seed; `low`,
    `high`, `p` (two-sided): of the resampled difference; `relative`: second / first - 1, resampled, None of a first
    that is 0.
    """
    means = mean_of_groups(first, groups), mean_of_groups(second, groups)
    before, after = resampled([first, second], groups, samples)
    ends = [(1 - LEVEL) / 2, (1 + LEVEL) / 2]
    low, high = map(float, np.quantile(after - before, ends))
    found = {"over_seeds": seed_interval(means[1] - means[0], -1), "low": low, "high": high,
             "p": two_sided_p(after - before), "relative": None}  # fmt: skip
    if means[0].mean() > 0:
        low, high = map(float, np.quantile(after / np.maximum(before, 1e-9) - 1, ends))
        mean = float(means[1].mean() / means[0].mean() - 1)
        found["relative"] = {"mean": mean, "low": low, "high": high, "values": ()}
    return found


def two_sided_p(draws: np.ndarray) -> float:
    """Twice the smaller share of draws on one side of 0, at most 1; never 0, because draws are finite."""
    smaller = min(np.count_nonzero(draws <= 0), np.count_nonzero(draws >= 0))
    return min(1.0, 2 * (1 + smaller) / (len(draws) + 1))
