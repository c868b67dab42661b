"""Test sets of the three formats: `python -m data_gen.gen_instruction.test_set --help`.

Writes {sequence,collage,pip}_test_images.json and test_images_{sequence,collage,pip}.tar into OUTPUT, with
dropped.jsonl and run.json. Numbers of pictures and target positions are balanced; no two prompts ask about the same
picture, and no picture is one of the training set (compared by pixels: re-encoded copies are not recognised, and of
collages only those whose records list their `sources`). The same flags write the same bytes. Exit codes as of
data_gen.gen_instruction.
"""

import argparse
import json
import logging
import sys
from collections import Counter
from collections.abc import Sequence

import numpy as np
from tqdm import tqdm

from data_gen.drops import Drop, Unusable
from data_gen.gen_instruction.arguments import add_common
from data_gen.gen_instruction.collage import GRIDS
from data_gen.gen_instruction.questions import Maker, Tar
from data_gen.gen_instruction.schedule import FORMATS
from data_gen.gen_instruction.workers import WorkerKilled, ordered
from data_gen.pictures import PictureFiles, decode, fingerprint
from data_gen.sources import Sources
from llava.records import name_of, read_json
from llava.runtime import ArgumentParser, setup_logging, stop, user_errors, write_run_json, write_text

logger = logging.getLogger("data_gen.gen_instruction")
SIZES = {"sequence": (2, 3, 4, 5), "collage": tuple(GRIDS), "pip": (2,)}  # pictures of a prompt


def main() -> int:
    """Find what must not be used, then make the three sets."""
    args = parse_args()
    setup_logging()
    drops: list[Drop] = []
    with user_errors():
        if args.num_per_format < 1 or args.seed < 0:
            raise ValueError("--num_per_format must be at least 1, and --seed at least 0")
        if bool(args.exclude_training) != bool(args.exclude_images):
            raise ValueError("--exclude_training and --exclude_images belong together: records and their pictures")
        sources = Sources(args.source, args.image_folder, drops.append)
        forbidden, num_unread = exclude(args, sources.files)
        maker = Maker(sources, np.random.default_rng(args.seed), forbidden, drops, args.picture_format)
        args.output.mkdir(parents=True, exist_ok=True)
        make_all(args, maker)
    write_text(args.output / "dropped.jsonl", "".join(json.dumps(drop.as_dict()) + "\n" for drop in drops))
    counts = {
        "read": sources.num_read, "usable": len(sources), "made": dict.fromkeys(FORMATS, args.num_per_format),
        "excluded_pictures": len(forbidden), "excluded_but_unreadable": num_unread,
        "left_out_for_bounding_boxes": int(sources.has_box().sum()),
        "dropped": Counter(drop.reason for drop in drops),
    }  # fmt: skip
    write_run_json(args.output / "run.json", arguments=vars(args), counts=counts)
    num_bad = sum(drop.is_bad for drop in drops)
    logger.info("%s: %d questions of each format", args.output, args.num_per_format)
    if num_bad:
        logger.info("%d times the input was bad: dropped.jsonl has file, record and reason", num_bad)
    return 1 if num_bad else 0


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add_common(parser)
    parser.add_argument("--num_per_format", type=int, default=500, help="questions of each format (default: 500)")
    parser.add_argument("--seed", type=int, default=42, help="of everything drawn by chance (default: 42)")
    parser.add_argument("--exclude_training", help="train.json: none of its pictures is used")
    parser.add_argument("--exclude_images", help="folder, .zip or .tar of the pictures of train.json")
    return parser.parse_args()


def exclude(args: argparse.Namespace, files: PictureFiles | None) -> tuple[set[bytes], int]:
    """Fingerprints of the training pictures, and how many could not be read."""
    if not args.exclude_training:
        return set(), 0
    wanted = training_pictures(args.exclude_training, args.exclude_images, files)
    try:
        found = list(
            tqdm(ordered(_fingerprint, None, wanted, args.num_workers), total=len(wanted), desc="training set")
        )
    except WorkerKilled as error:
        stop(str(error))
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


def _fingerprint(_: None, place: tuple[PictureFiles, str]) -> bytes | None:
    try:
        return fingerprint(decode(place[0].read(place[1]), place[1]).pixels)
    except Unusable:
        return None


def make_all(args: argparse.Namespace, maker: Maker) -> None:
    """Write the JSON and tar files of all formats. Raises ValueError if the sources do not suffice."""
    for image_type in FORMATS:
        records = []
        with Tar(args.output / f"test_images_{image_type}.tar") as tar:
            for size, target in tqdm(slots(SIZES[image_type], args.num_per_format, maker.rng), desc=image_type):
                record = maker.next_question(f"{image_type}_{len(records):04d}", image_type, size, target, tar)
                if record is None:
                    raise ValueError(
                        f"{args.source[0]}: enough for {len(records)} of {args.num_per_format} {image_type} questions "
                        "only, as every question needs a target of its own; give more sources or a smaller "
                        "--num_per_format"
                    )
                records.append(record)
        lines = ",\n".join(json.dumps(record) for record in records)
        write_text(args.output / f"{image_type}_test_images.json", f"[\n{lines}\n]\n")


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
