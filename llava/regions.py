"""Regions: which image tokens a prompt points at, as weights in [0, 1].

Letters: P image tokens of a prompt, images in order, R regions (0 = target, 1 = all image tokens, then the parts).
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from llava.families import ImageTokens
from llava.records import Prompt

CELL, MARGIN = 448, 40  # px of the published collages
PIP_SHARE = 0.7  # the inner picture fits into this share of the outer one
UNPOINTED = ("single", "multi")  # formats in which nothing is told apart, or no image is referred to
UNSEEN = 1e-6  # a target whose largest weight is below this is not seen at all


def collage_box(size: tuple[int, int], target: int, grid: tuple[int, int] | None) -> tuple[int, int, int, int]:
    """Box of a collage's cell `target` (0-based, row by row) in px.

    A picture that fits the published canvas (W = 448·cols + 40·(cols−1), H = 488·rows) has 448 px cells below
    40 px label strips; any other is split evenly. Raises ValueError if there is no such cell.
    """
    width, height = size
    rows, cols = grid or collage_grid(size)
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


def collage_grid(size: tuple[int, int]) -> tuple[int, int]:
    """(rows, columns) of a collage whose record has no grid: as many published cells as its px hold."""
    return size[1] // CELL, size[0] // CELL


def pip_box(size: tuple[int, int]) -> tuple[int, int, int, int]:
    """The centred box of 0.7 of width and height, in px: where an inner picture of unknown shape lies at most."""
    width, height = size
    w, h = int(width * PIP_SHARE), int(height * PIP_SHARE)
    x, y = (width - w) // 2, (height - h) // 2
    return x, y, x + w, y + h


def target_boxes(record: Prompt, size: tuple[int, int]) -> list[tuple[float, ...]]:
    """Boxes in px of what a one-image prompt points at: the record's own, else one a target by its format's rule."""
    if record.target_box is not None:
        _, _, x1, y1 = record.target_box
        if x1 > size[0] or y1 > size[1]:
            raise ValueError(
                f"`target_box` {list(record.target_box)} reaches outside the {size[0]} x {size[1]} picture"
            )
        return [record.target_box]
    if record.image_type == "collage":
        return [collage_box(size, target, record.grid) for target in record.targets]
    return [pip_box(size)]


def outlined(record: Prompt, size: tuple[int, int]) -> list[tuple[float, ...]] | None:
    """The boxes in px that a drawing outlines in a prompt's one picture; None: whole pictures. Raises ValueError."""
    return target_boxes(record, size) if needs_sizes(record) else None


def pointed_at(record: Prompt) -> tuple[int, ...]:
    """The parts that a prompt's words point at; () where they tell none apart, refer to none, or look for them.

    Where what is looked for lies is the answer, and nothing that helps to find it may be told.
    """
    return () if record.image_type in UNPOINTED or record.is_search else record.targets


def needs_sizes(record: Prompt) -> bool:
    """Whether a picture's size decides what is pointed at (a sequence points at whole images)."""
    return record.image_type in ("collage", "pip")


def num_parts(record: Prompt, sizes: Sequence[tuple[int, int]]) -> int:
    """Pictures that a prompt shows: images of a sequence, cells of a collage, two of a picture in a picture.

    `sizes` are (width, height) of the stored pictures; a sequence needs none. A collage that is not divided, or has no
    grid and another size, counts as one.
    """
    if record.image_type == "collage":
        rows, cols = record.grid or collage_grid(sizes[0])
        return max(1, rows * cols)
    return 2 if record.image_type == "pip" else len(record.images)


def part_weights(record: Prompt, images: Sequence[ImageTokens]) -> Float[Tensor, "parts P"]:
    """Weight in [0, 1] of every image token in each part that the prompt tells apart, parts in order.

    The images of a sequence, the cells of a collage, inner and outer picture of a pic-in-pic, else the one image. Parts
    `record.targets` are the target region. No parts where nothing says how a collage is divided.
    Raises ValueError like `target_weights`.
    """
    if not needs_sizes(record):
        lengths = torch.tensor([len(image.areas) for image in images])
        return torch.eye(len(images)).repeat_interleave(lengths, dim=1)
    target, (image,) = target_weights(record, images), images  # refuses what cannot be seen
    if record.image_type == "pip":
        return torch.stack([target, 1 - target])
    cells = num_parts(record, [image.size])
    if record.targets[-1] >= cells:
        return target.new_zeros(0, len(target))
    parts = [image.weights(collage_box(image.size, cell, record.grid)) for cell in range(cells)]
    if record.target is not None:
        parts[record.target] = target  # of its own box, if it has one
    return torch.stack(parts)


def target_weights(record: Prompt, images: Sequence[ImageTokens]) -> Float[Tensor, " P"]:
    """Weight in [0, 1] of every image token of the prompt: the share of its pixels that the prompt points at.

    Several targets are one region; a prompt without one points at all images. Raises ValueError, naming the record, if
    it points at a cell that does not exist or that the model does not see.
    """
    if not needs_sizes(record):
        is_target = [not record.targets or number in record.targets for number in range(len(images))]
        return torch.cat([torch.full((len(i.areas),), float(own)) for i, own in zip(images, is_target, strict=True)])
    try:
        boxes = [images[0].weights(box) for box in target_boxes(record, images[0].size)]
        if any(weights.max() < UNSEEN for weights in boxes):
            raise ValueError(
                "the target lies in a part of the picture that is cropped away: use --image_aspect_ratio pad"
            )
    except ValueError as error:
        raise ValueError(f"{record.where}: {error}") from error
    return union(torch.stack(boxes))


def union(parts: Float[Tensor, "parts P"]) -> Float[Tensor, " P"]:
    """Weight in [0, 1] of every token in any of the parts, which do not overlap."""
    return parts.sum(dim=0).clamp(max=1)


def prompt_regions(record: Prompt, images: Sequence[ImageTokens]) -> Float[Tensor, "R P"]:
    """What is measured of a prompt: target, all images, then the parts. Raises ValueError like `target_weights`."""
    parts = part_weights(record, images)
    target = union(parts[list(record.targets)]) if len(parts) and record.targets else target_weights(record, images)
    return torch.cat([torch.stack([target, torch.ones_like(target)]), parts])
