"""How sure a score is: bootstrap intervals and paired tests, seeded."""

from collections.abc import Sequence

import numpy as np
from scipy.stats import binomtest, rankdata

SAMPLES = 10_000
LEVEL = 0.95
DRAWS_AT_ONCE = 4_000_000  # counts held in memory at a time


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
