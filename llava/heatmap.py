"""Where an answer looked: attention mass on every patch, and its drawing on the original pictures."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageEnhance, ImageFont
from torch import Tensor
from transformers import LogitsProcessor

from llava.attention import mean_over_layers
from llava.generation import PromptBatch, Steer, generate
from llava.layout import PatchGrid

COLOURS = matplotlib.colormaps["inferno"]
OPACITY = 0.75  # of the hottest patch
OUTLINE = (0, 229, 255)  # cyan stands out on inferno and on most pictures
STRIP, GAP = 22, 8  # px of the line of text above a picture, and between pictures


class Forced(LogitsProcessor):
    """Lets `generate` say given tokens, so that the attention of an answer can be measured again."""

    def __init__(self, tokens: Sequence[int]):
        self.tokens = list(tokens)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores that leave one token."""
        forced = torch.full_like(scores, -torch.inf)
        forced[:, self.tokens.pop(0)] = 0.0
        return forced


def patch_masses(
    model, tokenizer, batch: PromptBatch, answer: Sequence[int], layers: Sequence[int], image_token: int,
    steer: Steer | None = None, heads: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """(image tokens,) mean attention mass on each image token of a batch of one prompt while `answer` is given.

    Mean over the rows that predict the answer's tokens, `layers` and `heads` (L, H; None: all): the mass of the
    attention ratio (design §4), with every image token a region of its own. The answer (token ids) is said again, under
    the same `steer`.
    """
    places = (batch.input_ids[0] == image_token).nonzero()[:, 0]
    patches = torch.zeros(1, batch.input_ids.shape[1], len(places))
    patches[0, places, torch.arange(len(places))] = 1.0
    regions = torch.cat([batch.regions[..., :2], patches], dim=2)
    batch = replace(batch, regions=regions, num_regions=(regions.shape[2],))
    settings = {"max_new_tokens": len(answer), "logits_processor": [Forced(answer)]}
    (again,) = generate(model, tokenizer, batch, layers, steer, heads, **settings)
    assert again.tokens == list(answer)
    return mean_over_layers(again.masses[:, 2:], heads)


def attention_map(masses: Tensor, sizes: Sequence[tuple[int, int]], grid: PatchGrid) -> list[dict[str, Any]]:
    """The masses as `attention_map` of an answer: per image the `area` in px of the stored picture that the patch grid
    covers, and the `mass` of its patches, row by row."""
    per_image = masses.view(len(sizes), grid.rows, grid.cols)
    return [
        {"area": [round(v, 2) for v in grid.area(size)], "mass": [[float(f"{v:.3g}") for v in row] for row in mass]}
        for size, mass in zip(sizes, per_image.tolist(), strict=True)
    ]


def draw_prompt(
    pictures: Sequence[Image.Image],
    maps: Sequence[dict] | None,
    target: int,
    box: Sequence[float] | None,
    height: int = 240,
) -> Image.Image:
    """The pictures of a prompt side by side, `height` px high, with the target outlined.

    `maps` are `attention_map` of the answer, drawn over the pictures on one scale of colour, with each image's share of
    the attention above it; None draws the pictures alone. `box` is the target in px of picture 0; None outlines the
    whole picture `target` (0-based).
    """
    shares = _shares(maps) if maps else None
    tiles = []
    for number, picture in enumerate(pictures):
        tile = picture.convert("RGB").resize((max(1, round(picture.width * height / picture.height)), height))
        if maps:
            hottest = max(np.max(one["mass"]) for one in maps) or 1.0
            tile = overlay(tile, maps[number], picture.size, hottest)
        if box is not None or number == target:
            scale = height / picture.height
            outline = [v * scale for v in box] if box is not None else [0, 0, *tile.size]
            _outline(tile, outline)
        label = f"Image{number + 1}" if len(pictures) > 1 else ""
        tiles.append(_captioned(tile, f"{label}  {shares[number]:.0%}".strip() if shares and label else label))
    sheet = Image.new("RGB", (sum(t.width for t in tiles) + GAP * (len(tiles) - 1), tiles[0].height), "white")
    x = 0
    for tile in tiles:
        sheet.paste(tile, (x, 0))
        x += tile.width + GAP
    return sheet


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
