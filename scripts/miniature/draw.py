"""Pictures of the miniature world: scenes, collages and pictures inside pictures, drawn with pillow.

Drawing is deterministic: the same scene gives the same pixels. All sides and boxes are in pixels.
"""

import numpy as np
from PIL import Image, ImageDraw

from scripts.miniature.world import Scene

SIDE = 72  # of a stored picture; with patches of 12 it makes 6 x 6 image tokens
INNER_SIDE = 50  # of the picture pasted in the centre of another
GRID = (2, 2)  # rows and columns of a collage
OVERSAMPLING = 2  # shapes are drawn larger and reduced, so that their edges are smooth
NOISE = 4.0  # standard deviation of the pixel noise, of 255
TINT = 12  # largest shift of a colour's channels from its name's value, of 255

RGB = {
    "red": (214, 40, 40), "green": (40, 160, 60), "blue": (40, 80, 220),
    "yellow": (240, 210, 30), "purple": (130, 40, 160), "orange": (245, 130, 20),
    "white": (245, 245, 245), "grey": (140, 140, 140), "black": (20, 20, 20),
    "pink": (250, 180, 200), "brown": (115, 75, 45),
}  # fmt: skip
SPOTS = {  # centres of the shapes, as shares of the side
    1: [(0.5, 0.5)],
    2: [(0.72, 0.3), (0.28, 0.7)],
    3: [(0.5, 0.27), (0.27, 0.73), (0.73, 0.73)],
    4: [(0.27, 0.27), (0.73, 0.27), (0.27, 0.73), (0.73, 0.73)],
}
RADIUS = {1: 0.33, 2: 0.24, 3: 0.21, 4: 0.21}
CORNERS = [(0.08, 0.08), (0.92, 0.92), (0.92, 0.08), (0.08, 0.92)]
CORNER_RADIUS = 0.075
DIGITS = {  # 3 x 5 dots a digit, row by row
    1: "010110010010111", 2: "111001111100111", 3: "111001111001111", 4: "101101111001001",
}  # fmt: skip


def draw_single(scene: Scene) -> Image.Image:
    """The scene as a square picture of its own."""
    return _add_noise(_draw_scene(scene, SIDE), scene.seed)


def draw_collage(scenes: tuple[Scene, ...]) -> Image.Image:
    """One picture with a numbered scene in each cell of GRID, row by row."""
    canvas, cell = Image.new("RGB", (SIDE, SIDE)), SIDE // GRID[1]
    for index, scene in enumerate(scenes):
        left, top = cell_box(index)[:2]
        canvas.paste(_draw_scene(scene, cell), (left, top))
        _draw_label(canvas, index + 1, left, top, cell)
    return _add_noise(canvas, scenes[0].seed)


def draw_pip(inner: Scene, outer: Scene) -> Image.Image:
    """One picture with another pasted in its centre.

    The outer scene keeps its shapes in the corners, or the inner picture would hide what they are.
    """
    canvas = _draw_scene(outer, SIDE, corners=True)
    left, top, right, bottom = inner_box()
    ImageDraw.Draw(canvas).rectangle((left - 1, top - 1, right, bottom), fill="white")
    canvas.paste(_draw_scene(inner, INNER_SIDE), (left, top))
    return _add_noise(canvas, inner.seed)


def cell_box(index: int) -> list[int]:
    """Box [x0, y0, x1, y1] of the collage's cell number `index`, counted from 0."""
    row, column = divmod(index, GRID[1])
    cell = SIDE // GRID[1]
    return [column * cell, row * cell, (column + 1) * cell, (row + 1) * cell]


def inner_box() -> list[int]:
    """Box [x0, y0, x1, y1] of the inner picture."""
    start = (SIDE - INNER_SIDE) // 2
    return [start, start, start + INNER_SIDE, start + INNER_SIDE]


