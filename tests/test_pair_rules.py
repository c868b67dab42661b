"""Which answers are rejected: the rule's numbers, every reason, right answers in other words, noise, other images."""

import math
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from data_gen.correctness import edit_distance, is_right, length_ratio
from data_gen.gen_chosen_rejected.noise import Noise
from data_gen.gen_chosen_rejected.others import Truth, bare_question, other_image, repointed, truths
from data_gen.gen_chosen_rejected.output import select
from data_gen.gen_chosen_rejected.rules import CHECKS, THRESHOLDS, Candidate, Rules, judge, read_thresholds, unfit
from llava.records import Question

RULES = Rules(THRESHOLDS)


# ---- the rule


def question(image_type="sequence", number=2, answer="red car", targets=(0,), **extra):
    """A question about some of `number` pictures."""
    grid = {"collage": {2: (1, 2), 3: (1, 3), 4: (2, 2), 6: (2, 3), 9: (3, 3)}.get(number)}.get(image_type)
    images = tuple(f"{n}.png" for n in range(number if image_type == "sequence" else 1))
    head = "".join(f"Image{n + 1}:<image>\n" for n in range(number)) if image_type == "sequence" else "<image>\n"
    where = "the centre picture" if image_type == "pip" else " and ".join(f"Image{n + 1}" for n in targets)
    prompt = f"{head}In {where}, what is it?"
    return Question("x.json record 1", "q", images, prompt, image_type, targets, None, grid, extra, answer=answer)


def candidate(text="blue house", ratio=0.1, perplexity=2.0, **changes):
    return Candidate(changes.pop("asked", question()), text, "clean", True, ratio, perplexity, **changes)


PUBLISHED = [  # format, pictures, threshold, whether the threshold itself is kept
    ("sequence", 2, 0.8, True), ("sequence", 3, 0.7, True), ("sequence", 4, 0.6, True), ("sequence", 5, 0.6, True),
    ("collage", 2, 0.7, False), ("collage", 3, 0.6, False), ("collage", 4, 0.5, False), ("collage", 6, 0.4, False),
    ("collage", 9, 0.3, False), ("pip", 2, 0.8, False),
]  # fmt: skip


@pytest.mark.parametrize(("image_type", "number", "threshold", "is_inclusive"), PUBLISHED, ids=str)
def test_thresholds_are_the_published_ones(image_type, number, threshold, is_inclusive):
    asked = question(image_type, number)
    at, below, above = (
        judge(candidate(ratio=r, asked=asked), RULES) for r in (threshold, threshold - 1e-9, threshold + 1e-9)
    )
    assert below is None and above[0] == "on target" and above[1]["threshold"] == threshold
    assert (at is None) == is_inclusive


def test_the_table_holds_nothing_else():
    assert {(f, n): t for f, row in THRESHOLDS.items() for n, t in row.items()} == {
        (f, n): t for f, n, t, _ in PUBLISHED
    }


def test_thresholds_may_be_changed_by_json():
    changed = read_thresholds('{"sequence": {"2": 0.75, "7": 0.5}}')
    assert changed["sequence"] == {2: 0.75, 3: 0.7, 4: 0.6, 5: 0.6, 7: 0.5} and changed["pip"] == THRESHOLDS["pip"]
    for wrong in ("{", '{"film": {"2": 0.5}}', '{"pip": 0.5}', '{"pip": {"2": 1.5}}'):
        with pytest.raises(ValueError, match="--thresholds"):
            read_thresholds(wrong)


@pytest.mark.parametrize(("perplexity", "is_kept"), [(1.0, False), (1.1, False), (1.1001, True), (1 / 0.9, True)])
def test_perplexity_must_be_above_the_limit(perplexity, is_kept):
    assert (judge(candidate(perplexity=perplexity), RULES) is None) == is_kept


REACHED = {
    "empty": candidate(" ... "),
    "cut off": replace(candidate(), is_complete=False),
    "special text": candidate("a <image> of a dog"),
    "undecided": candidate("red or blue", asked=question(answer="red", choices=["red", "blue"])),
    "right": candidate("A red car."),
    "sure": candidate(perplexity=1.05),
    "on target": candidate(ratio=0.9),
    "length": candidate("a blue house that stands on a hill far away"),
    "near copy": candidate(
        "A bird is sitting quietly on the old fence ab",
        asked=question(answer="A bird is sitting quietly on the old fence ac"),
    ),
}


