"""One HTML page of the scores, nothing loaded from elsewhere: chart, sentences, tables and sample prompts."""

import io
import logging
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup, escape
from matplotlib.figure import Figure
from PIL import Image

from inference.llava_hound_dpo.findings import preamble, sentences, tables
from inference.llava_hound_dpo.summary import Row, is_confused
from llava.asked import image_names
from llava.charts import COLOURS, GLYPHS, GREY, KINDS, MARKERS, chart_file, draw_interval, inline, percent_chart
from llava.endpoint import data_url
from llava.heatmap import draw_prompt
from llava.image import ImageStore
from llava.markdown import number
from llava.records import FORMATS, IMAGE, Question
from llava.regions import outlined

log = logging.getLogger(__name__)

TEMPLATE = "report.html.j2"
PICTURE_HEIGHT, PICTURE_WIDTH = 240, 1000  # px of a prompt's pictures, and of all of them side by side
LONGEST, LONGEST_LABEL = 1000, 36  # characters shown of a text, and of a name in a chart


@dataclass(frozen=True)
class Model:
    """An answers file: its scores, its judged rows, and the sign that stands for it in charts and tables."""

    name: str
    scores: dict[str, Any]
    rows: Sequence[Row]
    colour: str
    glyph: str


def report(
    scores: dict[str, Any],
    rows: Mapping[str, Sequence[Row]],
    questions: Sequence[Question] = (),
    store: ImageStore | None = None,
    num_samples: int = 12,
    charts: Mapping[tuple[str, str], bytes] | None = None,
) -> str:
    """The page. `rows` has the judged rows of each answers file of `scores`, by its name there.

    Sample prompts are drawn only with the test set's `questions` and the `store` of its pictures; without them the page
    says how to get them. `charts`, as `draw_charts` gives them, are drawn here if absent.
    """
    models = {
        name: Model(name, found, rows[name], COLOURS[n % len(COLOURS)], GLYPHS[n % len(GLYPHS)])
        for n, (name, found) in enumerate(scores["answers"].items())
    }
    charts = charts or draw_charts(scores, ["svg"])
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,  # questions and answers may hold anything
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"number": number, "shorten": _shorten, "breakable": _breakable, "marked": _marked}
    return environment.get_template(TEMPLATE).render(
        models=models,
        preamble=preamble(scores),
        sentences=sentences(scores),
        tables=tables(scores),
        charts={name: Markup(inline(file)) for (name, kind), file in charts.items() if kind == "svg"},
        samples=_samples(list(models.values()), questions, store, num_samples) if questions and store else None,
    )


def _shorten(text: str, longest: int = LONGEST) -> str:
    return text if len(text) <= longest else f"{text[:longest]} … ({len(text) - longest} more characters)"


def _breakable(name: str) -> Markup:
    """A name that a line may break after its separators only, and not in the middle of a word."""
    return Markup(re.sub(r"([_\-./\\])(?=\w)", r"\1<wbr>", str(escape(name))))


def _marked(text: str) -> Markup:
    """A text with its intervals set apart."""
    return Markup(re.sub(r"(\[[^]]*\])", r'<span class="ci">\1</span>', str(escape(text))))


# ---- charts


def draw_charts(scores: dict[str, Any], kinds: Sequence[str] = KINDS) -> dict[tuple[str, str], bytes]:
    """The file of every chart, by the name of its table and its kind."""
    names = list(scores["answers"])
    drawn = [(own, draw_accuracy(own.groups, names)) for own in tables(scores) if own.groups]
    return {(own.name, kind): chart_file(figure, kind, own.title) for own, figure in drawn for kind in kinds}


