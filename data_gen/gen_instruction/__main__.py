"""Multi-image instructions from single-image questions: `python -m data_gen.gen_instruction --help`.

Writes OUTPUT/instructions.jsonl, OUTPUT/images (collages and pictures in pictures), OUTPUT/dropped.jsonl (every record
that was left out, and why) and OUTPUT/run.json. An instruction's `sources` are in the order of its pictures; of a
picture in a picture the inner one comes first. The same flags write the same bytes, with any number of workers, and
after a kill: start the same command again and it goes on. Exit code 0; 1 if a record was dropped because it is bad; 2
if the run could not be done.
"""

import argparse
import logging
import sys
from importlib.metadata import version
from typing import Any

from tqdm import tqdm

from data_gen.drops import Drop
from data_gen.gen_instruction import collage, sequence
from data_gen.gen_instruction.arguments import add_common, weights_or
from data_gen.gen_instruction.compose import Recipe, make
from data_gen.gen_instruction.output import Output
from data_gen.gen_instruction.schedule import (
    BOX_FILTERS,
    FORMATS,
    SHARES,
    Schedule,
    only_in_sequences,
    plan,
    why_left_out,
)
from data_gen.gen_instruction.workers import WorkerKilled, ordered
from data_gen.sources import Sources
from data_gen.tables import stamp
from llava.runtime import ArgumentParser, setup_logging, stop, user_errors

logger = logging.getLogger("data_gen.gen_instruction")
NOT_OF_THE_DATA = {"output", "num_workers", "strict"}  # flags that do not change what is written


def main() -> int:
    """Read the sources, make what is not made yet, write the final files."""
    args = parse_args()
    setup_logging()
    with user_errors():
        check(args)
        output = Output(args.output, identify(args))
        counts = output.finished()
        if counts is None:
            output.start()
            recipe, schedule = prepare(args, output)
    if counts is not None:
        logger.info("%s is complete: nothing to do", args.output)
        return summarise(args, counts)
    try:
        bad = fill(args, output, recipe, schedule)
    except WorkerKilled as error:
        stop(str(error))
    if bad:
        stop(str(bad))
    counts = {"read": recipe.sources.num_read, "usable": len(recipe.sources)}
    counts = output.finish(counts, arguments={name: str(value) for name, value in vars(args).items()})
    return summarise(args, counts)


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    # fmt: off
    parser.add_argument("--format", choices=[*FORMATS, "mix"], required=True,
                        help="sequence: several pictures; collage: numbered ones in one; pip: one inside another")
    add_common(parser)
    parser.add_argument("--seed", type=int, default=0, help="of everything drawn by chance")
    parser.add_argument("--num_records", type=int, help="prompts to make (default: one per source record)")
    parser.add_argument("--shares", help="of the formats in a mix (default as published):\n" + shown(SHARES))
    parser.add_argument("--num_images_weights", help="pictures of a sequence (default as published):\n"
                        + shown(sequence.SHARES))
    parser.add_argument("--num_cells_weights", help="pictures of a collage (default as published):\n"
                        + shown(collage.SHARES) + ", or\n" + shown(collage.SHARES_MIXED) + " with `mixed`")
    parser.add_argument("--sources_per_collage", choices=["one", "mixed"], default="one",
                        help="records that ask in a collage: one, or 1, 2, 2, 3, 3 for 2, 3, 4, 6, 9 pictures,\n"
                             "as in the larger published set")
    parser.add_argument("--refusals", type=float, default=0.0,
                        help="share (0..1) of sequences and collages that ask about a picture that is not there\n"
                             "(published: 0.02, sequences, as a set of its own)")
    parser.add_argument("--bbox_filter", choices=BOX_FILTERS, default="coco",
                        help="subsets whose records with a bounding box become sequences only (published: coco)")
    parser.add_argument("--exclude_subsets", nargs="*", default=[],
                        help="subsets that become sequences only (published: vg)")
    parser.add_argument("--sequence_pictures", choices=["auto", "keep", "copy"], default="auto",
                        help="keep: paths below --image_folder; copy: also put (linked where possible) below\n"
                             "OUTPUT/images, which then holds all pictures; auto: copy in a mix or if embedded")
    # fmt: on
    parser.add_argument("--strict", action="store_true", help="stop at the first bad record")
    return parser.parse_args()


def shown(shares: dict[Any, int]) -> str:
    """Weights as the flags take them."""
    return ",".join(f"{choice}:{weight}" for choice, weight in shares.items())


