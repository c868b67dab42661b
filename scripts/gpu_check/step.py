"""A training step at 7B's shape on the production path: how fast, how large, and whether new lengths cost anything."""

import re
from collections.abc import Iterator
from functools import partial

import torch

from scripts.bench.common import Shape, add_lora, build_base, build_pairs
from scripts.bench.steps import PlainDPOTrainer, TrainerStep
from scripts.gpu_check import common
from scripts.gpu_check.common import FAIL, OK, SKIPPED, Finding, Settings, aimed, at_most, seconds
from scripts.gpu_check.models import family_of, production_step
from train.llava_hound_dpo.costs import PairShape, Recipe, count, work
from train.llava_hound_dpo.data import PairDataset
from train.llava_hound_dpo.memory import GIB, Kept, Numbers, Row, Zero, estimate_memory
from train.llava_hound_dpo.model import count_parameters
from train.llava_hound_dpo.plan import shape_of
from train.llava_hound_dpo.trainer import AttentionAwareDPOTrainer

SECTION = "step"
PEAKS = {  # FLOP/s of dense bf16 products by the data sheets; of parts (MIG) and slower makes unknown
    r"\bA100\b(?!.*MIG)": 312e12, r"\bH100\b.*(HBM3|SXM)(?!.*MIG)": 989e12, r"\bH200\b(?!.*(NVL|MIG))": 989e12,
}  # fmt: skip
ADVICE = {
    "share": "the GPU waits or takes slow kernels: see kernels and waits, and nvidia-smi for its clocks",
    "memory": "the plan's estimate does not hold here: leave that much more room, and report it with this file",
    "lengths": "a new row length costs extra: cuDNN plans anew, or memory is broken up (environment: allocator)",
    "syncs": "the CPU waits for the GPU within a micro-batch, which is then idle",
    "term": "the attention term should hide behind the rest: see the kernels of the region masses",
}


class Bench:
    """The policy of random weights, with a trainer that has the attention term and one that has not."""

    def __init__(self, settings: Settings):
        self.settings, self.family = settings, family_of(settings)
        base = build_base(self.family, settings.device)
        self.policy = add_lora(base, self.family, fp32_adapter=False)
        self.costs, pairs = count(self.family.config), self.pairs(Shape(1, *settings.sizes.answers))
        make = partial(production_step, self.policy, pairs, settings.folder / "trainer", settings.device)
        self.step, self.plain = make(AttentionAwareDPOTrainer), make(PlainDPOTrainer)

    def pairs(self, shape: Shape) -> PairDataset:
        """Pairs of a shape."""
        name = f"{shape.images}-{shape.count}-{shape.chosen}-{shape.rejected}"
        return build_pairs(self.settings.folder / name, shape, self.family)

    def load(self, step: TrainerStep, pairs: PairDataset) -> None:
        """Make these pairs, as one row, what a step trains on."""
        step.trainer.train_dataset, step.batch = pairs, step.trainer.data_collator(list(pairs))

    def checkpoint(self, is_on: bool) -> None:
        """Recompute activations in the backward pass, or keep them all."""
        (self.policy.activation_checkpointing_enable if is_on else self.policy.activation_checkpointing_disable)()

    def flops(self, shapes: list[PairShape], is_checkpointed: bool) -> float:
        """Of a step on these pairs, the reference's pass included."""
        lora = sum(parameter.numel() for name, parameter in self.policy.named_parameters() if "lora_" in name)
        recipe = Recipe("step", lora, checkpointing=is_checkpointed, probed_layers=len(self.step.trainer.layers))
        return work(self.costs, shapes, recipe).total

    def estimate_gib(self, shapes: list[PairShape], is_checkpointed: bool) -> float:
        """What the plan says of a process that has no optimiser: weights, gradients in their precision, activations."""
        config, size = self.family.config, self.settings.dtype.itemsize
        numbers = Numbers(*count_parameters(self.policy), bytes_each=size)
        row = Row(*(sum(parts) for parts in zip(*((s.tokens, s.answers, sum(s.patches)) for s in shapes), strict=True)))
        rank, layers = self.policy.peft_config["default"].r, tuple(sorted(self.step.trainer.layers))
        memory = estimate_memory(config, numbers, row, Kept(is_checkpointed, rank, layers, size), Zero(), world=1)
        return (memory.weights + numbers.trained * size + memory.activations) / GIB


def run(settings: Settings) -> Iterator[Finding]:
    """Rows of one pair and of several; then what costs extra."""
    bench = Bench(settings)
    for name, shape in rows(bench).items():
        yield from guarded(bench, name, shape, True)
        yield from guarded(bench, f"{name}, no checkpointing", shape, False)
    bench.checkpoint(True)
    yield from extras(bench)