def draw_accuracy(groups: Mapping[str, Sequence[Mapping[str, Any]]], names: Sequence[str]) -> Figure:
    """A line for each group with the points of all files, one below the other; dashed, 1/images where it is known."""
    labels = [f"{_cut(label)} ({own[0]['questions']})" for label, own in groups.items()]
    figure, axis = percent_chart(labels, "accuracy (%)", 3.2 + 0.075 * max(map(len, labels)), 0.16 + 0.16 * len(names))
    step = 0.7 / len(names)
    for place, own in enumerate(groups.values()):
        if (chance := own[0]["chance"]) is not None:
            axis.plot([100 * chance] * 2, [place - 0.45, place + 0.45], "--", color=GREY, linewidth=1)
        for n, found in enumerate(own):
            style = {"fmt": MARKERS[n % len(MARKERS)], "color": COLOURS[n % len(COLOURS)]}
            draw_interval(axis, place + step * (n - (len(own) - 1) / 2), found, "accuracy", **style)
    if len(names) > 1:
        columns = max(1, 44 // (4 + max(len(_cut(name)) for name in names)))
        legend = figure.legend(axis.containers[: len(names)], [" "] * len(names), loc="outside upper left",
                               ncols=columns, frameon=False, handletextpad=0.2)  # fmt: skip
        for text, name in zip(legend.get_texts(), names, strict=True):  # a legend leaves out names with "_" in front
            text.set(text=_cut(name), parse_math=False)
    return figure


def _cut(name: str) -> str:
    return name if len(name) <= LONGEST_LABEL else name[: LONGEST_LABEL - 1] + "…"


# ---- sample prompts


def _samples(
    models: Sequence[Model], questions: Sequence[Question], store: ImageStore, num_samples: int
) -> list[dict[str, Any]]:
    by_id = {question.id: question for question in questions}
    chosen = choose([model.rows for model in models], num_samples)
    samples = [_sample(models, place, by_id[models[0].rows[place].asked.id], store) for place in chosen]
    without = sum(sample["problem"] is not None for sample in samples)
    log.info("report: %d sample prompts%s", len(samples), f", {without} without pictures" if without else "")
    return samples


def choose(rows: Sequence[Sequence[Row]], num_samples: int) -> list[int]:
    """Places of the questions to show: first some of every format and outcome, then those with an attention map.

    An outcome is whether the first and the second file are right, and whether any answer is true of another image.
    Questions that a file has no answer to come last. The same rows give the same choice, in order of outcome
    (confusions, then disagreements, first) and format.
    """
    kinds = {place: _kind(own) for place, own in enumerate(zip(*rows, strict=True))}
    seen: Counter = Counter()  # outcomes are tuples and formats are numbers, so that one counter holds both

    def rank(kind: tuple) -> tuple:
        is_unanswered, has_no_map, outcome, image_type = kind
        is_covered = min(seen[outcome], seen[image_type]) > 0
        return is_unanswered, is_covered, has_no_map, seen[outcome] + seen[image_type], outcome, image_type

    chosen, waiting = [], {kind: [place for place in kinds if kinds[place] == kind] for kind in set(kinds.values())}
    while any(waiting.values()) and len(chosen) < num_samples:
        kind = min((kind for kind in waiting if waiting[kind]), key=rank)
        chosen.append(waiting[kind].pop(0))
        seen.update(kind[2:])
    return sorted(chosen, key=lambda place: (kinds[place][2:], place))


def _kind(own: Sequence[Row]) -> tuple[bool, bool, tuple[bool, ...], int]:
    """Unanswered, without a map, outcome, format. Of outcomes, confusions come first, then disagreements of the first
    two files, then what the first has wrong."""
    first, second = own[0].is_right, own[min(1, len(own) - 1)].is_right
    outcome = not any(map(is_confused, own)), first == second, first, second
    has_no_map = not any(row.given and row.given.extra.get("attention_map") for row in own)
    return any(row.given is None for row in own), has_no_map, outcome, FORMATS.index(own[0].asked.image_type)


def _sample(models: Sequence[Model], place: int, question: Question, store: ImageStore) -> dict[str, Any]:
    """What the page shows of one question; `problem` says why its pictures are missing."""
    pictures, boxes, problem = [], None, None
    try:
        pictures = [store.open(name) for name in question.images]
        boxes = outlined(question, pictures[0].size)
    except (ValueError, FileNotFoundError) as error:
        pictures, problem = [], str(error)
    draw = partial(_drawn, pictures, question.targets, boxes)
    return {
        "question": question,
        "asked": models[0].rows[place].asked,
        "about": image_names(t + 1 for t in question.targets) if question.targets else "",
        "text": re.sub(rf"(?:Image\d+:)?\s*{IMAGE}\s*", "", question.prompt) or question.prompt,
        "picture": draw(None) if pictures else None,
        "problem": problem,
        "answers": [_answered(model, model.rows[place], pictures, draw) for model in models],
    }


def _answered(model: Model, row: Row, pictures: Sequence[Image.Image], draw: Callable[[Any], str]) -> dict[str, Any]:
    """One model's answer; `map` is its attention drawn on the pictures, `problem` why its map could not be."""
    maps = row.given.extra.get("attention_map") if row.given and pictures else None
    problem = _bad_map(maps, [picture.size for picture in pictures]) if maps else None
    drawn = draw(maps) if maps and not problem else None
    return {"model": model, "row": row, "is_confused": is_confused(row), "map": drawn, "problem": problem}


def _drawn(pictures: Sequence[Image.Image], targets: Sequence[int], boxes: Sequence | None, maps: Any) -> str:
    height = int(PICTURE_WIDTH / sum(picture.width / picture.height for picture in pictures))
    file = io.BytesIO()
    draw_prompt(pictures, maps, targets, boxes, max(1, min(PICTURE_HEIGHT, height))).save(file, "jpeg", quality=85)
    return data_url(file.getvalue(), "jpeg")


def _bad_map(maps: Any, sizes: Sequence[tuple[int, int]]) -> str | None:
    """What keeps an `attention_map` from being drawn, None if nothing does."""
    if not isinstance(maps, list) or len(maps) != len(sizes):
        return f"`attention_map` must be a list with one map for each of the {len(sizes)} images"
    for n, (one, (width, height)) in enumerate(zip(maps, sizes, strict=True), 1):
        try:
            area, mass = np.array(one["area"], dtype=float).reshape(2, 2), np.array(one["mass"], dtype=float)
            is_drawable = mass.ndim == 2 and np.isfinite(mass).all() and mass.min() >= 0
            is_drawable &= ((area[1] > area[0]) & (area[1] - area[0] <= 2 * max(width, height))).all()
        except (KeyError, TypeError, ValueError):
            is_drawable = False
        if not is_drawable:
            box = f"`area`, [x0, y0, x1, y1] in px of the picture of {width} x {height} px"
            return f"`attention_map` of image {n} must have {box}, and `mass`, rows of equal length of numbers from 0"
    return None
