"""How close collages come to what pillow alone needs to decode, resize and encode: `python -m scripts.bench.collage`

Pictures are made up, of the size of photographs. One core is measured; both sides take turns, collage by collage.
"""

import io
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from data_gen.gen_instruction import collage, sequence
from data_gen.gen_instruction.compose import Recipe, make
from data_gen.gen_instruction.output import PictureFolder
from data_gen.gen_instruction.schedule import Task
from data_gen.sources import Sources
from llava.command_line import flag
from scripts.bench import common

SIZES = ((640, 480), (480, 640), (640, 427), (500, 375))  # px, as COCO has them
COUNT = 200  # photographs


@dataclass(kw_only=True)
class Flags(common.Flags):
    """How much is made."""

    prompts: int = flag("collages per turn", 40)
    repeats: int = flag("turns of each side", 7)


def main() -> None:
    """Record collages per second of both sides, and the median of their ratios."""
    own = common.flags_of(Flags, __doc__)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe = Recipe(
            Sources([photographs(folder)], folder / "images", print), PictureFolder(folder / "out", folder), 0,
            sequence.SHARES, collage.SHARES, dict.fromkeys(collage.GRIDS, 1), 0.0, np.zeros(COUNT, dtype=bool), "jpg",
            False,
        )  # fmt: skip
        turns = [turn(recipe, folder / "images", own.prompts, repeat) for repeat in range(own.repeats + 1)]
    ours, bound = zip(*turns[1:], strict=True)  # the first turn warms caches up
    lines = common.table(["collages per second and core", "median", "lowest", "highest"])
    for name, seconds in (("ours", ours), ("pillow alone, same pictures", bound)):
        rates = [own.prompts / taken for taken in seconds]
        lines.append(common.row([name, *(f"{of(rates):.1f}" for of in (statistics.median, min, max))]))
    lines += ["", f"ours / pillow alone: {common.ratio(bound, ours)}, wanted: 0.9"]
    common.record("Collages: speed", "collage", own, lines)


def turn(recipe: Recipe, images: Path, prompts: int, repeat: int) -> tuple[float, float]:
    """Seconds of the same collages: ours, and with pillow alone."""
    ours = bound = 0.0
    for index in range(repeat * prompts, (repeat + 1) * prompts):
        start = time.perf_counter()
        sources = make(recipe, Task(index, "collage", index % COUNT)).record["sources"]
        middle = time.perf_counter()
        pillow_alone([images / item["path"] for item in sources])
        ours, bound = ours + middle - start, bound + time.perf_counter() - middle
    return ours, bound


def pillow_alone(paths: Sequence[Path]) -> None:
    """Decode, resize and encode, with as little around as there can be."""
    grid = collage.GRIDS[len(paths)]
    canvas = Image.new("RGB", collage.canvas_size(grid), "white")
    for cell, path in enumerate(paths):
        picture = Image.open(path)
        canvas.paste(picture.resize(collage.fitted(picture.size), Image.Resampling.LANCZOS), collage.corner(grid, cell))
    canvas.save(io.BytesIO(), "JPEG", quality=95, subsampling=0)


def photographs(folder: Path) -> Path:
    """Pictures about as hard to compress as photographs, and their records; the path of these."""
    rng, records = np.random.default_rng(0), []
    (folder / "images/coco").mkdir(parents=True)
    turns = [
        {"from": "human", "value": "<image>\nWhat is in the picture?"},
        {"from": "gpt", "value": "A shape on a background, as far as one can tell. " * 4},
    ]
    for number in range(COUNT):
        size = SIZES[number % len(SIZES)]
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        pixels = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC)) + rng.normal(0, 8, (size[1], size[0], 1))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"images/coco/{number}.jpg", quality=90)
        records.append({"id": f"{number:012d}", "image": f"coco/{number}.jpg", "conversations": turns})
    (folder / "source.json").write_text(json.dumps(records))
    return folder / "source.json"


if __name__ == "__main__":
    main()
