"""Charts of scores with their intervals: one look on pages, in papers and in studies."""

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Of Okabe and Ito, then of Tol: safe if colour-blind.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#999933", "#aa4499")
MARKERS = "os^Dv<>P"
GLYPHS = "●■▲◆▼◀▶✚"  # the same in a text
KINDS = ("png", "svg")
GREY = "#808080"  # legible on white and on black


def percent_chart(labels: Sequence[str], xlabel: str, width: float, height: float) -> tuple[Figure, Axes]:
    """An empty chart from 0 to 100 % with a line for each label, the first on top; `height` of a line in inches."""
    figure = Figure(figsize=(width, 0.8 + height * len(labels)), layout="constrained")
    axis = figure.subplots()
    axis.set_yticks(range(len(labels)), labels, parse_math=False)
    axis.set(ylim=(len(labels) - 0.5, -0.5), xlim=(-2, 102), xlabel=xlabel)
    axis.grid(axis="x", color=GREY, alpha=0.3)
    axis.tick_params(length=0)
    axis.spines[["top", "right", "left"]].set_visible(False)
    return figure, axis


def draw_interval(axis: Axes, place: float, found: Mapping[str, Any], name: str, **style: Any) -> None:
    """A point of per cent with its interval, if it has one, at a height of the chart."""
    value = found[name]
    ends = [[100 * abs(value - (value if found[end] is None else found[end]))] for end in ("low", "high")]
    axis.errorbar(100 * value, place, xerr=ends, markersize=5, capsize=2.5, **style)


def chart_file(figure: Figure, kind: str, title: str) -> bytes:
    """The chart as a "png" or "svg": the same for the same chart, and the text of an SVG stays text."""
    font = {"svg.fonttype": "none", "svg.hashsalt": "chart", "font.sans-serif": ["DejaVu Sans", "Helvetica", "Arial"]}
    undated = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    metadata = {"png": {"Software": None}, "svg": {"Title": title, **undated}}[kind]
    file = io.BytesIO()
    with matplotlib.rc_context(font):
        figure.savefig(file, format=kind, dpi=200, metadata=metadata, transparent=kind == "svg")
    return file.getvalue()


def inline(svg: bytes) -> str:
    """An SVG as a part of a page: what is black takes the colour of the page's text."""
    text = svg.decode("utf-8")
    needless = r'(?s)<metadata>.*?</metadata>| (xmlns(:xlink)?="[^"]*"|id="[\w.]+_\d+")'
    text = re.sub(needless, "", text[text.index("<svg") :])
    return text.replace("xlink:href", "href").replace("#000000", "currentColor")
