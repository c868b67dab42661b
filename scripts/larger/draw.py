"""Pictures of the larger world: emoji on white, collages and pictures inside pictures. Sides and boxes are in pixels.

Sides are multiples of the vision tower's patch, so that no cell and no inner picture cuts one.
"""

import numpy as np
from PIL import Image, ImageDraw

from scripts.larger.world import Scene
from scripts.miniature.draw import DIGITS, cell_box, cell_side, inner_box

WHITE = (255, 255, 255)
PATCH = 14
SIDE = 12 * PATCH  # of a stored picture; 12 x 12 image tokens, 6 x 6 for a collage's cell
INNER_SIDE = 6 * PATCH  # of the picture pasted in the centre of another
CORNER = (SIDE - INNER_SIDE) // 2  # what is left around it
SIZES = (0.75, 0.95)  # of a glyph, as a share of its square
TURN = 12.0  # degrees, at most, either way
DOT = 3  # px of a label's dots


def draw_single(scene: Scene) -> Image.Image:
    """The glyph as a square picture of its own."""
    return _draw_scene(scene, SIDE)


def draw_collage(scenes: tuple[Scene, ...], grid: tuple[int, int]) -> Image.Image:
    """One picture with a numbered glyph in each cell, row by row."""
    cell = cell_side(grid, SIDE)
    canvas = Image.new("RGB", (grid[1] * cell, grid[0] * cell), WHITE)
    for index, scene in enumerate(scenes):
        left, top = cell_box(grid, index, SIDE)[:2]
        canvas.paste(_draw_scene(scene, cell), (left, top))
        _draw_label(canvas, index + 1, left, top, cell)
    return canvas


def draw_pip(inner: Scene, outer: Scene) -> Image.Image:
    """One picture with another pasted in its centre; the outer one has its glyph in every corner, or it were hidden."""
    canvas = Image.new("RGB", (SIDE, SIDE), WHITE)
    corner = _draw_scene(outer, CORNER)
    for left in (0, SIDE - CORNER):
        for top in (0, SIDE - CORNER):
            canvas.paste(corner, (left, top))
    left, top, right, bottom = inner_box(SIDE, INNER_SIDE)
    canvas.paste(_draw_scene(inner, INNER_SIDE), (left, top))
    ImageDraw.Draw(canvas).rectangle((left, top, right - 1, bottom - 1), outline="black")
    return canvas


def _draw_scene(scene: Scene, side: int) -> Image.Image:
    """The glyph on white, its size, place and turn decided by the scene's seed."""
    rng = np.random.default_rng(scene.seed)
    size = round(side * rng.uniform(*SIZES))
    left, top = (int(value) for value in rng.integers(0, side - size + 1, 2))
    turned = scene.picture().rotate(rng.uniform(-TURN, TURN), Image.Resampling.BICUBIC, expand=True)
    glyph = turned.resize((size, size), Image.Resampling.BICUBIC)
    canvas = Image.new("RGBA", (side, side), (*WHITE, 255))
    canvas.alpha_composite(glyph, (left, top))
    return canvas.convert("RGB")


def _draw_label(canvas: Image.Image, number: int, left: int, top: int, cell: int) -> None:
    """The cell's number in its top left corner, black on a white plate, and a line around the cell."""
    draw = ImageDraw.Draw(canvas)
    draw.rectangle((left, top, left + cell - 1, top + cell - 1), outline="grey")
    draw.rectangle((left, top, left + 5 * DOT, top + 7 * DOT), fill=WHITE, outline="grey")
    for index, dot in enumerate(DIGITS[number]):
        if dot == "1":
            row, column = divmod(index, 3)
            x, y = left + DOT * (1 + column), top + DOT * (1 + row)
            draw.rectangle((x, y, x + DOT - 1, y + DOT - 1), fill="black")
