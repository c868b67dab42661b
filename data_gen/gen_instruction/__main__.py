"""Multi-image instructions from single-image questions: `python -m data_gen.gen_instruction --help`.

Writes OUTPUT/instructions.jsonl, OUTPUT/images (collages and pictures in pictures), OUTPUT/dropped.jsonl (every record
that was left out, and why) and OUTPUT/run.json. An instruction's `sources` are in the order of its pictures; of a
picture in a picture the inner one comes first. The same flags write the same bytes, with any number of workers, and
after a kill: start the same command again and it goes on. Exit code 0; 1 if a record was dropped because it is bad; 2
if the run could not be done.
"""

import logging
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

from data_gen.drops import Drop
from data_gen.gen_instruction import schedule
from data_gen.gen_instruction.arguments import Common, exit_code, of_the_data
from data_gen.gen_instruction.compose import Recipe, make
from data_gen.gen_instruction.formats import FORMATS, GRIDS
from data_gen.gen_instruction.levels import NAMED
from data_gen.gen_instruction.output import Output
from data_gen.gen_instruction.workers import WorkerKilled, ordered
from data_gen.sources import Sources
from data_gen.tables import stamp
from llava.command_line import check_numbers, flag, parse
from llava.runtime import Progress, setup_logging, stop, user_errors

logger = logging.getLogger("data_gen.gen_instruction")
MOST = 100_000_000  # prompts of a run: what decides each is in memory
COLLAGES = {"one": schedule.COLLAGE_SHARES, "mixed": schedule.COLLAGE_SHARES_MIXED}
NOT_OF_THE_DATA = {"output", "num_workers", "strict"}  # flags that do not change what is written


def shown(shares: dict[Any, int]) -> str:
    """Weights as the flags take them."""
    return ",".join(f"{choice}:{weight}" for choice, weight in shares.items())


@dataclass(kw_only=True)
class Flags(Common):
    """The command line."""

    _argument_group_name = "instructions"
    format: str = flag(
        "sequence: several pictures; collage: numbered ones in one; pip: one inside another", choices=[*FORMATS, "mix"]
    )
    seed: int = flag("of everything drawn by chance", 0)
    num_records: int | None = flag("prompts to make; without it one per source record", None)
    shares: str | None = flag(f"of the formats in a mix; as published: {shown(schedule.SHARES)}", None)
    num_images_weights: str | None = flag(
        f"pictures of a sequence; as published: {shown(schedule.SEQUENCE_SHARES)}", None
    )
    num_cells_weights: str | None = flag(
        "pictures of a collage; as published: {}, or {} with `mixed`".format(*map(shown, COLLAGES.values())), None
    )
    sources_per_collage: str = flag(
        "records that ask in a collage: one, or 1, 2, 2, 3, 3 for 2, 3, 4, 6, 9 pictures, as in the larger published "
        "set",
        "one", choices=[*COLLAGES],
    )  # fmt: skip
    refusals: float = flag(
        "share (0..1) of sequences and collages that ask about a picture that is not there (published: 0.02, "
        "sequences, as a set of its own)",
        0.0,
    )
    bbox_filter: str = flag(
        "subsets whose records with a bounding box become sequences only (published: coco)", "coco",
        choices=schedule.BOX_FILTERS,
    )  # fmt: skip
    exclude_subsets: list[str] = flag("subsets that become sequences only (published: vg)", [])
    sequence_pictures: str = flag(
        "keep: paths below --image_folder; copy: also put (linked where possible) below OUTPUT/images, which then "
        "holds all pictures; auto: copy in a mix or if embedded",
        "auto", choices=["auto", "keep", "copy"],
    )  # fmt: skip
    strict: bool = flag("stop at the first bad record", False)


def main(argv: Sequence[str] | None = None) -> int:
    """Read the sources, make what is not made yet, write the final files."""
    setup_logging()
    with ExitStack() as stack:
        with user_errors():
            (flags,) = parse([Flags], __doc__, argv)
            check_numbers(flags, refusals=(0, 1), seed=(0, None), num_records=(1, MOST))
            chances = chances_of(flags)
            arguments = {name: str(value) for name, value in (asdict(flags) | chances).items()}
            output = Output(flags.output, identify(arguments, flags.source))
            counts = output.finished()
            if counts is None:
                stack.enter_context(output.writing())
                recipe, planned = prepare(flags, chances, output)
        if counts is not None:
            logger.info("%s is complete: nothing to do", flags.output)
            return summarise(flags, counts)
        try:
            fill(flags, output, recipe, planned)
        except WorkerKilled as error:
            stop(str(error))
        counts = {"read": recipe.sources.num_read, "usable": len(recipe.sources)}
        counts = output.finish(counts, arguments=arguments)
    return summarise(flags, counts)


def chances_of(flags: Flags) -> dict[str, dict[Any, float]]:
    """What formats and numbers of pictures are drawn by: weights by choice. Raises ValueError."""
    if flags.shares is not None and flags.format != "mix":
        raise ValueError("--shares is for --format mix")
    if flags.format == "pip" and flags.level != NAMED:
        raise ValueError(f"--level {flags.level}: a pip has no numbered pictures; take --format sequence or collage")
    one_format = {name: float(name == flags.format) for name in FORMATS}
    return {
        "shares": weights(flags.shares, schedule.SHARES) if flags.format == "mix" else one_format,
        "num_images_weights": weights(flags.num_images_weights, schedule.SEQUENCE_SHARES),
        "num_cells_weights": weights(flags.num_cells_weights, COLLAGES[flags.sources_per_collage]),
    }


