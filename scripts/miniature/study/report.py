"""results.json, results.md, figures and one self-contained page, from the finished units."""

import base64
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from llava.runtime import write_text
from scripts.miniature.study.config import TITLE
from scripts.miniature.study.results import HOW
from scripts.miniature.study.tables import MAIN_GROUPS, Entry, entries, markdown, summary, tables

TEMPLATE = "report.html.j2"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#555555", "#000000")
MARKERS = "os^Dv<>P"
CURVE_LABELS = {
    "rewards/margins": "reward margin",
    "attention/ratio": "attention ratio, training target",
    "losses/sft": "NLL of chosen",
}
NO_END = 0.02  # so many more answers begin right than are right
CSS_DPI, DENSITY = 96, 2  # px of an inch on a page; px of a plot per px of the page


def write_report(results: Mapping[str, Any], output: Path) -> None:
    """Writes all four; each is whole or as it was."""
    figures = draw_all(results)
    write_text(output / "results.json", json.dumps(results, indent=1) + "\n")
    write_text(output / "results.md", markdown(results))
    write_text(output / "report.html", page(results, figures))
    (output / "figures").mkdir(exist_ok=True)
    for name, picture in figures.items():
        (output / "figures" / f"{name}.png").write_bytes(picture)


def page(results: Mapping[str, Any], figures: Mapping[str, bytes]) -> str:
    """The page, which loads nothing from elsewhere."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    shown = [{"title": TITLES[name], **_shown(picture)} for name, picture in figures.items()]
    config = json.dumps(results["config"], indent=1)
    template = environment.get_template(TEMPLATE)
    title = results["config"].get("title", TITLE)
    return template.render(title=title, summary=summary(results), tables=tables(results), figures=shown, config=config)


def draw_all(results: Mapping[str, Any]) -> dict[str, bytes]:
    """The plots as PNG, those that have something to show."""
    plain, every = entries(results, MAIN_GROUPS), entries(results, MAIN_GROUPS, tuple(HOW))
    drawn: dict[str, Figure | None] = {
        "accuracy": draw_means(every),
        "by_format": draw_keyed(plain, "format/"),
        "by_num_images": draw_keyed(plain, "images/"),
        "by_position": draw_keyed(plain, "position/"),
        "ratio": draw_ratio(every),
        "training": draw_curves(plain),
    }
    return {name: _png(figure) for name, figure in drawn.items() if figure is not None}


TITLES = {
    "accuracy": "Mean accuracy of the multi-image formats; a dot is a seed, a bar the 95 % t interval over seeds, "
    "a cross the answers that begin right, where many have no end",
    "by_format": "Accuracy by format",
    "by_num_images": "Accuracy by number of images or cells; dashed: an image picked at random and read without error",
    "by_position": "Accuracy by position of the target",
    "ratio": "Attention ratio and accuracy of every seed: does accuracy follow the attention?",
    "training": "During training, mean over seeds",
}


def draw_means(found: Sequence[Entry]) -> Figure:
    """Every arm on its own line."""
    figure = Figure(figsize=(7.5, 0.8 + 0.26 * len(found)), layout="constrained")
    axis = figure.subplots()
    for place, entry in enumerate(found):
        own = entry.numbers["mean"]
        axis.plot(100 * np.array(own["values"]), [place] * len(own["values"]), "o", color="#999999", markersize=3)
        axis.errorbar(100 * own["mean"], place, xerr=_bars([own]), **_style(list(HOW).index(entry.key[1])))
        begins = entry.numbers["begins"]["mean"]
        if begins > own["mean"] + NO_END:
            axis.plot(100 * begins, place, "x", color="#000000", markersize=7)
        if entry.key == ("base", "plain"):
            axis.axvline(100 * own["mean"], color="#555555", linestyle="dashed", linewidth=1)
    axis.set_yticks(range(len(found)), [entry.label for entry in found], parse_math=False)
    axis.set(ylim=(len(found) - 0.5, -0.5), xlim=(-2, 102), xlabel="mean accuracy of the multi-image formats (%)")
    return figure


def draw_keyed(found: Sequence[Entry], prefix: str) -> Figure | None:
    """Accuracy of groups along the axis, a marker for each arm."""
    names = list(dict.fromkeys(name for entry in found for name in entry.numbers if name.startswith(prefix)))
    if not names:
        return None
    figure = Figure(figsize=(min(11.0, max(7.5, 2.4 + 1.1 * len(names))), 3.6), layout="constrained")
    axis = figure.subplots()
    for place, entry in enumerate(found):
        known = [(x, entry.numbers[name]) for x, name in enumerate(names) if name in entry.numbers]
        shift = 0.7 * ((place + 0.5) / len(found) - 0.5)
        means = [100 * own["mean"] for _, own in known]
        axis.errorbar([x + shift for x, _ in known], means, yerr=_bars([own for _, own in known]), label=entry.label,
                      **_style(place))  # fmt: skip
    axis.set_xticks(range(len(names)), [name.removeprefix(prefix).replace(", ", "\n") for name in names])
    axis.set(ylim=(-2, 102), ylabel="accuracy (%)")
    if prefix == "images/":
        for x, count in enumerate(name.removeprefix(prefix) for name in names):
            if count.isdigit():
                axis.hlines(100 / int(count), x - 0.4, x + 0.4, "#555555", "dashed", linewidth=1)
    _legend(figure, axis)
    return figure


def draw_ratio(found: Sequence[Entry]) -> Figure | None:
    """Each seed of each arm, attention ratio against accuracy: a colour for an arm, a marker for a way of answering."""
    known = [entry for entry in found if "ratio" in entry.numbers]
    if not known:
        return None
    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    axis = figure.subplots()
    arms = list(dict.fromkeys(entry.key[0] for entry in known))
    for entry in known:
        place, way = arms.index(entry.key[0]), list(HOW).index(entry.key[1])
        accuracy = 100 * np.array(entry.numbers["mean"]["values"])
        axis.plot(entry.numbers["ratio"]["values"], accuracy, **_point(place, way))
    for place, name in enumerate(arms):
        axis.plot([], [], label=next(entry.arm["label"] for entry in known if entry.key[0] == name), **_point(place, 0))
    for way, label in enumerate(HOW.values()):
        axis.plot([], [], label=label.removeprefix(" + ") or "plain", **_point(len(COLOURS) - 1, way))
    axis.set(xlabel="attention ratio of the multi-image prompts", ylabel="mean accuracy (%)")
    _legend(figure, axis)
    return figure


def _point(place: int, way: int) -> dict[str, Any]:
    """A point of an arm; those after the last colour are hollow."""
    colour = COLOURS[place % len(COLOURS)]
    face = "none" if place >= len(COLOURS) else colour
    return {"color": colour, "marker": MARKERS[way], "linestyle": "", "markersize": 5, "markerfacecolor": face}


def draw_curves(found: Sequence[Entry]) -> Figure | None:
    """Margin, ratio and likelihood of the chosen answer by step."""
    names = [name for name in CURVE_LABELS if any(name in entry.arm["curves"] for entry in found)]
    if not names:
        return None
    figure = Figure(figsize=(max(7.5, 3.4 * len(names)), 3.6), layout="constrained")
    for axis, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for place, entry in enumerate(found):
            points = np.array(entry.arm["curves"].get(name, [])).reshape(-1, 2)
            style = {"color": COLOURS[place % len(COLOURS)], "linestyle": "--" if place >= len(COLOURS) else "-"}
            axis.plot(*points.T, linewidth=1.4, label=entry.label, **style)
        axis.set(xlabel="step", title=CURVE_LABELS[name])
        axis.title.set_size(9)
    _legend(figure, axis)
    return figure


def _bars(found: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """(2, n) distances in % to the interval's ends, 0 where there is none."""
    ends = [[own["mean"] if own[end] is None else own[end] for own in found] for end in ("low", "high")]
    return 100 * np.abs(np.array(ends) - np.array([own["mean"] for own in found]))


def _style(place: int) -> dict[str, Any]:
    again = place // len(COLOURS)  # the second time round a colour has another marker
    marks = {"color": COLOURS[place % len(COLOURS)], "fmt": MARKERS[(place + again) % len(MARKERS)]}
    return {**marks, "markersize": 5, "capsize": 2.5, "elinewidth": 1.3}


def _legend(figure: Figure, axis: Axes) -> None:
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=8)


def _png(figure: Figure) -> bytes:
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8.5)
        axis.grid(color="#e4e4e4", linewidth=0.8)
        axis.set_axisbelow(True)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=CSS_DPI * DENSITY, metadata={"Software": None})
    return file.getvalue()


def _shown(picture: bytes) -> dict[str, Any]:
    """A PNG as `url`, with its `width` on the page in px."""
    url = f"data:image/png;base64,{base64.b64encode(picture).decode('ascii')}"
    return {"url": url, "width": int.from_bytes(picture[16:20], "big") // DENSITY}
