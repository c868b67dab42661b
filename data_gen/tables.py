"""Files of records that are read one at a time: only where each record lies stays in memory.

A record's place is (start, length): bytes of a text file, or (row, 0) of a table of the `datasets` library. Reading is
safe in forked workers, and tables can be pickled for spawned ones.
"""

import codecs
import csv
import io
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

Place = tuple[int, int]
CHUNK = 1 << 20  # bytes of a JSON array that are read at once
LONGEST_RECORD = 64 << 20  # characters after which a JSON record that does not end counts as broken
SEPARATOR = re.compile(r"[ \t\r\n]*,?[ \t\r\n]*")


def open_table(path: str | Path) -> "TextTable | ArrowTable":
    """A source by its kind: folder of `save_to_disk`, .parquet, .csv, else JSON array or JSONL, told by content.

    Raises FileNotFoundError, or ValueError if it is none of these.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such source file; check --source")
    return ArrowTable(path) if path.is_dir() or path.suffix == ".parquet" else TextTable(path)


def stamp(path: str | Path) -> str:
    """Changes when the file, or a file in the folder, does. Raises FileNotFoundError."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such source file; check --source")
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    found = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return ", ".join(f"{name} {size} {time}" for name, size, time in found)


class TextTable:
    """A JSON array, a JSONL file, or a CSV file with a header line."""

    is_embedded = False  # pictures are files of their own

    def __init__(self, path: Path):
        self.path = path
        self.kind = "csv" if path.suffix.lower() == ".csv" else _json_kind(path)
        self._columns = _header(path) if self.kind == "csv" else []
        self._descriptor: int | None = None

    def __getstate__(self):
        return {**self.__dict__, "_descriptor": None}

    def scan(self) -> Iterator[tuple[Place, Any]]:
        """Every record with its place; one that cannot be parsed comes as the ValueError that says why.

        Raises ValueError if nothing after a fault can be read.
        """
        with self.path.open("rb") as file:
            if self.kind == "csv":
                yield from ((place, self._named(row)) for place, row in _csv_rows(self.path, file))
            else:
                yield from _array_items(self.path, file) if self.kind == "array" else _json_lines(file)

    def read(self, place: Place) -> Any:
        """The record at a place that `scan` gave."""
        if self._descriptor is None:
            self._descriptor = os.open(self.path, os.O_RDONLY)
        text = os.pread(self._descriptor, place[1], place[0])  # moves no file position that forks would share
        if self.kind == "csv":
            return self._named(next(csv.reader(io.StringIO(text.decode(), newline=""))))
        return json.loads(text)

    def _named(self, row: list[str] | ValueError) -> dict[str, str] | ValueError:
        if isinstance(row, ValueError):
            return row
        if len(row) != len(self._columns):
            return ValueError(f"{len(row)} fields under a header of {len(self._columns)}")
        return dict(zip(self._columns, row, strict=True))


class ArrowTable:
    """A data set of the `datasets` library: a folder that `save_to_disk` wrote, or a .parquet file."""

    def __init__(self, path: Path):
        from datasets import Dataset, DatasetDict, load_from_disk  # slow to import, and most sources need it not
        from datasets.utils.logging import disable_progress_bar

        disable_progress_bar()
        self.path = path
        data = load_from_disk(str(path)) if path.is_dir() else Dataset.from_parquet(str(path))
        if isinstance(data, DatasetDict):
            raise ValueError(f"{path}: holds the splits {', '.join(data)}; give one, as {path / next(iter(data))}")
        self._pictures = _embedded_pictures(data)
        self._records = data.remove_columns("image") if self.is_embedded else data

    @property
    def is_embedded(self) -> bool:
        """Whether the pictures are inside the table."""
        return self._pictures is not None

    def scan(self) -> Iterator[tuple[Place, Any]]:
        """Every record with its place; pictures inside the table are not read."""
        for row, record in enumerate(self._records):
            yield (row, 0), self._with_picture_name(row, record)

    def read(self, place: Place) -> Any:
        """The record at a place that `scan` gave."""
        return self._with_picture_name(place[0], self._records[place[0]])

    def picture(self, place: Place) -> bytes | None:
        """The encoded picture of a record, None where the table has none for it."""
        cell = self._pictures[place[0]]["image"]
        return cell.get("bytes") if isinstance(cell, dict) else cell

    def _with_picture_name(self, row: int, record: dict) -> dict:
        return {**record, "image": f"{self.path.stem}/{row:07d}"} if self.is_embedded else record


