"""Pixels as the original LLaVA-1.5 code makes them, written out here by hand with pillow and numpy.

One difference on purpose: pictures are turned as their EXIF orientation says, which the original left out. Then they
are converted to RGB (alpha dropped), padded with the mean colour, resized with bicubic filtering, and normalised.
"""

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from transformers import CLIPImageProcessorPil

from llava.image import ImageStore
from tests.conftest import llava15

MEAN, STD = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
SIDE = 336


def by_hand(path) -> np.ndarray:
    picture = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    side = max(picture.size)
    square = np.empty((side, side, 3), dtype=np.uint8)
    square[:] = (255 * MEAN).astype(int)
    left, top = (side - picture.width) // 2, (side - picture.height) // 2
    square[top : top + picture.height, left : left + picture.width] = np.asarray(picture)
    resized = np.asarray(Image.fromarray(square).resize((SIDE, SIDE), Image.Resampling.BICUBIC))
    return ((resized / 255 - MEAN) / STD).transpose(2, 0, 1)


def noise(mode, size):
    rng = np.random.default_rng(0)
    width, height = size
    bands = {"L": (), "RGB": (3,), "RGBA": (4,), "CMYK": (4,)}[mode]
    pixels = rng.integers(0, 255, (-(-height // 4), -(-width // 4), *bands), dtype=np.uint8)
    return Image.fromarray(pixels, mode).resize(size)


def rotated(path):
    picture = noise("RGB", (200, 120))
    exif = picture.getexif()
    exif[0x0112] = 6
    picture.save(path.with_suffix(".jpg"), exif=exif)
    return path.with_suffix(".jpg")


PICTURES = {
    "landscape": lambda path: noise("RGB", (640, 480)).save(path),
    "portrait": lambda path: noise("RGB", (427, 640)).save(path),
    "square": lambda path: noise("RGB", (336, 336)).save(path),
    "larger square": lambda path: noise("RGB", (700, 700)).save(path),
    "tiny": lambda path: noise("RGB", (7, 3)).save(path),
    "one row": lambda path: noise("RGB", (50, 1)).save(path),
    "collage": lambda path: noise("RGB", (936, 488)).save(path),
    "grayscale": lambda path: noise("L", (300, 200)).save(path),
    "palette": lambda path: noise("RGB", (300, 200)).quantize(16).save(path),
    "alpha": lambda path: noise("RGBA", (300, 200)).save(path),
    "bilevel": lambda path: noise("L", (300, 200)).convert("1").save(path),
    "cmyk": lambda path: noise("CMYK", (300, 200)).save(path.with_suffix(".jpg")) or path.with_suffix(".jpg"),
    "exif rotated": rotated,
}


@pytest.mark.parametrize("name", PICTURES)
def test_pixels_equal_the_original_code(tmp_path, name):
    path = tmp_path / "picture.png"
    path = PICTURES[name](path) or path
    processor = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    found = llava15(processor).pixels([ImageStore(tmp_path).open(path.name)])["pixel_values"]
    assert found.shape == (1, 3, SIDE, SIDE)
    torch.testing.assert_close(found[0].double(), torch.from_numpy(by_hand(path)), atol=1e-6, rtol=0)