def check(args: argparse.Namespace) -> None:
    """Complete the flags. Raises ValueError if one is out of range."""
    if not 0 <= args.refusals <= 1:
        raise ValueError(f"--refusals {args.refusals}: a share must be between 0 and 1")
    if args.seed < 0 or (args.num_records is not None and args.num_records < 1):
        raise ValueError("--num_records must be at least 1, and --seed at least 0")
    if args.shares is not None and args.format != "mix":
        raise ValueError("--shares is for --format mix")
    is_mixed = args.sources_per_collage == "mixed"
    one_format = {name: float(name == args.format) for name in FORMATS}
    args.shares = weights_or(args.shares, SHARES) if args.format == "mix" else one_format
    args.num_images_weights = weights_or(args.num_images_weights, sequence.SHARES)
    args.num_cells_weights = weights_or(args.num_cells_weights, collage.SHARES_MIXED if is_mixed else collage.SHARES)


def identify(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """What decides the bytes that are written: a run of another kind is not continued."""
    return {
        "arguments": {name: str(value) for name, value in vars(args).items() if name not in NOT_OF_THE_DATA},
        "sources": {path: stamp(path) for path in args.source},
        "versions": {name: version(name) for name in ("pillow", "numpy")},
    }


def prepare(args: argparse.Namespace, output: Output) -> tuple[Recipe, Schedule]:
    """Index the sources and decide which is asked about in which format."""

    def report(drop: Drop) -> None:
        if args.strict and drop.is_bad:
            raise ValueError(str(drop))
        output.report(drop)

    try:
        sources = Sources(args.source, args.image_folder, report)
        uncut = only_in_sequences(sources, args.bbox_filter, args.exclude_subsets)
        schedule = plan(args.shares, uncut, len(sources), args.num_records, args.seed)
        copies = copies_sequences(args, sources)
    except (ValueError, FileNotFoundError):
        output.abandon()
        raise
    for index in map(int, schedule.left_out):
        source = sources[index]
        report(Drop.of(why_left_out(sources, index, args.exclude_subsets), source.id, source.where))
    num_asking = collage.ASKING_MIXED if args.sources_per_collage == "mixed" else dict.fromkeys(collage.GRIDS, 1)
    recipe = Recipe(
        sources, output.pictures, args.seed, args.num_images_weights, args.num_cells_weights, num_asking,
        args.refusals, uncut, args.picture_format, copies,
    )  # fmt: skip
    return recipe, schedule


def copies_sequences(args: argparse.Namespace, sources: Sources) -> bool:
    """Whether pictures of sequences go into the output folder. Raises ValueError if they must but may not."""
    has_embedded = any(table.is_embedded for table in sources.tables)
    if args.sequence_pictures == "keep" and has_embedded and args.shares["sequence"]:
        raise ValueError("--sequence_pictures keep: pictures inside a table have no path to keep; use copy or auto")
    return args.sequence_pictures == "copy" or (
        args.sequence_pictures == "auto" and (args.format == "mix" or has_embedded)
    )


def fill(args: argparse.Namespace, output: Output, recipe: Recipe, schedule: Schedule) -> Drop | None:
    """Make the prompts that are missing; with --strict up to the first bad record, which is returned."""
    if output.num_done:
        logger.info("%d prompts found in %s: continuing", output.num_done, args.output)
    with tqdm(total=len(schedule), initial=output.num_done, desc="prompts", unit="prompt") as bar:
        for made in ordered(make, recipe, schedule.tasks(output.num_done), args.num_workers):
            if args.strict and (bad := [drop for drop in made.drops if drop.is_bad]):
                return bad[0]
            output.append(made.record, made.drops)
            bar.update()
    return None


def summarise(args: argparse.Namespace, counts: dict[str, Any]) -> int:
    """Say what was made and dropped; the exit code."""
    made = ", ".join(f"{counts['made'].get(name, 0)} {name}" for name in (*FORMATS, "refusals"))
    logger.info("%s: %s of %d records (%d usable)", args.output, made, counts["read"], counts["usable"])
    own = args.output / "images"
    logger.info("pictures: --image_folder %s", own if own.is_dir() else args.image_folder)
    for title in ("dropped", "companions_passed_over"):
        if found := counts[title]:
            reasons = ", ".join(f"{number} {reason}" for reason, number in sorted(found.items()))
            logger.info("%s: %s", title.replace("_", " "), reasons)
    if counts["bad"]:
        logger.info("%d times the input was bad: dropped.jsonl has file, record and reason", counts["bad"])
    return 1 if counts["bad"] else 0


if __name__ == "__main__":
    sys.exit(main())
