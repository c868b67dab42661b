"""A published data set as it lies in a folder: train.json (perhaps validation.json) and its pictures."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from data_gen.mix.pictures import look_at
from data_gen.pictures import PictureFiles
from data_gen.sources import source_paths
from llava.checks import check_pictures
from llava.records import DataError, Preference, read_preferences

PARTS = ("train", "validation")
PICTURES = ("images.zip", "images.tar", "images")


@dataclass(frozen=True)
class Published:
    """The records of each part and their pictures."""

    parts: dict[str, list[Preference]]
    store: PictureFiles


def read_published(folder: str | Path, depth: str = "full") -> Published:
    """Read and check a data set; `<image-placeholder>` and missing fields are fine.

    Raises DataError, FileNotFoundError.
    """
    folder = Path(folder)
    pictures = next((folder / name for name in PICTURES if (folder / name).exists()), None)
    if not (folder / "train.json").is_file() or pictures is None:
        raise FileNotFoundError(f"{folder}: a published data set has train.json and one of {', '.join(PICTURES)}")
    store = PictureFiles(pictures)
    names = [name for name in PARTS if (folder / f"{name}.json").is_file()]
    parts = {name: read_preferences(folder / f"{name}.json") for name in names}
    check_pictures([record for part in parts.values() for record in part], store, None, depth)
    return Published(parts, store)


def report(published: Published) -> list[str]:
    """Numbers by part and format, a line each."""
    lines = []
    for name, records in published.parts.items():
        counts = Counter(record.image_type for record in records)
        listed = ", ".join(f"{count} {image_type}" for image_type, count in sorted(counts.items()))
        twice = len(records) - len({record.id for record in records})
        lines.append(f"{name}: {len(records)} pairs ({listed})" + (f"; {twice} ids are used again" if twice else ""))
    return [*lines, f"pictures: {published.store.path}"]


def refuse_leaks(published: Published) -> None:
    """Raise DataError with a line for every validation pair that has a picture of a training pair."""
    if "validation" not in published.parts:
        return
    contents = look_at(
        published.store, [(record.images, record.where) for part in published.parts.values() for record in part]
    )

    def pictures(record: Preference) -> set[str]:
        return {contents[name].fingerprint for name in record.images} | set(source_paths(record.extra))

    trained = set().union(*map(pictures, published.parts["train"]))
    leaks = [record.where for record in published.parts["validation"] if pictures(record) & trained]
    if leaks:
        raise DataError([f"{where}: one of its pictures is also in a training pair" for where in leaks])
