"""Pairs for other trainers: the tables that TRL, LLaMA-Factory and ms-swift read, with pictures as they are seen here.

Of several rejected answers each gets a row. What no such trainer knows of a record stays in columns that they ignore:
`import` gives the same records again.
"""

import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from data_gen.drops import Unusable
from data_gen.mix.pictures import TOP, Folder
from data_gen.pictures import PictureFiles, decode
from llava.records import IMAGE, DataError, Preference, parse_preference, read_records

TYPED = ("image_type", "target", "target_box", "grid", "gt", "attention_ratio", "perplexity", "rejected_from")
OWN = {"id", "image", "prompt", "context", "chosen", "rejected"}
MORE = "more"  # JSON of a record's further fields
BRANCH = "rejected_number"  # among them, for the second and later rejected answers: it belongs to the row before
DATASET_INFO = {
    "file_name": "pairs.json", "formatting": "sharegpt", "ranking": True,
    "columns": {"messages": "conversations", "system": "system", "images": "images", "chosen": "chosen",
                "rejected": "rejected"},
}  # fmt: skip


@dataclass(frozen=True)
class Pair:
    """A record as it stands in its file, and as it is read."""

    raw: dict[str, Any]
    read: Preference

    def branches(self, *known: str) -> Iterator[tuple[str, dict[str, str]]]:
        """Every rejected answer, and the column of the fields that stand in no other one (`known`)."""
        more = {name: value for name, value in self.raw.items() if name not in OWN.union(known)}
        for number, text in enumerate(self.read.rejected):
            yield text, {MORE: json.dumps(more | ({BRANCH: number} if number else {}))}


def export_pairs(data_path: str, image_folder: str, output: Path, to: str) -> int:
    """Write what the trainer `to` (one of WRITERS) reads, whole or not at all; the number of rows.

    Raises DataError, ValueError, FileNotFoundError.
    """
    if output.exists():
        raise ValueError(f"{output} exists: remove it or choose another --output")
    pairs = read_records(data_path, lambda raw, where: Pair(raw, parse_preference(raw, where)))
    files = PictureFiles(image_folder)
    missing = [f"{p.read.where}: no {n} in {files.path}" for p in pairs for n in p.read.images if not files.has(n)]
    if missing:
        raise DataError(missing)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent) as folder:
        part = Path(folder) / output.name
        WRITERS[to](pairs, files, part)
        part.replace(output)
    return sum(len(pair.read.rejected) for pair in pairs)


def parts(text: str) -> list[dict[str, str | None]]:
    """A text as image and text parts."""
    found: list[dict[str, str | None]] = []
    for number, piece in enumerate(text.split(IMAGE)):
        found += [{"type": "image", "text": None}] if number else []
        found += [{"type": "text", "text": piece}] if piece else []
    return found


def _trl(pairs: list[Pair], files: PictureFiles, output: Path) -> None:
    """A folder of `save_to_disk`, or a .parquet file: conversational, with image parts and the pictures inside."""
    from datasets import Dataset, disable_progress_bars  # slow to import

    disable_progress_bars()
    rows = Dataset.from_generator(
        _trl_rows, gen_kwargs={"pairs": pairs, "files": files}, features=_features(), cache_dir=f"{output}.cache"
    )
    rows.to_parquet(str(output)) if output.suffix == ".parquet" else rows.save_to_disk(str(output))


def _features():
    from datasets import Features, Image, List, Value

    text, whole, real = Value("string"), Value("int64"), Value("float64")
    message = List({"role": text, "content": List({"type": text, "text": text})})
    typed = (text, whole, List(real), List(whole), text, real, real, text)
    return Features(
        {"images": List(Image()), "prompt": message, "chosen": message, "rejected": message, "id": text,
         "image_paths": List(text), **dict(zip(TYPED, typed, strict=True)), MORE: text}
    )  # fmt: skip


def _trl_rows(pairs: list[Pair], files: PictureFiles) -> Iterator[dict[str, Any]]:
    for pair in pairs:
        names = pair.read.images
        prompt = [_message(role, parts(text)) for role, text in (*pair.read.context, ("user", pair.read.prompt))]
        row = {
            "images": [{"bytes": _seen(pair, files, name), "path": PurePosixPath(name).name} for name in names],
            "prompt": prompt, "chosen": [_message("assistant", parts(pair.read.chosen))], "id": pair.read.id,
            "image_paths": list(names), **{name: pair.raw.get(name) for name in TYPED},
        }  # fmt: skip
        for text, more in pair.branches(*TYPED):
            yield row | more | {"rejected": [_message("assistant", parts(text))]}


def _llama_factory(pairs: list[Pair], files: PictureFiles, output: Path) -> None:
    """A folder for `dataset_dir`: pairs.json in the sharegpt format, dataset_info.json and images/."""
    names, rows, folder = {"user": "human", "assistant": "gpt"}, [], Folder(output / TOP)
    for pair in pairs:
        messages = _messages(pair)
        system = messages.pop(0)["content"] if messages[0]["role"] == "system" else ""
        turns = [{"from": names[message["role"]], "value": message["content"]} for message in messages]
        row = {"conversations": turns, "system": system, "chosen": {"from": "gpt", "value": pair.read.chosen}}
        row |= _columns(pair, files, folder)
        rows += [row | more | {"rejected": {"from": "gpt", "value": text}} for text, more in pair.branches()]
    (output / "pairs.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    (output / "dataset_info.json").write_text(json.dumps({"pairs": DATASET_INFO}, indent=2), encoding="utf-8")


def _ms_swift(pairs: list[Pair], files: PictureFiles, output: Path) -> None:
    """A folder with pairs.jsonl, whose messages end with the chosen answer, and images/."""
    lines, folder = [], Folder(output / TOP)
    for pair in pairs:
        row = {"messages": [*_messages(pair), _message("assistant", pair.read.chosen)]}
        row |= _columns(pair, files, folder)
        lines += [json.dumps(row | more | {"rejected_response": text}) + "\n" for text, more in pair.branches()]
    (output / "pairs.jsonl").write_text("".join(lines), encoding="utf-8")


WRITERS = {"trl": _trl, "llama-factory": _llama_factory, "ms-swift": _ms_swift}


def _message(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def _messages(pair: Pair) -> list[dict[str, Any]]:
    """All turns up to the question."""
    return [_message(role, text) for role, text in (*pair.read.context, ("user", pair.read.prompt))]


def _columns(pair: Pair, files: PictureFiles, folder: Folder) -> dict[str, Any]:
    """Pictures, put into the folder, and what such trainers ignore."""
    names = pair.read.images
    paths = [f"{TOP}/{folder.put(name, _seen(pair, files, name))}" for name in names]
    return {"images": paths, "id": pair.read.id, "image_paths": list(names)}


def _seen(pair: Pair, files: PictureFiles, name: str) -> bytes:
    """A picture's file, redrawn where other readers would see it otherwise. Raises ValueError naming the record."""
    try:
        return decode(files.read(name), name).file()[1]
    except Unusable as error:
        raise ValueError(f"record {pair.read.id}: {error.detail}") from error
