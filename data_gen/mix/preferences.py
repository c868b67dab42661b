"""To the preference format of the `datasets` library that TRL and others train on, and back; also what others made.

A row has `images` and the conversational lists `prompt`, `chosen`, `rejected` of {role, content}, where content is a
list of image and text parts. Everything else of a record is kept in columns that such trainers ignore.
"""

import hashlib
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from data_gen.drops import Unusable
from data_gen.mix.pictures import free_name
from data_gen.pictures import PictureFiles, decode
from llava.records import IMAGE, DataError, Preference, parse_preference, read_json, read_preferences
from llava.runtime import write_records
from llava.strict_json import loads
from llava.tables import is_arrow, read_rows

TYPED = ("image_type", "target", "target_box", "grid", "gt", "attention_ratio", "perplexity", "rejected_from")
ROLES = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
MORE = "more"  # JSON of a record's further fields


def export_pairs(data_path: str, image_folder: str, output: Path) -> int:
    """Write a folder of `save_to_disk`, or a file where `output` ends in .parquet; the number of rows.

    Raises DataError, ValueError, FileNotFoundError.
    """
    from datasets import Dataset, disable_progress_bars  # slow to import

    if output.exists():
        raise ValueError(f"{output} exists: remove it or choose another --output")
    pairs, records, files = read_preferences(data_path), read_json(data_path), PictureFiles(image_folder)
    missing = [f"{p.where}: no {name} in {files.path}" for p in pairs for name in p.images if not files.has(name)]
    if missing:
        raise DataError(missing)
    disable_progress_bars()
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent) as folder:
        rows = Dataset.from_generator(
            _rows, gen_kwargs={"records": records, "files": files}, features=_features(), cache_dir=f"{folder}/cache"
        )
        part = Path(folder) / output.name
        rows.to_parquet(str(part)) if output.suffix == ".parquet" else rows.save_to_disk(str(part))
        part.replace(output)
    return len(records)


def _features():
    from datasets import Features, Image, List, Value

    text, whole, real = Value("string"), Value("int64"), Value("float64")
    message = List({"role": text, "content": List({"type": text, "text": text})})
    typed = (text, whole, List(real), List(whole), text, real, real, text)
    return Features(
        {"images": List(Image()), "prompt": message, "chosen": message, "rejected": message, "id": text,
         "image_paths": List(text), **dict(zip(TYPED, typed, strict=True)), MORE: text}
    )  # fmt: skip


def _rows(records: Sequence[dict[str, Any]], files: PictureFiles):
    for record in records:
        yield _row(record, parse_preference(record, ""), files)


def _row(record: dict[str, Any], pair: Preference, files: PictureFiles) -> dict[str, Any]:
    known = {"id", "image", *ROLES, *TYPED}
    try:
        pictures = [{"bytes": files.read(name), "path": PurePosixPath(name).name} for name in pair.images]
    except Unusable as error:
        raise ValueError(f"record {pair.id}: {error.detail}") from error
    texts = {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected[0]}
    return {
        "images": pictures,
        **{name: [{"role": ROLES[name], "content": parts(text)}] for name, text in texts.items()},
        "id": pair.id,
        "image_paths": list(pair.images),
        **{name: record.get(name) for name in TYPED},
        MORE: json.dumps({name: value for name, value in record.items() if name not in known}),
    }


def parts(text: str) -> list[dict[str, str | None]]:
    """A text as image and text parts."""
    found: list[dict[str, str | None]] = []
    for number, piece in enumerate(text.split(IMAGE)):
        found += [{"type": "image", "text": None}] if number else []
        found += [{"type": "text", "text": piece}] if piece else []
    return found


def import_pairs(path: Path, output: Path) -> int:
    """Write train.json and images/; the number of pairs. Raises DataError, ValueError, FileNotFoundError."""
    if (output / "train.json").exists():
        raise ValueError(f"{output} holds a train.json: remove it or choose another --output")
    if path.exists() and not is_arrow(path):
        raise ValueError(f"{path}: neither a folder of save_to_disk nor a .parquet file")
    records, problems, put = [], [], pictures_in(output / "images")
    beside = PictureFiles(path.parent)
    for number, row in enumerate(read_rows(path), 1):
        where = f"{path} row {number}"
        try:
            if isinstance(row, ValueError):
                raise row
            records.append(_record(row, number, put, beside))
            parse_preference(records[-1], where)
        except ValueError as error:
            problems.append(f"{where}: {error}")
        except (LookupError, TypeError, AttributeError) as error:
            problems.append(f"{where}: not of the preference format ({type(error).__name__}: {error})")
    if problems or not records:
        raise DataError(problems or [f"{path}: the data set has no rows"])
    write_records(output / "train.json", records, default=str)
    return len(records)


def pictures_in(folder: Path) -> Callable[[str, bytes], str]:
    """What puts each picture there once, under the name it comes with where that is free, and gives its name."""
    names: dict[str, str] = {}  # by content
    taken: set[str] = set()

    def put(name: str, data: bytes) -> str:
        digest = hashlib.sha256(data).hexdigest()
        if digest not in names:
            names[digest] = path = free_name(name, digest, taken)
            taken.add(path)
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(data)
        return names[digest]

    return put


def _record(
    row: dict[str, Any], number: int, put: Callable[[str, bytes], str], beside: PictureFiles
) -> dict[str, Any]:
    """The record of a row. Raises ValueError."""
    own = {"images", "image", "image_paths", "id", MORE, *ROLES}
    pictures = row.get("images") or ([row["image"]] if row.get("image") else [])
    names = row.get("image_paths") or [None] * len(pictures)
    if len(names) != len(pictures):
        raise ValueError(f"{len(pictures)} images but {len(names)} `image_paths`")
    stored = []
    for place, (picture, name) in enumerate(zip(pictures, names, strict=True), 1):
        data, plain_name = _bytes(picture, beside), f"{number:07d}_{place}"
        suffix = decode(data, name or plain_name).suffix
        stored.append(put(name or plain_name + suffix, data))
    prompt, chosen, rejected = _texts(row)
    if IMAGE not in prompt:
        prompt = f"{IMAGE}\n" * len(stored) + prompt
    record = {"id": row.get("id") or f"row_{number}", "image": stored}
    record |= {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    typed = {name: _plain(value) for name, value in row.items() if name not in own and value is not None}
    return record | typed | loads(row.get(MORE) or "{}")


def _bytes(picture: Any, beside: PictureFiles) -> bytes:
    """Those of a picture, or of its file below the folder of the table."""
    data = picture.get("bytes") if isinstance(picture, dict) else picture
    if data is None and isinstance(picture, dict) and picture.get("path"):
        data = beside.read(picture["path"])
    if not isinstance(data, bytes):
        raise ValueError("a picture must come as bytes, or as the path of a file")
    return data


def _texts(row: dict[str, Any]) -> list[str]:
    """Prompt and both answers as texts; the prompt may also stand in front of each answer."""
    missing = [name for name in ("chosen", "rejected") if not row.get(name)]
    if missing:
        raise ValueError(f"no `{missing[0]}`; the columns are {', '.join(row)}")
    prompt, chosen, rejected = (row.get(name) for name in ROLES)
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
