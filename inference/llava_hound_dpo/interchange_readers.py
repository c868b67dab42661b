"""Rows and pictures of data sets on disk: nothing is downloaded."""

import base64
import binascii
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from llava import tables

SUFFIXES = (".parquet", ".arrow", ".jsonl", ".json", ".tsv")
DESCRIPTIONS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}  # not data
SHARD = re.compile(r"-\d{5}-of-\d{5}$")
EXTENSIONS = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp", "GIF": ".gif", "BMP": ".bmp"}
IN_BASE64_FROM = 64  # characters; VLMEvalKit reads what is shorter as the index of the row that has the picture


@dataclass(frozen=True)
class Row:
    """A row as it stands in the file, pictures undecoded."""

    file: Path
    split: str  # "val", or "Art_Style/val" of a folder of subsets
    number: int  # from 0, through all files of the split: lmms-eval's doc_id
    fields: Any  # an object, or the ValueError that says why it cannot be read

    @property
    def where(self) -> str:
        """How messages name it."""
        return f"{self.file} record {self.number + 1}"


# ---- rows


def read_rows(source: Path, split: str | None = None) -> Iterator[Row]:
    """Rows of a file, of a folder of files, or of a folder made by `save_to_disk`, in order of path.

    `split` chooses among several ("val", "Art_Style/val"). Raises FileNotFoundError, DataError, ValueError.
    """
    for name, files in _splits(source, split).items():
        number = 0
        for file in files:
            for fields in _fields(file):
                yield Row(file, name, number, fields)
                number += 1


def _splits(source: Path, split: str | None) -> dict[str, list[Path]]:
    """Files (or `save_to_disk` folders) of each split. Raises ValueError where it must be chosen first."""
    if not source.exists():
        raise FileNotFoundError(f"--source {source}: no such file or folder")
    found: dict[str, list[Path]] = {}
    for path in [source] if source.is_file() else _data(source):
        stem = SHARD.sub("", path.stem)
        name = stem if path == source else path.relative_to(source).with_name(stem).as_posix()
        found.setdefault(name, []).append(path)
    chosen = {name: files for name, files in found.items() if split in (None, name, name.rsplit("/", 1)[-1])}
    if not chosen or len({name.rsplit("/", 1)[-1] for name in chosen}) > 1:
        given = f"--split {split} is not there" if split else "several data sets: choose one with --split"
        names = ", ".join(found) or f"no file that ends in {', '.join(SUFFIXES)}"
        raise ValueError(f"{source}: {given if found else 'nothing to read'} (found {names})")
    return chosen


def _data(folder: Path) -> list[Path]:
    """Folders made by `save_to_disk`, and data files outside of them, in order of path."""
    saved = sorted(path.parent for path in folder.rglob("state.json"))
    files = (path for path in sorted(folder.rglob("*")) if path.suffix in SUFFIXES and path.name not in DESCRIPTIONS)
    return saved + [path for path in files if path.is_file() and not any(own in path.parents for own in saved)]


def _fields(path: Path) -> Iterator[Any]:
    """Every row of a file. Raises ValueError where the file is damaged."""
    if path.is_file() and path.suffix not in SUFFIXES:
        raise ValueError(f"{path}: a data file ends in {', '.join(SUFFIXES)}")
    return iter(read_tsv(path)) if path.suffix == ".tsv" else tables.read_rows(path)


def read_tsv(path: Path) -> list[dict[str, Any] | ValueError]:
    """Rows of a VLMEvalKit table; an `image` that is another row's index is replaced by that row's."""
    rows = list(tables.read_rows(path))
    whole = [row for row in rows if isinstance(row, dict)]
    images = {row["index"]: row["image"] for row in whole if "image" in row and "index" in row}
    for row in whole:
        if row.get("image") and len(row["image"]) <= IN_BASE64_FROM:
            row["image"] = images.get(row["image"], row["image"])
    return rows


# ---- pictures


def picture_file(value: Any, folder: Path) -> tuple[bytes, str]:
    """Content and extension to store a picture under: the bytes that it has, or PNG where these are a rare format.

    `value` is bytes, {"bytes", "path"} of `datasets`, a path below `folder`, or base64 (also as data URL).
    Raises ValueError, FileNotFoundError.
    """
    content = _content(value, folder)
    try:
        with Image.open(io.BytesIO(content)) as picture:
            picture.load()
            if 0 in picture.size:
                raise ValueError("the picture has no area")
            if picture.format in EXTENSIONS:
                return content, EXTENSIONS[picture.format]
            stored = io.BytesIO()
            picture.convert("RGB").save(stored, "PNG")
            return stored.getvalue(), ".png"
    except UnidentifiedImageError as error:
        raise ValueError("not a picture that pillow can read") from error
    except (OSError, SyntaxError, EOFError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"truncated or damaged picture ({error})") from error


def _content(value: Any, folder: Path) -> bytes:
    if isinstance(value, dict):
        value = value["bytes"] if value.get("bytes") else value.get("path")
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        raise ValueError(f"a picture cannot be read from {type(value).__name__}")
    if not value.startswith("data:image/") and len(value) < 4096 and (folder / value).is_file():
        return (folder / value).read_bytes()
    encoded = re.sub(r"^data:image/[^,]*,|\s", "", value)
    if len(encoded) <= IN_BASE64_FROM:
        raise FileNotFoundError(f"no picture {value} in {folder}: give --image_folder")
    try:
        return base64.b64decode(encoded, validate=True)
    except binascii.Error as error:
        raise ValueError(f"neither a file in {folder} nor base64: {value[:40]}...") from error
