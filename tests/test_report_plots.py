"""Tables and charts of the report: the numbers of the scores; charts whole as PNG and SVG, no label on another."""

import io
import itertools
from xml.etree import ElementTree

import pytest
from PIL import Image

from inference.llava_hound_dpo.evaluate import evaluate, main
from inference.llava_hound_dpo.report import draw_accuracy, draw_charts, report
from llava.charts import inline
from tests.test_report import Page, interval, world  # noqa: F401

SVG = "{http://www.w3.org/2000/svg}"


def test_a_chart_has_every_interval_and_no_two_labels_in_one_place(world):  # noqa: F811
    """Also of many groups with long names: a line for each."""
    names = [f"Visual_Correspondence_of_part_{n}" for n in range(20)]
    given = [answer | {"category": names[n % 20]} for n, answer in enumerate(world.first)]
    scores, _ = evaluate([world.write("a.jsonl", given), world.write("b.jsonl", world.second)])
    files = list(scores["answers"].values())
    groups = {name: [file["by_category"][name] for file in files] for name in names}
    figure = draw_accuracy(groups, list(scores["answers"]))
    figure.draw_without_rendering()
    (axis,) = figure.axes
    labels = axis.get_yticklabels()
    assert [label.get_text() for label in labels] == [f"{name} (2)" for name in names]
    boxes = [label.get_window_extent() for label in labels]
    assert all(lower.y1 < upper.y0 for upper, lower in itertools.pairwise(boxes))
    assert min(box.x0 for box in boxes) >= 0
    drawn = [[100 * x for x in (own["accuracy"], own["low"], own["high"])] for own in itertools.chain(*groups.values())]
    points = [[bar[0].get_xdata()[0], *bar[2][0].get_segments()[0][:, 0]] for bar in axis.containers]
    assert points == [pytest.approx(own) for own in drawn] and len(drawn) == 40
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]


def test_arms_stand_side_by_side_and_chance_is_dashed(world):  # noqa: F811
    scores, _ = world.judged()
    groups = {name: [file["by_format"][name] for file in scores["answers"].values()] for name in ("collage", "single")}
    (axis,) = draw_accuracy(groups, ["m0", "m1"]).axes
    heights = [bar[0].get_ydata()[0] for bar in axis.containers]
    assert heights == sorted(heights) and max(heights[:2]) < 0.5 < min(heights[2:])
    assert (
        len({bar[0].get_color() for bar in axis.containers}) == len({b[0].get_marker() for b in axis.containers}) == 2
    )
    dashed = [line.get_xdata()[0] for line in axis.lines if line.get_linestyle() == "--"]
    assert dashed == [25]  # a collage of four; a single image has no other
    assert not draw_accuracy({"pip": [groups["single"][0]]}, ["m0"]).legends  # of one file


def test_charts_as_files(world):  # noqa: F811
    """The same for the same scores; text stays text."""
    scores, _ = world.judged()
    charts = draw_charts(scores)
    assert charts == draw_charts(scores)
    names = ["accuracy_format", "accuracy_images", "accuracy_sequence", "accuracy_collage"]
    assert list(charts) == list(itertools.product(names, ("png", "svg")))
    for name in names:
        Image.open(io.BytesIO(charts[name, "png"])).verify()
        assert ElementTree.fromstring(charts[name, "svg"]).tag == f"{SVG}svg"
    svg = ElementTree.fromstring(charts["accuracy_format", "svg"])
    assert {"m0", "m1", "all (40)", "collage (10)"} <= {text.text for text in svg.iter(f"{SVG}text")}
    assert svg.find(f"{SVG}title").text == "Accuracy by format, % [95 % interval]"
    page = inline(charts["accuracy_format", "svg"])
    assert page.startswith("<svg") and "http" not in page and "#000000" not in page and 'id="text_' not in page


def test_the_command_keeps_no_chart_of_earlier_answers(world):  # noqa: F811
    output = world.folder / "out"

    def figures(*answers):
        main(
            ["--answers", *(str(world.write(f"{n}.jsonl", a)) for n, a in enumerate(answers)), "--output", str(output)]
        )
        return {path.name for path in (output / "figures").iterdir()}

    both = figures([answer | {"category": "Art"} for answer in world.first], world.second)
    assert {"accuracy_category.png", "accuracy_category.svg", "accuracy_sequence.png"} < both and len(both) == 10
    single = figures([answer for answer in world.first if answer["image_type"] == "single"])
    assert single == {"accuracy_format.png", "accuracy_format.svg"}


