"""What both generators take, and say at the end."""

import logging
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_gen.gen_instruction.levels import LEVELS, MIX, NAMED
from data_gen.gen_instruction.workers import usable_cores
from llava.command_line import check_numbers, flag

logger = logging.getLogger("data_gen.gen_instruction")


@dataclass(kw_only=True)
class Common:
    """Flags of instructions and test sets alike."""

    _argument_group_name = "sources and output"
    source: list[str] = flag(
        "LLaVA-style JSON or JSONL, folder of datasets' save_to_disk, .parquet, or .csv or .tsv with "
        "image,question,answer[,id,subset]; several are put together"
    )
    image_folder: str | None = flag("folder, .zip or .tar of the pictures, unless the source embeds them", None)
    output: Path = flag("folder to write")
    level: str = flag(
        "named: about one picture; compare: about two; search: which picture it is, the answer is its number; mix: a "
        "third each (pip: always named)",
        NAMED, choices=[*LEVELS, MIX],
    )  # fmt: skip
    num_workers: int = flag("processes", usable_cores())
    picture_format: str = flag(
        "of collages and pictures in pictures: jpg of quality 95, or png", "jpg", choices=["jpg", "png"]
    )

    def __post_init__(self):
        check_numbers(self, num_workers=(0, 1024))


def of_the_data(arguments: dict[str, Any], others: Container[str]) -> dict[str, Any]:
    """Those that decide what is written; a level that is not chosen is left out, as in runs that knew of none."""
    kept = {name: value for name, value in arguments.items() if name not in others}
    return {name: value for name, value in kept.items() if (name, value) != ("level", NAMED)}


def exit_code(counts: dict[str, Any]) -> int:
    """1 if the input was bad anywhere, which is said."""
    if counts["bad"]:
        logger.info("%d times the input was bad: dropped.jsonl has file, record and reason", counts["bad"])
    return 1 if counts["bad"] else 0
