"""One self-contained HTML page of the scores: tables, plots and sample prompts, nothing loaded from elsewhere."""

import io
import logging
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup, escape
from PIL import Image

from inference.llava_hound_dpo.llm_judge import RUBRICS, WITHOUT
from inference.llava_hound_dpo.summary import Row, groupings, is_confused
from llava.endpoint import data_url
from llava.heatmap import draw_prompt
from llava.image import ImageStore
from llava.records import FORMATS, IMAGE, Answer, Question
from llava.regions import needs_sizes, target_box

log = logging.getLogger(__name__)

TEMPLATE = "report.html.j2"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe and Ito: safe if colour-blind
GLYPHS = "●■▲◆▼"
PICTURE_HEIGHT, PICTURE_WIDTH = 240, 1000  # px of a prompt's pictures, and of all of them side by side
LONGEST = 1000  # characters shown of a text


@dataclass(frozen=True)
class Model:
    """An answers file: its scores, its judged rows, and the sign that stands for it in plots and tables."""

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
) -> str:
    """The page. `rows` has the judged rows of each answers file of `scores`, by its name there.

    Sample prompts are drawn only with the test set's `questions` and the `store` of its pictures; without them the page
    says how to get them.
    """
    models = [
        Model(name, found, rows[name], COLOURS[number % len(COLOURS)], GLYPHS[number % len(GLYPHS)])
        for number, (name, found) in enumerate(scores["answers"].items())
    ]
    return _template(TEMPLATE).render(
        scores=scores,
        models=models,
        grades=_grades(models),
        charts=groupings(scores["answers"]),
        samples=_samples(models, questions, store, num_samples) if questions and store else None,
    )


def markdown(scores: dict[str, Any]) -> str:
    """The scores as Markdown: accuracy by group, counts, comparisons, and what a judge said."""
    names = {"rubrics": RUBRICS, "verdicts": ("judged", *WITHOUT)}
    return _template("scores.md.j2").render(scores=scores, groupings=groupings(scores["answers"]), **names)


def _template(name: str) -> jinja2.Template:
    is_page = name == TEMPLATE
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=is_page,  # questions and answers may hold anything
        undefined=jinja2.StrictUndefined if is_page else jinja2.ChainableUndefined,  # "-": not in every file
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": _percent,
        "number": _number,
        "interval": _interval,
        "cell": lambda text: text.replace("|", "\\|"),
        "extract": lambda name, found: found[name],
        "shorten": _shorten,
        "breakable": _breakable,
    }
    return environment.get_template(name)


def _percent(value: Any, form: str = ".1f", unit: str = "") -> str:
    return format(100 * value, form) + unit if isinstance(value, int | float) else "-"


def _number(value: Any, form: str = ".3f") -> str:
    return format(value, form) if isinstance(value, int | float) else "-"


def _interval(found: dict[str, float] | None, name: str, form: str, factor: float = 1) -> str:
    """A number with its 95 % interval."""
    if not found:
        return "-"
    value, low, high = (format(factor * found[key], form) for key in (name, "low", "high"))
    return f"{value} [{low}, {high}]"


def _shorten(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} … ({len(text) - LONGEST} more characters)"


def _breakable(name: str) -> Markup:
    """A name that a line may break after its separators only, and not in the middle of a word."""
    return Markup(re.sub(r"([_\-./\\])(?=\w)", r"\1<wbr>", str(escape(name))))


def _grades(models: Sequence[Model]) -> dict[str, Any] | None:
    """What a judge said: rubrics, and by model its grades and counts; None where no answers file was judged."""
    said = {model.name: model.scores["judge"]["overall"] for model in models if "judge" in model.scores}
    grades = {name: {k: v for k, v in own.items() if isinstance(v, dict)} for name, own in said.items()}
    counts = {name: {k: v for k, v in own.items() if isinstance(v, int)} for name, own in said.items()}
    rubrics = list(dict.fromkeys(rubric for own in grades.values() for rubric in own))
    return {"rubrics": rubrics, "of": grades, "counts": counts} if said else None


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
    kinds = [_kind(own) for own in zip(*rows, strict=True)]
    waiting: dict[tuple, list[int]] = {}
    for place, kind in enumerate(kinds):
        waiting.setdefault(kind, []).append(place)
    seen: Counter = Counter()  # outcomes are tuples and formats are numbers, so that one counter holds both

    def rank(kind: tuple) -> tuple:
        is_unanswered, has_no_map, outcome, image_type = kind
        is_covered = min(seen[outcome], seen[image_type]) > 0
        return is_unanswered, is_covered, has_no_map, seen[outcome] + seen[image_type], outcome, image_type

    chosen = []
    while waiting and len(chosen) < num_samples:
        kind = min(waiting, key=rank)
        chosen.append(waiting[kind].pop(0))
        seen.update(kind[2:])
        if not waiting[kind]:
            del waiting[kind]
    return sorted(chosen, key=lambda place: (kinds[place][2:], place))


