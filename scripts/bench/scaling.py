"""Pairs per second of the trainer's whole loop (data, optimiser and log lines included) in one and in two processes.

Started by `scripts.bench.training --only scaling`; as a program it is one of the processes that train, on a CPU with
one thread each.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from transformers import TrainerCallback

from scripts.bench import common
from scripts.bench.common import Shape, add_lora, build_base, build_family, build_pairs
from scripts.bench.steps import build_trainer

WARM_UP, STEPS = 1, 8  # optimiser steps that do not count, and that do
IMAGES = 2  # of a prompt
RATE = "pairs per second: "  # how the line begins that rank 0 prints


def main() -> None:
    """Train some steps and print pairs per second, all processes together."""
    own = common.flags_of(common.Flags, __doc__)
    world, times = int(os.environ.get("WORLD_SIZE", "1")), Times()
    family = build_family(own.size)
    with tempfile.TemporaryDirectory() as folder:
        pairs = build_pairs(Path(folder) / "data", Shape(IMAGES, count=4 * world), family)
        trainer = build_trainer(
            add_lora(build_base(family), family), pairs, Path(folder) / "output",
            num_train_epochs=WARM_UP + STEPS, max_steps=WARM_UP + STEPS, logging_steps=1,
        )  # fmt: skip
        trainer.add_callback(times)
        trainer.train()
    if int(os.environ.get("RANK", "0")) == 0:
        print(RATE + str(STEPS * world / (times.ends[-1] - times.ends[WARM_UP - 1])), flush=True)


class Times(TrainerCallback):
    """When every optimiser step ended."""

    def __init__(self):
        self.ends: list[float] = []

    def on_step_end(self, args, state, control, **kwargs):
        """Note the time."""
        self.ends.append(common.clock())


def rate(size: str, processes: int) -> float:
    """Pairs per second of so many processes that share every step. Raises RuntimeError if one of them fails."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [*launcher, "-m", "scripts.bench.scaling", "--size", size]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    found = [line.removeprefix(RATE) for line in done.stdout.splitlines() if line.startswith(RATE)]
    if done.returncode or not found:
        raise RuntimeError(f"{' '.join(command)} ended with code {done.returncode}; its own message is above")
    return float(found[-1])


if __name__ == "__main__":
    main()
