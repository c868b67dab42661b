"""Geometry: which image tokens a prompt points at.

Letters in tensor names: P patches of one image, R regions (0 = target, 1 = all image tokens).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from llava.records import Prompt

CELL, MARGIN = 448, 40  # px of the published collages
PIP_SHARE = 0.7  # the inner picture fits into this share of the outer one


@dataclass(frozen=True)
class PatchGrid:
    """How the image processor maps pixels of a stored image onto image tokens."""

    rows: int
    cols: int
    patch: int  # px of the model input per patch
    pad: bool  # padded to a square first (`image_aspect_ratio=pad`)
    shortest_edge: int | None  # resized to this, aspect kept ...
    size: tuple[int, int] | None  # ... or to exactly (height, width)
    crop: tuple[int, int] | None  # then this (height, width) is cut from the centre

    @classmethod
    def of(cls, image_processor, vision_config, pad: bool) -> "PatchGrid":
        """The grid of a checkpoint. Raises ValueError if the processor's result does not fit the vision tower."""
        side, patch = vision_config.image_size, vision_config.patch_size
        size = dict(image_processor.size) if image_processor.do_resize else {}
        exact = (size["height"], size["width"]) if "height" in size else None
        crop = image_processor.crop_size if image_processor.do_center_crop else None
        grid = cls(
            rows=side // patch,
            cols=side // patch,
            patch=patch,
            pad=pad,
            shortest_edge=size.get("shortest_edge"),
            size=exact,
            crop=(crop["height"], crop["width"]) if crop else None,
        )
        if (grid.crop or grid.size) != (side, side):
            raise ValueError(
                f"the image processor makes {grid.crop or grid.size or size} px pictures but the vision tower takes "
                f"{side} x {side}: processor and model are of different checkpoints"
            )
        return grid

    @property
    def num_tokens(self) -> int:
        """Image tokens per image (576 for CLIP-L/336)."""
        return self.rows * self.cols

    def area(self, size: tuple[int, int]) -> tuple[float, float, float, float]:
        """Box (x0, y0, x1, y1), in px of the stored image of `size` (width, height), that the whole grid covers.

        It reaches outside the picture where that is padded, and lies inside where it is cropped.
        """
        width, height = size
        left = top = 0
        if self.pad:
            side = max(width, height)
            left, top = (side - width) // 2, (side - height) // 2
            width = height = side
        new_width, new_height = self._resized(width, height)
        crop_height, crop_width = self.crop or (new_height, new_width)
        x0, y0 = (new_width - crop_width) // 2, (new_height - crop_height) // 2
        across, down = width / new_width, height / new_height
        return (
            x0 * across - left,
            y0 * down - top,
            (x0 + self.cols * self.patch) * across - left,
            (y0 + self.rows * self.patch) * down - top,
        )

    def weights(self, box: Sequence[float], size: tuple[int, int]) -> Float[Tensor, " P"]:
        """Share (0..1) of each patch's area that lies in `box`, row by row.

        `box` is (x0, y0, x1, y1) in px of the stored image of `size` (width, height). A border that cuts a patch
        gives it a fractional weight.
        """
        (x0, y0, x1, y1), (left, top, right, bottom) = box, self.area(size)
        across = _overlap((x0 - left) / (right - left), (x1 - left) / (right - left), self.cols)
        down = _overlap((y0 - top) / (bottom - top), (y1 - top) / (bottom - top), self.rows)
        return (down[:, None] * across[None, :]).flatten()

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        if self.size:
            return self.size[1], self.size[0]
        if self.shortest_edge is None:
            return width, height
        short, long = min(width, height), max(width, height)
        longer = int(self.shortest_edge * long / short)
        return (self.shortest_edge, longer) if width <= height else (longer, self.shortest_edge)


def _overlap(start: float, end: float, count: int) -> Tensor:
    """Share of each of `count` equal patches that lies in start..end, both in shares of the whole length."""
    edges = torch.arange(count, dtype=torch.float64)
    covered = (edges + 1).clamp(max=end * count) - edges.clamp(min=start * count)
    return covered.clamp(min=0).float()


