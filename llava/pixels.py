"""A picture as it is seen: upright RGB, whatever way it was stored. One way for generation, training and answers."""

import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError

# Pillow promises OSError for damaged files; its plugins also let through what they meet on the way.
DECODER_ERRORS = (
    OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, LookupError, TypeError, OverflowError,
)  # fmt: skip
ORIENTATION = 0x0112  # EXIF tag
# Editors write megabytes of text and colour profile into healthy pictures; together they keep to pillow's own limit.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY
warnings.filterwarnings("ignore", module=r"PIL\.")  # of odd metadata, and of sizes that are refused


class TooLarge(ValueError):
    """More pixels than PIL.Image.MAX_IMAGE_PIXELS."""


def open_picture(source: Path | io.BytesIO) -> Image.Image:
    """The picture of a file, its pixels not read yet.

    Raises ValueError; TooLarge above pillow's limit against bombs, where pillow itself only warns up to twice it.
    """
    huge = f"more pixels than pillow's limit of {Image.MAX_IMAGE_PIXELS} (PIL.Image.MAX_IMAGE_PIXELS)"
    try:
        picture = Image.open(source)
    except Image.DecompressionBombError as error:
        raise TooLarge(huge) from error
    except UnidentifiedImageError as error:
        raise ValueError("not a picture that pillow can read") from error
    except DECODER_ERRORS as error:
        raise ValueError(f"truncated or damaged picture ({error})") from error
    num_pixels = picture.width * picture.height
    if not num_pixels:
        raise ValueError("the picture has no area")
    if Image.MAX_IMAGE_PIXELS and num_pixels > Image.MAX_IMAGE_PIXELS:
        raise TooLarge(huge)
    return picture


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
