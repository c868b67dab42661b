"""An answer as a piece of the page: its words, its numbers, and where it looked. Draws what a `Reply` holds."""

import io
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from matplotlib.colors import to_hex
from PIL import Image

from llava.endpoint import data_url
from llava.heatmap import COLOURS, overlay
from llava.vlm import Reply

HEIGHT = 320  # px of a drawn picture; the page shows it at 160 or more, screens of phones have two for one
SCALE = ", ".join(to_hex(COLOURS(v)) for v in np.linspace(0.15, 1, 8))  # of the colours, as the maps use them


def card(title: str, reply: Reply, layers: Sequence[int], note: str = "") -> str:
    """The HTML of one answer, measured in `layers`; `note`: what there is to say about it."""
    return _render(
        title=title, reply=reply, note=note, colours=SCALE, maps=maps(reply), parts=parts(reply),
        by_layer=list(zip(layers, reply.ratio_by_layer or (), strict=bool(reply.ratio_by_layer))),
        hottest=max(np.max(one["mass"]) for one in reply.maps) if reply.maps else None,
    )  # fmt: skip


def notice(title: str, note: str) -> str:
    """The HTML of a card without an answer."""
    return _render(title=title, reply=None, note=note)


def about(*texts: str) -> str:
    """The HTML of a line of short texts."""
    return f'<p class="about">{"".join(f"<span>{escape(text)}</span>" for text in texts)}</p>'


def parts(reply: Reply) -> list[dict[str, Any]]:
    """What the prompt tells apart: `name`, `share` of the image attention, and whether it `is_target`."""
    shares = reply.shares or []
    names = [f"Image{number}" for number in range(1, len(shares) + 1)]
    if reply.question.image_type == "pip":
        names = ["inner picture", "outer picture"]
    targets = reply.question.targets
    return [
        {"name": name, "share": share, "is_target": number in targets and len(shares) > 1}
        for number, (name, share) in enumerate(zip(names, shares, strict=True))
    ]


def maps(reply: Reply) -> list[dict[str, Any]]:
    """Each picture under its attention, all on one scale of colours: `picture` (a data URL) and `name`."""
    if len(reply.pictures) == 1:
        return [{"picture": _jpeg(reply.heatmap(HEIGHT)), "name": "", "is_target": False}]
    hottest = max(np.max(one["mass"]) for one in reply.maps) or 1.0
    drawn = []
    for part, picture, one in zip(parts(reply), reply.pictures, reply.maps, strict=True):
        tile = picture.resize((max(1, round(picture.width * HEIGHT / picture.height)), HEIGHT))
        drawn.append({"picture": _jpeg(overlay(tile, one, picture.size, hottest)), **part})
    return drawn


def _jpeg(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, "jpeg", quality=90)
    return data_url(file.getvalue(), "jpeg")


def _render(**values: Any) -> str:
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template("card.html.j2").render(**values)
