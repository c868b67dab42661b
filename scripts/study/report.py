"""results.json, results.md with one table of arms and one of comparisons, and two figures as PNG and SVG."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from llava.charts import COLOURS, GREY, KINDS, MARKERS, chart_file, draw_interval, percent_chart
from llava.markdown import interval, number
from llava.markdown import table as markdown_table
from llava.run_folder import as_json
from llava.runtime import short_commit, write_bytes, write_text
from scripts.study.config import BASE, PLAIN

FEW = 6  # of fewer seeds an interval says little: their values stand beside it
NO_END = 0.02  # so many more answers begin right than are right: many have no end
SEVERAL = (
    "Units of several commits: they are paired by seed only where these train the same weights, for with another order "
    "of the pairs the same seed is another draw."
)
ARMS_NOTE = (
    "Mean over seeds in % [95 % interval, Student's t over seeds] (each of fewer than six seeds). The mean is that of "
    "the formats with several images. Begins right: the answer begins with the true one, whatever follows; far above "
    "the accuracy, the model no longer ends its answers. Cut off: answers without an end. Attention ratio: share of "
    "the image attention that lies on the image asked about."
)
COMPARED_NOTE = (
    "Arm - control, paired by seed and by question, in points [t interval over seeds] (each of fewer than six seeds); "
    "resampled: 95 % of 10,000 draws of seeds and, within each format, of questions; p: two-sided, of these draws; "
    "relative: to the control, resampled."
)
EXTRA_NOTES = {
    "category/": "By category of the questions: of the formats of the mean, each format alike.",
    "flipped": "Flipped: right in one order of the pictures and not in another, of the questions asked in several.",
}
CAPTIONS = {
    "accuracy": "Mean accuracy; a dot is a seed, a bar the 95 % t interval over seeds, a cross the answers that begin "
    "right where many have no end",
    "ratio": "Attention ratio and accuracy of every seed: does accuracy follow the attention?",
}


def write_report(results: Mapping[str, Any], output: Path) -> str:
    """Writes all of them; each is whole or as it was. Gives the Markdown."""
    results = as_json(results)
    figures = {"accuracy": draw_accuracy(results["arms"]), "ratio": draw_ratio(results["arms"])}
    figures = {name: figure for name, figure in figures.items() if figure}
    for name, figure in figures.items():
        for kind in KINDS:
            write_bytes(output / f"figures/{name}.{kind}", chart_file(figure, kind, CAPTIONS[name]))
    text = markdown(results) + "".join(f"\n![{CAPTIONS[name]}](figures/{name}.png)\n" for name in figures)
    write_text(output / "results.json", json.dumps(results, indent=1) + "\n")
    write_text(output / "results.md", text)
    return text


def markdown(results: Mapping[str, Any]) -> str:
    """Title, summary and both tables."""
    made = results["git_commits"]
    summary = f"{results['progress']}. Code: {', '.join(map(short_commit, made))}."
    parts = [f"# {results['config'].get('title', 'Study')}", summary + (f" {SEVERAL}" if len(made) > 1 else "")]
    extra = _extra([arm["numbers"] for arm in results["arms"]])
    notes = [note for start, note in EXTRA_NOTES.items() if any(name.startswith(start) for name in extra)]
    parts += ["## Arms", " ".join([ARMS_NOTE, *notes]), arms_table(results["arms"])]
    if results["comparisons"]:
        parts += ["## Comparisons", COMPARED_NOTE, comparisons_table(results["comparisons"])]
    return "\n\n".join(parts) + "\n"


def arms_table(arms: Sequence[Mapping[str, Any]]) -> str:
    """A row for every arm and way of answering."""
    parts = [*_named("format/", [arm["numbers"] for arm in arms]), *_extra([arm["numbers"] for arm in arms])]
    rows = [
        [arm["label"], str(len(arm["seeds"])),
         *(shown(arm["numbers"][name]) for name in ("mean", "begins")), shown(arm["numbers"]["cut_off"], brief=True),
         *(shown(arm["numbers"].get(name), brief=True) for name in parts),
         shown(arm["numbers"].get("ratio"), ".3f", 1, brief=True)]
        for arm in arms
    ]  # fmt: skip
    names = [name.removeprefix("format/").removeprefix("category/") for name in parts]
    return markdown_table(["", "seeds", "mean", "begins right", "cut off", *names, "attention ratio"], rows)


def comparisons_table(comparisons: Sequence[Mapping[str, Any]]) -> str:
    """A row for every arm and control."""
    parts = _extra(comparisons)
    rows = [
        [own["label"], str(len(own["seeds"])), shown(own["over_seeds"], "+.1f"),
         f"[{100 * own['low']:+.1f}, {100 * own['high']:+.1f}]", f"{own['p']:.2g}", shown(own["relative"], "+.1f"),
         shown(own["begins"], "+.1f"), *(shown(own.get(name), "+.1f") for name in parts)]
        for own in comparisons
    ]  # fmt: skip
    names = ["mean", "resampled", "p", "relative %", "begins right", *(n.removeprefix("category/") for n in parts)]
    return markdown_table(["arm - control", "seeds", *names], rows)


def _named(start: str, found: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for own in found for name in own if name.startswith(start)))


def _extra(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """Columns that only some studies have: accuracy by category, and how often the order of the pictures decides."""
    return [*_named("category/", found), *_named("flipped", found)]


def shown(found: Mapping[str, Any] | None, form: str = ".1f", scale: float = 100, brief: bool = False) -> str:
    """An interval as "84.7 [84.4, 84.9] (84.6 84.8)"; without the values of the seeds if `brief` or not few."""
    text = interval(found, "mean", form, scale)
    if brief or not found or found["low"] is None or not 0 < len(found["values"]) < FEW:
        return text
    return f"{text} ({' '.join(number(value, form, scale) for value in found['values'])})"


def draw_accuracy(arms: Sequence[Mapping[str, Any]]) -> Figure:
    """Every arm on its own line."""
    figure, axis = percent_chart([arm["label"] for arm in arms], "mean accuracy (%)", 7.5, 0.26)
    for place, arm in enumerate(arms):
        own, begins = arm["numbers"]["mean"], arm["numbers"]["begins"]["mean"]
        axis.plot(100 * np.array(own["values"]), [place] * len(own["values"]), "o", color=GREY, markersize=3)
        draw_interval(axis, place, own, "mean", fmt="o", color=COLOURS[arm["way"] != PLAIN])
        if begins > own["mean"] + NO_END:
            axis.plot(100 * begins, place, "x", color="#000000", markersize=7)
        if (arm["arm"], arm["way"]) == (BASE, PLAIN):
            axis.axvline(100 * own["mean"], color=GREY, linestyle="dashed", linewidth=1)
    return figure


def draw_ratio(arms: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Each seed of each arm, attention ratio against accuracy: a colour for an arm, a marker for a way of answering."""
    known = [arm for arm in arms if "ratio" in arm["numbers"]]
    if not known:
        return None
    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    axis = figure.subplots()
    names, ways = (list(dict.fromkeys(arm[key] for arm in known)) for key in ("arm", "way"))
    for arm in known:
        place = names.index(arm["arm"])
        colour = COLOURS[place % len(COLOURS)]  # arms after the last colour are hollow
        axis.plot(
            arm["numbers"]["ratio"]["values"], 100 * np.array(arm["numbers"]["mean"]["values"]), linestyle="",
            marker=MARKERS[ways.index(arm["way"]) % len(MARKERS)], color=colour, markersize=5, label=arm["label"],
            markerfacecolor=colour if place < len(COLOURS) else "none",
        )  # fmt: skip
    axis.set(xlabel="attention ratio", ylabel="mean accuracy (%)")
    axis.grid(color=GREY, alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=7)
    return figure
