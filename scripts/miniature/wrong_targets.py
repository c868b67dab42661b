"""Pairs that look away: `python -m scripts.miniature.wrong_targets --pairs pairs.json --output DIR`.

The study's control: the attention target of each pair is another image at random (of several as many others as there
are), its prompt and answers stay. Writes DIR/pairs.json.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llava.asked import given_targets, target_fields
from llava.command_line import check_numbers, flag, parse
from llava.records import read_json, read_preferences
from llava.runtime import user_errors, write_records
from scripts.miniature.draw import cell_box


@dataclass(frozen=True)
class TargetFlags:
    """The command line."""

    _argument_group_name = "targets"
    pairs: Path = flag("preference pairs about several images")
    output: Path = flag("folder for pairs.json")
    seed: int = flag("of the other images", 0)

    def __post_init__(self):
        check_numbers(self, seed=(0, None))


def main() -> None:
    """Writes OUTPUT/pairs.json."""
    with user_errors():
        (flags,) = parse([TargetFlags], __doc__)
        rng = np.random.default_rng(flags.seed)
        where = [pair.where for pair in read_preferences(flags.pairs)]
        records = [with_another_target(*both, rng) for both in zip(read_json(flags.pairs), where, strict=True)]
        write_records(flags.output / "pairs.json", records)


def with_another_target(record: dict, where: str, rng: np.random.Generator) -> dict:
    """The record with its targets, and the box of one, on other images at random. Raises ValueError if it has none.

    One about all of its images stays as it is: wherever it looks is on target. Of a picture in a picture, the strip of
    the outer one above the inner one, which is in its centre, is the other target: a box can hold that.
    """
    image_type = record.get("image_type")
    needed = {"sequence": ["target"], "collage": ["target", "grid"], "pip": ["target_box"]}.get(image_type)
    own = given_targets(record) or frozenset()
    if needed is None or not {*needed} <= record.keys() | ({"target"} if own else set()):
        raise ValueError(f"{where}: not a pair about several images with {' and '.join(needed or ['image_type'])}")
    if image_type == "pip":
        x0, y0, x1, _ = record["target_box"]
        return record | {"target_box": [0, 0, x0 + x1, y0]}
    count = len(record["image"]) if image_type == "sequence" else record["grid"][0] * record["grid"][1]
    if count < 2:
        raise ValueError(f"{where}: there is no other image")
    others = [place for place in range(count) if place + 1 not in own]
    if not others:
        return record
    several = {} if len(own) == 1 else {"size": min(len(own), len(others)), "replace": False}
    targets = np.atleast_1d(rng.choice(others, **several)).tolist()
    moved = {name: value for name, value in record.items() if name != "targets"} | target_fields(sorted(targets))
    box = {"target_box": cell_box(targets[0])} if image_type == "collage" and len(targets) == 1 else {}
    return moved | {"points_elsewhere": True} | box


if __name__ == "__main__":
    main()
