"""From the preference format of the `datasets` library (see hf_export): also data sets that were made elsewhere."""

import hashlib
import json
from pathlib import Path
from typing import Any

from data_gen.mix.hf_export import MORE
from data_gen.mix.pictures import free_name
from data_gen.pictures import decode
from llava.records import IMAGE, DataError, parse_preference
from llava.runtime import write_records
from llava.tables import is_arrow, read_rows

TEXTS = ("prompt", "chosen", "rejected")


def import_pairs(path: Path, output: Path) -> int:
    """Write train.json and images/; the number of pairs. Raises DataError, ValueError, FileNotFoundError."""
    if (output / "train.json").exists():
        raise ValueError(f"{output} holds a train.json: remove it or choose another --output")
    if path.exists() and not is_arrow(path):
        raise ValueError(f"{path}: neither a folder of save_to_disk nor a .parquet file")
    records, problems, folder = [], [], Folder(output / "images")
    for number, row in enumerate(read_rows(path), 1):
        where = f"{path} row {number}"
        try:
            if isinstance(row, ValueError):
                raise row
            records.append(_record(row, number, folder))
            parse_preference(records[-1], where)
        except ValueError as error:
            problems.append(f"{where}: {error}")
        except (LookupError, TypeError, AttributeError) as error:
            problems.append(f"{where}: not of the preference format ({type(error).__name__}: {error})")
    if problems or not records:
        raise DataError(problems or [f"{path}: the data set has no rows"])
    write_records(output / "train.json", records, default=str)
    return len(records)


class Folder:
    """Pictures written once each, under the name they came with where that is free."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._names: dict[str, str] = {}  # by content
        self._taken: set[str] = set()

    def add(self, name: str, data: bytes) -> str:
        """Put a picture; its name."""
        digest = hashlib.sha256(data).hexdigest()
        if digest not in self._names:
            path = free_name(name, digest, self._taken)
            (self.folder / path).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / path).write_bytes(data)
            self._names[digest] = path
            self._taken.add(path)
        return self._names[digest]


def _record(row: dict[str, Any], number: int, folder: Folder) -> dict[str, Any]:
    """The record of a row. Raises ValueError."""
    own = {"images", "image", "image_paths", "id", MORE, *TEXTS}
    pictures = row.get("images") or ([row["image"]] if row.get("image") else [])
    names = row.get("image_paths") or [None] * len(pictures)
    if len(names) != len(pictures):
        raise ValueError(f"{len(pictures)} images but {len(names)} `image_paths`")
    stored = []
    for place, (picture, name) in enumerate(zip(pictures, names, strict=True), 1):
        stored.append(_stored(picture, name, f"{number:07d}_{place}", folder))
    prompt, chosen, rejected = _texts(row)
    if IMAGE not in prompt:
        prompt = f"{IMAGE}\n" * len(stored) + prompt
    record = {"id": row.get("id") or f"row_{number}", "image": stored}
    record |= {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    typed = {name: _plain(value) for name, value in row.items() if name not in own and value is not None}
    return record | typed | json.loads(row.get(MORE) or "{}")


def _stored(picture: Any, name: str | None, plain_name: str, folder: Folder) -> str:
    data = picture.get("bytes") if isinstance(picture, dict) else picture
    if data is None and isinstance(picture, dict) and picture.get("path"):
        data = Path(picture["path"]).read_bytes()
    if not isinstance(data, bytes):
        raise ValueError("a picture must come as bytes, or as the path of a file")
    suffix = decode(data, name or plain_name).suffix
    return folder.add(name or plain_name + suffix, data)


def _texts(row: dict[str, Any]) -> list[str]:
    """Prompt and both answers as texts; the prompt may also stand in front of each answer."""
    missing = [name for name in ("chosen", "rejected") if not row.get(name)]
    if missing:
        raise ValueError(f"no `{missing[0]}`; the columns are {', '.join(row)}")
    prompt, chosen, rejected = (row.get(name) for name in TEXTS)
    if prompt is None and isinstance(chosen, list):
        prompt, chosen, rejected = chosen[:-1], chosen[-1:], rejected[-1:]
    return [_text(prompt, "user"), _text(chosen, "assistant"), _text(rejected, "assistant")]


def _text(said: Any, role: str) -> str:
    """A text, or the one message of the role, with `<image>` for its image parts."""
    if isinstance(said, str):
        return said
    if not isinstance(said, list) or [message.get("role") for message in said] != [role]:
        roles = [message.get("role") for message in said] if isinstance(said, list) else said
        raise ValueError(f"a text or one message of {role} is needed here, not {roles}: only single turns are taken")
    content = said[0]["content"]
    if isinstance(content, str):
        return content
    return "".join(IMAGE if part["type"] == "image" else part["text"] for part in content)


def _plain(value: Any) -> Any:
    """Boxes come back as whole numbers where they were."""
    if isinstance(value, list) and all(isinstance(v, float) and v.is_integer() for v in value):
        return [int(v) for v in value]
    return value
