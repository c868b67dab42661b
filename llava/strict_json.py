"""JSON as other programs read it too: what Python's reader lets through, or ends by a traceback at, is refused."""

import json
from typing import Any


def loads(text: str) -> Any:
    """The value of a JSON text. Raises ValueError for anything else, json.JSONDecodeError where it has a place.

    Refused beside broken JSON: an object with a name twice, of which Python would take the last; halves of characters,
    which no file can hold; nesting and numbers beyond what Python reads.
    """
    value, end = value_at(text, len(text) - len(text.lstrip()))
    if rest := text[end:].lstrip():
        raise json.JSONDecodeError("Extra data", text, len(text) - len(rest))
    return value


def value_at(text: str, start: int) -> tuple[Any, int]:
    """The value that begins at a place of a text, and where it ends. Raises like `loads`."""
    try:
        value, end = DECODER.raw_decode(text, start)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if "\\ud" in text[start:end].lower():  # escaped: pairs of them are characters, one alone is none
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"half a character (\\u{ord(error.object[error.start]):04x} alone)") from error
    return value, end


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the name {twice[:60]!r} stands twice in one object")
    return found


DECODER = json.JSONDecoder(object_pairs_hook=_object)
