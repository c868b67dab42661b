"""Pictures in the centre of other pictures."""

from PIL import Image

from llava.regions import PIP_SHARE

Box = tuple[int, int, int, int]


def paste_inside(inner: Image.Image, outer: Image.Image) -> tuple[Image.Image, Box]:
    """The outer picture with the inner one on it, and the box in px that the inner one covers."""
    box = inner_box(inner.size, outer.size)
    canvas = outer.copy()
    canvas.paste(inner.resize((box[2] - box[0], box[3] - box[1]), Image.Resampling.LANCZOS), box[:2])
    return canvas, box


def inner_box(inner: tuple[int, int], outer: tuple[int, int]) -> Box:
    """Where an inner picture lies: as large as fits into 0.7 of the outer width and height, aspect kept, centred.

    Small pictures are enlarged. Sizes are (width, height); sides are rounded down, as in the published data.
    """
    aspect = inner[0] / inner[1]
    width = outer[0] * PIP_SHARE
    if width / aspect <= outer[1] * PIP_SHARE:
        w = max(1, int(width))
        h = max(1, int(w / aspect))
    else:
        h = max(1, int(outer[1] * PIP_SHARE))
        w = max(1, int(h * aspect))
    x, y = (outer[0] - w) // 2, (outer[1] - h) // 2
    return x, y, x + w, y + h
