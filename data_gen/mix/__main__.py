"""One data set from the pairs of several runs, ready to train on and to publish: `python -m data_gen.mix --help`.

Writes OUTPUT/train.json, validation.json, images.zip (with --zip, else the folder images), data_card.md and .json,
run.json. No source picture is in both parts. The same flags write the same bytes. Other commands:

  python -m data_gen.mix read --published DIR        check a published data set, and count what it holds
  python -m data_gen.mix export --data_path train.json --image_folder images.zip --to trl --output FILE.parquet
                                                     for TRL, LLaMA-Factory or ms-swift
  python -m data_gen.mix import --path FILE --output DIR
                                                     and back; also what others made, in the formats of docs/data.md

Exit code 0; 1 if `import` dropped a row because it is bad; 2 if it could not be done.
"""

import dataclasses
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_gen.mix.card import describe, readable
from data_gen.mix.exporting import WRITERS, export_pairs
from data_gen.mix.importing import import_pairs
from data_gen.mix.merge import Item, Merged, data_digest, merge
from data_gen.mix.published import read_published, refuse_leaks, report
from data_gen.mix.splitting import OVERLAPS, split
from llava.checks import DEPTHS
from llava.command_line import check_numbers, flag, parse
from llava.run_folder import finished_run, only_writer
from llava.runtime import check_outputs, setup_logging, user_errors, write_records, write_run_json, write_text

logger = logging.getLogger("data_gen.mix")
WRITTEN = ("train.json", "validation.json", "images.zip", "data_card.json", "data_card.md", "run.json")


@dataclass(kw_only=True)
class MixFlags:
    """The command line without a command."""

    pairs: list[str] = flag("pairs.json or train.json; several are put together")
    image_folder: list[str] = flag("folder, .zip or .tar of their pictures: one, or one each")
    source_images: str | None = flag(
        "folder, .zip or .tar of the source pictures: one is then known under two names", None
    )
    output: Path = flag("folder to write")
    validation: float = flag("share of the pairs that is held out; 0: no validation.json", 0.05)
    overlap: str = flag(
        "where shared source pictures connect too many pairs: stop, or drop training pairs", "error", choices=OVERLAPS
    )
    seed: int = flag("of order and split", 0)
    zip: bool = flag("pictures as images.zip, not as a folder", False)
    licence: list[str] = flag("of source pictures, for the data card: SUBSET=TEXT", [], metavar="SUBSET=TEXT")
    title: str = flag("of the data card", "Multi-image preference pairs")


@dataclass(kw_only=True)
class ReadFlags:
    """The command line of `read`."""

    published: str = flag("folder with train.json and images.zip, images.tar or images")
    check_images: str = flag("decode, read headers, or see they exist", "full", choices=DEPTHS)


@dataclass(kw_only=True)
class ExportFlags:
    """The command line of `export`."""

    data_path: str = flag("train.json or pairs.json")
    image_folder: str = flag("folder, .zip or .tar of the pictures")
    to: str = flag("the trainer that reads it", "trl", choices=[*WRITERS])
    output: Path = flag("folder to write; for TRL one of save_to_disk, or a name.parquet")


@dataclass(kw_only=True)
class ImportFlags:
    """The command line of `import`."""

    path: list[str] = flag("JSON, JSONL, CSV, parquet, folder of parquet or of save_to_disk; several are put together")
    image_folder: str | None = flag(
        "folder, .zip or .tar of pictures that are named only; without it the folder of the file", None
    )
    output: Path = flag("folder for train.json, images and dropped.jsonl")


def main(argv: Sequence[str] | None = None) -> int | None:
    """The command of the first word; without one, mix. Its exit code, None for 0."""
    words = list(sys.argv[1:] if argv is None else argv)
    commands = {"mix": (mix, MixFlags), "read": (read, ReadFlags), "export": (export, ExportFlags),
                "import": (import_, ImportFlags)}  # fmt: skip
    run, kind = commands[words.pop(0) if words and words[0] in commands else "mix"]
    setup_logging()
    with user_errors():
        return run(*parse([kind], __doc__, words))


