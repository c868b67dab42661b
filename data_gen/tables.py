"""Sources as tables: their rows, one at a time, and the pictures inside them where there are any."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llava.tables import DELIMITERS, is_arrow, open_dataset, read_rows

PICTURE = "image"  # the column
OF_QUESTIONS = {PICTURE, "question", "answer"}  # columns that a table without types must have


class Table:
    """A source. Safe in forked workers; can be pickled.

    Raises FileNotFoundError, or ValueError if a folder is no data set or holds several.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.exists():
            raise FileNotFoundError(f"{self.path}: no such source file; check --source")
        self.is_embedded = is_arrow(self.path) and _has_pictures(self.path)  # the pictures are inside the table
        self._is_parquet = self.path.is_file() and self.path.suffix.lower() == ".parquet"
        is_mapped = self.is_embedded and not self._is_parquet
        self._mapped = open_dataset(self.path).with_format("arrow") if is_mapped else None

    def rows(self) -> Iterator[Any]:
        """As `read_rows`; a picture inside the table is not read, but gets a name. Raises ValueError."""
        for number, row in enumerate(read_rows(self.path, without=[PICTURE] if self.is_embedded else [])):
            if self.is_embedded:
                row = {**row, PICTURE: f"{self.path.stem}/{number:07d}"}
            elif self.path.suffix.lower() in DELIMITERS and isinstance(row, dict):
                if missing := OF_QUESTIONS - row.keys():
                    lacks = f"the header lacks {', '.join(sorted(missing))}; it has {', '.join(row)}"
                    raise ValueError(f"{self.path}: {lacks}")
            yield row

    def picture(self, number: int) -> bytes | None:
        """The encoded picture of a row from 0, None where there is none; of parquet, its row group is read for it."""
        column = self._row_group_from(number) if self._is_parquet else self._mapped[number][PICTURE]
        cell = column[0].as_py()
        return cell.get("bytes") if isinstance(cell, dict) else cell

    def _row_group_from(self, number: int):
        """The pictures of a row's group, from that row on. The file is opened anew, as workers must not share one."""
        from pyarrow.parquet import ParquetFile

        with ParquetFile(self.path) as file:
            group = 0
            while number >= (num_rows := file.metadata.row_group(group).num_rows):
                number, group = number - num_rows, group + 1
            return file.read_row_group(group, [PICTURE])[PICTURE].slice(number)


def _has_pictures(path: Path) -> bool:
    """Whether the column of pictures holds bytes, and not paths."""
    from pyarrow import ArrowException, types
    from pyarrow.parquet import read_schema

    try:
        is_parquet = path.is_file() and path.suffix.lower() == ".parquet"
        schema = read_schema(path) if is_parquet else open_dataset(path).features.arrow_schema
    except (ArrowException, OSError) as error:
        raise ValueError(f"{path}: cannot be read ({str(error).splitlines()[0]})") from error
    kind = schema.field(PICTURE).type if PICTURE in schema.names else None
    return kind is not None and (types.is_binary(kind) or types.is_large_binary(kind) or types.is_struct(kind))


def stamp(path: str | Path) -> str:
    """Changes when the file, or a file in the folder, does. Raises FileNotFoundError."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such source file; check --source")
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    found = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return ", ".join(f"{name} {size} {time}" for name, size, time in found)
