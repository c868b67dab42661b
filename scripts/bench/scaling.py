"""Pairs per second of the trainer's whole loop (data, optimiser and log lines included) in one and in two processes.

Started by `scripts.bench.training --only scaling`; as a program it is one of the processes that train. On a CPU each
has one thread. Two processes that know nothing of each other show what the machine itself gives for a second one.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import TrainerCallback

from scripts.bench import common
from scripts.bench.pairs import Shape, add_lora, build_base, build_pairs
from scripts.bench.steps import build_trainer
from train.llava_hound_dpo.trainer import AttentionAwareDPOTrainer

WARM_UP = 1  # optimiser steps that do not count
READY, RATE = "ready", "pairs per second: "  # how lines begin that a process prints


def main() -> None:
    """Train some steps and print pairs per second, all processes together."""
    parser = common.parser(__doc__)
    parser.add_argument("--images", type=int, default=2)
    parser.add_argument("--accumulation", type=int, default=1, help="micro-batches of a step")
    parser.add_argument("--steps", type=int, default=8, help="micro-batches that count")
    parser.add_argument("--wait", action="store_true", help="say that all is built, and wait for a line")
    args = parser.parse_args()
    world = int(os.environ.get("WORLD_SIZE", "1"))
    base, clock = build_base(args.size), Clock()
    with tempfile.TemporaryDirectory() as folder:
        steps = WARM_UP + args.steps // args.accumulation
        pairs = build_pairs(Path(folder) / "data", Shape(args.images, count=4 * world), base.config)
        arguments = {"max_steps": steps, "gradient_accumulation_steps": args.accumulation, "logging_steps": 1}
        trainer = build_trainer(
            AttentionAwareDPOTrainer,
            add_lora(base),
            pairs,
            Path(folder) / "output",
            num_train_epochs=steps,
            **arguments,
        )
        trainer.add_callback(clock)
        if args.wait:
            print(READY, flush=True)
            sys.stdin.readline()
        trainer.train()
    counted = (len(clock.ends) - WARM_UP) * args.accumulation * world
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


def alone(count: int, size: str, *flags: object) -> float:
    """Pairs per second of so many processes that start together and know nothing of each other."""
    command = [sys.executable, "-m", "scripts.bench.scaling", "--size", size, "--wait", *map(str, flags)]
    jobs = [subprocess.Popen(command, env=_environment(), stdin=-1, stdout=-1, text=True) for _ in range(count)]
    for job in jobs:
        while (line := job.stdout.readline()).strip() != READY:
            if not line:
                raise RuntimeError(f"{' '.join(command)} ended before it trained, with code {job.wait()}")
    for job in jobs:
        job.stdin.write("\n")
        job.stdin.flush()
    return sum(_result(command, job.communicate()[0], job.returncode) for job in jobs)


def together(count: int, size: str, *flags: object) -> float:
    """Pairs per second of so many processes that share every batch (DDP)."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
    command = [*launcher, "-m", "scripts.bench.scaling", "--size", size, *map(str, flags)]
    done = subprocess.run(command, env=_environment(), stdout=subprocess.PIPE, text=True, check=False)
    return _result(command, done.stdout, done.returncode)


def _environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}


def _result(command: Sequence[str], output: str, code: int) -> float:
    found = [line.removeprefix(RATE) for line in output.splitlines() if line.startswith(RATE)]
    if code or not found:
        raise RuntimeError(f"{' '.join(command)} ended with code {code}; its last lines: {output.splitlines()[-3:]}")
    return float(found[-1])


if __name__ == "__main__":
    main()
