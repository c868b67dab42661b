"""What the study computes and reports, against numbers made by hand."""

from dataclasses import replace

import numpy as np
import pytest

from inference.llava_hound_dpo.summary import Asked, judge
from llava import statistics
from llava.records import Answer
from scripts.study.report import arms_table, comparisons_table, draw_accuracy, draw_ratio, markdown, shown, write_report
from scripts.study.results import BEGINS, Answered, difference, known_of, numbers

# ---- statistics


def test_the_interval_over_seeds_is_students_and_ends_where_the_quantity_does():
    found = statistics.seed_interval([1.0, 2.0, 3.0], 0, 9)  # standard deviation 1, t of two degrees 4.3027
    assert (found["mean"], found["low"], found["high"]) == pytest.approx((2, 0, 2 + 4.3027 / 3**0.5), abs=1e-4)
    assert statistics.seed_interval([0.5]) == {"mean": 0.5, "low": None, "high": None, "values": (0.5,)}
    found = statistics.seed_interval([0.75, 0.625])
    assert (found["low"], found["high"]) == (0.0, 1.0)  # 0.6875 +- 12.7062 * 0.0884 / 1.4142 = 0.794
    assert statistics.seed_interval([-0.1, 0.1], -1)["low"] == pytest.approx(-1)
    with pytest.raises(ValueError, match="at least one"):
        statistics.seed_interval([])


def test_every_format_weighs_the_same():
    scores = np.array([[1, 1, 1, 0.0, 0], [1, 0, 0, 1, 1]])
    formats = np.array(["sequence"] * 3 + ["pip"] * 2)
    assert statistics.mean_of_groups(scores, formats) == pytest.approx([0.5, (1 / 3 + 1) / 2])


def test_resampled_questions_have_the_binomial_error():
    scores, formats = np.repeat([[0.0, 1.0]], 50, axis=1).reshape(1, 100), np.array(["sequence"] * 100)
    (draws,) = statistics.resampled([scores], formats, 4000)
    assert draws.mean() == pytest.approx(0.5, abs=0.005) and draws.std() == pytest.approx(0.05, abs=0.003)


def test_resampled_seeds_have_the_error_of_the_seeds():
    """All questions of a seed alike: only seeds are uncertain, by std / sqrt(S) with the divisor S."""
    scores = np.array([[0.0] * 10, [1.0] * 10])
    (draws,) = statistics.resampled([scores], np.array(["pip"] * 10), 4000)
    assert set(np.round(draws, 6)) == {0.0, 0.5, 1.0} and draws.std() == pytest.approx(0.5 / 2**0.5, abs=0.02)


def test_comparisons_are_paired_by_question():
    rng = np.random.default_rng(0)
    first = (rng.random((3, 200)) < 0.5).astype(float)
    second = first.copy()
    second[:, :20] = 1.0  # gains on the same questions in every seed
    found = statistics.compare_sets(first, second, np.array(["collage"] * 200), 2000)
    gain = (second - first).mean()
    assert found["over_seeds"]["mean"] == pytest.approx(gain)
    assert 0 < found["low"] < gain < found["high"] < gain + 0.05 and found["p"] < 0.01
    assert found["relative"]["mean"] == pytest.approx(second.mean() / first.mean() - 1)
    same = statistics.compare_sets(first, first, np.array(["collage"] * 200), 500)
    assert (same["low"], same["high"], same["p"]) == (0, 0, 1)


# ---- results

ASKED = Asked("q", "test.json record 1", "red", "sequence", (1,), 2, (), ("blue",))
FORMATS = np.array(["sequence"] * 4 + ["collage"] * 2 + ["single"] * 2)
NO_CATEGORY = np.array([""] * 8)


def answered(*rows, seeds=None):
    """By seed a text of the eight questions: 1 right, 0 wrong, e right but without an end."""
    known = []
    for text in rows:
        marks = text.replace(" ", "")
        known.append([[mark == "1", mark in "1e", mark == "e", 0.6] for mark in marks])
    known = np.array(known, dtype=float).transpose(2, 0, 1)
    return Answered(tuple(seeds or range(len(rows))), known, FORMATS, NO_CATEGORY)


SFT = answered("1111 1e 11", "1110 10 11")
DPO = answered("1111 11 10")
UNTRAINED = answered("1100 10 11")


def test_numbers_of_an_arm_are_those_made_by_hand():
    found = numbers(SFT)
    assert found["mean"]["values"] == (0.75, 0.625)  # (4/4 + 1/2) / 2 and (3/4 + 1/2) / 2
    assert (found["mean"]["low"], found["mean"]["high"]) == (0.0, 1.0)
    assert found["begins"]["values"] == (1.0, 0.625)  # one of the first seed's wrong answers only has no end
    assert found["cut_off"]["values"] == (0.25, 0.0)
    assert found["format/single"]["mean"] == 1 and found["format/collage"]["mean"] == 0.5
    assert found["ratio"]["mean"] == pytest.approx(0.6)


def test_without_attention_there_is_no_ratio_and_it_is_not_zero():
    known = SFT.known.copy()
    known[3] = np.nan
    assert "ratio" not in numbers(replace(SFT, known=known))


def test_a_test_set_of_one_kind_is_its_own_mean():
    found = numbers(DPO.only(FORMATS == "single"))
    assert found["mean"]["mean"] == 0.5


def test_differences_are_paired_by_the_seeds_that_both_have():
    found = difference(SFT, DPO, False)
    assert found["seeds"] == [0] and found["over_seeds"]["mean"] == pytest.approx(0.25)
    assert found["begins"]["mean"] == 0
    base = difference(UNTRAINED, SFT, True)
    assert base["seeds"] == [0, 1] and base["over_seeds"]["mean"] == pytest.approx(0.6875 - 0.5)
    assert base["relative"]["mean"] == pytest.approx(0.375)
    assert difference(SFT, answered("1111 11 11", seeds=[7]), False) is None


