"""A picture as it is seen: upright RGB, whatever way it was stored. One way for generation, training and answers."""

import struct
import zlib

import numpy as np
from PIL import Image, ImageOps

# Pillow promises OSError for damaged files; its plugins also let through what they meet on the way.
DECODER_ERRORS = (
    OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, LookupError, TypeError, OverflowError,
)  # fmt: skip
ORIENTATION = 0x0112  # EXIF tag


def as_seen(picture: Image.Image) -> Image.Image:
    """RGB pixels of the first frame, turned as EXIF says. Raises one of DECODER_ERRORS for a damaged picture.

    Of 16 bits the upper 8 are kept, where pillow's conversion would clip to white; what a palette leaves transparent
    is white.
    """
    picture.load()
    return _as_rgb(ImageOps.exif_transpose(picture) if not is_upright(picture) else picture)


def is_upright(picture: Image.Image) -> bool:
    """Whether EXIF turns nothing; damaged EXIF does not."""
    try:
        return picture.getexif().get(ORIENTATION, 1) not in range(2, 9)
    except DECODER_ERRORS:
        return True


def is_turned(picture: Image.Image) -> bool:
    """Whether EXIF swaps width and height; of a TIFF, pillow's size is the turned one already."""
    return picture.format != "TIFF" and picture.getexif().get(ORIENTATION, 1) in range(5, 9)


def _as_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode == "RGB":
        return picture
    if picture.mode == "F":
        raise ValueError("its pixels are floating-point numbers of unknown range")
    if picture.mode.startswith("I"):
        values = np.asarray(picture).astype(np.int64)
        shift = 8 if values.max() > 255 else 0
        return Image.fromarray((values >> shift).clip(0, 255).astype(np.uint8)).convert("RGB")
    if picture.mode in ("P", "PA") and (picture.mode == "PA" or "transparency" in picture.info):
        picture = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return picture.convert("RGB")
