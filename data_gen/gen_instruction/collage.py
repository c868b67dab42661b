"""Collages: numbered pictures in one. Geometry of the published data: 448 px cells below 40 px strips for labels."""

from functools import cache

from PIL import Image, ImageDraw, ImageFont

from llava.regions import CELL, MARGIN

GRIDS = {2: (1, 2), 3: (1, 3), 4: (2, 2), 6: (2, 3), 9: (3, 3)}  # pictures: rows, cols
# Published collages of each size. One record asks: counted before those with bounding boxes were dropped.
SHARES = {2: 26_000, 3: 7_500, 4: 7_500, 6: 6_300, 9: 6_519}
SHARES_MIXED = {2: 48_000, 3: 14_000, 4: 14_000, 6: 7_000, 9: 7_000}
ASKING_MIXED = {2: 1, 3: 2, 4: 2, 6: 3, 9: 3}  # records that ask in a collage of each size
LABEL_PX = 34  # the largest size of pillow's own font that stays within the strip
LABEL_LEFT = 20  # px right of the cell's edge

Box = tuple[int, int, int, int]


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
