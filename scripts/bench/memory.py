"""Peak memory of one training step above what is there before it, each way in a process of its own.

On a CPU the growth of the resident set: the kernel's high-water mark, reset before every step. There every allocation
above 64 KiB is a mapping of its own, so that freed memory does not count. On a GPU what PyTorch has allocated.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from scripts.bench import common
from scripts.bench.pairs import Shape, add_lora, build_base, build_pairs
from scripts.bench.steps import NAMES, Step, build_steps

MIB = 1024**2


def main() -> None:
    """Measure one way and print {number of images: bytes}."""
    parser = common.parser(__doc__)
    parser.add_argument("--name", choices=NAMES, required=True)
    parser.add_argument("--images", type=int, nargs="+", required=True)
    args = parser.parse_args()
    base = build_base(args.size)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        shapes = [Shape(images=images) for images in args.images]
        pairs = [build_pairs(Path(folder) / str(shape.images), shape, base.config) for shape in shapes]
        build = partial(build_base, args.size)
        step = build_steps([args.name], add_lora(base), build, pairs[0], Path(folder))[args.name]
        step.load(pairs[0])
        step()  # what is allocated once and kept
        for shape, own in zip(shapes, pairs, strict=True):
            step.load(own)
            found[shape.images] = peak(step)
    print(json.dumps(found))


def peak(step: Step) -> int | None:
    """Bytes that one step needs at most; None if the GPU has not so many."""
    step.policy.zero_grad()
    common.release()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        try:
            step()
        except torch.cuda.OutOfMemoryError:
            return None
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = _status("VmRSS")
    step()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(f"{name}:")))


def measure(name: str, size: str, images: Sequence[int]) -> dict[int, int | None]:
    """Bytes of a step by number of images, in a fresh process. Raises CalledProcessError if that one fails."""
    command = [sys.executable, "-m", "scripts.bench.memory", "--name", name, "--size", size, "--images"]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(
        [*command, *map(str, images)], env=environment, stdout=subprocess.PIPE, text=True, check=True
    )  # fmt: skip
    return {int(number): found for number, found in json.loads(done.stdout.splitlines()[-1]).items()}


if __name__ == "__main__":
    main()
