"""Where pictures are pasted: golden values, and painted pictures found again in what was made."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessor

from data_gen.gen_instruction.formats import (
    GRIDS,
    LABEL_LEFT,
    Collage,
    canvas_size,
    corner,
    fitted,
    inner_box,
    paste_inside,
)
from llava.regions import CELL, MARGIN, collage_box
from tests.conftest import llava15
from tests.single_images import colour, generate, lines, save_pictures, write

CLIP = llava15(CLIPImageProcessor(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}))


@pytest.mark.parametrize(
    ("count", "size"), [(2, (936, 488)), (3, (1424, 488)), (4, (936, 976)), (6, (1424, 976)), (9, (1424, 1464))]
)
def test_canvas_of_the_published_collages(count, size):
    rows, cols = GRIDS[count]
    assert canvas_size((rows, cols)) == size
    assert (size[1] // CELL, size[0] // CELL) == (rows, cols) and rows * cols == count
    for cell in range(count):
        assert corner((rows, cols), cell) == collage_box(size, cell, None)[:2]


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((640, 480), (448, 336)),
        ((480, 640), (336, 448)),
        ((427, 640), (298, 448)),
        ((1000, 3), (448, 1)),
        ((3000, 1), (448, 1)),
        ((448, 448), (448, 448)),
        ((10, 10), (448, 448)),
    ],
)
def test_fit_into_a_cell(size, expected):
    assert fitted(size) == expected


@pytest.mark.parametrize(
    ("inner", "outer", "size", "offset"),
    [
        ((500, 375), (640, 480), (448, 336), (96, 72)),
        ((300, 600), (640, 480), (168, 336), (236, 72)),
        ((1000, 200), (640, 480), (448, 89), (96, 195)),
        ((640, 480), (480, 640), (336, 252), (72, 194)),
        ((100, 100), (333, 500), (233, 233), (50, 133)),
        ((5000, 2), (20, 20), (14, 1), (3, 9)),
        ((2, 5000), (1, 1), (1, 1), (0, 0)),
    ],
)
def test_inner_picture(inner, outer, size, offset):
    x0, y0, x1, y1 = inner_box(inner, outer)
    assert (x1 - x0, y1 - y0) == size and (x0, y0) == offset


def test_labels_stay_in_their_strips():
    canvas = np.asarray(Collage(9).canvas)
    for cell in range(9):
        x, y = corner((3, 3), cell)
        assert (canvas[y : y + CELL, x : x + CELL] == 255).all()
        strip = canvas[y - MARGIN : y, x : x + CELL]
        inked = np.argwhere((strip < 128).all(axis=2))
        assert len(inked) > 300 and LABEL_LEFT <= inked[:, 1].min() <= LABEL_LEFT + 8
    first, second = (canvas[:MARGIN, x : x + CELL] for x, _ in (corner((3, 3), 0), corner((3, 3), 1)))
    assert (first != second).any()


def test_both_pictures_keep_their_pixels():
    inner, outer = Image.new("RGB", (40, 40), (250, 10, 20)), Image.new("RGB", (100, 80), (10, 20, 250))
    picture, (x0, y0, x1, y1) = paste_inside(inner, outer)
    pixels = np.asarray(picture)
    assert (pixels[y0:y1, x0:x1] == (250, 10, 20)).all() and (pixels[0] == (10, 20, 250)).all()
    assert np.asarray(outer)[40, 50, 0] == 10, "the outer picture itself is untouched"


def painted(monkeypatch, tmp_path, image_type, count):
    """Yields (rendered pixels, colour of the target, record) of `count` prompts about pictures of one colour each."""
    records, num_pictures = [], 30
    save_pictures(tmp_path / "images", num_pictures, "red", sides=(1, 700))
    for number in range(num_pictures):
        text = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "This."}]
        records.append({"id": str(number), "image": f"red/{number}.png", "conversations": text})
    flags = [*write(tmp_path, records), "--output", tmp_path / "out", "--picture_format", "png", "--num_workers", 1]
    assert generate(monkeypatch, "--format", image_type, "--num_records", count, *flags) == 0
    made = lines(tmp_path / "out" / "instructions.jsonl")
    assert len(made) == count
    for record in made:
        target = record["sources"][record["target"] - 1]["id"]
        yield np.asarray(Image.open(tmp_path / "out/images" / record["image"][0])), colour(int(target)), record


def check_painted(pixels, paint, record):
    mask = np.logical_and.reduce([pixels[:, :, channel] == paint[channel] for channel in range(3)])
    rows, cols = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    x0, y0, x1, y1 = record["target_box"]
    assert [cols[0], rows[0], cols[-1] + 1, rows[-1] + 1] == [x0, y0, x1, y1], record["id"]
    assert mask.sum() == (x1 - x0) * (y1 - y0), "nothing else lies on the target"
    torch.testing.assert_close(
        CLIP.image(mask.shape[::-1]).weights(record["target_box"]), share_of_patches(mask), atol=1e-4, rtol=0
    )


def share_of_patches(mask):
    """Share of each of 24 x 24 patches that marked pixels cover, once the picture is padded to a square."""
    height, width = mask.shape
    side = max(mask.shape)
    square = np.zeros((side, side), dtype=np.float32)
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = mask
    edges, pixel = np.arange(25)[:, None] * side / 24, np.arange(side)
    covered = (np.minimum(edges[1:], pixel + 1) - np.maximum(edges[:-1], pixel)).clip(min=0) / (side / 24)
    covered = covered.astype(np.float32)
    return torch.from_numpy(covered @ square @ covered.T).flatten()


@pytest.mark.parametrize("image_type", ["collage", "pip"])
def test_the_target_box_is_what_was_pasted(monkeypatch, tmp_path, image_type):
    for pixels, paint, record in painted(monkeypatch, tmp_path, image_type, 60):
        check_painted(pixels, paint, record)


@pytest.mark.slow
@pytest.mark.parametrize("image_type", ["collage", "pip"])
def test_a_thousand_target_boxes(monkeypatch, tmp_path, image_type):
    for pixels, paint, record in painted(monkeypatch, tmp_path, image_type, 1000):
        check_painted(pixels, paint, record)


def test_a_mistaken_box_is_noticed(monkeypatch, tmp_path):
    """The check above fails where the box is off by one pixel."""
    pixels, paint, record = next(painted(monkeypatch, tmp_path, "collage", 1))
    shifted = json.loads(json.dumps(record))
    shifted["target_box"][2] -= 1
    with pytest.raises(AssertionError):
        check_painted(pixels, paint, shifted)
