"""One data set from the pairs of several runs, ready to train on and to publish: `python -m data_gen.mix --help`.

Writes OUTPUT/train.json, validation.json, images.zip (with --zip, else the folder images), data_card.md and .json,
run.json. No source picture is in both parts. The same flags write the same bytes. Other commands:

  python -m data_gen.mix read --published DIR        check a published data set, and count what it holds
  python -m data_gen.mix export --data_path train.json --image_folder images.zip --output DIR or FILE.parquet
                                                     to the preference format of the datasets library
  python -m data_gen.mix import --path DIR or FILE.parquet --output DIR
                                                     and back
"""

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_gen.mix.card import describe, markdown
from data_gen.mix.hf_export import export_pairs
from data_gen.mix.hf_import import import_pairs
from data_gen.mix.merge import Item, Merged, data_digest, merge
from data_gen.mix.published import read_published, refuse_leaks, report
from data_gen.mix.splitting import OVERLAPS, split
from llava.checks import DEPTHS
from llava.runtime import ArgumentParser, setup_logging, user_errors, write_run_json, write_text

logger = logging.getLogger("data_gen.mix")


def main(argv: Sequence[str] | None = None) -> None:
    """The command of the first word; without one, mix."""
    words = list(sys.argv[1:] if argv is None else argv)
    commands = {"mix": mix, "read": read, "export": export, "import": import_}
    command = words.pop(0) if words and words[0] in commands else "mix"
    setup_logging()
    with user_errors():
        commands[command](_parser(command), words)


