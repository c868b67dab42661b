"""Rows of tables on disk: JSON, JSONL, CSV, TSV, parquet, Arrow and folders of the `datasets` library.

One row at a time, whatever the file's size; nothing is downloaded and nothing cached. The JSON and CSV readers of
`datasets` would load an array whole, guess one type for a column (ids that are numbers here and texts there), take
"N/A" for an absent cell and end at the first broken line.
"""

import csv
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import ijson

from llava.strict_json import loads

BATCH = 16  # rows of parquet and Arrow in memory: a row may hold tens of pictures
DELIMITERS = {".csv": ",", ".tsv": "\t"}
BOM = b"\xef\xbb\xbf"


def is_arrow(path: Path) -> bool:
    """Whether the table is typed: parquet, Arrow, or a folder that `save_to_disk` wrote."""
    return path.is_dir() or path.suffix.lower() in (".parquet", ".arrow")


def read_rows(path: str | Path, without: Collection[str] = ()) -> Iterator[Any]:
    """Every row, absent cells as None, pictures as they are encoded; of a broken row the ValueError that says why.

    `without`: columns of typed tables that are not read. What is neither typed nor .csv or .tsv is JSON, an array or
    a value per line, told by content. Raises FileNotFoundError, or ValueError naming the file if it cannot be read on.
    """
    from pyarrow import ArrowException

    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    try:
        yield from _arrow(path, without) if is_arrow(path) else _text(path)
    except (OSError, UnicodeDecodeError, ArrowException) as error:
        raise ValueError(f"{path}: cannot be read ({str(error).splitlines()[0]})") from error


def open_dataset(path: Path, **options: Any):
    """The `datasets` Dataset of a typed table. Raises ValueError naming the splits where one must be chosen."""
    from datasets import Dataset, DatasetDict, load_from_disk  # slow to import, and most tables need it not
    from datasets.utils.logging import disable_progress_bar

    disable_progress_bar()
    if not path.is_dir():
        open_file = Dataset.from_parquet if path.suffix.lower() == ".parquet" else Dataset.from_file
        return open_file(str(path), **options)
    data = load_from_disk(str(path))
    if isinstance(data, DatasetDict):
        raise ValueError(f"{path}: holds the splits {', '.join(data)}; give one, as {path / next(iter(data))}")
    return data


def _arrow(path: Path, without: Collection[str]) -> Iterator[dict[str, Any]]:
    from pyarrow.parquet import ParquetFile

    if path.suffix.lower() == ".parquet" and path.is_file():  # `datasets` would copy all of it to Arrow first
        file = ParquetFile(path)
        batches = file.iter_batches(BATCH, columns=[n for n in file.schema_arrow.names if n not in without])
    else:
        data = open_dataset(path)
        data = data.remove_columns([name for name in data.column_names if name in without])
        batches = data.with_format("arrow").iter(BATCH)
    for batch in batches:
        yield from batch.to_pylist()


def _text(path: Path) -> Iterator[Any]:
    if delimiter := DELIMITERS.get(path.suffix.lower()):
        return _csv(path, delimiter)
    with path.open("rb") as file:
        start = next((text for line in file if (text := line.removeprefix(BOM).lstrip())), b"")
    if not start:
        raise ValueError(f"{path}: the file is empty")
    if start[:1] not in b"[{":
        raise ValueError(f"{path}: neither JSON nor JSONL; a table must be named .csv, .tsv or .parquet")
    return _array(path) if start[:1] == b"[" else _lines(path)


def _csv(path: Path, delimiter: str) -> Iterator[dict[str, str | None] | ValueError]:
    csv.field_size_limit(sys.maxsize)  # pictures in base64
    with path.open(encoding="utf-8-sig", newline="") as file:
        table = csv.reader(file, delimiter=delimiter, strict=delimiter == ",")
        header = [name.strip() for name in next(table, [])]
        while True:
            try:
                row = next(table)
            except StopIteration:
                return
            except csv.Error as error:
                yield ValueError(f"broken CSV: {error}")
                continue
            if len(row) == len(header):
                yield {name: cell or None for name, cell in zip(header, row, strict=True)}
            elif row:
                yield ValueError(f"{len(row)} fields under a header of {len(header)}")


def _lines(path: Path) -> Iterator[Any]:
    with path.open("rb") as file:  # as text, a character that is not UTF-8 would end all of it
        for number, line in enumerate(file, 1):
            try:
                if text := line.decode("utf-8-sig" if number == 1 else "utf-8").strip():
                    yield loads(text)
            except ValueError as error:
                yield ValueError(f"broken JSON: {error}")


def _array(path: Path) -> Iterator[Any]:
    with path.open("rb") as file:
        if file.read(len(BOM)) != BOM:
            file.seek(0)
        num_read = 0
        try:
            for item in ijson.items(file, "item", use_float=True):
                yield item
                num_read += 1
        except (ijson.JSONError, RecursionError) as error:
            why = " ".join(str(error).split())
            raise ValueError(f"{path}: broken JSON some way after record {num_read} ({why})") from error