@pytest.mark.parametrize("reason", CHECKS)
def test_every_reason_is_reached_listed_and_counted(reason):
    selection = select([], [REACHED[reason], candidate()], RULES)
    (line,) = selection.dropped
    assert line["reason"] == reason and line["text"] == REACHED[reason].text and len(selection.pairs) == 1
    assert selection.counts()["by_format"] == {"sequence 2": {reason: 1, "kept": 1}}


def test_reasons_of_the_question_alone():
    assert unfit(question(targets=()), RULES) == ("refusal", {})
    assert unfit(question(answer="x" * 512), RULES) == ("long true answer", {"chars": 512})
    assert unfit(question(answer="x" * 511), RULES) is None


# ---- right in other words


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Red.", "red"), ("The car is red.", "red"), ("red", "The car is red."), ("2", "two"), ("Two dogs", "two"),
        ("a dog", "dogs"), ("Yes", "Yes, there is one."), ("on the left, a man", "a man on the left"), ("A. red", "A"),
        ("(a)", "A"), ("The answer is B.", "B"), ("1,000", "1000"),
    ],
)  # fmt: skip
def test_a_right_answer_in_other_words_is_not_rejected(text, answer):
    assert is_right(text, answer) and judge(candidate(text, asked=question(answer=answer)), RULES)[0] == "right"


@pytest.mark.parametrize(
    ("text", "answer"),
    [("blue", "red"), ("hundred", "red"), ("no", "yes"), ("three", "two"), ("B", "A"), ("cat", "category"),
     ("man in a blue shirt", "man in a red shirt")],
)  # fmt: skip
def test_a_wrong_answer_is_wrong(text, answer):
    assert not is_right(text, answer)


def test_multiple_choice_is_judged_by_the_option_it_names():
    choices = ["red", "dark red", "blue"]
    assert is_right("B", "dark red", choices) and is_right("It is dark red", "dark red", choices)
    assert is_right("red", "dark red", choices) is False
    assert is_right("I cannot tell", "dark red", choices) is None


def test_distances_by_hand():
    assert edit_distance("kitten", "sitting") == pytest.approx(3 / 7)
    assert edit_distance("", "abc") == 1 and edit_distance("Same", "same") == 0 and edit_distance("", "") == 0
    assert edit_distance("abc", "xabcx") == pytest.approx(2 / 5)
    assert length_ratio("a b c", "a") == 3 and length_ratio("a", "") == 1


def test_edit_distance_is_levenshteins():
    rng = np.random.default_rng(0)
    for _ in range(30):
        first, second = ("".join(rng.choice(list("abc"), rng.integers(0, 9))) for _ in range(2))
        table = {(i, j): i + j for i in range(len(first) + 1) for j in range(len(second) + 1) if not i * j}
        for i, a in enumerate(first, 1):
            for j, b in enumerate(second, 1):
                table[i, j] = min(table[i - 1, j] + 1, table[i, j - 1] + 1, table[i - 1, j - 1] + (a != b))
        longest = max(len(first), len(second), 1)
        assert edit_distance(first, second) == pytest.approx(table[len(first), len(second)] / longest)


# ---- noise


PICTURE = Image.new("RGB", (100, 60), (10, 128, 250))


def changed(before, after):
    """Where pixels differ, (height, width) of bool."""
    return (np.asarray(before) != np.asarray(after)).any(-1)


def test_noise_on_the_target_of_a_collage_only():
    asked = replace(question("collage", 2, targets=(1,)), target_box=(60, 10, 90, 50))
    (noisy,) = Noise("target", None, 0)(asked, [PICTURE])
    where, inside = changed(PICTURE, noisy), np.zeros((60, 100), bool)
    inside[10:50, 60:90] = True
    assert not where[~inside].any() and where[inside].mean() > 0.95


def test_noise_is_gaussian_clipped_and_not_wrapped():
    """The earlier code added in uint8: dark pixels became bright ones by wrapping."""
    dark = Image.new("RGB", (200, 200), (0, 0, 0))
    (noisy,) = Noise("whole", 49.0, 0)(question("pip"), [dark])
    values = np.asarray(noisy).ravel()
    assert 0.49 < (values == 0).mean() < 0.52 and values.max() < 49 * 6
    assert np.mean(values[values > 0]) == pytest.approx(49 * math.sqrt(2 / math.pi), rel=0.03)


def test_noise_on_the_target_of_a_sequence_and_on_everything():
    pictures = [PICTURE, PICTURE, PICTURE]
    asked = question("sequence", 3, targets=(2,))
    assert [changed(PICTURE, p).any() for p in Noise("target", 20.0, 0)(asked, pictures)] == [False, False, True]
    assert [changed(PICTURE, p).any() for p in Noise("whole", 20.0, 0)(asked, pictures)] == [True, True, True]


