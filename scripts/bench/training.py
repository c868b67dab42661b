"""What a training step costs: `python -m scripts.bench.training` (about eleven minutes on a CPU; --size 7b on a GPU)

    --only step        ours, TRL's DPOTrainer, and the straight way (eager, whole attention maps), equality included
    --only attention   the attention term on and off
    --only reference   reference log-probs on the fly and precomputed
    --only scaling     processes, gradient accumulation, length of the answers
    --only loader      the data loader against the step

A step is the loss with its reference log-probs, and the gradients of LoRA; the optimiser is left out (but in scaling).
Batches are one pair of 336 px pictures, 576 tokens each; checkpointing on; bf16 on a GPU, else fp32. Tokens per second
count a pair's prompt once and both its answers, whoever computes more.
"""

import statistics
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from scripts.bench import common, flops, scaling
from scripts.bench.memory import MIB, measure
from scripts.bench.pairs import Pairs, Shape, add_lora, build_base, build_pairs
from scripts.bench.steps import NAMES, Ours, Step, build_steps, build_trainer, difference
from train.llava_hound_dpo.reference import ReferenceCache
from train.llava_hound_dpo.trainer import AttentionAwareDPOTrainer

COMMAND = "python -m scripts.bench.training --only"


def main() -> None:
    """Run the parts in turn; each appends its table."""
    parser = common.parser(__doc__, size="shallow", repeats=3)
    parts = {"step": steps, "attention": attention, "reference": reference, "scaling": scale, "loader": loader}
    parser.add_argument("--only", choices=parts, nargs="+", default=list(parts), help="parts to run; default: all")
    parser.add_argument("--images", type=int, nargs="+", default=[1, 2, 4], help="of a prompt, in turn")
    args = parser.parse_args()
    for name in args.only:
        with tempfile.TemporaryDirectory() as folder:
            parts[name](args, Path(folder))


def arrange(names: Sequence[str], size: str, shape: Shape, folder: Path) -> tuple[dict[str, Step], Pairs]:
    """Steps of a shape, loaded, and the pairs."""
    common.release()
    base = build_base(size)
    pairs = build_pairs(folder / "data", shape, base.config)
    found = build_steps(names, add_lora(base), partial(build_base, size), pairs, folder)
    for step in found.values():
        step.load(pairs)
    return found, pairs


# ---- ours, TRL, eager


def steps(args, folder: Path) -> None:
    """Time, tokens per second, equality; and peak memory."""
    shapes = [(f"{images}", args.size, Shape(images), NAMES) for images in args.images]
    most = Shape(max(args.images))
    equal = Shape(most.images, chosen=most.rejected, rejected=most.rejected)
    shapes.append((f"{most.images}, answers equally long: nothing to pad", args.size, equal, ("ours", "trl")))
    if args.size == "shallow":
        shapes.append((f"{most.images}, 2 heads of 128 for 8 of 32", "shallow_128", most, ("ours", "eager")))
    columns = ["images", "tokens", "ours, s", "ours, tokens/s", "TRL / ours", "eager / ours"]
    columns += ["loss, gradients: eager from ours", "without the term: TRL from ours"]
    lines = table(columns + utilisation_columns())
    for number, (title, size, shape, names) in enumerate(shapes):
        lines.append(compare(title, size, shape, names, args, folder / str(number)))
    if torch.cuda.is_available():
        lines += [
            "",
            "Operations: 4 x linear + 5.5 x attention + 3 x output + vision, as `scripts/bench/flops.py` has it.",
        ]
    common.record("Training step: time, median (lowest to highest) of paired runs", command(args, "step"), lines)
    lines = table(
        ["images", "ours, MiB", "plain DPO, packed, MiB", "TRL, MiB", "eager, MiB", "TRL / ours", "eager / ours"]
    )
    peaks = memories(NAMES, args, (("trl", "ours"), ("eager", "ours")))
    lines += [row([f"{images}", *cells]) for images, cells in zip(args.images, peaks, strict=True)]
    common.record("Training step: peak memory above the weights", command(args, "step"), lines)


