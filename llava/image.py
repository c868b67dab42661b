"""Opening pictures from a folder or straight out of a .zip or .tar, whose names all follow the same rules."""

import io
import lzma
import os
import re
import struct
import tarfile
import threading
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, Protocol
from unicodedata import normalize

from PIL import Image

from llava.pixels import DECODER_ERRORS, as_seen, is_turned, open_picture

# What the readers of archives let through for damaged, encrypted and unsupported ones.
DAMAGED = (
    zipfile.BadZipFile, zlib.error, lzma.LZMAError, tarfile.TarError, struct.error, EOFError, OSError, ValueError,
    RuntimeError, LookupError, OverflowError,
)  # fmt: skip
LARGEST = 128 << 20  # bytes of a picture's file; a member that would inflate to more is not read
FOLLOW_LINKS = "FOLLOW_LINKS"  # environment variable: 1 lets links lead out of the image folder
TOP = "images"  # the folder in the names of published sets
NO_PICTURES = ("__MACOSX", ".DS_Store", "Thumbs.db", "desktop.ini")  # beside the pictures on other systems


class Pictures(Protocol):
    """Where pictures are, by the names that records have: an `ImageStore`, or what is in memory."""

    def open(self, name: str) -> Image.Image:
        """The picture, upright RGB."""

    def size(self, name: str) -> tuple[int, int]:
        """Its (width, height) in px."""


