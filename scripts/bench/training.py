"""What a training step costs: `python -m scripts.bench.training` (some minutes on a CPU; --size 7b on a GPU)

    --only step        ours, TRL's DPOTrainer, and the straight way (eager, whole attention maps), equality included
    --only attention   the attention term on and off
    --only loader      the data loader against the step

A step is the loss with its reference log-probs, and the gradients of LoRA; the optimiser is left out.
Batches are one pair of 336 px pictures, 576 tokens each; checkpointing on; bf16 on a GPU, else fp32. Tokens per second
count a pair's prompt once and both its answers, whoever computes more.
"""

import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from llava.command_line import flag
from llava.markdown import row
from scripts.bench import common
from scripts.bench.common import Shape, add_lora, build_base, build_family, build_pairs, ratio, table
from scripts.bench.steps import NAMES, Step, build_steps, difference
from train.llava_hound_dpo.data import PairDataset

PARTS = ["step", "attention", "loader"]


@dataclass(kw_only=True)
class Flags(common.Flags):
    """What is measured."""

    size: str = flag("of the random model; 7b needs a GPU", "shallow", choices=list(common.SIZES))
    repeats: int = flag("counted runs of each, in turn", 3)
    only: list[str] = flag("parts to run", PARTS, choices=PARTS)
    images: list[int] = flag("of a prompt, in turn", [1, 2, 4])


def main() -> None:
    """Run the parts in turn; each appends its table."""
    own = common.flags_of(Flags, __doc__)
    parts = {"step": steps, "attention": attention, "loader": loader}
    for name in own.only:
        with tempfile.TemporaryDirectory() as folder:
            title, lines = parts[name](own, Path(folder))
        common.record(title, "training", replace(own, only=[name]), lines)


def arrange(names: Sequence[str], size: str, shape: Shape, folder: Path) -> tuple[dict[str, Step], PairDataset]:
    """Steps of a shape, and its pairs."""
    common.release()
    family = build_family(size)
    pairs = build_pairs(folder / "data", shape, family)
    policy = add_lora(build_base(family), family)
    return build_steps(names, policy, partial(build_base, family), pairs, folder), pairs


def steps(own: Flags, folder: Path) -> tuple[str, list[str]]:
    """Ours, TRL, eager: time, tokens per second, equality."""
    shapes = [(f"{images}", Shape(images), NAMES) for images in own.images]
    most = Shape(max(own.images))
    equal = Shape(most.images, chosen=most.rejected, rejected=most.rejected)
    shapes.append((f"{most.images}, answers equally long: nothing to pad", equal, ("ours", "trl")))
    columns = ["images", "tokens", "ours, s", "ours, tokens/s", "TRL / ours", "eager / ours"]
    lines = table([*columns, "loss, gradients: eager from ours", "without the term: TRL from ours"])
    for number, (title, shape, names) in enumerate(shapes):
        found, pairs = arrange(names, own.size, shape, folder / str(number))
        tokens = sum(pair.prompt_tokens + len(pair.chosen) + sum(map(len, pair.rejected)) for pair in pairs.pairs)
        lines.append(row([title, tokens, *compare(found, tokens, names, own.repeats)]))
    return "Training step: time, median (lowest to highest) of paired runs", lines


def compare(found: dict[str, Step], tokens: int, names: Sequence[str], repeats: int) -> list[str]:
    """Cells of a row; what does not fit on the GPU says so."""
    losses, gradients = {}, {}
    for name, step in list(found.items()):  # warms up as well
        try:
            losses[name], gradients[name] = step().item(), step.gradients()
        except torch.cuda.OutOfMemoryError:
            del found[name]
            common.release()
    seconds = common.alternate({name: step for name, step in found.items() if name != "plain"}, repeats, warm_up=0)
    median = statistics.median(seconds["ours"])
    cells = [f"{median:.2f}", f"{tokens / median:.0f}"]
    for name in ("trl", "eager"):
        missing = "out of memory" if name in names else "-"
        cells.append(ratio(seconds[name], seconds["ours"]) if name in seconds else missing)
    for first, second in (("ours", "eager"), ("plain", "trl")):
        both = first in losses and second in losses
        cells.append(apart(losses, gradients, first, second) if both else "-")
    return cells


def apart(losses: dict, gradients: dict, first: str, second: str) -> str:
    """How far two losses and their gradients are from each other, relative."""
    loss = abs(losses[first] - losses[second]) / abs(losses[first])
    return f"{loss:.1e}, {difference(gradients[first], gradients[second]):.1e}"


def attention(own: Flags, folder: Path) -> tuple[str, list[str]]:
    """The same step of the same trainer with the term and without."""
    lines = table(["images", "with / without the term"])
    for images in own.images:
        found, _ = arrange(("ours", "plain"), own.size, Shape(images), folder / str(images))
        seconds = common.alternate(found, 3 * own.repeats)
        lines.append(row([images, ratio(seconds["ours"], seconds["plain"])]))
    return "The attention term: time of a step", lines


def loader(own: Flags, folder: Path) -> tuple[str, list[str]]:
    """Pairs per second of the trainer's own loader, from JPEG files, against the step."""
    lines = table(["images", "step, pairs/s", "loader, pairs/s", "loader / step"])
    for images in own.images:
        shape = Shape(images, count=12, side=(640, 480), suffix=".jpg")
        found, pairs = arrange(("ours",), own.size, shape, folder / str(images))
        step, trainer = found["ours"], found["ours"].trainer
        step.batch = trainer.data_collator([pairs[0]])
        runs = {"step": step, "loader": lambda repeat, trainer=trainer: sum(1 for _ in trainer.get_train_dataloader())}
        seconds = common.alternate(runs, own.repeats)
        rates = [shape.count / taken for taken in seconds["loader"]]
        steps_s = [1 / taken for taken in seconds["step"]]
        medians = [f"{statistics.median(steps_s):.2f}", f"{statistics.median(rates):.1f}"]
        lines.append(row([images, *medians, ratio(rates, steps_s)]))
    lines += ["", "The loader runs in one process; `--dataloader_num_workers` adds more and hides it behind the step."]
    return "Training: the data loader against the step", lines


if __name__ == "__main__":
    main()
