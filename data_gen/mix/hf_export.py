"""To the preference format of the `datasets` library that TRL and others train on.

A row has `images` and the conversational lists `prompt`, `chosen`, `rejected` of {role, content}, where content is a
list of image and text parts. Everything else of a record is kept in columns that such trainers ignore.
"""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from data_gen.drops import Unusable
from data_gen.pictures import PictureFiles
from llava.records import IMAGE, DataError, Preference, parse_preference, read_json, read_preferences

TYPED = ("image_type", "target", "target_box", "grid", "gt", "attention_ratio", "perplexity", "rejected_from")
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
    known = {"id", "image", "prompt", "chosen", "rejected", *TYPED}
    try:
        pictures = [{"bytes": files.read(name), "path": PurePosixPath(name).name} for name in pair.images]
    except Unusable as error:
        raise ValueError(f"record {pair.id}: {error.detail}") from error
    return {
        "images": pictures,
        "prompt": [{"role": "user", "content": parts(pair.prompt)}],
        "chosen": [{"role": "assistant", "content": parts(pair.chosen)}],
        "rejected": [{"role": "assistant", "content": parts(pair.rejected[0])}],
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