def mix(flags: MixFlags) -> None:
    """Merge, split, write."""
    licences = _licences(flags)
    identity = _identity(flags)
    if finished_run(flags.output, identity):
        logger.info("%s is complete: nothing to do", flags.output)
        return
    check_outputs([flags.output / name for name in WRITTEN], [*flags.pairs, *flags.image_folder, flags.source_images])
    merged = merge(flags.pairs, flags.image_folder, flags.source_images)
    parts = _parts(flags, merged)
    card = describe(parts, flags.pairs, licences) | {"dropped": dict(merged.dropped)}
    with only_writer(flags.output / "mix"):
        _write(flags, merged, parts, card)
        write_run_json(flags.output / "run.json", identity=identity, counts=card)
    _say(flags.output, card)


def _licences(flags: MixFlags) -> dict[str, str]:
    check_numbers(flags, validation=(0, 1), seed=(0, None))
    if flags.validation == 1:
        raise ValueError("--validation 1: nothing is left to train on")
    pairs = [text.partition("=") for text in flags.licence]
    if wrong := [subset for subset, equals, text in pairs if not (subset and equals and text)]:
        raise ValueError(f"--licence {wrong[0]}: write SUBSET=TEXT, as coco='CC BY 4.0'")
    return {subset: text for subset, _, text in pairs}


def _identity(flags: MixFlags) -> dict[str, Any]:
    """What decides the bytes that are written."""
    arguments = {name: value for name, value in dataclasses.asdict(flags).items() if name != "output"}
    return {"arguments": arguments, "pairs": {path: data_digest(path) for path in flags.pairs}}


def _parts(flags: MixFlags, merged: Merged) -> dict[str, list[Item]]:
    train, validation, overlapping = split(
        [item.pictures for item in merged.items], flags.validation, flags.seed, flags.overlap
    )
    if overlapping:
        merged.dropped["shares a picture with validation"] = len(overlapping)
    numbers = {"train": train} | ({"validation": validation} if flags.validation else {})
    return {name: [merged.items[number] for number in part] for name, part in numbers.items()}


def _write(flags: MixFlags, merged: Merged, parts: dict[str, list[Item]], card: dict[str, Any]) -> None:
    names = {name for part in parts.values() for item in part for name in item.record["image"]}
    card["pictures"] = {"files": len(names), "bytes": merged.names.num_bytes(names)}
    for part in flags.output.glob("images.zip.*.tmp"):  # of a run that was killed
        part.unlink()
    if flags.zip:
        merged.names.write_zip(flags.output / "images.zip", names)
    else:
        merged.names.write_folder(flags.output / "images", names)
    for name, part in parts.items():
        write_records(flags.output / f"{name}.json", (item.record for item in part))
    write_text(flags.output / "data_card.json", json.dumps(card, indent=2) + "\n")
    write_text(flags.output / "data_card.md", readable(card, flags.title))


def _say(output: Path, card: dict[str, Any]) -> None:
    pairs = ", ".join(f"{count} {name}" for name, count in card["pairs"].items())
    logger.info("%s: pairs: %s; %d pictures", output, pairs, card["pictures"]["files"])
    for reason, count in card["dropped"].items():
        logger.info("dropped: %d, %s", count, reason)
    if card["without_sources"]:
        logger.info(
            "%d pairs list no `sources`: the split knows their pictures as a whole only", card["without_sources"]
        )


def read(flags: ReadFlags) -> None:
    """Check a published data set and say what it holds."""
    published = read_published(flags.published, flags.check_images)
    refuse_leaks(published)
    for line in report(published):
        logger.info("%s", line)


def export(flags: ExportFlags) -> None:
    """Pairs for another trainer."""
    with only_writer(flags.output):
        num_rows = export_pairs(flags.data_path, flags.image_folder, flags.output, flags.to)
    logger.info("%s: %d rows", flags.output, num_rows)


def import_(flags: ImportFlags) -> int:
    """Pairs of other projects; 1 if a row was bad."""
    with only_writer(flags.output / "import"):
        counts = import_pairs(flags.path, flags.image_folder, flags.output)
    formats = ", ".join(f"{count} {name}" for name, count in counts["formats"].items())
    logger.info("%s: %d pairs of %d rows (%s)", flags.output / "train.json", counts["pairs"], counts["rows"], formats)
    for reason, count in counts["dropped"].items():
        logger.info("dropped: %d, %s (dropped.jsonl has file, row and detail)", count, reason)
    return 1 if counts["bad"] else 0


if __name__ == "__main__":
    sys.exit(main())