def collage_box(size: tuple[int, int], target: int, grid: tuple[int, int] | None) -> tuple[int, int, int, int]:
    """Box of a collage's cell `target` (0-based, row by row) in px.

    A picture that fits the published canvas (W = 448·cols + 40·(cols−1), H = 488·rows) has 448 px cells below
    40 px label strips; any other is split evenly. Raises ValueError if there is no such cell.
    """
    width, height = size
    rows, cols = grid or (height // CELL, width // CELL)
    if target >= rows * cols:
        raise ValueError(
            f"Image{target + 1} does not exist: a collage of {width} x {height} px is read as {rows} x {cols} cells; "
            "give `grid` or `target_box` if that is wrong"
        )
    row, col = divmod(target, cols)
    if (width, height) == (CELL * cols + MARGIN * (cols - 1), (CELL + MARGIN) * rows):
        x, y = (CELL + MARGIN) * col, MARGIN + (CELL + MARGIN) * row
        return x, y, x + CELL, y + CELL
    return width * col // cols, height * row // rows, width * (col + 1) // cols, height * (row + 1) // rows


def pip_box(size: tuple[int, int]) -> tuple[int, int, int, int]:
    """The centred box of 0.7 of width and height, in px: where an inner picture of unknown shape lies at most."""
    width, height = size
    w, h = int(width * PIP_SHARE), int(height * PIP_SHARE)
    x, y = (width - w) // 2, (height - h) // 2
    return x, y, x + w, y + h


def target_box(record: Prompt, size: tuple[int, int]) -> tuple[float, ...]:
    """Box in px of what a one-image prompt points at: the record's own, else its format's rule."""
    if record.target_box is not None:
        _, _, x1, y1 = record.target_box
        if x1 > size[0] or y1 > size[1]:
            raise ValueError(
                f"`target_box` {list(record.target_box)} reaches outside the {size[0]} x {size[1]} picture"
            )
        return record.target_box
    if record.image_type == "collage":
        return collage_box(size, record.target, record.grid)
    return pip_box(size)


def needs_sizes(record: Prompt) -> bool:
    """Whether `target_weights` must know the picture's size (a sequence points at whole images)."""
    return record.image_type in ("collage", "pip")


def num_parts(record: Prompt, sizes: Sequence[tuple[int, int]]) -> int:
    """Pictures that a prompt shows: images of a sequence, cells of a collage, two of a picture in a picture.

    `sizes` as of `target_weights`. A collage that is not divided, or has no grid and another size, counts as one.
    """
    if record.image_type == "collage":
        rows, cols = record.grid or (sizes[0][1] // CELL, sizes[0][0] // CELL)
        return max(1, rows * cols)
    return 2 if record.image_type == "pip" else len(record.images)


def part_weights(record: Prompt, sizes: Sequence[tuple[int, int]], grid: PatchGrid) -> Float[Tensor, "parts tokens"]:
    """Weight in [0, 1] of every image token in each part that the prompt tells apart, parts in order.

    The images of a sequence, the cells of a collage, inner and outer picture of a pic-in-pic, else the one image. Part
    `record.target` is the target region. No parts where nothing says how a collage is divided.
    Raises ValueError like `target_weights`.
    """
    if not needs_sizes(record):
        return torch.eye(len(record.images)).repeat_interleave(grid.num_tokens, dim=1)
    target = target_weights(record, sizes, grid)
    if record.image_type == "pip":
        return torch.stack([target, 1 - target])
    rows, cols = record.grid or (sizes[0][1] // CELL, sizes[0][0] // CELL)
    if record.target >= rows * cols:
        return target.new_zeros(0, len(target))
    cells = [grid.weights(collage_box(sizes[0], cell, record.grid), sizes[0]) for cell in range(rows * cols)]
    cells[record.target] = target
    return torch.stack(cells)


def target_weights(record: Prompt, sizes: Sequence[tuple[int, int]], grid: PatchGrid) -> Float[Tensor, " tokens"]:
    """Weight in [0, 1] of every image token of the prompt, images in order: the target region of design §3.

    `sizes` are (width, height) of the stored pictures; a sequence needs none. A prompt without a target points at all
    images. Raises ValueError, naming the record, if the prompt points at a cell that does not exist or that the model
    does not see.
    """
    weights = torch.zeros(len(record.images), grid.num_tokens)
    if not needs_sizes(record):
        weights[slice(None) if record.target is None else record.target] = 1.0
        return weights.flatten()
    try:
        weights[0] = grid.weights(target_box(record, sizes[0]), sizes[0])
        if not weights.any():
            raise ValueError(
                "the target lies in a part of the picture that is cropped away: use --image_aspect_ratio pad"
            )
    except ValueError as error:
        raise ValueError(f"{record.where}: {error}") from error
    return weights.flatten()


def prompt_regions(record: Prompt, sizes: Sequence[tuple[int, int]], grid: PatchGrid) -> Float[Tensor, "R tokens"]:
    """What is measured of a prompt: target, all images, then the parts. Raises ValueError like `target_weights`."""
    parts = part_weights(record, sizes, grid)
    target = parts[record.target] if len(parts) and record.target is not None else target_weights(record, sizes, grid)
    return torch.cat([torch.stack([target, torch.ones_like(target)]), parts])


def expand_images(ids: Sequence[int], image_token: int, num_tokens: int) -> list[int]:
    """Ids with every image placeholder repeated `num_tokens` times."""
    return [t for token in ids for t in ([token] * num_tokens if token == image_token else [token])]