LEVELS = np.array(["named", "named", "search", "search", "named", "search", "named", ""])


def test_categories_are_means_over_the_formats_that_make_the_mean():
    first, second = (replace(own, categories=LEVELS) for own in (SFT, DPO))
    found = numbers(first)
    assert found["category/named"]["values"] == (1.0, 1.0)  # 2/2 of the sequences and 1/1 of the collages
    assert found["category/search"]["values"] == (0.5, 0.25)  # 2/2 and 0/1; 1/2 and 0/1
    assert "category/" not in found and not any(name.startswith("category/") for name in numbers(SFT))
    compared = difference(first, second, False)  # of the seed that both have
    assert (compared["category/named"]["mean"], compared["category/search"]["mean"]) == (0, 0.5)
    assert "| begins right | named | search |" in comparisons_table([{"label": "DPO - SFT", **compared}])


def test_flips_are_shown_where_they_are_known():
    first, second = replace(SFT, flipped=(0.5, 0.25)), replace(DPO, flipped=(0.125,))
    arms = [{"label": "SFT", "seeds": (0, 1), "numbers": numbers(first)},
            {"label": "base", "seeds": (0,), "numbers": numbers(UNTRAINED)}]  # fmt: skip
    header, _, sft, base = arms_table(arms).splitlines()
    assert header.endswith("| single | flipped | attention ratio |")
    assert "| 37.5 [0.0, 100.0] | 0.600" in sft and "| - | 0.600" in base
    assert difference(first, second, False)["flipped"]["mean"] == -0.375
    assert difference(second, first, True)["flipped"]["values"] == (0.375, 0.125)  # the base's one beside each seed
    assert "flipped" not in difference(first, UNTRAINED, False)


@pytest.mark.parametrize(
    ("text", "more", "wanted"),
    [
        ("red", {}, (1, 1, 0)),
        ("Red red red", {"is_complete": False}, (0, 1, 1)),
        ("blue", {"is_complete": True}, (0, 0, 0)),
    ],
)
def test_an_answer_begins_right_however_it_goes_on(text, more, wanted):
    given = Answer("a", "q", text, "red", "sequence", (1,), 2, extra=more)
    *found, ratio = known_of(judge(ASKED, given, "auto"))
    assert tuple(map(float, found)) == wanted and np.isnan(ratio)


def test_a_missing_answer_is_wrong():
    *found, ratio = known_of(judge(ASKED, None, "auto"))
    assert tuple(map(float, found)) == (0, 0, 0) and np.isnan(ratio)


# ---- the report


def results():
    own = {"base": UNTRAINED, "sft": SFT, "dpo": DPO}
    labels = {"base": "base", "sft": "SFT | <b>", "dpo": "DPO"}
    return {
        "config": {"title": "Ours"}, "progress": "4 of 5 units finished", "git_commits": ["a" * 40, "b" * 40],
        "arms": [{"arm": name, "way": "plain", "label": labels[name], "seeds": found.seeds, "numbers": numbers(found)}
                 for name, found in own.items()],
        "comparisons": [{"control": ("sft", "plain"), "arm": ("dpo", "plain"), "label": "DPO - SFT",
                         **difference(SFT, DPO, False)}],
    }  # fmt: skip


def test_few_seeds_are_shown_beside_their_interval():
    assert shown(numbers(SFT)["mean"]) == "68.8 [0.0, 100.0] (75.0 62.5)"
    assert shown(numbers(SFT)["mean"], brief=True) == "68.8 [0.0, 100.0]"
    assert shown(numbers(DPO)["mean"]) == "100.0" and shown(None) == "-"
    six = numbers(answered(*["1111 11 11"] * 6))["mean"]
    assert shown(six) == "100.0 [100.0, 100.0]"
    assert shown({"mean": -1e-12, "low": None, "high": None}, "+.1f") == "+0.0"


def test_the_tables_say_what_was_computed():
    arms = arms_table(results()["arms"])
    assert "| SFT \\| <b> | 2 | 68.8 [0.0, 100.0] (75.0 62.5) | 81.2 " in arms
    assert "| sequence | collage | single | attention ratio |" in arms
    assert "| DPO - SFT | 1 | +25.0 | [" in comparisons_table(results()["comparisons"])
    text = markdown(results())
    assert text.startswith("# Ours\n") and "Units of several commits" in text


def test_everything_is_written_with_two_figures(tmp_path):
    text = write_report(results(), tmp_path)
    assert text == (tmp_path / "results.md").read_text() and text.count("](figures/") == 2
    for name in ("accuracy", "ratio"):
        assert (tmp_path / f"figures/{name}.png").read_bytes()[:4] == b"\x89PNG"
        assert "SFT | &lt;b&gt;" in (tmp_path / f"figures/{name}.svg").read_text()


def test_the_figures_show_every_arm_and_cross_what_has_no_end():
    arms = results()["arms"]
    axis = draw_accuracy(arms).axes[0]
    assert [label.get_text() for label in axis.get_yticklabels()] == [arm["label"] for arm in arms]
    assert [line.get_marker() for line in axis.lines].count("x") == 1  # SFT's: 81 % begin right, 69 are
    assert numbers(SFT)["begins"]["mean"] > numbers(SFT)["mean"]["mean"] and BEGINS == 1
    assert len(draw_ratio(arms).axes[0].lines) == 3
    assert draw_ratio([]) is None
