"""JSON as other programs read it too: what Python's reader lets through, or ends by a traceback at, is refused."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def read_json(path: str | Path) -> list[Any]:
    """Items of a JSON array, or of a JSONL file, told apart by content; a BOM is ignored.

    Raises FileNotFoundError, or ValueError with line and column where the file is not JSON.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text (byte {error.start}); is it an archive or a picture?") from error
    if not text.strip():
        raise ValueError(f"{path}: the file is empty")
    if text.lstrip().startswith("["):
        return _json_value(path, text)
    return list(_json_lines(path, text))


def _json_lines(path: Path, text: str) -> Iterator[Any]:
    for number, line in enumerate(text.split("\n"), 1):  # splitlines would also cut inside strings, at U+2028
        if line.strip():
            yield _json_value(path, line, number)


def _json_value(path: Path, text: str, first_line: int = 1) -> Any:
    try:
        return loads(text)
    except json.JSONDecodeError as error:
        place = f"line {first_line + error.lineno - 1}, column {error.colno}"
        raise ValueError(f"{path}: broken JSON at {place}: {error.msg}") from error
    except ValueError as error:
        raise ValueError(f"{path}: broken JSON from line {first_line} on: {error}") from error


def loads(text: str) -> Any:
    """The value of a JSON text. Raises ValueError for anything else, json.JSONDecodeError where it has a place.

    Refused beside broken JSON: an object with a name twice, of which Python would take the last; nesting and numbers
    beyond what Python reads.
    """
    value, end = value_at(text, len(text) - len(text.lstrip()))
    if rest := text[end:].lstrip():
        raise json.JSONDecodeError("Extra data", text, len(text) - len(rest))
    return value


def value_at(text: str, start: int) -> tuple[Any, int]:
    """The value that begins at a place of a text, and where it ends. Raises like `loads`."""
    try:
        return DECODER.raw_decode(text, start)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def check_text(value: Any) -> None:
    """Raises ValueError for half a character anywhere in a value: JSON can say it, no file or tokenizer takes it."""
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"half a character (\\u{ord(error.object[error.start]):04x}) is no text") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        own = f", id {str(found['id'])[:60]}" if "id" in found else ""
        raise ValueError(f"the name {twice[:60]!r} stands twice in one object{own}")
    return found


DECODER = json.JSONDecoder(object_pairs_hook=_object)
