"""The training pairs of an arm, made from those of data_gen or make_data: `python -m scripts.miniature.study.pairs`.

Takes the first of them, so that every set has the same number; may add pairs about single images, and may point the
attention target of each pair at another image on purpose, for the control. Prompts and answers stay what they are.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from llava.records import read_json
from llava.runtime import ArgumentParser, user_errors, write_text


def main() -> None:
    """Writes OUTPUT/train.json."""
    args = parse_args()
    with user_errors():
        records = first_of(read_json(args.pairs), args.num_pairs, args.pairs)
        if args.single:
            records += first_of(read_json(args.single), args.num_single, args.single)
    if args.shuffle_targets:
        rng = np.random.default_rng(args.seed)
        records = [with_another_target(record, rng) for record in records]
    lines = ",\n".join(json.dumps(record) for record in records)
    write_text(args.output / "train.json", f"[\n{lines}\n]\n")


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--pairs", type=Path, required=True, help="preference pairs about several images")
    parser.add_argument("--num_pairs", type=int, required=True, help="how many of them, from the first on")
    parser.add_argument("--single", type=Path, help="preference pairs about single images")
    parser.add_argument("--num_single", type=int, default=0, help="how many of them")
    parser.add_argument("--shuffle_targets", action="store_true", help="point each target at another image")
    parser.add_argument("--seed", type=int, default=0, help="of the other images")
    parser.add_argument("--output", type=Path, required=True, help="folder for train.json")
    return parser.parse_args()


def first_of(records: list[dict], count: int, path: Path) -> list[dict]:
    """The first records. Raises ValueError if there are fewer."""
    if len(records) < count:
        raise ValueError(
            f"{path} has {len(records)} pairs, {count} are wanted: lower `num_pairs` of the study's config, "
            "or raise `num_instructions`"
        )
    return records[:count]


def with_another_target(record: dict, rng: np.random.Generator) -> dict:
    """The record with its target, and the box of it, on another image at random; a single image stays.

    Of a picture in a picture, the strip of the outer one above the inner one, which is in its centre, is the other
    target: a box can hold that. Cells of a collage are all of the target's size.
    """
    image_type = record["image_type"]
    if image_type == "single":
        return record
    if image_type == "pip":
        x0, y0, x1, _ = record["target_box"]
        return record | {"target_box": [0, 0, x0 + x1, y0]}
    count = len(record["image"]) if image_type == "sequence" else record["grid"][0] * record["grid"][1]
    others = [place for place in range(count) if place != record["target"] - 1]
    target = int(rng.choice(others))
    moved = {"target": target + 1}
    return record | moved | ({"target_box": _moved_cell(record, target)} if image_type == "collage" else {})


def _moved_cell(record: dict, target: int) -> list[int]:
    (x0, y0, x1, y1), columns = record["target_box"], record["grid"][1]
    before, after = divmod(record["target"] - 1, columns), divmod(target, columns)
    down, across = ((after[i] - before[i]) * size for i, size in enumerate((y1 - y0, x1 - x0)))
    return [x0 + across, y0 + down, x1 + across, y1 + down]


if __name__ == "__main__":
    main()
