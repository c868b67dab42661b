"""Pairs of several files as one list: ids made unique, pictures named by content, exact copies left out."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_gen.mix.pictures import Content, Names, look_at
from data_gen.pictures import PictureFiles
from data_gen.sources import source_paths
from llava.asked import TARGET, target_fields
from llava.records import Preference, parse_preference, read_records


@dataclass(frozen=True)
class Item:
    """A pair with what tells whether it shares a picture with another one."""

    record: dict[str, Any]  # as it is written
    pictures: frozenset[str]  # content of every picture, and paths of the source pictures
    subset: str  # of the picture that is asked about
    has_sources: bool


@dataclass
class Merged:
    """What all files hold together."""

    items: list[Item]
    names: Names  # where the bytes of each picture are, and what it is called
    dropped: Counter = field(default_factory=Counter)  # reason: pairs


def merge(paths: Sequence[str], folders: Sequence[str], source_folder: str | None) -> Merged:
    """Read and check all pairs and their pictures. Raises DataError, ValueError, FileNotFoundError."""
    if len(folders) not in (1, len(paths)):
        raise ValueError(f"{len(folders)} folders of pictures for {len(paths)} files of pairs: give one, or one each")
    folders = list(folders) * len(paths) if len(folders) == 1 else folders
    opened = {folder: PictureFiles(folder) for folder in dict.fromkeys(folders)}
    sources = PictureFiles(source_folder) if source_folder else None
    merged = Merged([], Names())
    taken, seen = set(), set()
    for path, folder in zip(paths, folders, strict=True):
        files = opened[folder]
        pairs = read_records(path, _pair)
        contents = look_at(files, [(pair.images, pair.where) for _, pair in pairs])
        beside = _source_contents([pair for _, pair in pairs], files, sources)
        for raw, pair in pairs:
            own = [contents[name] for name in pair.images]
            key = (pair.context, pair.prompt, pair.chosen, pair.rejected, *(content.digest for content in own))
            if key in seen:
                merged.dropped["duplicate"] += 1
                continue
            seen.add(key)
            names = [merged.names.of(name, content, files) for name, content in zip(pair.images, own, strict=True)]
            record = _written(raw, pair, unique(pair.id, taken), names)
            merged.items.append(_item(record, pair, own, beside))
    return merged


def unique(wanted: str, taken: set[str]) -> str:
    """The name, or the first of name_2, name_3, ... that is not taken; afterwards it is."""
    found, number = wanted, 1
    while found in taken:
        number += 1
        found = f"{wanted}_{number}"
    taken.add(found)
    return found


def subset_of(pair: Preference) -> str:
    """First folder of the path of the picture that is asked about, of several the first."""
    paths = source_paths(pair.extra) or list(pair.images)
    path = paths[pair.targets[0] if pair.targets[0] < len(paths) else 0]
    return path.lstrip("/").split("/", 1)[0] if "/" in path.lstrip("/") else "all"


def _pair(raw: Any, where: str) -> tuple[dict[str, Any], Preference]:
    return raw, parse_preference(raw, where)


def _source_contents(
    pairs: Sequence[Preference], files: PictureFiles, sources: PictureFiles | None
) -> dict[str, Content]:
    """Content of the source pictures that are at hand: so one picture is known under two names."""
    places = {}
    for path in {path for pair in pairs for path in source_paths(pair.extra)}:
        place = next((place for place in (files, sources) if place and place.has(path)), None)
        if place:
            places.setdefault(place, []).append(path)
    found = {}
    for place, paths in places.items():
        found |= look_at(place, [((path,), f"source picture {path}") for path in sorted(paths)])
    return found


def _item(
    record: dict[str, Any], pair: Preference, own: Sequence[Content], beside: dict[str, Content]
) -> Item:
    paths = source_paths(pair.extra)
    content = {content.fingerprint for content in own} | {beside[path].fingerprint for path in paths if path in beside}
    pictures = frozenset(content | {f"path {path}" for path in paths})
    return Item(record, pictures, subset_of(pair), bool(paths))


def _written(raw: dict[str, Any], pair: Preference, name: str, images: list[str]) -> dict[str, Any]:
    """The record with its new names; format and target are written out, as readers might derive them otherwise."""
    rejected = pair.rejected[0] if len(pair.rejected) == 1 else list(pair.rejected)
    own = {"id": name, "image": images, "prompt": pair.prompt, "chosen": pair.chosen, "rejected": rejected}
    derived = {"image_type": pair.image_type}
    if TARGET.search(pair.prompt) or pair.image_type == "pip":
        derived |= target_fields(pair.targets)
    return own | {name: value for name, value in (derived | raw | derived).items() if name not in own}


def data_digest(path: str | Path) -> str:
    """Changes when the bytes of a file do. Raises FileNotFoundError."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
