"""What a micro-batch costs the CPU: `python -m scripts.bench.dispatch [--against FOLDER]` (two minutes)

A LLaVA with the 32 layers of 7B and widths so small that Python and PyTorch's dispatcher are nearly all of its time.
On a GPU this is what must be done before the kernels of a row are queued. A micro-batch is one pair about one picture:
loss with its reference, gradients of LoRA, checkpointing. Times are of this process alone (`time.process_time`).
FOLDER is a checkout of an earlier commit; its code runs the same in turn, in a process of its own.
"""

import copy
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from llava.command_line import check_numbers, flag, parse
from llava.families import Llava15
from llava.markdown import table
from llava.runtime import user_errors
from scripts.bench import common
from scripts.bench.steps import build_trainer
from scripts.miniature.model import build_config, build_processor
from train.llava_hound_dpo.trainer import AttentionAwareDPOTrainer

SIZES = ((64, 32, 4, 128), (64, 24, 1))  # layers of LLaVA-1.5-7B
PARTS = ("micro-batch", "without checkpointing", "PEFT's disable_adapter()", "adapter off and on")
ANSWER = "ms:"  # begins a worker's answer
ROOT = Path(__file__).parents[2]


@dataclass(kw_only=True)
class Flags:
    """What is measured."""

    against: str | None = flag("folder of an earlier checkout to compare with", None)
    repeats: int = flag("counted runs, in turn", 20)
    publish: bool = flag("append to scripts/bench/RESULTS.md, which git keeps, and not to output/bench/", False)

    def __post_init__(self):
        check_numbers(self, repeats=(1, 1000))
        if self.against and not (Path(self.against) / "train").is_dir():
            raise ValueError(f"--against {self.against}: no checkout of this repository")


def main() -> None:
    """Measures and appends the table."""
    with user_errors():
        (own,) = parse((Flags,), __doc__)
    folders = {"before": Path(own.against).absolute()} if own.against else {}
    found = measure(folders | {"now": ROOT}, own.repeats)
    rows = [[name, *(f"{statistics.median(ms):.2f}" if ms else "-" for ms in part)] for name, part in found.items()]
    if folders:
        pairs = zip(found["now"], found["before"], strict=True)
        rows.append(["now / before", *(common.ratio(*pair) if all(pair) else "-" for pair in pairs)])
    command = f"python -m scripts.bench.dispatch --repeats {own.repeats}" + (" --against FOLDER" if folders else "")
    cells = table(("code", *(f"{part}, ms" for part in PARTS)), rows)
    common.record(
        "Python and dispatch of a micro-batch, 32 layers: process time, median of runs in turn", command, cells,
        common.PUBLISHED if own.publish else common.RESULTS,
    )  # fmt: skip


def measure(folders: dict[str, Path], repeats: int) -> dict[str, list[list[float]]]:
    """Milliseconds of every part in every repeat, by code."""
    workers = {name: start(folder) for name, folder in folders.items()}
    found = {name: [[] for _ in PARTS] for name in workers}
    try:
        for _ in range(repeats):
            for name, worker in workers.items():
                worker.stdin.write("go\n")
                worker.stdin.flush()
                for part, ms in zip(found[name], answer(worker), strict=False):
                    part.append(ms)
    finally:
        for worker in workers.values():
            worker.kill()
            worker.wait()
    return found


def start(folder: Path) -> subprocess.Popen:
    """A process that runs this file with the code of a folder, once for every line that it is sent."""
    code = f"import sys, runpy; sys.path.insert(0, {str(folder)!r}); runpy.run_path({__file__!r})['work']()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-c", code], cwd=folder, text=True, **pipes)


def answer(worker: subprocess.Popen) -> list[float]:
    """The numbers of a worker's next answer; libraries print lines of their own."""
    line = next(line for line in worker.stdout if line.startswith(ANSWER))
    return [float(ms) for ms in line.removeprefix(ANSWER).split()]


def work() -> None:
    """Run all parts for every line of the standard input."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        runs = build(Path(folder))
        for run in runs:  # warms up
            run()
        for _ in sys.stdin:
            print(ANSWER, *map(milliseconds, runs), flush=True)


def build(folder: Path) -> list[Callable[[], None]]:
    """The parts, in order."""
    processor = build_processor()
    config = build_config(processor, *SIZES)
    family = Llava15(config, processor.tokenizer, processor.image_processor)
    pairs = common.build_pairs(folder / "data", common.Shape(1, 5, 4), family)
    torch.manual_seed(0)
    policy = common.add_lora(family.model_class(config)(copy.deepcopy(config)), family, rank=4)
    trainer = build_trainer(policy, pairs, folder / "out", AttentionAwareDPOTrainer)
    trainer.current_gradient_accumulation_steps = 1  # as `train` sets it
    model, batch = trainer.accelerator.prepare_model(policy), trainer.data_collator(list(pairs))

    def checkpoint() -> None:
        """As `train` does it."""
        policy.activation_checkpointing_enable(activation_checkpointing_kwargs=trainer.args.activation_checkpointing_kwargs)
        if hasattr(trainer, "_has_entered"):  # an earlier commit left that on
            policy.disable_input_require_grads()

    def off_and_on(context: Callable) -> None:
        with context():
            pass

    def keeping_all() -> None:
        policy.activation_checkpointing_disable()
        trainer.training_step(model, batch)
        checkpoint()

    checkpoint()
    step = [lambda: trainer.training_step(model, batch), keeping_all, lambda: off_and_on(policy.disable_adapter)]
    # An earlier commit may have no other way than PEFT's.
    return step + [lambda: off_and_on(trainer._as_reference)] * hasattr(trainer, "_switches")


def milliseconds(run: Callable[[], None]) -> float:
    """Process time of a run."""
    begin = time.process_time()
    run()
    return 1e3 * (time.process_time() - begin)


if __name__ == "__main__":
    main()
