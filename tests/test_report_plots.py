"""The charts of the report: drawn from the scores, whole as PNG and SVG beside it, and no label on another."""

import io
import itertools
from xml.etree import ElementTree

import pytest
from PIL import Image

from inference.llava_hound_dpo.evaluate import evaluate, main
from inference.llava_hound_dpo.report import draw_accuracy, draw_charts
from llava.charts import inline
from tests.test_report import world  # noqa: F401

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