# ---- tables


def test_numbers_are_those_of_the_scores(world):  # noqa: F811
    scores, rows = world.judged()
    tables = Page(report(scores, rows)).tables
    files = scores["answers"].values()

    def line(name, label):
        return next(line[1:] for line in tables[name] if line[0] == label)

    for verdict in ("right", "wrong", "unparsed", "missing", "cut_off"):
        assert line("answers", verdict.replace("_", " ")) == [str(file["overall"][verdict]) for file in files]
    assert line("attention", "attention ratio") == [f"{file['overall']['attention_ratio']:.3f}" for file in files]
    for label, name in (("wrong", "wrong"), ("true of another image", "true_of_another")):
        assert line("confusion", label) == [str(file["confusion"][name]) for file in files]
    for label, name in (("their share", "of_wrong"), ("by chance", "chance")):
        assert line("confusion", label) == [f"{file['confusion'][name]:.3f}" for file in files]
    (c,) = scores["comparisons"]
    for place, own in {"all": c, **c["by_format"]}.items():
        assert line("comparisons", f"m1 - m0, {place}") == [
            str(own["questions"]),
            f"{100 * own['difference']:+.1f} [{100 * own['low']:+.1f}, {100 * own['high']:+.1f}]",
            str(own["only_first_right"]), str(own["only_second_right"]), f"{own['mcnemar_p']:.2g}",
        ]  # fmt: skip


def test_accuracy_by_group_and_chance(world):  # noqa: F811
    scores, rows = world.judged()
    tables = Page(report(scores, rows)).tables
    found = {name: {line[0]: line[1:] for line in lines} for name, lines in tables.items()}
    files = list(scores["answers"].values())
    for name, chance in (("sequence", "50.0"), ("collage", "25.0"), ("pip", "50.0"), ("single", "-")):
        accuracies = [interval(file["by_format"][name]) for file in files]
        assert found["accuracy_format"][name] == ["10", *accuracies, chance]
    assert found["accuracy_format"]["all"][1:3] == [interval(file["overall"]) for file in files]
    assert found["accuracy_images"]["4"][1::2] == [interval(files[0]["by_num_images"]["4"]), "25.0"]
    assert found["accuracy_collage"]["Image2"][1] == interval(files[0]["by_position"]["collage"]["Image2"])


def test_where_it_looked(world):  # noqa: F811
    scores, rows = world.judged()
    first, second = (file["looked_answered"] for file in scores["answers"].values())
    lines = {line[0]: line[1:] for line in Page(report(scores, rows)).tables["attention"]}
    for a, b in itertools.product(("right", "wrong"), repeat=2):
        name = f"looked_{a}_answered_{b}"
        assert lines[f"looked {a}, answered {b}"] == [str(first[name]), str(second[name])]
    assert lines["where it looked is unknown"] == [str(own["judged_by"]["unknown"]) for own in (first, second)]
    auc = [file["ratio_auc"]["overall"]["auc"] for file in scores["answers"].values()]
    assert lines["ratio tells right from wrong, AUC"] == [f"{own:.3f}" for own in auc]


def test_what_an_unparsed_answer_scores_is_said(world):  # noqa: F811
    scores, rows = world.judged()
    assert "unparsed and missing answers score 0 and stay" in Page(report(scores, rows)).text


def test_a_judge_is_shown_when_there_is_one(world):  # noqa: F811
    scores, rows = world.judged()
    assert "judge" not in Page(report(scores, rows)).tables
    grade, difference = {"mean": 3.25, "low": 2.5, "high": 4.0}, {"difference": -0.5, "low": -1.0, "high": 0.25}
    scores["judge"] = {"model": "a <judge>"}
    scores["answers"]["m1"]["judge"] = {"overall": {"judged": 7, "clarity": grade, "relevance": None}}
    scores["comparisons"][0]["judge"] = {"pairs": 5, "clarity": difference}
    page = Page(report(scores, rows))
    assert {"- 3.25 [2.50, 4.00]", "- 7"} < {" ".join(line[1:]) for line in page.tables["judge"]}
    assert page.tables["judge_comparisons"][1:] == [["m1 - m0", "5", "-", "-", "-0.50 [-1.00, +0.25]", "-"]]
    assert "Grades 1 to 5 by a <judge>" in page.text