def mix(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """Merge, split, write."""
    add = parser.add_argument
    add("--pairs", nargs="+", required=True, help="pairs.json or train.json; several are put together")
    add("--image_folder", nargs="+", required=True, help="folder, .zip or .tar of their pictures: one, or one each")
    add("--source_images", help="folder, .zip or .tar of the source pictures: one is then known under two names")
    add("--output", type=Path, required=True, help="folder to write")
    add("--validation", type=float, default=0.05, help="share of the pairs that is held out; 0: no validation.json")
    add("--overlap", choices=OVERLAPS, default="error",
        help="where shared source pictures connect too many pairs: stop, or drop training pairs")  # fmt: skip
    add("--seed", type=int, default=0, help="of order and split")
    add("--zip", action="store_true", help="pictures as images.zip, not as a folder")
    add("--licence", nargs="+", default=[], metavar="SUBSET=TEXT", help="of source pictures, for the data card")
    add("--title", default="Multi-image preference pairs", help="of the data card")
    args = parser.parse_args(words)
    licences = _licences(args)
    identity = _identity(args)
    if _is_complete(args.output, identity):
        logger.info("%s is complete: nothing to do", args.output)
        return
    merged = merge(args.pairs, args.image_folder, args.source_images)
    parts = _parts(args, merged)
    card = describe(parts, args.pairs, licences) | {"dropped": dict(merged.dropped)}
    _write(args, merged, parts, card)
    write_run_json(args.output / "run.json", identity=identity, counts=card)
    _say(args.output, card)


def _licences(args: argparse.Namespace) -> dict[str, str]:
    if not 0 <= args.validation < 1 or args.seed < 0:
        raise ValueError("--validation must be from 0 to below 1, and --seed 0 or more")
    pairs = [text.partition("=") for text in args.licence]
    if wrong := [subset for subset, equals, text in pairs if not (subset and equals and text)]:
        raise ValueError(f"--licence {wrong[0]}: write SUBSET=TEXT, as coco='CC BY 4.0'")
    return {subset: text for subset, _, text in pairs}


def _identity(args: argparse.Namespace) -> dict[str, Any]:
    """What decides the bytes that are written."""
    arguments = {name: str(value) for name, value in vars(args).items() if name != "output"}
    return {"arguments": arguments, "pairs": {path: data_digest(path) for path in args.pairs}}


def _is_complete(output: Path, identity: dict[str, Any]) -> bool:
    """Whether this same mix is there. Raises ValueError if another one is."""
    run_json = output / "run.json"
    if not run_json.is_file():
        for part in output.glob("images.zip.*.tmp"):  # of a run that was killed
            part.unlink()
        return False
    if json.loads(run_json.read_text(encoding="utf-8")).get("identity") != identity:
        raise ValueError(f"{output} holds another data set, see its run.json: choose another --output, or remove it")
    return True


def _parts(args: argparse.Namespace, merged: Merged) -> dict[str, list[Item]]:
    train, validation, overlapping = split(
        [item.pictures for item in merged.items], args.validation, args.seed, args.overlap
    )
    if overlapping:
        merged.dropped["shares a picture with validation"] = len(overlapping)
    numbers = {"train": train} | ({"validation": validation} if args.validation else {})
    return {name: [merged.items[number] for number in part] for name, part in numbers.items()}


def _write(args: argparse.Namespace, merged: Merged, parts: dict[str, list[Item]], card: dict[str, Any]) -> None:
    names = {name for part in parts.values() for item in part for name in item.record["image"]}
    card["pictures"] = {"files": len(names), "bytes": merged.names.num_bytes(names)}
    args.output.mkdir(parents=True, exist_ok=True)
    if args.zip:
        merged.names.write_zip(args.output / "images.zip", names)
    else:
        merged.names.write_folder(args.output / "images", names)
    for name, part in parts.items():
        lines = ",\n".join(json.dumps(item.record) for item in part)
        write_text(args.output / f"{name}.json", f"[\n{lines}\n]\n")
    write_text(args.output / "data_card.json", json.dumps(card, indent=2) + "\n")
    write_text(args.output / "data_card.md", markdown(card, args.title))


def _say(output: Path, card: dict[str, Any]) -> None:
    pairs = ", ".join(f"{count} {name}" for name, count in card["pairs"].items())
    logger.info("%s: pairs: %s; %d pictures", output, pairs, card["pictures"]["files"])
    for reason, count in card["dropped"].items():
        logger.info("dropped: %d, %s", count, reason)
    if card["without_sources"]:
        logger.info(
            "%d pairs list no `sources`: the split knows their pictures as a whole only", card["without_sources"]
        )


def read(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """Check a published data set and say what it holds."""
    parser.add_argument(
        "--published", required=True, help="folder with train.json and images.zip, images.tar or images"
    )
    parser.add_argument(
        "--check_images", choices=DEPTHS, default="full", help="decode, read headers, or see they exist"
    )
    args = parser.parse_args(words)
    published = read_published(args.published, args.check_images)
    refuse_leaks(published)
    for line in report(published):
        logger.info("%s", line)


def export(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """Pairs to the datasets library."""
    parser.add_argument("--data_path", required=True, help="train.json or pairs.json")
    parser.add_argument("--image_folder", required=True, help="folder, .zip or .tar of the pictures")
    parser.add_argument("--output", type=Path, required=True, help="folder of save_to_disk, or a name.parquet")
    args = parser.parse_args(words)
    logger.info("%s: %d rows", args.output, export_pairs(args.data_path, args.image_folder, args.output))


def import_(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """Pairs from the datasets library."""
    parser.add_argument("--path", type=Path, required=True, help="folder of save_to_disk, or a .parquet file")
    parser.add_argument("--output", type=Path, required=True, help="folder for train.json and images")
    args = parser.parse_args(words)
    logger.info("%s: %d pairs", args.output / "train.json", import_pairs(args.path, args.output))


def _parser(command: str) -> argparse.ArgumentParser:
    name = "python -m data_gen.mix" + ("" if command == "mix" else f" {command}")
    return ArgumentParser(name, description=__doc__, formatter_class=argparse.RawTextHelpFormatter)


if __name__ == "__main__":
    sys.exit(main())
