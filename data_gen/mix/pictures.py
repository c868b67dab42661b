"""Pictures of a data set: what each is, whatever it is called, and one file for each in an archive or a folder."""

import hashlib
import os
import unicodedata
import zipfile
from collections.abc import Container, Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from tqdm.contrib.concurrent import thread_map

from data_gen.drops import Unusable
from data_gen.pictures import PictureFiles, decode, fingerprint
from llava.records import DataError
from llava.runtime import Progress

TOP = "images"  # folder inside the archive, so that it unpacks beside train.json as it is named there
EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest time that a zip can hold


class Content(NamedTuple):
    """What a picture is."""

    digest: str  # of its bytes
    fingerprint: str  # of its pixels: the same for a copy that was stored in another way without loss
    num_bytes: int


def look_at(files: PictureFiles, wanted: Iterable[tuple[Sequence[str], str]]) -> dict[str, Content]:
    """Content of every picture of (names, where they are needed). Raises DataError: one line per place in trouble."""
    places: dict[str, str] = {}
    for names, where in wanted:
        for name in names:
            places.setdefault(name, where)
    options = {"tqdm_class": Progress, "desc": "pictures", "disable": len(places) < 1000}
    found = thread_map(lambda name: _content(files, name), places, **options)
    contents = dict(zip(places, found, strict=True))
    if problems := [f"{places[name]}: {error}" for name, error in contents.items() if isinstance(error, Unusable)]:
        raise DataError(problems)
    return contents


def _content(files: PictureFiles, name: str) -> Content | Unusable:
    try:
        data = files.read(name)
        pixels = decode(data, name).pixels
    except Unusable as error:
        return error
    return Content(hashlib.sha256(data).hexdigest(), fingerprint(pixels).hex(), len(data))


def free_name(name: str, digest: str, taken: Container[str]) -> str:
    """The name that a picture came with, below the folder; with a part of its content's digest if that is taken.

    In one Unicode form and with "/" between folders: other systems would tell or spell names otherwise.
    """
    parts = PurePosixPath(unicodedata.normalize("NFC", name.replace("\\", "/"))).parts
    path = PurePosixPath(*(part for part in parts if part not in ("/", "..")))
    return str(path.with_name(f"{path.stem}_{digest[:8]}{path.suffix}") if str(path) in taken else path)


class Folder:
    """Pictures written once each, under the name they come with where that is free."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._names: dict[str, str] = {}  # by content
        self._taken: set[str] = set()

    def put(self, name: str, data: bytes) -> str:
        """Write a picture if it is not there; its name."""
        digest = hashlib.sha256(data).hexdigest()
        if digest not in self._names:
            self._names[digest] = path = free_name(name, digest, self._taken)
            self._taken.add(path)
            (self.folder / path).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / path).write_bytes(data)
        return self._names[digest]


class Names:
    """One name for each content, and where its bytes are."""

    def __init__(self):
        self._by_digest: dict[str, str] = {}
        self._places: dict[str, tuple[PictureFiles, str, int]] = {}

    def of(self, name: str, content: Content, files: PictureFiles) -> str:
        """The name of a picture in the data set: its own, unless another picture has that."""
        if content.digest not in self._by_digest:
            own = free_name(name, content.digest, self._places)
            self._by_digest[content.digest] = own
            self._places[own] = files, name, content.num_bytes
        return self._by_digest[content.digest]

    def num_bytes(self, names: Iterable[str]) -> int:
        """Bytes of the pictures together."""
        return sum(self._places[name][2] for name in names)

    def write_zip(self, path: Path, names: Iterable[str]) -> None:
        """An archive without compression whose bytes depend on names and contents only; in place once it is whole."""
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
            for name in Progress(sorted(names), desc=path.name, unit="picture"):
                files, there, _ = self._places[name]
                info = zipfile.ZipInfo(f"{TOP}/{name}", EPOCH)
                info.create_system, info.external_attr = 3, 0o644 << 16  # unix, whatever this machine is
                archive.writestr(info, files.read(there))
        temporary.replace(path)

    def write_folder(self, folder: Path, names: Iterable[str]) -> None:
        """The pictures as files: links to those of a folder where the file system can, else copies."""
        for name in Progress(sorted(names), desc=folder.name, unit="picture"):
            files, there, num_bytes = self._places[name]
            target = folder / name
            if target.is_file() and target.stat().st_size == num_bytes:
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
            try:
                os.link(files.file(there).resolve(), temporary)
            except (AttributeError, OSError):  # an archive, another file system, or one without links
                temporary.write_bytes(files.read(there))
            temporary.replace(target)
