"""JSON as other programs read it too: what Python's reader lets through, or ends by a traceback at, is refused."""

import json
from typing import Any


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
