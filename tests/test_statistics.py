"""Intervals and paired tests against values worked out by hand."""

from fractions import Fraction
from math import comb

import numpy as np
import pytest

from llava.statistics import bootstrap_interval, mcnemar, paired_difference, score_interval


@pytest.mark.parametrize(
    ("only_first", "only_second", "p"),
    [
        (0, 0, 1.0),
        (1, 0, 1.0),  # 2 · 1/2
        (0, 5, 2 / 32),
        (1, 7, 2 * (1 + 8) / 256),
        (3, 3, 1.0),
        (10, 2, 2 * (1 + 12 + 66) / 4096),
        (5, 15, 2 * 21700 / 2**20),
    ],
)
def test_mcnemar_by_hand(only_first, only_second, p):
    assert mcnemar(only_first, only_second) == mcnemar(only_second, only_first) == pytest.approx(p, rel=1e-12)


def test_mcnemar_of_many_disagreements():
    """Whole numbers of any size: no overflow, no rounding to 0."""
    exact = Fraction(2 * sum(comb(3000, k) for k in range(1401)), 2**3000)
    assert mcnemar(1400, 1600) == pytest.approx(float(exact), rel=1e-12)
    assert 0 < mcnemar(0, 1000) < 1e-300


def test_bootstrap_of_a_proportion_is_the_binomial():
    """Resampled means of 30 right of 100 are Binomial(100, 0.3) / 100, whose 95 % quantiles are 0.21 and 0.39."""
    low, high = bootstrap_interval([1.0] * 30 + [0.0] * 70)
    assert (low, high) == (pytest.approx(0.21, abs=0.0101), pytest.approx(0.39, abs=0.0101))


def test_bootstrap_of_graded_scores_is_about_normal():
    values = np.random.default_rng(1).random(400)
    low, high = bootstrap_interval(values)
    margin = 1.96 * values.std() / 20
    assert (low, high) == (
        pytest.approx(values.mean() - margin, abs=3e-3),
        pytest.approx(values.mean() + margin, abs=3e-3),
    )


def test_bootstrap_is_seeded_and_blind_to_order():
    values = list(np.random.default_rng(2).random(50))
    assert bootstrap_interval(values) == bootstrap_interval(values[::-1])
    assert bootstrap_interval(values, seed=1) != bootstrap_interval(values, seed=2)


def test_coverage():
    """Of 300 samples of 80 coins of probability 0.6, about 95 % have it in their interval (3 sd: 91 to 99)."""
    rng = np.random.default_rng(3)
    intervals = [score_interval((rng.random(80) < 0.6).astype(float), samples=1000) for _ in range(300)]
    assert 0.91 <= np.mean([low <= 0.6 <= high for low, high in intervals]) <= 0.99


def test_all_right_or_all_wrong_is_not_certain():
    """Clopper-Pearson: 3 of 3 right leaves 0.025^(1/3) possible."""
    assert score_interval([1.0] * 3) == (pytest.approx(0.2924, abs=1e-4), 1.0)
    assert score_interval([0.0] * 3) == (0.0, pytest.approx(0.7076, abs=1e-4))


def test_paired_difference():
    first, second = [1.0, 0.0, 0.0, 1.0] * 25, [1.0, 1.0, 0.0, 1.0] * 25
    difference, low, high = paired_difference(first, second)
    assert difference == 0.25 and 0.15 <= low < 0.25 < high <= 0.35
    assert paired_difference(first, first) == (0.0, 0.0, 0.0)


def test_pairing_narrows_the_interval():
    """What both find hard cancels out: unpaired the interval of 80 right of 160 alone is 0.15 wide."""
    first = [1.0, 0.0] * 80
    second = [1.0, 0.0] * 78 + [1.0, 1.0] * 2
    _, low, high = paired_difference(first, second)
    assert high - low < 0.05


def test_refusals():
    with pytest.raises(ValueError, match="at least one value"):
        bootstrap_interval([])
    with pytest.raises(ValueError, match="same questions"):
        paired_difference([1.0], [1.0, 0.0])
