"""Opening pictures from a folder or straight out of a .zip or .tar."""

import io
import os
import tarfile
import threading
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from PIL import Image, UnidentifiedImageError

from llava.pixels import DECODER_ERRORS, as_seen, is_turned

DAMAGED = (zipfile.BadZipFile, zlib.error, tarfile.TarError, EOFError)


class ImageStore:
    """Pictures below a folder, or inside a `.zip` or uncompressed `.tar`, which is read without extracting.

    An archive's common top folder may be left out of a path: `images.zip` holding `images/a.jpg` answers to both
    `a.jpg` and `images/a.jpg`. Safe to pickle and to share between threads; every process opens its own handle.
    Raises FileNotFoundError if the folder or archive does not exist, ValueError if it is neither.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.exists():
            raise FileNotFoundError(f"{self.path}: no such image folder or archive")
        self.kind = _kind(self.path)
        self._names: dict[str, str | tarfile.TarInfo] = {}
        self._handle, self._owner, self._lock = None, None, threading.Lock()
        if self.kind != "folder":
            try:
                self._names = _with_short_names(self._members())
            except DAMAGED as error:
                raise ValueError(f"{self.path}: the archive is cut off or damaged ({error})") from error

    def __getstate__(self):
        return {**self.__dict__, "_handle": None, "_owner": None, "_lock": None}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def has(self, name: str) -> bool:
        """Whether there is such a picture; its content is not looked at."""
        return self._file(name).is_file() if self.kind == "folder" else _normal(name) in self._names

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

    def stamp(self, name: str) -> str:
        """Changes when the picture's file does: size and time in a folder, size and checksum or time in an archive."""
        if not self.has(name):
            raise FileNotFoundError(f"{self._place(name)}: no such picture")
        if self.kind == "folder":
            status = self._file(name).stat()
            return f"{status.st_size}-{status.st_mtime_ns}"
        member = self._names[_normal(name)]
        if self.kind == "tar":
            return f"{member.size}-{member.mtime}"
        with self._lock:
            info = self._archive().getinfo(member)
        return f"{info.file_size}-{info.CRC}"

    def _decoded(self, name: str) -> Image.Image:
        source = self._source(name)
        try:
            picture = Image.open(source)
        except UnidentifiedImageError as error:
            raise ValueError(f"{self._place(name)}: not a picture that pillow can read") from error
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise ValueError(f"{self._place(name)}: truncated or damaged picture ({error})") from error
        if 0 in picture.size:
            raise ValueError(f"{self._place(name)}: the picture has no area")
        return picture

    def _source(self, name: str) -> Path | io.BytesIO:
        if not self.has(name):
            raise FileNotFoundError(f"{self._place(name)}: no such picture")
        if self.kind == "folder":
            return self._file(name)
        member = self._names[_normal(name)]
        with self._lock:
            archive = self._archive()
            try:
                data = archive.read(member) if self.kind == "zip" else archive.extractfile(member).read()
            except DAMAGED as error:
                raise ValueError(f"{self._place(name)}: the archive is damaged there ({error})") from error
        return io.BytesIO(data)

    def _file(self, name: str) -> Path:
        return self.path / name

    def _place(self, name: str) -> str:
        return str(self._file(name)) if self.kind == "folder" else f"{name} in {self.path}"

    def _archive(self) -> zipfile.ZipFile | tarfile.TarFile:
        if self._owner != os.getpid():  # a forked worker must not share its parent's file position
            self._handle = zipfile.ZipFile(self.path) if self.kind == "zip" else tarfile.open(self.path, "r:")
            self._owner = os.getpid()
        return self._handle

    def _members(self) -> dict[str, str | tarfile.TarInfo]:
        archive = self._archive()
        if self.kind == "zip":
            return {_normal(n): n for n in archive.namelist() if not n.endswith("/")}
        return {_normal(m.name): m for m in archive.getmembers() if m.isfile()}


def _kind(path: Path) -> str:
    if path.is_dir():
        return "folder"
    if zipfile.is_zipfile(path):
        return "zip"
    try:
        with tarfile.open(path, "r:"):
            return "tar"
    except tarfile.TarError as error:
        raise ValueError(f"{path}: not a folder, a .zip or an uncompressed .tar") from error


def _normal(name: str) -> str:
    return str(PurePosixPath(name.replace("\\", "/")))


def _with_short_names(members: dict) -> dict:
    tops = {name.split("/", 1)[0] for name in members}
    if len(tops) == 1 and all("/" in name for name in members):
        return {**{name.split("/", 1)[1]: member for name, member in members.items()}, **members}
    return members
