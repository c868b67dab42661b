"""Reading pictures to be looked at, pasted or copied: as encoded bytes and as upright RGB pixels."""

import hashlib
import io
from typing import NamedTuple

from PIL import Image

from data_gen.drops import Unusable
from llava.image import ImageStore
from llava.pixels import DECODER_ERRORS, TooLarge, as_seen, is_upright, open_picture

SUFFIXES = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp", "BMP": ".bmp", "GIF": ".gif", "TIFF": ".tif"}
COPIED = ("JPEG", "PNG", "WEBP")  # formats whose files are passed on as they are
SAMPLE = (64, 64)  # pixels compared to tell pictures of one size apart


class Picture(NamedTuple):
    """A decoded picture and the file it came from."""

    pixels: Image.Image  # as it is seen (llava.pixels)
    data: bytes  # the encoded file
    suffix: str  # of a file name for `data`: ".jpg"
    is_plain: bool  # every reader makes exactly `pixels` of `data`

    def file(self) -> tuple[str, bytes]:
        """Suffix and bytes to store: as it came, or redrawn where readers would see it otherwise."""
        return (self.suffix, self.data) if self.is_plain else (".png", encode(self.pixels, "png"))


class PictureFiles(ImageStore):
    """The pictures of a folder or archive, encoded."""

    def read(self, path: str) -> bytes:
        """The encoded picture. Raises Unusable if it is missing or cannot be read."""
        try:
            return super().read(path)
        except FileNotFoundError as error:
            raise Unusable("missing picture", f"no {path} in {self.path}") from error
        except (OSError, ValueError) as error:
            raise Unusable("unreadable picture", f"{path} in {self.path} ({error})") from error


def decode(data: bytes, name: str) -> Picture:
    """The picture in a file's bytes. Raises Unusable, naming it, if it is damaged, of no pixels, or too large."""
    if not data:
        raise Unusable("empty file", f"{name} has no bytes")
    try:
        picture = open_picture(io.BytesIO(data))
    except TooLarge as error:
        raise Unusable("huge picture", f"{name}: {error}") from error
    except ValueError as error:
        raise Unusable("not a picture", f"{name}: {error}") from error
    kind, mode = picture.format, picture.mode
    try:
        pixels = as_seen(picture)
    except DECODER_ERRORS as error:
        raise Unusable("damaged picture", f"{name} is truncated or damaged ({error})") from error
    is_plain = kind in COPIED and mode in ("RGB", "L") and is_upright(picture)
    return Picture(pixels, data, SUFFIXES.get(kind, f".{kind.lower()}"), is_plain)


def encode(picture: Image.Image, kind: str) -> bytes:
    """The picture as a file: `jpg` of quality 95 without colour subsampling, or `png`."""
    buffer = io.BytesIO()
    options = {"format": "JPEG", "quality": 95, "subsampling": 0} if kind == "jpg" else {"format": "PNG"}
    picture.save(buffer, **options)
    return buffer.getvalue()


def fingerprint(picture: Image.Image) -> bytes:
    """Equal for pictures of equal pixels, however they are named and stored.

    Size and 4,096 sampled pixels: pictures that differ between the samples only count as the same one.
    """
    sample = picture.resize(SAMPLE, Image.Resampling.NEAREST).tobytes()
    return hashlib.blake2b(sample, digest_size=16, key=b"%dx%d" % picture.size).digest()