def rows(bench: Bench) -> dict[str, Shape]:
    """Pairs of a row, by what the row is called."""
    own = bench.settings.sizes
    single = {f"{images} image{'s' * (images > 1)}": Shape(images, *own.answers) for images in own.images}
    two = Shape(2, *own.answers)
    pairs = own.row_tokens // shape_of(bench.pairs(two).pairs[0], True).tokens
    return single | {f"{pairs} pairs of 2 images": Shape(2, *own.answers, pairs)}


def guarded(bench: Bench, name: str, shape: Shape, is_checkpointed: bool) -> Iterator[Finding]:
    """`measure`, or that it does not fit."""
    try:
        yield from measure(bench, name, shape, is_checkpointed)
    except torch.cuda.OutOfMemoryError as error:
        bench.policy.zero_grad()
        yield common.too_large(SECTION, name, error)


def measure(bench: Bench, name: str, shape: Shape, is_checkpointed: bool) -> Iterator[Finding]:
    """Time, speed and memory of a row; checkpointed also what the term costs, and how often the CPU waits."""
    settings, step, pairs = bench.settings, bench.step, bench.pairs(shape)
    shapes = [shape_of(pair, with_rejected=True) for pair in pairs.pairs]
    tokens = sum(shape.tokens for shape in shapes)
    bench.checkpoint(is_checkpointed)
    bench.load(step, pairs)
    step()  # warms up
    taken = seconds(settings, step, settings.sizes.repeats)
    yield Finding(SECTION, f"{name}: a step of {tokens:,} tokens", 1e3 * taken, "ms")
    yield from speed(settings, name, bench.flops(shapes, is_checkpointed) / taken)
    # Onto the gradients of the step before: all are there from the start, as in all but the first of a step's rows.
    peak, due = common.peak_gib(settings, step.forward_and_backward), bench.estimate_gib(shapes, is_checkpointed)
    verdict = at_most(abs(peak / due - 1), 0.1, 0.1, settings.on_gpu)
    told, shown = ADVICE["memory"] * (verdict == FAIL), f"({peak:.2f} GiB / {due:.2f} GiB)"
    yield Finding(SECTION, f"{name}: peak memory / estimate", peak / due, shown, verdict, told)
    if is_checkpointed:
        bench.load(bench.plain, pairs)
        bench.plain()
        ratio = taken / seconds(settings, bench.plain, settings.sizes.repeats)
        yield aimed(settings, SECTION, f"{name}: with / without the term", ratio, 1.03, 1.1, ADVICE["term"])


def speed(settings: Settings, name: str, per_second: float) -> Iterator[Finding]:
    """FLOP/s, and what share of the GPU's peak they are."""
    yield Finding(SECTION, f"{name}: speed", per_second / 1e12, "TFLOP/s")
    device = torch.cuda.get_device_name() if settings.on_gpu else "a CPU"
    name, peak = f"{name}: share of the peak", peak_of(device)
    if not peak:
        yield Finding(SECTION, name, None, "", SKIPPED, f"the peak of {device} is not known here")
        return
    verdict = at_most(peak / per_second, 1 / 0.5, 1 / 0.25)
    shown = "% (aim: at least 50)"
    yield Finding(SECTION, name, 100 * per_second / peak, shown, verdict, ADVICE["share"] * (verdict != OK))


def peak_of(device: str) -> float | None:
    """FLOP/s of a GPU by its name, where they are known."""
    return next((peak for pattern, peak in PEAKS.items() if re.search(pattern, device)), None)


def extras(bench: Bench) -> Iterator[Finding]:
    """Waits of the CPU in a step, and rows of ever new lengths against as many of one."""
    settings, step, own = bench.settings, bench.step, bench.settings.sizes
    middle = own.answers[0] + own.lengths // 2
    bench.load(step, bench.pairs(Shape(1, middle, middle)))
    step()
    syncs, name = common.count_syncs(settings, step), "waits of the CPU in a step"
    if syncs is None:
        yield Finding(SECTION, name, None, "", SKIPPED, "a CPU waits for no GPU")
    else:
        yield aimed(settings, SECTION, name, syncs, 5, 25, ADVICE["syncs"])
    one = seconds(settings, lambda: [step() for _ in range(own.lengths)])
    lengths = range(own.answers[0], own.answers[0] + own.lengths)
    batches = [step.trainer.data_collator(list(bench.pairs(Shape(1, length, length)))) for length in lengths]

    def each() -> None:
        for step.batch in batches:
            step()

    ratio = seconds(settings, each) / one
    name = f"{own.lengths} different lengths / one repeated"
    yield aimed(settings, SECTION, name, ratio, 1.1, 1.3, ADVICE["lengths"])
    finite = torch.isfinite(torch.stack([gradient.sum() for gradient in step.gradients().values()])).all().item()
    yield common.judged(SECTION, "gradients are finite", "yes" if finite else "no", finite, "see correctness")
