"""JSON as other programs read it too: what Python's reader lets through, or ends by a traceback at, is refused."""

import json
from typing import Any


def loads(text: str) -> Any:
    """The value of a JSON text. Raises ValueError for anything else, json.JSONDecodeError where it has a place.

    Refused beside broken JSON: an object with a name twice, of which Python would take the last; halves of characters,
    which no file can hold; nesting and numbers beyond what Python reads.
    """
    try:
        value = json.loads(text, object_pairs_hook=_object)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if "\\ud" in text or "\\uD" in text:  # escaped: pairs of them are characters, one alone is none
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"half a character (\\u{ord(error.object[error.start]):04x} alone)") from error
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the name {twice[:60]!r} stands twice in one object")
    return found