class ImageStore:
    """Pictures below a folder, or inside a `.zip` or uncompressed `.tar`, which is read without extracting.

    A picture has the same names in all three: its path; without the folder that everything lies in, or with that of the
    store (`images.zip` or a folder `images`, holding `images/a.jpg` or `a.jpg`, answer to both); with `/` or a
    backslash, its letters composed or not. A path that leaves the store is refused. Safe to pickle and to share between
    threads; every process opens its own handle. Raises FileNotFoundError if the folder or archive does not exist,
    ValueError if it is neither.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.exists():
            raise FileNotFoundError(f"{self.path}: no such image folder or archive")
        self.kind, self._root = _kind(self.path), self.path.resolve()
        self._names: dict[str, str | tarfile.TarInfo] = {}  # members of an archive
        self._folders: dict[Path, dict[str, str]] = {}  # of a folder's folders, entries by composed name
        self._handle, self._owner, self._lock = None, None, threading.Lock()
        if self.kind == "folder":
            top = _only(_names_in(self.path))
            self._top = top if (self.path / top).is_dir() else ""
        else:
            self._names = self._members()
            self._top = _only(name.rpartition("/")[0].split("/")[0] for name in self._names)

    def __getstate__(self):
        return {**self.__dict__, "_handle": None, "_owner": None, "_lock": None}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def has(self, name: str) -> bool:
        """Whether there is such a picture; its content is not looked at."""
        try:
            return self._find(name) is not None
        except (OSError, ValueError):
            return False

    def size(self, name: str) -> tuple[int, int]:
        """(width, height) in px as the picture is seen, from its header where that says it. Raises like `open`."""
        with self._decoded(name) as picture:
            width, height = picture.size
            try:
                return (height, width) if width != height and is_turned(picture) else (width, height)
            except DECODER_ERRORS as error:
                raise ValueError(f"{self._place(name)}: truncated or damaged picture ({error})") from error

    def open(self, name: str) -> Image.Image:
        """The picture as `as_seen`.

        Raises FileNotFoundError if there is none, ValueError if it is truncated or not a picture.
        """
        with self._decoded(name) as picture:
            try:
                return as_seen(picture)
            except DECODER_ERRORS as error:
                raise ValueError(f"{self._place(name)}: truncated or damaged picture ({error})") from error

    def read(self, name: str) -> bytes:
        """The picture's file as it is stored. Raises FileNotFoundError, OSError, ValueError."""
        source = self._source(name)
        return source.read_bytes() if isinstance(source, Path) else source.getvalue()

    def file(self, name: str) -> Path | None:
        """Where the picture's file is, None inside an archive. Raises FileNotFoundError, ValueError."""
        return self._found(name) if self.kind == "folder" else None

    def stamp(self, name: str) -> str:
        """Changes when the picture's file does: size and time in a folder, size and checksum or time in an archive."""
        found = self._found(name)
        if self.kind == "folder":
            status = found.stat()
            return f"{status.st_size}-{status.st_mtime_ns}"
        if self.kind == "tar":
            return f"{found.size}-{found.mtime}"
        with self._lock:
            info = self._archive().getinfo(found)
        return f"{info.file_size}-{info.CRC}"

    def _decoded(self, name: str) -> Image.Image:
        source = self._source(name)
        try:
            return open_picture(source)
        except ValueError as error:
            raise ValueError(f"{self._place(name)}: {error}") from error

    def _source(self, name: str) -> Path | io.BytesIO:
        found = self._found(name)
        if self.kind == "folder":
            return found
        with self._lock:
            try:
                return io.BytesIO(self._read_member(found))
            except DAMAGED as error:
                raise ValueError(f"{self._place(name)}: cannot be read from the archive ({error})") from error

    def _read_member(self, member: str | tarfile.TarInfo) -> bytes:
        """Raises one of DAMAGED; ValueError, before it is in memory, for more than a picture's file can be."""
        archive = self._archive()
        if self.kind == "tar" and member.islnk():
            member = self._names.get(_normal(member.linkname), member)
        if self.kind == "tar" and not member.isreg():
            raise ValueError("it is a link, or no file at all")
        info = archive.getinfo(member) if self.kind == "zip" else member
        size = info.file_size if self.kind == "zip" else info.size
        if size > LARGEST:
            raise ValueError(f"it has {size:,} bytes, a picture has at most {LARGEST:,}")
        with archive.open(info) if self.kind == "zip" else archive.extractfile(info) as file:
            return file.read(size + 1)  # with a limit, so that a false size does not inflate to another

    def _found(self, name: str) -> Any:
        found = self._find(name)
        if found is None:
            raise FileNotFoundError(f"{self._place(name)}: no such picture")
        return found

    def _find(self, name: str) -> Path | str | tarfile.TarInfo | None:
        """The file or member of a name, by the rules of the class."""
        normal = _normal(name)
        if _leaves(normal):
            raise ValueError(f"{self._place(name)}: the path leaves the image folder; it must lie below it")
        look = self._file if self.kind == "folder" else self._names.get
        first, _, rest = normal.partition("/")
        names = [normal, rest] if rest and first in (TOP, self._top, self.path.stem, self.path.name) else [normal]
        below = ["", f"{self._top}/"] if self._top else [""]
        for candidate in (top + own for own in names for top in below):
            for form in dict.fromkeys((candidate, normalize("NFC", candidate))):
                if (found := look(form)) is not None:
                    return found
        return None

    def _file(self, name: str) -> Path | None:
        """The file of a path below the folder. Raises ValueError where a link leads out of it."""
        path = self.path / name
        if not path.is_file() and not name.isascii():
            path = self.path
            for part in name.split("/"):
                path = path / self._composed(path).get(normalize("NFC", part), part)
        if not path.is_file():
            return None
        if not path.resolve().is_relative_to(self._root) and os.environ.get(FOLLOW_LINKS) != "1":
            raise ValueError(
                f"{path}: a link that leaves the image folder; copy the picture to where the link is, or set "
                f"{FOLLOW_LINKS}=1 if the folder is your own"
            )
        return path

    def _composed(self, folder: Path) -> dict[str, str]:
        """Entries of a folder by their names with composed letters; looked at once."""
        if folder not in self._folders:
            self._folders[folder] = {normalize("NFC", name): name for name in _names_in(folder)}
        return self._folders[folder]

    def _place(self, name: str) -> str:
        return str(self.path / name) if self.kind == "folder" else f"{name} in {self.path}"

    def _archive(self) -> zipfile.ZipFile | tarfile.TarFile:
        if self._owner != os.getpid():  # a forked worker must not share its parent's file position
            self._handle = zipfile.ZipFile(self.path) if self.kind == "zip" else tarfile.open(self.path, "r:")
            self._owner = os.getpid()
        return self._handle

    def _members(self) -> dict[str, str | tarfile.TarInfo]:
        """By path, and by path with composed letters where no other has that. Raises ValueError."""
        try:
            archive = self._archive()
            if self.kind == "zip":
                found = {_normal(n): n for n in archive.namelist() if not n.endswith("/")}
            else:
                found = {_normal(m.name): m for m in archive.getmembers() if not m.isdir()}
        except DAMAGED as error:
            raise ValueError(f"{self.path}: the archive is cut off or damaged ({error})") from error
        found = {name: member for name, member in found.items() if _is_picture(name) and not _leaves(name)}
        return {normalize("NFC", name): member for name, member in found.items()} | found


def _kind(path: Path) -> str:
    if path.is_dir():
        return "folder"
    if zipfile.is_zipfile(path):
        return "zip"
    try:
        with tarfile.open(path, "r:"):
            return "tar"
    except DAMAGED as error:
        raise ValueError(f"{path}: not a folder, a .zip or an uncompressed .tar") from error


def _normal(name: str) -> str:
    return str(PurePosixPath(name.replace("\\", "/")))


def _leaves(name: str) -> bool:
    """Whether a path does not lie below the folder that it starts from."""
    return name.startswith("/") or ".." in name.split("/") or re.match("[A-Za-z]:/", name) is not None


def _is_picture(name: str) -> bool:
    """Whether a name is of what people put there, and not of what their system did."""
    return not any(part in NO_PICTURES or part.startswith("._") for part in name.split("/"))


def _names_in(folder: Path) -> Iterator[str]:
    try:
        with os.scandir(folder) as entries:
            yield from (entry.name for entry in entries if _is_picture(entry.name))
    except OSError:  # no folder, or not ours to read
        return


def _only(names: Iterable[str]) -> str:
    """The name that all have; "" if they differ."""
    names = iter(names)
    first = next(names, "")
    return first if all(name == first for name in names) else ""
