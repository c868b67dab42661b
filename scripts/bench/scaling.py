"""Pairs per second of the trainer's whole loop (data, optimiser and log lines included) in one and in two processes.

Started by `scripts.bench.training --only scaling`; as a program it is one of the processes that train, on a CPU with
one thread each.
"""

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import TrainerCallback

from llava.command_line import flag
from scripts.bench import common
from scripts.bench.pairs import Shape, add_lora, build_base, build_pairs
from scripts.bench.steps import build_trainer
from train.llava_hound_dpo.trainer import AttentionAwareDPOTrainer

WARM_UP = 1  # optimiser steps that do not count
RATE = "pairs per second: "  # how the line begins that rank 0 prints


@dataclass(kw_only=True)
class Flags(common.Flags):
    """What is trained."""

    images: int = flag("of a prompt", 2)
    accumulation: int = flag("micro-batches of a step", 1)
    steps: int = flag("micro-batches that count", 8)


def main() -> None:
    """Train some steps and print pairs per second, all processes together."""
    own = common.flags_of(Flags, __doc__)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    base, clock = build_base(own.size), Clock()
    with tempfile.TemporaryDirectory() as folder:
        steps = WARM_UP + own.steps // own.accumulation
        pairs = build_pairs(Path(folder) / "data", Shape(own.images, count=4 * world), base.config)
        trainer = build_trainer(
            AttentionAwareDPOTrainer, add_lora(base), pairs, Path(folder) / "output", num_train_epochs=steps,
            max_steps=steps, gradient_accumulation_steps=own.accumulation, logging_steps=1,
        )  # fmt: skip
        trainer.add_callback(clock)
        trainer.train()
    counted = (len(clock.ends) - WARM_UP) * own.accumulation * world
    if int(os.environ.get("RANK", "0")) == 0:
        print(RATE + str(counted / (clock.ends[-1] - clock.ends[WARM_UP - 1])), flush=True)


class Clock(TrainerCallback):
    """When every optimiser step ended."""

    def __init__(self):
        self.ends: list[float] = []

    def on_step_end(self, args, state, control, **kwargs):
        """Note the time."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())


def rate(size: str, processes: int, accumulation: int) -> float:
    """Pairs per second of so many processes that share every step. Raises RuntimeError if one of them fails."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [*launcher, "-m", "scripts.bench.scaling", "--size", size, "--accumulation", str(accumulation)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    found = [line.removeprefix(RATE) for line in done.stdout.splitlines() if line.startswith(RATE)]
    if done.returncode or not found:
        raise RuntimeError(f"{' '.join(command)} ended with code {done.returncode}; its own message is above")
    return float(found[-1])


if __name__ == "__main__":
    main()
