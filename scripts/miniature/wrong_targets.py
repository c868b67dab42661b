"""Pairs that look away: `python -m scripts.miniature.wrong_targets --pairs pairs.json --output DIR`.

The study's control: the attention target of each pair is another image at random, its prompt and answers stay. Writes
DIR/pairs.json.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llava.command_line import flag, parse
from llava.records import read_json
from llava.runtime import user_errors, write_records
from scripts.miniature.draw import cell_box


@dataclass(frozen=True)
class TargetFlags:
    """The command line."""

    _argument_group_name = "targets"
    pairs: Path = flag("preference pairs about several images")
    output: Path = flag("folder for pairs.json")
    seed: int = flag("of the other images", 0)


def main() -> None:
    """Writes OUTPUT/pairs.json."""
    with user_errors():
        (flags,) = parse([TargetFlags], __doc__)
        records = read_json(flags.pairs)
    rng = np.random.default_rng(flags.seed)
    write_records(flags.output / "pairs.json", (with_another_target(record, rng) for record in records))


def with_another_target(record: dict, rng: np.random.Generator) -> dict:
    """The record with its target, and the box of it, on another image at random.

    Of a picture in a picture, the strip of the outer one above the inner one, which is in its centre, is the other
    target: a box can hold that.
    """
    image_type = record["image_type"]
    if image_type == "pip":
        x0, y0, x1, _ = record["target_box"]
        return record | {"target_box": [0, 0, x0 + x1, y0]}
    count = len(record["image"]) if image_type == "sequence" else record["grid"][0] * record["grid"][1]
    target = int(rng.choice([place for place in range(count) if place != record["target"] - 1]))
    moved = {"target": target + 1}
    return record | moved | ({"target_box": cell_box(target)} if image_type == "collage" else {})


if __name__ == "__main__":
    main()
