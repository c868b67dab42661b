"""Test sets of the three formats: `python -m data_gen.gen_instruction.test_set --help`.

Writes {sequence,collage,pip}_test_images.json and test_images_{sequence,collage,pip}.tar into OUTPUT, with
dropped.jsonl and run.json. Numbers of pictures and target positions are balanced; no two prompts ask about the same
picture, and no picture is one of the training set (compared by pixels: re-encoded copies are not recognised, and of
collages only those whose records list their `sources`). The same flags write the same bytes. Exit codes as of
data_gen.gen_instruction.
"""

import json
import logging
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from tqdm.contrib.concurrent import thread_map

from data_gen.drops import Drop, Unusable
from data_gen.gen_instruction.arguments import Common, exit_code, of_the_data
from data_gen.gen_instruction.formats import FORMATS, GRIDS
from data_gen.gen_instruction.questions import Maker, new_tar
from data_gen.pictures import PictureFiles, decode, fingerprint
from data_gen.sources import Sources
from data_gen.tables import stamp
from llava.command_line import check_numbers, flag, parse
from llava.records import name_of, read_json
from llava.run_folder import finished_run, only_writer
from llava.runtime import Progress, check_outputs, setup_logging, user_errors, write_records, write_run_json, write_text

logger = logging.getLogger("data_gen.gen_instruction")
SIZES = {"sequence": (2, 3, 4, 5), "collage": tuple(GRIDS), "pip": (2,)}  # pictures of a prompt


@dataclass(kw_only=True)
class Flags(Common):
    """The command line."""

    _argument_group_name = "test set"
    num_per_format: int = flag("questions of each format", 500)
    seed: int = flag("of everything drawn by chance", 42)
    exclude_training: str | None = flag("train.json: none of its pictures is used", None)
    exclude_images: str | None = flag("folder, .zip or .tar of the pictures of train.json", None)


def main(argv: Sequence[str] | None = None) -> int:
    """Find what must not be used, then make the three sets."""
    setup_logging()
    with user_errors():
        (flags,) = parse([Flags], __doc__, argv)
        check_numbers(flags, num_per_format=(1, 10_000_000), seed=(0, None))
        if bool(flags.exclude_training) != bool(flags.exclude_images):
            raise ValueError("--exclude_training and --exclude_images belong together: records and their pictures")
        if flags.exclude_images:
            PictureFiles(flags.exclude_images)  # is there, before anything is made
        identity = identify(flags)
        run = finished_run(flags.output, identity)
        if run:
            logger.info("%s is complete: nothing to do", flags.output)
            return exit_code(run["counts"])
        written = [flags.output / f"{name}_test_images.json" for name in FORMATS]
        check_outputs(written, [*flags.source, flags.exclude_training])
        with only_writer(flags.output / "test_set"):
            counts = make(flags, identity)
    logger.info("%s: %d questions of each format", flags.output, flags.num_per_format)
    return exit_code(counts)


def identify(flags: Flags) -> dict[str, Any]:
    """What decides the bytes that are written."""
    arguments = of_the_data(asdict(flags), ("output", "num_workers"))
    tables = [*flags.source, *([flags.exclude_training] if flags.exclude_training else [])]
    return {"arguments": arguments, "sources": {path: stamp(path) for path in tables}}


def make(flags: Flags, identity: dict[str, Any]) -> dict[str, Any]:
    """Write everything; what was counted. Raises ValueError, FileNotFoundError."""
    drops: list[Drop] = []
    sources = Sources(flags.source, flags.image_folder, drops.append)
    forbidden, num_unread = exclude(flags, sources.files)
    rng = np.random.default_rng(flags.seed)
    make_all(flags, Maker(sources, rng, forbidden, drops, flags.picture_format, flags.level))
    write_text(flags.output / "dropped.jsonl", "".join(json.dumps(drop.as_dict()) + "\n" for drop in drops))
    counts = {
        "read": sources.num_read, "usable": len(sources), "made": dict.fromkeys(FORMATS, flags.num_per_format),
        "excluded_pictures": len(forbidden), "excluded_but_unreadable": num_unread,
        "left_out_for_bounding_boxes": int(sources.has_box.sum()),
        "dropped": Counter(drop.reason for drop in drops), "bad": sum(drop.is_bad for drop in drops),
    }  # fmt: skip
    write_run_json(flags.output / "run.json", arguments=asdict(flags), identity=identity, counts=counts)
    return counts


def exclude(flags: Flags, files: PictureFiles | None) -> tuple[set[bytes], int]:
    """Fingerprints of the training pictures, and how many could not be read."""
    if not flags.exclude_training:
        return set(), 0
    wanted = training_pictures(flags.exclude_training, flags.exclude_images, files)
    found = thread_map(_fingerprint, wanted, tqdm_class=Progress, max_workers=flags.num_workers, desc="training set")
    return set(found) - {None}, found.count(None)


def training_pictures(records: str, images: str, files: PictureFiles | None) -> list[tuple[PictureFiles, str]]:
    """Every picture of the training records and of their `sources`, with where it is found. Raises ValueError."""
    trained_on = PictureFiles(images)
    names: dict[str, None] = {}
    for number, record in enumerate(read_json(records), 1):
        try:
            own = [record["image"]] if isinstance(record["image"], str) else record["image"]
            names |= dict.fromkeys([*own, *(source["path"] for source in record.get("sources", []))])
        except (KeyError, TypeError) as error:
            where = name_of(records, number, record)
            raise ValueError(f"{where}: `image` must name its pictures, and `sources` the `path` of each") from error
    places = [next((place for place in (trained_on, files) if place and place.has(name)), None) for name in names]
    if missing := places.count(None):
        logger.info("%d pictures of %s are in no given folder: they cannot be excluded", missing, records)
    return [(place, name) for place, name in zip(places, names, strict=True) if place]


def _fingerprint(place: tuple[PictureFiles, str]) -> bytes | None:
    try:
        return fingerprint(decode(place[0].read(place[1]), place[1]).pixels)
    except Unusable:
        return None


def make_all(flags: Flags, maker: Maker) -> None:
    """Write the JSON and tar files of all formats. Raises ValueError if the sources do not suffice."""
    for image_type in FORMATS:
        records = []
        with new_tar(flags.output / f"test_images_{image_type}.tar") as tar:
            for size, target in Progress(slots(SIZES[image_type], flags.num_per_format, maker.rng), desc=image_type):
                record = maker.next_question(f"{image_type}_{len(records):04d}", image_type, size, target, tar)
                if record is None:
                    raise ValueError(
                        f"{flags.source[0]}: enough for {len(records)} of {flags.num_per_format} {image_type} "
                        "questions only, as every question needs a target of its own; give more sources or a smaller "
                        "--num_per_format"
                    )
                records.append(record)
        write_records(flags.output / f"{image_type}_test_images.json", records)


def slots(sizes: Sequence[int], count: int, rng: np.random.Generator) -> list[tuple[int, int]]:
    """`count` times (number of pictures, 0-based target) in random order, all as equally often as can be.

    Alone in a format of one size (pip), the target is always the first.
    """
    found = []
    for number, size in enumerate(rng.permutation(sizes)):
        share = count // len(sizes) + (number < count % len(sizes))
        order = rng.permutation(size) if len(sizes) > 1 else [0]
        found += [(int(size), int(order[place % len(order)])) for place in range(share)]
    return [found[place] for place in rng.permutation(len(found))]


if __name__ == "__main__":
    sys.exit(main())
