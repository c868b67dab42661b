"""Where an answer looked: attention mass on every image token, drawn on the original pictures."""

import textwrap
from collections.abc import Collection, Sequence
from typing import Any

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFont
from torch import Tensor

from llava.families import ImageTokens

COLOURS = matplotlib.colormaps["inferno"]
OPACITY = 0.75  # of the hottest patch
OUTLINE = (0, 229, 255)  # cyan stands out on inferno and on most pictures
SCALE = (120, 12)  # px of the scale of colours
STRIP, GAP = 22, 8  # px of the line of text above a picture, and between pictures


def attention_map(masses: Tensor, images: Sequence[ImageTokens]) -> list[dict[str, Any]]:
    """The mass (P,) of every image token as `attention_map` of an answer: per image the `area` in px of the stored
    picture that its tokens cover, and the `mass` on it as a raster, row by row."""
    parts = masses.split([len(image.areas) for image in images])
    return [
        {"area": [round(v, 2) for v in image.extent],
         "mass": [[float(f"{v:.3g}") for v in row] for row in image.raster(mass).tolist()]}
        for mass, image in zip(parts, images, strict=True)
    ]  # fmt: skip


def draw_prompt(
    pictures: Sequence[Image.Image],
    maps: Sequence[dict] | None,
    targets: Collection[int],
    boxes: Sequence[Sequence[float]] | None,
    height: int = 240,
) -> Image.Image:
    """The pictures of a prompt side by side, `height` px high, with every target outlined.

    `maps` are `attention_map` of the answer, drawn over the pictures on one scale of colour, with each image's share of
    the attention above it; None draws the pictures alone. `boxes` are the targets in px of picture 0; None outlines the
    whole pictures `targets` (0-based).
    """
    shares = _shares(maps) if maps else None
    tiles = []
    for number, picture in enumerate(pictures):
        tile = picture.convert("RGB").resize((max(1, round(picture.width * height / picture.height)), height))
        if maps:
            hottest = max(np.max(one["mass"]) for one in maps) or 1.0
            tile = overlay(tile, maps[number], picture.size, hottest)
        scale, is_whole = height / picture.height, boxes is None and number in targets
        for box in [[0, 0, *tile.size]] if is_whole else [[v * scale for v in box] for box in boxes or ()]:
            _outline(tile, box)
        label = f"Image{number + 1}" if len(pictures) > 1 else ""
        tiles.append(_captioned(tile, f"{label}  {shares[number]:.0%}".strip() if shares and label else label))
    sheet = Image.new("RGB", (sum(t.width for t in tiles) + GAP * (len(tiles) - 1), tiles[0].height), "white")
    x = 0
    for tile in tiles:
        sheet.paste(tile, (x, 0))
        x += tile.width + GAP
    return sheet


def explained(sheet: Image.Image, texts: Sequence[str], hottest: float) -> Image.Image:
    """A drawn prompt with texts above it, and below it the scale of its colours, whose end is the mass `hottest`."""
    font, columns = ImageFont.load_default(size=14), max(20, sheet.width // 8)
    lines = [line for text in texts for line in textwrap.wrap(textwrap.shorten(text, 8 * columns), columns)]
    end = f"{hottest:.2g} of the attention on one patch"
    width = max(sheet.width, SCALE[0] + 40 + round(font.getlength(end)))
    page = Image.new("RGB", (width, STRIP * len(lines) + GAP + sheet.height + GAP + STRIP), "white")
    draw = ImageDraw.Draw(page)
    for number, line in enumerate(lines):
        draw.text((2, STRIP * number + 3), line, fill="black", font=font)
    page.paste(sheet, (0, STRIP * len(lines) + GAP))
    bar = COLOURS(np.linspace(0.15, 1, SCALE[0]))[None, :, :3].repeat(SCALE[1], axis=0)
    y = page.height - STRIP
    page.paste(Image.fromarray((255 * bar).round().astype(np.uint8)), (16, y + 4))
    draw.text((2, y + 2), "0", fill="black", font=font)
    draw.text((SCALE[0] + 22, y + 2), end, fill="black", font=font)
    return page


def overlay(tile: Image.Image, one: dict, stored: tuple[int, int], hottest: float) -> Image.Image:
    """A resized picture with its patches' mass on top; `stored` is its size before, `hottest` the end of the scale."""
    scale = tile.width / stored[0], tile.height / stored[1]
    x0, y0, x1, y1 = (round(v * scale[n % 2]) for n, v in enumerate(one["area"]))
    mass = np.asarray(one["mass"], dtype=np.float32) / hottest
    sheet = Image.new("F", tile.size)
    sheet.paste(Image.fromarray(mass).resize((max(1, x1 - x0), max(1, y1 - y0)), Image.Resampling.BILINEAR), (x0, y0))
    strength = np.asarray(sheet).clip(0, 1)[..., None]
    pale = np.asarray(ImageEnhance.Color(tile).enhance(0.6), dtype=np.float32) * 0.8  # the heat stands out on it
    alpha = OPACITY * np.sqrt(strength)
    blended = pale * (1 - alpha) + 255 * COLOURS(0.15 + 0.85 * strength[..., 0])[..., :3] * alpha
    return Image.fromarray(blended.round().clip(0, 255).astype(np.uint8))


def _shares(maps: Sequence[dict]) -> list[float]:
    totals = [float(np.sum(one["mass"])) for one in maps]
    return [total / (sum(totals) or 1.0) for total in totals]


def _outline(tile: Image.Image, box: Sequence[float]) -> None:
    x0, y0, x1, y1 = (round(v) for v in box)
    draw = ImageDraw.Draw(tile)
    draw.rectangle((x0, y0, x1 - 1, y1 - 1), outline="black", width=5)
    draw.rectangle((x0 + 1, y0 + 1, x1 - 2, y1 - 2), outline=OUTLINE, width=3)


def _captioned(tile: Image.Image, text: str) -> Image.Image:
    if not text:
        return tile
    sheet = Image.new("RGB", (tile.width, tile.height + STRIP), "white")
    ImageDraw.Draw(sheet).text((2, 3), text, fill="black", font=ImageFont.load_default(size=14))
    sheet.paste(tile, (0, STRIP))
    return sheet
