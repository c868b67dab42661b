"""How close collages come to what pillow alone needs, and how memory grows with the number of records.

    python -m scripts.bench.collage speed     # collages per second and core against decoding, resizing, encoding
    python -m scripts.bench.collage memory    # peak memory of a whole run at 1,000 and 200,000 records

Pictures are made up, of the size of photographs for speed and tiny for memory. One core is measured; both sides of the
comparison take turns, collage by collage.
"""

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from data_gen.gen_instruction import collage, sequence
from data_gen.gen_instruction.compose import Recipe, make
from data_gen.gen_instruction.output import PictureFolder
from data_gen.gen_instruction.schedule import Task
from data_gen.sources import Sources
from llava.runtime import ArgumentParser
from scripts.bench import common

SIZES = ((640, 480), (480, 640), (640, 427), (500, 375))  # px, as COCO has them
CHILD = """
import resource, sys
from data_gen.gen_instruction.__main__ import main
sys.argv = ["gen_instruction", *sys.argv[1:]]
code = main()
print(code, *(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))
"""


def main() -> None:
    """Run one measurement in a folder of its own."""
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("mode", choices=["speed", "memory"])
    parser.add_argument("--repeats", type=int, default=7, help="turns of each side (speed)")
    parser.add_argument("--prompts", type=int, default=40, help="collages per turn (speed)")
    parser.add_argument("--records", type=int, nargs="+", default=[1_000, 200_000], help="source records (memory)")
    parser.add_argument("--format", default="sequence", help="of the prompts (memory)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        speed(Path(folder), args) if args.mode == "speed" else memory(Path(folder), args)


def speed(folder: Path, args: argparse.Namespace) -> None:
    """Record collages per second of both sides, and the median of their ratios."""
    source = photographs(folder, 200)
    recipe = Recipe(
        Sources([source], folder / "images", print), PictureFolder(folder / "out", folder), 0, sequence.SHARES,
        collage.SHARES, dict.fromkeys(collage.GRIDS, 1), 0.0, np.zeros(200, dtype=bool), "jpg", False,
    )  # fmt: skip
    ours, bounds = [], []
    for repeat in range(args.repeats + 1):
        own = bound = 0.0
        for index in range(repeat * args.prompts, (repeat + 1) * args.prompts):
            start = time.perf_counter()
            sources = make(recipe, Task(index, "collage", index % 200)).record["sources"]
            middle = time.perf_counter()
            pillow_alone([folder / "images" / item["path"] for item in sources])
            own, bound = own + middle - start, bound + time.perf_counter() - middle
        if repeat:  # the first turn warms caches up
            ours.append(args.prompts / own)
            bounds.append(args.prompts / bound)
    ratios = [own / bound for own, bound in zip(ours, bounds, strict=True)]
    lines = [
        f"collages per second and core: {statistics.median(ours):.1f} ({min(ours):.1f} to {max(ours):.1f})  ",
        f"pillow alone, same pictures: {statistics.median(bounds):.1f} ({min(bounds):.1f} to {max(bounds):.1f})  ",
        f"ratio: {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}), wanted: 0.9",
    ]
    common.record("Collages: speed", "python -m scripts.bench.collage speed", lines)


def pillow_alone(paths: list[Path]) -> None:
    """Decode, resize and encode, with as little around as there can be."""
    grid = collage.GRIDS[len(paths)]
    canvas = Image.new("RGB", collage.canvas_size(grid), "white")
    for cell, path in enumerate(paths):
        picture = Image.open(path)
        canvas.paste(picture.resize(collage.fitted(picture.size), Image.Resampling.LANCZOS), collage.corner(grid, cell))
    canvas.save(io.BytesIO(), "JPEG", quality=95, subsampling=0)


def photographs(folder: Path, count: int) -> Path:
    """Pictures about as hard to compress as photographs, and their records; the path of these."""
    rng, records = np.random.default_rng(0), []
    (folder / "images/coco").mkdir(parents=True)
    for number in range(count):
        size = SIZES[number % len(SIZES)]
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize(
            size, Image.Resampling.BICUBIC
        )
        pixels = np.asarray(coarse) + rng.normal(0, 8, (size[1], size[0], 1))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"images/coco/{number}.jpg", quality=90)
        records.append(record(number, f"coco/{number}.jpg"))
    (folder / "source.json").write_text(json.dumps(records))
    return folder / "source.json"


def record(number: int, path: str) -> dict:
    """A LLaVA-style record of usual length."""
    turns = [
        ("human", "<image>\nWhat is in the picture?"),
        ("gpt", "A shape on a background, as far as one can tell. " * 4),
    ]
    return {
        "id": f"{number:012d}",
        "image": path,
        "conversations": [{"from": who, "value": text} for who, text in turns],
    }


def memory(folder: Path, args: argparse.Namespace) -> None:
    """Record the peak memory of runs over more and more records."""
    lines = []
    for count in args.records:
        source, images = tiny_pictures(folder, count)
        flags = ["--format", args.format, "--source", source, "--image_folder", images]
        flags += ["--output", folder / f"out_{count}", "--num_workers", 2]
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", CHILD, *map(str, flags)], capture_output=True, text=True, check=True
        )  # fmt: skip
        code, parent, worker = done.stdout.split()[-3:]
        taken = time.perf_counter() - start
        lines.append(
            f"{count:,} records: at most {int(parent) / 1024:.0f} MiB in the main process and "
            f"{int(worker) / 1024:.0f} MiB in a worker; {taken:.0f} s, exit code {code}  "
        )
    common.record("Instructions: peak memory", "python -m scripts.bench.collage memory", lines)


def tiny_pictures(folder: Path, count: int) -> tuple[Path, Path]:
    """`count` records with paths of their own, hard links to 1,000 different files; the two places."""
    images, rng = folder / f"images_{count}", np.random.default_rng(0)
    originals = []
    for number in range(1000):
        path = images / f"originals/{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path)
        originals.append(path)
    with (folder / f"source_{count}.json").open("w") as file:
        file.write("[")
        for number in range(count):
            path = f"coco/{number // 1000:03d}/{number:012d}.png"
            (images / path).parent.mkdir(parents=True, exist_ok=True)
            os.link(originals[number % 1000], images / path)
            file.write((",\n" if number else "\n") + json.dumps(record(number, path)))
        file.write("\n]\n")
    return folder / f"source_{count}.json", images


if __name__ == "__main__":
    main()