def _json_kind(path: Path) -> str:
    with path.open("rb") as file:
        start = file.read(CHUNK).removeprefix(codecs.BOM_UTF8).lstrip()
    if not start:
        raise ValueError(f"{path}: the file is empty")
    if start[:1] not in b"[{":
        raise ValueError(f"{path}: neither JSON nor JSONL; a table of questions must be named .csv or .parquet")
    return "array" if start[:1] == b"[" else "jsonl"


def _json_lines(file: BinaryIO) -> Iterator[tuple[Place, Any]]:
    start = 0
    for line in file:
        text = line.removeprefix(codecs.BOM_UTF8) if start == 0 else line
        if text.strip():
            yield (start + len(line) - len(text), len(text)), _parsed(text)
        start += len(line)


def _parsed(text: bytes) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:  # also bytes that are not UTF-8
        return ValueError(f"broken JSON: {error}")


def _array_items(path: Path, file: BinaryIO) -> Iterator[tuple[Place, Any]]:
    """Items of a JSON array, decoded from a window of the file that slides along."""
    decode, find = codecs.getincrementaldecoder("utf-8")().decode, json.JSONDecoder().raw_decode
    first = file.read(CHUNK)
    content = first.removeprefix(codecs.BOM_UTF8)
    window = decode(content)
    position = window.index("[") + 1  # in the window
    start = len(first) - len(content) + position  # the same place in bytes: only blanks are before it
    lines, is_first = window.count("\n", 0, position), True
    while True:
        gap = SEPARATOR.match(window, position).end()
        item, end, fault = None, gap, ""
        if window[gap : gap + 1] == "]":
            return
        try:
            item, end = find(window, gap)
        except json.JSONDecodeError as error:
            fault = f"line {lines + 1 + window.count(chr(10), position, error.pos)}: {error.msg}"
        if not fault and not is_first and "," not in window[position:gap]:
            raise ValueError(f"{path}: broken JSON, a comma is missing before an item near byte {start}")
        if fault or end == len(window):  # what looks complete at the window's end may go on
            more = file.read(CHUNK)
            if not more or len(window) - position > LONGEST_RECORD:
                raise ValueError(f"{path}: broken JSON at {fault or 'the end: the array is not closed'}")
            window, position = window[position:] + decode(more), 0
            continue
        item_start = start + len(window[position:gap].encode())
        length = len(window[gap:end].encode())
        yield (item_start, length), item
        lines += window.count("\n", position, end)
        position, start, is_first = end, item_start + length, False


def _header(path: Path) -> list[str]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        columns = [name.strip() for name in next(csv.reader(file), [])]
    if missing := {"image", "question", "answer"} - set(columns):
        found = ", ".join(columns) or "nothing"
        raise ValueError(f"{path}: the header lacks {', '.join(sorted(missing))}; it has {found}")
    return columns


class _Lines:
    """Lines of a file for the csv module, which takes only as many as a record has; `position` is where it is."""

    def __init__(self, path: Path, file: BinaryIO):
        self._path, self._file, self.position = path, file, 0

    def __iter__(self):
        return self

    def __next__(self) -> str:
        line = self._file.readline()
        if not line:
            raise StopIteration
        self.position += len(line)
        try:
            return line.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{self._path}: not UTF-8 text near byte {self.position}") from error


def _csv_rows(path: Path, file: BinaryIO) -> Iterator[tuple[Place, list[str] | ValueError]]:
    lines = _Lines(path, file)
    reader = csv.reader(lines, strict=True)
    next(reader)  # the header
    while True:
        start = lines.position
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            row = ValueError(f"broken CSV: {error}")
        if row:
            yield (start, lines.position - start), row


def _embedded_pictures(data):
    """The column `image` with its pictures still encoded; None if it holds paths or does not exist."""
    from datasets import Image, Value

    kind = data.features.get("image")
    if kind is None or (isinstance(kind, Value) and kind.dtype not in ("binary", "large_binary")):
        return None
    pictures = data.select_columns("image")
    return pictures.cast_column("image", Image(decode=False)) if isinstance(kind, Image) else pictures
