"""What a training step costs: `python -m scripts.bench.training` (some minutes on a CPU; --size 7b on a GPU)

Ours against TRL's DPOTrainer, against the straight way (eager, whole attention maps), and against itself without the
attention term; that they compute the same is part of the table. A step is the loss with its reference log-probs, and
the gradients of LoRA; the optimiser is left out. Batches are one pair of 336 px pictures, 576 tokens each (144 with
Qwen2.5-VL, whose processor TRL can have only where torchvision is); checkpointing on; bf16 on a GPU, else fp32. Tokens
per second count a pair's prompt once and both its answers, whoever computes more.
"""

import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from llava.command_line import check_numbers, flag, parse
from llava.markdown import table
from llava.runtime import user_errors
from scripts.bench import common
from scripts.bench.common import Shape, ratio
from scripts.bench.steps import NAMES, build_steps, difference, lacks_trl

COLUMNS = (
    "images", "tokens", "ours, s", "ours, tokens/s", "TRL / ours", "eager / ours", "with / without the term",
    "loss, gradients: eager from ours", "without the term: TRL from ours",
)  # fmt: skip


@dataclass(kw_only=True)
class Flags:
    """What is measured."""

    family: str = flag("of the random model", "llava", choices=list(common.FAMILIES))
    size: str = flag("of the model; 7b needs a GPU", "shallow", choices=["tiny", "shallow", "7b"])
    repeats: int = flag("counted runs of each, in turn", 3)
    images: list[int] = flag("of a prompt, in turn", [1, 2, 4])
    publish: bool = flag("append to scripts/bench/RESULTS.md, which git keeps, and not to output/bench/", False)

    def __post_init__(self):
        check_numbers(self, repeats=(1, 1000), images=(1, 100))


def main() -> None:
    """Measures and appends the table."""
    with user_errors():
        (own,) = parse((Flags,), __doc__)
    shapes = [(f"{images}", Shape(images), NAMES) for images in own.images]
    most = Shape(max(own.images))
    equal = Shape(most.images, chosen=most.rejected, rejected=most.rejected)
    shapes.append((f"{most.images}, answers equally long: nothing to pad", equal, ("ours", "trl")))
    rows = []
    for title, shape, names in shapes:
        with tempfile.TemporaryDirectory() as folder:
            rows.append([title, *compare(own, shape, names, Path(folder))])
    images = " ".join(map(str, own.images))
    flags = f"--family {own.family} --size {own.size} --repeats {own.repeats} --images {images}"
    command = f"python -m scripts.bench.training {flags}"
    title = "Training step: time, median (lowest to highest) of paired runs"
    common.record(title, command, table(COLUMNS, rows), common.PUBLISHED if own.publish else common.RESULTS)


def compare(own: Flags, shape: Shape, names: Sequence[str], folder: Path) -> list[object]:
    """Cells of a row; what does not fit on the GPU says so."""
    common.release()
    family = common.FAMILIES[own.family](own.size)
    pairs = common.build_pairs(folder / "data", shape, family)
    policy = common.add_lora(common.build_base(family), family)
    possible = [name for name in names if name != "trl" or not lacks_trl(family)]
    steps = build_steps(possible, policy, partial(common.build_base, family), pairs, folder)
    losses, gradients = {}, {}
    for name, step in list(steps.items()):  # warms up as well
        try:
            losses[name], gradients[name] = step().item(), step.gradients()
        except torch.cuda.OutOfMemoryError:
            del steps[name]
            common.release()
    seconds = common.alternate(steps, own.repeats)
    median = statistics.median(seconds["ours"])
    tokens = sum(pair.prompt_tokens + len(pair.chosen) + sum(map(len, pair.rejected)) for pair in pairs.pairs)
    cells = [tokens, f"{median:.2f}", f"{tokens / median:.0f}"]
    for first, second in (("trl", "ours"), ("eager", "ours"), ("ours", "plain")):
        both = {first, second} <= seconds.keys()
        cells.append(ratio(seconds[first], seconds[second]) if both else missing({first, second}, names, possible))
    for first, second in (("ours", "eager"), ("plain", "trl")):
        both = {first, second} <= losses.keys()
        cells.append(apart(losses, gradients, first, second) if both else missing({first, second}, names, possible))
    return cells


def missing(pair: set[str], asked: Sequence[str], possible: Sequence[str]) -> str:
    """Why two steps are not compared."""
    if not pair <= {*asked}:
        return "-"
    return "out of memory" if pair <= {*possible} else "needs torchvision"


def apart(losses: dict, gradients: dict, first: str, second: str) -> str:
    """How far two losses and their gradients are from each other, relative."""
    loss = abs(losses[first] - losses[second]) / abs(losses[first])
    return f"{loss:.1e}, {difference(gradients[first], gradients[second]):.1e}"


if __name__ == "__main__":
    main()