def _draw_scene(scene: Scene, side: int, corners: bool = False) -> Image.Image:
    rng = np.random.default_rng(scene.seed)
    large = side * OVERSAMPLING
    canvas = Image.new("RGB", (large, large), _tinted(scene.background, rng))
    draw = ImageDraw.Draw(canvas)
    _draw_pattern(draw, scene, large, rng)
    count = scene.count_number
    spots, radius = (CORNERS[:count], CORNER_RADIUS) if corners else (SPOTS[count], RADIUS[count])
    fill = _tinted(scene.colour, rng)
    for x, y in spots:
        jitter = rng.uniform(-1, 1, 2) * (0.0 if corners else 0.04)
        size = radius * large * rng.uniform(0.9, 1.05)
        _draw_shape(draw, scene.shape, (x + jitter[0]) * large, (y + jitter[1]) * large, size, fill)
    return canvas.reduce(OVERSAMPLING)


def _tinted(name: str, rng: np.random.Generator) -> tuple[int, ...]:
    shifted = np.array(RGB[name]) + rng.integers(-TINT, TINT + 1, 3)
    return tuple(int(value) for value in shifted.clip(0, 255))


def _draw_pattern(draw: ImageDraw.ImageDraw, scene: Scene, side: int, rng: np.random.Generator) -> None:
    """Stripes, dots or checks in a darker or lighter shade of the background, about 8 px apart."""
    base = np.array(RGB[scene.background])
    ink = tuple(int(value) for value in (base * 0.6 if base.mean() > 90 else base + 75))
    step = 8 * OVERSAMPLING
    half = step // 2
    start_x, start_y = (int(value) for value in rng.integers(-step, 0, 2))
    if scene.pattern == "stripes":
        for y in range(start_y, side, step):
            draw.rectangle((0, y, side, y + half - 2), fill=ink)
    elif scene.pattern in ("dots", "checks"):
        for row, y in enumerate(range(start_y, side, half if scene.pattern == "checks" else step)):
            shift = half if scene.pattern == "checks" and row % 2 else 0
            for x in range(start_x + shift - step, side, step):
                if scene.pattern == "dots":
                    draw.ellipse((x, y, x + half - 1, y + half - 1), fill=ink)
                else:
                    draw.rectangle((x, y, x + half - 1, y + half - 1), fill=ink)


def _draw_shape(
    draw: ImageDraw.ImageDraw, shape: str, x: float, y: float, radius: float, fill: tuple[int, ...]
) -> None:
    around = (x - radius, y - radius, x + radius, y + radius)
    if shape == "circle":
        draw.ellipse(around, fill=fill)
    elif shape == "square":
        half = radius * 0.85
        draw.rectangle((x - half, y - half, x + half, y + half), fill=fill)
    elif shape == "cross":
        thin = radius * 0.3
        draw.rectangle((x - radius, y - thin, x + radius, y + thin), fill=fill)
        draw.rectangle((x - thin, y - radius, x + thin, y + radius), fill=fill)
    elif shape == "triangle":
        foot = y + radius * 0.85
        draw.polygon([(x, y - radius), (x + radius, foot), (x - radius, foot)], fill=fill)
    else:  # a ring
        draw.ellipse(around, outline=fill, width=max(1, round(radius * 0.45)))


def _draw_label(canvas: Image.Image, number: int, left: int, top: int, cell: int) -> None:
    """The cell's number in its top left corner, and a line around the cell."""
    draw = ImageDraw.Draw(canvas)
    draw.rectangle((left, top, left + cell - 1, top + cell - 1), outline="white")
    draw.rectangle((left, top, left + 8, top + 12), fill="white")
    for index, dot in enumerate(DIGITS[number]):
        if dot == "1":
            row, column = divmod(index, 3)
            x, y = left + 2 + 2 * column, top + 2 + 2 * row
            draw.rectangle((x, y, x + 1, y + 1), fill="black")


def _add_noise(picture: Image.Image, seed: int) -> Image.Image:
    pixels = np.asarray(picture, dtype=np.float32)
    noise = np.random.default_rng(seed).standard_normal(pixels.shape, dtype=np.float32) * NOISE
    return Image.fromarray((pixels + noise).clip(0, 255).astype(np.uint8))
