"""The three formats: sequences of pictures, numbered collages, and pictures in the centre of other pictures.

Collages have the geometry of the published data: 448 px cells below 40 px strips for labels.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from data_gen.gen_instruction.companions import Member
from data_gen.sources import Source
from llava.regions import CELL, MARGIN, PIP_SHARE

FORMATS = ("sequence", "collage", "pip")
GRIDS = {2: (1, 2), 3: (1, 3), 4: (2, 2), 6: (2, 3), 9: (3, 3)}  # pictures of a collage: rows, cols
LABEL_PX = 34  # the largest size of pillow's own font that stays within the strip
LABEL_LEFT = 20  # px right of the cell's edge

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Drawn:
    """The pictures of a prompt, put together."""

    members: dict[int, Member]  # by position, in the order they came; of collages without their pixels
    picture: Image.Image | None  # None for a sequence, whose pictures stay as they are
    fields: dict[str, Any]  # of the record, about the target

    @property
    def sources(self) -> list[Source]:
        """Where the pictures are from, in their order."""
        return [self.members[position].source for position in range(len(self.members))]


def positions(first: Sequence[int], num_pictures: int) -> list[int]:
    """Where the pictures go, from 0, that come first, then where their companions go."""
    return [*first, *(position for position in range(num_pictures) if position not in first)]


def put_together(image_type: str, first: Sequence[int], num_pictures: int, found: Iterable[Member]) -> Drawn:
    """A prompt's pictures: `found` gives those asked about `first`. Those of a collage are shrunk one by one."""
    placed = zip(positions(first, num_pictures), found, strict=True)
    if image_type == "sequence":
        return Drawn(dict(placed), None, {})
    if image_type == "pip":
        members = dict(placed)
        picture, box = paste_inside(members[0].picture.pixels, members[1].picture.pixels)
        return Drawn(members, picture, {"target_box": box})
    collage, members, boxes = Collage(num_pictures), {}, {}
    for position, member in placed:
        boxes[position] = collage.paste(position, member.picture.pixels)
        members[position] = replace(member, picture=None)
    box = {"target_box": boxes[first[0]]} if len(first) == 1 else {}
    return Drawn(members, collage.canvas, box | {"grid": collage.grid})


class Collage:
    """A white canvas with a label above every cell; pictures are pasted one by one."""

    def __init__(self, num_pictures: int):
        self.grid = GRIDS[num_pictures]
        self.canvas = Image.new("RGB", canvas_size(self.grid), "white")
        for cell in range(num_pictures):
            x, y = corner(self.grid, cell)
            self.canvas.paste(_label(cell + 1), (x, y - MARGIN))

    def paste(self, cell: int, picture: Image.Image) -> Box:
        """Shrink or enlarge the picture into a cell, top left; the box in px that it covers."""
        width, height = fitted(picture.size)
        x, y = corner(self.grid, cell)
        self.canvas.paste(picture.resize((width, height), Image.Resampling.LANCZOS), (x, y))
        return x, y, x + width, y + height


def canvas_size(grid: tuple[int, int]) -> tuple[int, int]:
    """(width, height) in px: margins between columns, a strip above every row."""
    rows, cols = grid
    return CELL * cols + MARGIN * (cols - 1), (CELL + MARGIN) * rows


def corner(grid: tuple[int, int], cell: int) -> tuple[int, int]:
    """(x, y) in px of a cell's top left corner, cells counted from 0 row by row."""
    row, col = divmod(cell, grid[1])
    return (CELL + MARGIN) * col, MARGIN + (CELL + MARGIN) * row


def fitted(size: tuple[int, int]) -> tuple[int, int]:
    """(width, height) with the longer side as long as a cell, the other one rounded down, but at least 1 px."""
    width, height = size
    longer = max(width, height)
    return max(1, width * CELL // longer), max(1, height * CELL // longer)


@cache
def _label(number: int) -> Image.Image:
    """The strip above a cell. Drawn once: letters take longer than all other pasting."""
    strip = Image.new("RGB", (CELL, MARGIN), "white")
    font = ImageFont.load_default(size=LABEL_PX)
    ImageDraw.Draw(strip).text((LABEL_LEFT, 0), f"Image{number}", fill="black", font=font)
    return strip


def paste_inside(inner: Image.Image, outer: Image.Image) -> tuple[Image.Image, Box]:
    """The outer picture with the inner one on it, and the box in px that the inner one covers."""
    box = inner_box(inner.size, outer.size)
    canvas = outer.copy()
    canvas.paste(inner.resize((box[2] - box[0], box[3] - box[1]), Image.Resampling.LANCZOS), box[:2])
    return canvas, box


def inner_box(inner: tuple[int, int], outer: tuple[int, int]) -> Box:
    """Where an inner picture lies: as large as fits into 0.7 of the outer width and height, aspect kept, centred.

    Small pictures are enlarged. Sizes are (width, height); sides are rounded down, as in the published data.
    """
    aspect = inner[0] / inner[1]
    width = outer[0] * PIP_SHARE
    if width / aspect <= outer[1] * PIP_SHARE:
        w = max(1, int(width))
        h = max(1, int(w / aspect))
    else:
        h = max(1, int(outer[1] * PIP_SHARE))
        w = max(1, int(h * aspect))
    x, y = (outer[0] - w) // 2, (outer[1] - h) // 2
    return x, y, x + w, y + h
