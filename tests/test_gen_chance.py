"""What chance decides about prompts: shares, positions, companions, which record is asked about in which format."""

from collections import Counter

import numpy as np
import pytest

from data_gen.gen_instruction.companions import shuffled
from data_gen.gen_instruction.compose import Recipe, draw
from data_gen.gen_instruction.schedule import COLLAGE_SHARES, SEQUENCE_SHARES, SHARES, Task, plan


def drafts(image_type, count, seed=0):
    recipe = Recipe(None, None, seed, SEQUENCE_SHARES, COLLAGE_SHARES, {}, 0.0, None, "jpg", False)
    return [draw(recipe, Task(index, image_type, 0)) for index in range(count)]


def chi_square(counts, shares):
    expected = np.array(shares) / sum(shares) * sum(counts)
    return float((((np.array(counts) - expected) ** 2) / expected).sum())


# 99.99 % points of chi-square with 1..8 degrees of freedom.
LIMIT = [15.1, 18.4, 21.1, 23.5, 25.7, 27.9, 29.9, 31.8]


@pytest.mark.parametrize(("image_type", "shares"), [("sequence", SEQUENCE_SHARES), ("collage", COLLAGE_SHARES)])
def test_numbers_of_pictures_and_positions_follow_their_shares(image_type, shares):
    found = Counter((draft.num_images, draft.first[0]) for draft in drafts(image_type, 6000))
    per_size = [sum(found[n, k] for k in range(n)) for n in shares]
    assert chi_square(per_size, list(shares.values())) < LIMIT[len(shares) - 2]
    for n in shares:
        assert chi_square([found[n, k] for k in range(n)], [1] * n) < LIMIT[n - 2]


def test_companions_are_drawn_evenly_and_without_repeats():
    pool = np.arange(100, 112)
    first = Counter()
    for seed in range(3000):
        rng = np.random.default_rng(seed)
        order = list(shuffled(pool, rng))
        assert sorted(order) == list(pool)
        first[order[2]] += 1
    assert chi_square([first[number] for number in pool], [1] * 12) < 37.4  # 99.99 % of 11 degrees of freedom


def test_drawing_companions_touches_only_what_is_drawn():
    class Pool:
        reads = 0

        def __len__(self):
            return 10**9

        def __getitem__(self, place):
            self.reads += 1
            return place

    pool = Pool()
    draw_one = shuffled(pool, np.random.default_rng(0))
    assert len({next(draw_one) for _ in range(5)}) == 5 and pool.reads == 5


def test_a_mix_keeps_its_shares_and_asks_every_record_once():
    uncut = np.random.default_rng(0).random(9000) < 0.2
    schedule = plan(SHARES, uncut, 9000, None, seed=3)
    assert sorted(schedule.sources) == list(range(9000)) and not len(schedule.left_out)
    assert not uncut[schedule.sources[schedule.formats > 0]].any()
    assert chi_square(np.bincount(schedule.formats), list(SHARES.values())) < LIMIT[1]


def test_only_sequences_may_ask_about_uncut_records():
    uncut = np.array([True, False] * 10)
    schedule = plan({"sequence": 0, "collage": 1, "pip": 0}, uncut, 20, 30, seed=0)
    assert len(schedule) == 30 and not uncut[schedule.sources].any()
    assert list(schedule.left_out) == list(range(0, 20, 2))
    few = plan({"sequence": 1, "collage": 9, "pip": 0}, uncut, 20, None, seed=0)
    assert len(few) + len(few.left_out) == 20 and not uncut[few.sources[few.formats > 0]].any()