def identify(arguments: dict[str, str], sources: list[str]) -> dict[str, dict[str, Any]]:
    """What decides the bytes that are written: a run of another kind is not continued."""
    return {
        "arguments": of_the_data(arguments, NOT_OF_THE_DATA),
        "sources": {path: stamp(path) for path in sources},
        "versions": {name: version(name) for name in ("pillow", "numpy")},
    }


def heed(flags: Flags, drops: Sequence[Drop]) -> None:
    """With --strict the first bad record ends the run."""
    if bad := [drop for drop in drops if drop.is_bad and flags.strict]:
        stop(str(bad[0]))


def prepare(flags: Flags, chances: dict[str, dict[Any, float]], output: Output) -> tuple[Recipe, schedule.Schedule]:
    """Index the sources and decide which is asked about in which format."""

    def report(drop: Drop) -> None:
        heed(flags, [drop])
        output.report(drop)

    sources = Sources(flags.source, flags.image_folder, report)
    uncut = schedule.only_in_sequences(sources, flags.bbox_filter, flags.exclude_subsets)
    planned = schedule.plan(chances["shares"], uncut, len(sources), flags.num_records, flags.seed)
    copies = copies_sequences(flags, chances["shares"], sources)
    for index in map(int, planned.left_out):
        report(Drop.of(schedule.why_left_out(sources[index], flags.exclude_subsets), sources[index]))
    num_asking = schedule.ASKING_MIXED if flags.sources_per_collage == "mixed" else dict.fromkeys(GRIDS, 1)
    recipe = Recipe(
        sources, output.pictures, flags.seed, chances["num_images_weights"], chances["num_cells_weights"], num_asking,
        flags.refusals, uncut, flags.picture_format, copies, flags.level,
    )  # fmt: skip
    return recipe, planned


def weights(text: str | None, default: dict[Any, float]) -> dict[Any, float]:
    """`2:3,4:1` as {2: 3.0, 4: 1.0}; choices of the default that are not named get 0. Without a text, the default.

    Raises ValueError naming the valid choices.
    """
    if text is None:
        return default
    example = ",".join(f"{choice}:1" for choice in list(default)[:2])
    allowed, found = {str(choice): choice for choice in default}, dict.fromkeys(default, 0.0)
    for part in text.split(","):
        name, _, value = part.partition(":")
        try:
            found[allowed[name.strip()]] = float(value)
        except (KeyError, ValueError) as error:
            choices = ", ".join(allowed)
            raise ValueError(f"weights {text!r}: {part!r} is none of {choices} with a number, as {example}") from error
    if not all(0 <= value < float("inf") for value in found.values()) or not sum(found.values()):
        raise ValueError(f"weights {text!r}: they must be positive numbers, or 0 for none, as {example}")
    return found


def copies_sequences(flags: Flags, shares: dict[str, float], sources: Sources) -> bool:
    """Whether pictures of sequences go into the output folder. Raises ValueError if they must but may not."""
    has_embedded = any(table.is_embedded for table in sources.tables)
    if flags.sequence_pictures == "keep" and has_embedded and shares["sequence"]:
        raise ValueError("--sequence_pictures keep: pictures inside a table have no path to keep; use copy or auto")
    is_needed = flags.format == "mix" or has_embedded
    return flags.sequence_pictures == "copy" or (flags.sequence_pictures == "auto" and is_needed)


def fill(flags: Flags, output: Output, recipe: Recipe, planned: schedule.Schedule) -> None:
    """Make the prompts that are missing. Raises WorkerKilled."""
    drops: list[Drop] = []
    output.begin()
    if output.num_done:
        logger.info("%d prompts found in %s: continuing", output.num_done, flags.output)
    with Progress(total=len(planned), initial=output.num_done, desc="prompts", unit="prompt") as bar:
        for record, drops in ordered(make, recipe, planned.tasks(output.num_done), flags.num_workers):
            if flags.strict and any(drop.is_bad for drop in drops):
                break
            output.append(record, drops)
            bar.update()
    heed(flags, drops)  # once the bar is gone


def summarise(flags: Flags, counts: dict[str, Any]) -> int:
    """Say what was made and dropped; the exit code."""
    made = ", ".join(f"{counts['made'].get(name, 0)} {name}" for name in (*FORMATS, "refusals"))
    logger.info("%s: %s of %d records (%d usable)", flags.output, made, counts["read"], counts["usable"])
    own = flags.output / "images"
    logger.info("pictures: --image_folder %s", own if own.is_dir() else flags.image_folder)
    for title in ("dropped", "companions_passed_over"):
        if found := counts[title]:
            reasons = ", ".join(f"{number} {reason}" for reason, number in sorted(found.items()))
            logger.info("%s: %s", title.replace("_", " "), reasons)
    return exit_code(counts)


if __name__ == "__main__":
    sys.exit(main())
