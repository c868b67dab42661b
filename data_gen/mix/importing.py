"""Preference pairs of other projects as ours: rows of tables, their pictures opened, checked and put in one folder."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from data_gen.drops import Drop, Unusable
from data_gen.mix.exporting import BRANCH, MORE
from data_gen.mix.formats import Messages, Row, listed, take, text_of
from data_gen.mix.pictures import Folder
from data_gen.pictures import PictureFiles, decode
from data_gen.sources import below
from llava.records import IMAGE, parse_preference
from llava.runtime import Progress, write_records, write_run_json, write_text
from llava.strict_json import loads
from llava.tables import read_rows


def import_pairs(paths: Sequence[str], image_folder: str | None, output: Path) -> dict[str, Any]:
    """Write train.json, images/, dropped.jsonl and run.json; what was counted.

    A row that is no pair, or whose pictures cannot be used, is dropped and listed. Raises ValueError, also where no
    pair is left, and FileNotFoundError.
    """
    if (output / "train.json").exists():
        raise ValueError(f"{output} holds a train.json: remove it or choose another --output")
    files = PictureFiles(image_folder) if image_folder else None
    importer, drops, num_rows = _Importer(Folder(output / "images")), [], 0
    for table in (table for path in paths for table in _tables(Path(path))):
        importer.files = files or PictureFiles(table if table.is_dir() else table.parent)
        for number, row in enumerate(Progress(read_rows(table), desc=table.name, unit="row"), 1):
            num_rows += 1
            try:
                importer.add(row, f"row_{num_rows}")
            except Unusable as error:
                id, where = _id(row, f"row_{num_rows}"), f"{table} row {number}"
                drops.append(Drop(id, where, error.reason, error.detail, error.is_bad))
    if not importer.records:
        first = f". The first: {drops[0]}" if drops else ""
        raise ValueError(f"{', '.join(paths)}: none of {num_rows} rows is a pair{first}")
    counts = {
        "rows": num_rows, "pairs": len(importer.records), "formats": importer.formats,
        "dropped": Counter(drop.reason for drop in drops), "bad": sum(drop.is_bad for drop in drops),
    }  # fmt: skip
    write_text(output / "dropped.jsonl", "".join(json.dumps(drop.as_dict()) + "\n" for drop in drops))
    write_records(output / "train.json", importer.records, default=str)
    write_run_json(output / "run.json", arguments={"path": paths, "image_folder": image_folder}, counts=counts)
    return counts


def _tables(path: Path) -> Iterator[Path]:
    """A table, or the parquet files of a folder that `save_to_disk` did not write."""
    parts = sorted(path.rglob("*.parquet")) if path.is_dir() and not (path / "state.json").exists() else []
    yield from [part for part in parts if not part.name.startswith(".")] or [path]


@dataclass
class _Importer:
    """Turns rows into records, and their pictures into files that are written once each."""

    folder: Folder
    files: PictureFiles | None = None  # where pictures are that the rows name only
    records: list[dict[str, Any]] = field(default_factory=list)
    formats: Counter = field(default_factory=Counter)

    def add(self, row: Any, name: str) -> None:
        """Add the record of a row, `name`d so where it has no id. Raises Unusable."""
        try:
            if isinstance(row, ValueError):
                raise Unusable("unreadable row", str(row))
            record, pictures, said = _record(dict(row), name)
            record["image"] = [f"{number}" for number in range(len(pictures))]
            parse_preference(record, name)
            stored = [self._checked(*picture) for picture in pictures]
        except Unusable:
            raise
        except ValueError as error:
            raise Unusable("no pair", str(error)) from error
        except (LookupError, TypeError, AttributeError) as error:
            raise Unusable("no pair", f"of no known format ({type(error).__name__}: {error})") from error
        record["image"] = [self.folder.put(*picture) for picture in stored]
        is_branch = _is_ours(row) and record.pop(BRANCH, 0) and self.records
        if not (is_branch and _joined(self.records[-1], record)):
            self.formats[said] += 1
            self.records.append(record)

    def _checked(self, picture: Any, name: str | None, plain_name: str) -> tuple[str, bytes]:
        """Name and bytes of a picture that can be decoded. Raises Unusable."""
        path = picture if isinstance(picture, str) else None
        if isinstance(picture, dict):
            picture, path = picture.get("bytes"), picture.get("path")
        if path and not isinstance(picture, bytes):
            path = self._below(path)
            picture = self.files.read(path)
        if not isinstance(picture, bytes):
            raise Unusable("no picture", "a picture must come as bytes, or as the path of a file")
        wanted = name or path or plain_name
        suffix = decode(picture, wanted).suffix
        return wanted if PurePath(wanted).suffix else wanted + suffix, picture

    def _below(self, path: str) -> str:
        """The path of a picture below the folder of pictures, which an absolute one may name too. Raises Unusable."""
        folder = self.files.path.resolve()
        pure = PurePath(path)
        return below(pure.relative_to(folder).as_posix() if pure.is_relative_to(folder) else path)


def _record(row: Row, name: str) -> tuple[dict[str, Any], list[tuple[Any, str | None, str]], str]:
    """The record of a row but for its pictures; each picture, its name if it has one, and one by number; the format."""
    said, inside = take(row), []
    *before, (role, prompt) = _turns(said.messages, inside) or [(None, "")]
    if role != "user":
        raise ValueError("the messages before the answers must end with one of the user")
    record = {"id": _id(row, name), "image": [], "prompt": prompt, "chosen": _answer(said.chosen)}
    rejected = [_answer(content) for content in said.rejected]
    record["rejected"] = rejected[0] if len(rejected) == 1 else rejected
    more = loads(row.pop(MORE)) if _is_ours(row) else {}
    names, beside = row.pop("image_paths", None), [listed(row.get(key)) for key in ("images", "image", "image_path")]
    pictures = inside or next(filter(None, beside), [])
    row.pop("images", None)
    if not pictures:
        raise Unusable("no picture", "the row has none, and training needs one", is_bad=False)
    names = names or [None] * len(pictures)
    if len(names) != len(pictures):
        raise ValueError(f"{len(pictures)} images but {len(names)} `image_paths`")
    _place(before, record, len(pictures))
    if before:
        record["context"] = [{"role": role, "content": text} for role, text in before]
    own = {key: _plain(value) for key, value in row.items() if value is not None and key not in record}
    numbered = [f"{name}_{number}" for number in range(1, len(pictures) + 1)]
    return record | own | more, list(zip(pictures, names, numbered, strict=True)), said.format


def _is_ours(row: Row) -> bool:
    """Whether `export` made the row."""
    return bool(row.get("image_paths") and row.get(MORE))


def _turns(messages: Messages, pictures: list[Any]) -> list[tuple[str, str]]:
    """Role and text of each; an empty system message says nothing."""
    turns = [(message["role"], text_of(message["content"], pictures)) for message in messages]
    return [(role, text) for role, text in turns if role != "system" or text.strip()]


def _answer(content: Any) -> str:
    text = text_of(content, [])
    if IMAGE in text:
        raise Unusable("picture in an answer", "an answer must be text only", is_bad=False)
    return text


def _place(before: list[tuple[str, str]], record: dict[str, Any], num_pictures: int) -> None:
    """Where no turn says where its pictures stand, they come first, as TRL puts them."""
    asked = [place for place, (role, _) in enumerate(before) if role == "user"]
    if any(IMAGE in before[place][1] for place in asked) or IMAGE in record["prompt"]:
        return
    if asked:
        before[asked[0]] = "user", f"{IMAGE}\n" * num_pictures + before[asked[0]][1]
    else:
        record["prompt"] = f"{IMAGE}\n" * num_pictures + record["prompt"]


def _joined(record: dict[str, Any], branch: dict[str, Any]) -> bool:
    """Whether another row's rejected answer could be added: of several, an export makes a row each."""
    if {**record, "rejected": None} != {**branch, "rejected": None}:
        return False
    known = record["rejected"]
    record["rejected"] = [*(known if isinstance(known, list) else [known]), branch["rejected"]]
    return True


def _id(row: Any, name: str) -> str:
    given = (row.get("id"), row.get("idx")) if isinstance(row, dict) else ()
    return next((str(value) for value in given if value not in (None, "")), name)


def _plain(value: Any) -> Any:
    """Boxes come back as whole numbers where they were."""
    if isinstance(value, list) and all(isinstance(v, float) and v.is_integer() for v in value):
        return [int(v) for v in value]
    return value