def test_noise_on_every_target():
    asked, pictures = question("sequence", 3, targets=(0, 2)), [PICTURE, PICTURE, PICTURE]
    noisy = Noise("target", 20.0, 0)(asked, pictures)
    assert [changed(PICTURE, p).any() for p in noisy] == [True, False, True]
    assert noisy[0].tobytes() != noisy[2].tobytes()
    (halves,) = Noise("target", None, 0)(question("collage", 4, targets=(0, 3)), [PICTURE])
    quarters = changed(PICTURE, halves).reshape(2, 30, 2, 50).mean(axis=(1, 3))
    assert quarters[0, 0] > 0.95 and quarters[1, 1] > 0.95 and quarters[0, 1] == quarters[1, 0] == 0


def test_noise_depends_on_seed_and_question_only():
    asked, other = question("pip"), replace(question("pip"), id="another")
    first, again = (Noise("whole", None, 3)(asked, [PICTURE])[0] for _ in range(2))
    assert first.tobytes() == again.tobytes()
    assert first.tobytes() != Noise("whole", None, 4)(asked, [PICTURE])[0].tobytes()
    assert first.tobytes() != Noise("whole", None, 3)(other, [PICTURE])[0].tobytes()


def test_published_noise_and_its_names():
    names = {f: Noise("published", None, 0).name(question(f)) for f in ("sequence", "collage", "pip")}
    assert names == {"sequence": "clean", "collage": "noise_target_225", "pip": "noise_whole_49"}
    assert Noise("target", 12.5, 0).name(question()) == "noise_target_12.5"
    assert Noise("published", None, 0)(question(), [PICTURE])[0] is PICTURE
    hidden = Noise("hidden", None, 0)
    assert hidden.name(question("pip")) == "hidden" and hidden(question("pip"), [PICTURE])[0] is PICTURE


# ---- what is true of other images


SOURCES = [{"id": str(n), "path": f"a/{n}.png"} for n in range(3)]
KNOWN = {"a/0.png": {"what is it?": "red car"}, "a/1.png": {"what is it?": "blue house"}, "a/2.png": {}}


def test_truths_come_from_the_record_or_from_the_sources():
    asked = question(number=3, sources=SOURCES)
    assert bare_question(asked.prompt) == "what is it?"
    assert truths(asked, KNOWN) == [Truth("blue house", 1)]
    assert truths(question(number=3, targets=(1,), others=["x", "y"]), {}) == [Truth("x", 0), Truth("y", 2)]
    assert truths(question(number=3, others=["x"]), {}) == [Truth("x", None)] and truths(asked, {}) == []
    both = question(number=3, targets=(0, 2), sources=SOURCES)
    assert bare_question(both.prompt) == "what is it?" and truths(both, KNOWN) == []  # one answers no two
    listed = replace(both, prompt="<image>In Image1, Image2 and Image4, what is it, and why?")
    assert bare_question(listed.prompt) == "what is it, and why?"


def test_another_images_answer_is_preferred_if_it_is_wrong_here():
    found = other_image(question(), [Truth("a red car", 1), Truth("tree", 2)], seed=0)
    assert (found.text, found.rejected_from) == ("tree", "other_image")
    assert judge(other_image(question(), [Truth("a red car", 1)], 0), RULES)[0] == "right"
    assert other_image(question(), [], 0) is None


def test_repointing_asks_about_the_other_images():
    (moved,) = repointed(question(number=3, sources=SOURCES, others=["x"]), [Truth("blue house", 1), Truth("?", None)])
    assert moved.question.prompt.endswith("In Image2, what is it?") and "In Image1" not in moved.question.prompt
    assert (moved.question.target, moved.question.answer, moved.text) == (1, "blue house", "red car")
    assert moved.question.id == "q_to_image2" and moved.question.extra == {"sources": SOURCES, "repointed_from": "q"}
    for asked in (question("pip"), question(number=3, targets=(0, 2)), question(is_search=True)):
        assert repointed(asked, [Truth("x", 1)]) == []


def test_a_pair_has_the_targets_of_its_question():
    """Those of one target as before, of several a list."""
    asked = question(number=3, targets=(0, 2), is_search=True)
    both, one = select([], [candidate(asked=asked), candidate(asked=question(targets=(1,)))], RULES).pairs
    assert (both["targets"], both["is_search"]) == ([1, 3], True) and "target" not in both
    assert one["target"] == 2 and "targets" not in one