def _kind(own: Sequence[Row]) -> tuple[bool, bool, tuple[bool, ...], int]:
    """Unanswered, without a map, outcome, format. Of outcomes, confusions come first, then disagreements of the first
    two files, then what the first has wrong."""
    first, second = own[0].is_right, own[min(1, len(own) - 1)].is_right
    outcome = not any(map(is_confused, own)), first == second, first, second
    is_unanswered, has_no_map = any(row.given is None for row in own), not any(_map_of(row.given) for row in own)
    return is_unanswered, has_no_map, outcome, FORMATS.index(own[0].asked.image_type)


def _map_of(given: Answer | None) -> Any:
    return given.extra.get("attention_map") if given else None


def _sample(models: Sequence[Model], place: int, question: Question, store: ImageStore) -> dict[str, Any]:
    """What the page shows of one question; `problem` says why its pictures are missing."""
    pictures, box, problem = [], None, None
    try:
        pictures = [store.open(name) for name in question.images]
        box = target_box(question, pictures[0].size) if needs_sizes(question) else None
    except (ValueError, FileNotFoundError) as error:
        problem = str(error)
    drawn = None if problem else _drawn(pictures, None, question, box)
    return {
        "question": question,
        "asked": models[0].rows[place].asked,
        "text": re.sub(rf"(?:Image\d+:)?\s*{IMAGE}\s*", "", question.prompt) or question.prompt,
        "picture": drawn,
        "problem": problem,
        "answers": [_answered(model, model.rows[place], question, pictures if drawn else [], box) for model in models],
    }


def _answered(
    model: Model, row: Row, question: Question, pictures: Sequence[Image.Image], box: Sequence[float] | None
) -> dict[str, Any]:
    """One model's answer; `map` is its attention drawn on the pictures, `problem` why its map could not be."""
    drawn = problem = None
    if pictures and (maps := _map_of(row.given)):
        problem = _bad_map(maps, [picture.size for picture in pictures])
        drawn = None if problem else _drawn(pictures, maps, question, box)
    return {"model": model, "row": row, "is_confused": is_confused(row), "map": drawn, "problem": problem}


def _drawn(
    pictures: Sequence[Image.Image], maps: Sequence[dict] | None, question: Question, box: Sequence[float] | None
) -> str:
    widths = sum(picture.width / picture.height for picture in pictures)
    height = max(1, min(PICTURE_HEIGHT, int(PICTURE_WIDTH / widths)))
    file = io.BytesIO()
    draw_prompt(pictures, maps, question.target, box, height).save(file, "jpeg", quality=85)
    return data_url(file.getvalue(), "jpeg")


def _bad_map(maps: Any, sizes: Sequence[tuple[int, int]]) -> str | None:
    """What keeps an `attention_map` from being drawn, None if nothing does."""
    if not isinstance(maps, list) or len(maps) != len(sizes):
        return f"`attention_map` must be a list with one map for each of the {len(sizes)} images"
    for number, (one, size) in enumerate(zip(maps, sizes, strict=True), 1):
        try:
            area, mass = np.asarray(one["area"], dtype=float), np.asarray(one["mass"], dtype=float)
        except (KeyError, TypeError, ValueError):
            return f"`attention_map` of image {number} must have `area` and `mass` in rows of equal length"
        if mass.ndim != 2 or not mass.size or not np.isfinite(mass).all() or mass.min() < 0:
            return f"`mass` of image {number} must be rows of numbers from 0"
        sides = area[2:] - area[:2] if area.shape == (4,) else np.array([np.nan])
        if not np.isfinite(sides).all() or sides.min() <= 0 or sides.max() > 2 * max(size):
            return f"`area` of image {number} must be [x0, y0, x1, y1] in px of the picture of {size[0]} x {size[1]} px"
    return None
