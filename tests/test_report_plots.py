"""The plots of the report: drawn from the scores, and no label on another."""

import itertools
import re

import pytest

from inference.llava_hound_dpo.evaluate import evaluate
from inference.llava_hound_dpo.report import report
from tests.test_report import world  # noqa: F401


def test_a_plot_has_every_interval_and_no_two_labels_in_one_place(world):  # noqa: F811
    """Also of many groups with long names: a row for each."""
    names = [f"Visual_Correspondence_of_part_{n}" for n in range(20)]
    given = [answer | {"category": names[n % 20]} for n, answer in enumerate(world.first)]
    paths = [world.write("a.jsonl", given), world.write("b.jsonl", world.second)]
    scores, rows = evaluate(paths)
    plots = re.findall(r"(?s)<svg.*?</svg>", report(scores, rows))
    places = re.findall(r'<text x="\d+" y="([\d.]+)" text-anchor="end">([^<]+) \(2\)</text>', plots[-1])
    assert len(plots) == 5 and [name for _, name in places] == names
    heights = [float(y) for y, _ in places]
    assert min(b - a for a, b in itertools.pairwise(heights)) >= 24
    found = scores["answers"]["a"]["by_category"][names[0]]
    left = int(re.search(r'<line x1="(\d+)"', plots[-1])[1])
    ends = [left + 300 * found[name] for name in ("low", "high")]
    drawn = [tuple(map(float, pair)) for pair in re.findall(r'x1="([\d.]+)" x2="([\d.]+)"[^>]*stroke-width', plots[-1])]
    assert drawn[0] == pytest.approx(ends) and len(drawn) == 40
