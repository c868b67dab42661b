"""LLaVA-OneVision: a picture alone is cut into tiles, one of several is padded to a square.

Source of the geometry: LLaVA-OneVision (arXiv 2408.03326), section 3.2, "Higher AnyRes". Spans are (from, to) in px.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava_onevision.modeling_llava_onevision import unpad_image

from llava.families.chat import ChatFamily
from llava.families.family import ImageTokens, areas_of, even_spans, miscounted, other_checkpoint, span_shares
from llava.families.llava15 import OLDER
from llava.records import IMAGE


@dataclass(frozen=True, eq=False)
class InterpolatedTokens(ImageTokens):
    """Tokens that end with a grid interpolated from a finer one, and a newline after each of its rows."""

    finer: Sequence[Float[Tensor, "_ 2"]]  # spans of its columns, and of its rows
    grid: tuple[int, int]  # columns and rows that are made of these

    def shares(self, axis: int, edges: Sequence[float] | Tensor) -> Float[Tensor, "P N"]:
        """See `ImageTokens`; those of the grid are the finer one's, interpolated as their features are."""
        found, (cols, rows) = super().shares(axis, edges), self.grid
        own = interpolate(span_shares(self.finer[axis], edges).T[None], size=self.grid[axis], mode="linear")[0].T
        found[-rows * (cols + 1) :].view(rows, cols + 1, -1)[:, : cols + axis] = own[:, None] if axis else own
        return found


class LlavaOneVision(ChatFamily):
    """See `Family`. A tile of `side` px has `rows` x `rows` patches, which leave out px at its right and below."""

    name = "LLaVA-OneVision"
    model_types = ("llava_onevision",)
    vectors = ("image_newline",)
    strategy = "full"  # SigLIP has no class token to leave out
    image_token = placeholder = IMAGE
    older = (*OLDER, (re.compile(r"^(model\.)?image_newline$"), "model.image_newline"))

    def __init__(self, config, tokenizer, image_processor, pad: bool | None = None):
        super().__init__(config, tokenizer, image_processor, pad)
        patch = config.vision_config.patch_size
        if not re.fullmatch(r"anyres_max_[1-9]\d*", config.vision_aspect_ratio):
            raise ValueError(f"vision_aspect_ratio is {config.vision_aspect_ratio!r}, not 'anyres_max_' and a number")
        self.side, self.rows = config.vision_config.image_size, config.vision_config.image_size // patch
        self.base, self.limit = self.rows**2, int(config.vision_aspect_ratio.rpartition("_")[2])  # patches, tiles
        self.tile = even_spans(0, self.rows * patch / self.side, self.rows)  # spans of a line's patches, side = 1
        made, grids = {*dict(image_processor.size).values()}, image_processor.image_grid_pinpoints
        if made != {self.side} or not grids or any(side % self.side for grid in grids for side in grid):
            raise other_checkpoint(f"tiles of {made} px on image_grid_pinpoints of {grids}", self.side)

    def check_processor(self, settings: Mapping[str, Any]) -> str | None:
        """What plain transformers would do wrong with a folder's processor_config.json; None: nothing."""
        if self.image_processor.image_grid_pinpoints != self.config.image_grid_pinpoints:
            return "image_grid_pinpoints of its pictures and its model differ: those of the pictures are used here"
        return miscounted(settings.get("num_image_tokens", self.base), self.base)

    def image(self, size: tuple[int, int], count: int = 1) -> ImageTokens:
        """Squashed to a tile, then all tiles as one grid with newline tokens; one of several: padded, one newline."""
        shown = size if count == 1 else (max(size), max(size))  # px of the stored picture and its padding
        whole = areas_of(*(self.tile * px - (px - own) // 2 for own, px in zip(size, shown, strict=True)))
        newline, lines, even = even_spans(0, size[0], 1), [], []  # a newline stands for the strip of its row
        if count > 1:
            areas = torch.cat([whole, areas_of(newline, even_spans(0, size[1], 1))])
            return ImageTokens((self.image_id,) * len(areas), areas, (self.rows, self.rows), size)
        canvas, left, grid = self._grid(size)
        for own, px, kept, made in zip(size, canvas, left, grid, strict=True):
            spans = (torch.arange(px // self.side)[:, None, None] + self.tile).flatten(0, 1) * self.side
            filled = min(px, math.ceil(own * min(canvas[0] / size[0], canvas[1] / size[1])))  # the rest is padding
            lines.append((spans.narrow(0, (len(spans) - kept) // 2, kept) - (px - filled) // 2) * own / filled)
            even.append(lines[-1] if made == kept else even_spans(lines[-1][0, 0], lines[-1][-1, 1], made))
        areas = torch.cat([whole, areas_of(torch.cat([even[0], newline]), even[1])])
        tokens = (self.image_id,) * len(areas), areas, (max(self.rows, left[1]), max(self.rows, left[0])), size
        return ImageTokens(*tokens) if grid == left else InterpolatedTokens(*tokens, lines, grid)

    def num_image_tokens(self, size: tuple[int, int] | None, count: int = 1) -> int:
        """As `image`, without the areas: asked for each picture of a data set at the start."""
        cols, rows = self._grid(size)[2] if count == 1 else (0, 1)
        return self.base + rows * (cols + 1)

    def patches(self, size: tuple[int, int] | None, count: int = 1) -> tuple[int, ...]:
        """Those of the whole picture, and of each tile of one that is alone."""
        return (self.base,) * (1 + (math.prod(self._grid(size)[0]) // self.side**2 if count == 1 else 0))

    def pixels(self, pictures: Sequence[Image.Image]) -> dict[str, Tensor]:
        """`pixel_values` (tiles of all pictures, 3, side, side), and which picture has what size and is alone."""
        found = self.image_processor(images=[list(pictures)], return_tensors="pt")
        return {**found, "pixel_values": found["pixel_values"].flatten(0, 1)}  # several have one tile each

    def encode(self, model, pixels: Mapping[str, Tensor]) -> Any:
        """What the language model reads of pictures. The model is told how they are cut: it has a list of its own."""
        model.config.image_grid_pinpoints = self.image_processor.image_grid_pinpoints
        return super().encode(model, pixels)

    def cap(self, max_image_tokens: int) -> None:
        """Leave out the grids of tiles that could cost more, in the model's config too. Raises ValueError."""
        grids, unit = self.image_processor.image_grid_pinpoints, self.side
        most = [self.base * (1 + min(y * x / unit**2, 1.21 * self.limit)) + y // unit * self.rows for y, x in grids]
        self.check_cap(max_image_tokens, int(min(most)))
        kept = [grid for grid, cost in zip(grids, most, strict=True) if cost <= max_image_tokens]
        self.image_processor.image_grid_pinpoints = self.config.image_grid_pinpoints = kept

    def _grid(self, size: tuple[int, int]) -> tuple[tuple[int, int], ...]:
        """Across and down: px of all tiles, patches left without padding, tokens made of these (without newlines)."""
        canvas = select_best_resolution(size[::-1], self.image_processor.image_grid_pinpoints)
        whole = torch.empty(1, *(px // self.side * self.rows for px in canvas), device="meta")
        rows, cols = unpad_image(whole, size[::-1]).shape[1:]
        ratio = math.sqrt(rows * cols / (self.limit * self.base))
        return canvas[::-1], (cols, rows), (int(cols // ratio), int(rows // ratio)) if ratio > 1.1 else (cols, rows)