def compare(title: str, size: str, shape: Shape, names: Sequence[str], args, folder: Path) -> str:
    """A row of the table."""
    found, pairs = arrange(names, size, shape, folder)
    losses, gradients = {}, {}
    for name, step in list(found.items()):  # warms up as well
        try:
            losses[name], gradients[name] = step().item(), step.gradients()
        except torch.cuda.OutOfMemoryError:
            del found[name]
            common.release()
    seconds = common.alternate({name: step for name, step in found.items() if name != "plain"}, args.repeats, warm_up=0)
    median = statistics.median(seconds["ours"])
    cells = [title, str(pairs.tokens), f"{median:.2f}", f"{pairs.tokens / median:.0f}"]
    for name in ("trl", "eager"):
        missing = "out of memory" if name in names else "-"
        cells.append(common.ratio(seconds[name], seconds["ours"]) if name in seconds else missing)
    for first, second in (("ours", "eager"), ("plain", "trl")):
        both = first in gradients and second in gradients
        cells.append(apart(losses, gradients, first, second) if both else "-")
    return row(cells + utilisation(found["ours"], shape, pairs, median))


def apart(losses: dict, gradients: dict, first: str, second: str) -> str:
    """How far two losses and their gradients are from each other, relative."""
    loss = abs(losses[first] - losses[second]) / abs(losses[first])
    return f"{loss:.1e}, {difference(gradients[first], gradients[second]):.1e}"


def utilisation_columns() -> list[str]:
    """Where operations can be compared with a peak."""
    return ["ours, TFLOP/s", "of the GPU's peak"] if torch.cuda.is_available() else []


def utilisation(step: Step, shape: Shape, pairs: Pairs, seconds: float) -> list[str]:
    """Operations per second as of `flops`, and their share of the peak; nothing on a CPU."""
    if not torch.cuda.is_available():
        return []
    text = pairs.tokens - pairs.dataset.grid.num_tokens * shape.images - shape.chosen - shape.rejected
    rate = flops.step(flops.forward(step.policy.get_base_model().config, shape, text), encodings=1) / seconds
    peak = flops.peak(torch.cuda.get_device_name())
    return [f"{rate / 1e12:.0f}", f"{rate / peak:.0%}" if peak else "unknown"]


def memories(names: Sequence[str], args, quotients: Sequence[tuple[str, str]]) -> list[list[str]]:
    """Cells of peak memory by number of images: of every way in MiB, then of one way over another."""
    common.release()
    found = {name: measure(name, args.size, args.images) for name in names}
    rows = []
    for images in args.images:
        own = {name: peaks[images] for name, peaks in found.items()}
        cells = ["out of memory" if own[name] is None else f"{own[name] / MIB:.1f}" for name in names]
        for first, second in quotients:
            both = own[first] is not None and own[second] is not None
            cells.append(f"{own[first] / own[second]:.2f}" if both else "-")
        rows.append(cells)
    return rows


# ---- the attention term, the reference


def attention(args, folder: Path) -> None:
    """The same step of the same trainer with the term and without, time and memory."""
    lines = table(["images", "with / without the term, time", "with, MiB", "without, MiB", "with / without, memory"])
    peaks = memories(("ours", "plain"), args, [("ours", "plain")])
    for images, cells in zip(args.images, peaks, strict=True):
        found, _ = arrange(("ours", "plain"), args.size, Shape(images), folder / str(images))
        seconds = common.alternate(found, 3 * args.repeats)
        lines.append(row([f"{images}", common.ratio(seconds["ours"], seconds["plain"]), *cells]))
    common.record("The attention term: time and peak memory of a step", command(args, "attention"), lines)


def reference(args, folder: Path) -> None:
    """Reference log-probs computed in the step (the adapter off), and read from a cache filled before."""
    lines = table(
        ["images", "on the fly / precomputed", "by operations", "at 7B", "loss differs by", "filling, s a pair"]
    )
    seven = common.config_of("7b")
    for images in args.images:
        shape = Shape(images)
        base = build_base(args.size)
        pairs = build_pairs(folder / str(images), shape, base.config)
        policy, found = add_lora(base), {}
        for name in ("on the fly", "precomputed"):
            found[name] = Ours(policy, pairs, folder / name, AttentionAwareDPOTrainer)
            found[name].load(pairs)
        start = time.perf_counter()
        precompute(found["precomputed"], folder / f"cache_{images}")
        filling = time.perf_counter() - start
        losses = {name: step().item() for name, step in found.items()}
        seconds = common.alternate(found, 2 * args.repeats, warm_up=0)
        expected = [f"{expected_gain(config, shape):.2f}" for config in (base.config, seven)]
        lines.append(row([
            f"{images}", common.ratio(seconds["on the fly"], seconds["precomputed"]), *expected,
            f"{abs(losses['on the fly'] - losses['precomputed']):.1e}", f"{filling:.2f}",
        ]))  # fmt: skip
    common.record("Reference log-probs: on the fly against precomputed", command(args, "reference"), lines)


def precompute(step: Ours, folder: Path) -> None:
    """Fill a cache and let the step read it."""
    trainer = step.trainer
    trainer.reference = ReferenceCache(folder, {"model": "of this benchmark"}, trainer.train_dataset.store)
    trainer.fill_reference(trainer.train_dataset, trainer.reference.missing(trainer.train_dataset.pairs))


def expected_gain(config, shape: Shape) -> float:
    """Operations of a step on the fly over one with precomputed log-probs."""
    one = flops.forward(config, shape)
    return flops.step(one, encodings=1) / flops.step(one, encodings=1, cached=True)


# ---- scaling, the loader


def scale(args, folder: Path) -> None:
    """Processes, accumulation, answers."""
    one, images = scaling.alone, ("--images", 2)
    runs = {
        "1 process": lambda: one(1, args.size, *images),
        "1 process, 4 micro-batches a step": lambda: one(1, args.size, *images, "--accumulation", 4),
        "2 processes, apart": lambda: one(2, args.size, *images),
        "2 processes, DDP": lambda: scaling.together(2, args.size, *images),
    }
    lines = table(["2 images, the whole loop", "pairs/s", "over 1 process"])
    if torch.cuda.is_available() and torch.cuda.device_count() < 2:
        runs = dict(list(runs.items())[:2])
        lines = ["Two processes were not run: there is one GPU.", "", *lines]
    rounds = [{name: run() for name, run in runs.items()} for _ in range(args.repeats)]
    rates = {name: [found[name] for found in rounds] for name in runs}
    for name, own in rates.items():
        lines.append(row([name, f"{statistics.median(own):.2f}", common.ratio(own, rates["1 process"])]))
    if "2 processes, DDP" in rates:
        over = common.ratio(rates["2 processes, DDP"], rates["2 processes, apart"])
        lines += ["", f"DDP over two processes that know nothing of each other: {over}"]
    lines += ["", *table(["tokens of both answers, 2 images", "ours, s", "ours, tokens/s", "TRL / ours"])]
    for length in (10, 75, 300):
        found, pairs = arrange(("ours", "trl"), args.size, Shape(2, length, length), folder / str(length))
        seconds = common.alternate(found, args.repeats)
        median = statistics.median(seconds["ours"])
        cells = [f"{length}", f"{median:.2f}", f"{pairs.tokens / median:.0f}"]
        lines.append(row([*cells, common.ratio(seconds["trl"], seconds["ours"])]))
    common.record("Training: scaling", command(args, "scaling"), lines)


def loader(args, folder: Path) -> None:
    """Pairs per second of the trainer's own loader, from JPEG files, against the step."""
    lines = table(["images", "step, pairs/s", "loader, pairs/s", "loader / step", "keeps up at 7B with, TFLOP/s"])
    seven = common.config_of("7b")
    for images in args.images:
        shape = Shape(images, count=12, side=(640, 480), suffix=".jpg")
        base = build_base(args.size)
        pairs = build_pairs(folder / str(images), shape, base.config)
        trainer = build_trainer(AttentionAwareDPOTrainer, add_lora(base), pairs, folder / "output")
        step = Ours(trainer.model, pairs, folder / "output", AttentionAwareDPOTrainer)
        step.batch = trainer.data_collator([pairs.dataset[0]])
        runs = {"step": step, "loader": lambda repeat, trainer=trainer: sum(1 for _ in trainer.get_train_dataloader())}
        seconds = common.alternate(runs, args.repeats)
        rates = [shape.count / taken for taken in seconds["loader"]]
        median = statistics.median(rates)
        power = median * flops.step(flops.forward(seven, shape), encodings=1) / 1e12
        over = common.ratio(rates, [1 / taken for taken in seconds["step"]])
        lines.append(row([
            f"{images}", f"{1 / statistics.median(seconds['step']):.2f}", f"{median:.1f}", over, f"{power:.0f}",
        ]))  # fmt: skip
    lines += [
        "",
        "The loader runs in one process here; `--dataloader_num_workers` adds more and hides it behind the step.",
    ]
    common.record("Training: the data loader against the step", command(args, "loader"), lines)


def command(args, part: str) -> str:
    """What ran, to run it again."""
    return f"{COMMAND} {part} --size {args.size} --images {' '.join(map(str, args.images))} --repeats {args.repeats}"


def table(columns: Sequence[str]) -> list[str]:
    """Head of a table, numbers to the right."""
    return [row(columns), row(["---", *["---:"] * (len(columns) - 1)])]


def row(cells: Sequence[str]) -> str:
    """A line of a table."""
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
