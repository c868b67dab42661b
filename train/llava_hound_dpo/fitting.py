"""What of a run is decided by what fits on the machine, checkpointing and tokens of a row; and what is said if not.

Decided by estimates (`memory`), before any weight is loaded, and the same on all processes.
"""

import logging
import math
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object

from llava.machine import host_memory
from llava.runtime import is_main_process
from train.llava_hound_dpo.arguments import ModelArguments, TrainArguments
from train.llava_hound_dpo.costs import PairShape, count
from train.llava_hound_dpo.memory import GIB, OVERHEAD, Kept, Memory, Numbers, Row, Zero, estimate_memory
from train.llava_hound_dpo.model import build_on_meta, count_parameters

logger = logging.getLogger(__name__)

MOST_TOKENS = 8192  # of a row by default: longer ones gain nothing, by the roofline of an A100
STEP = 256  # tokens that two sizes of a row differ by, when the largest that fits is looked for
OPTIMIZER_BYTES = 12  # of a trained weight in a checkpoint: fp32 copy and Adam's two moments


@dataclass(frozen=True)
class Needs:
    """What decides a run's memory, and its estimates."""

    config: Any
    numbers: Numbers
    kept: Kept
    zero: Zero
    bits: int
    shapes: Sequence[PairShape]

    @classmethod
    def of(
        cls, config, model: ModelArguments, args: TrainArguments, layers, shapes: Sequence[PairShape], policy=None
    ) -> "Needs":
        """Of the resolved flags, the probed layers and all pairs; `policy`: without weights, where it is there."""
        zero, (weights, computed) = Zero.read(args.deepspeed_file), precision(model, args)
        blocks = count(config).token / 2 if model.bits < 16 else 0
        numbers = Numbers(*count_parameters(policy or build_on_meta(config, model)), blocks, weights.itemsize)
        kept = Kept(
            bool(args.activation_checkpointing), model.lora_r if model.lora_enable else 0, tuple(layers),
            computed.itemsize, casts_adapter=model.lora_enable and not args.deepspeed_file and computed.itemsize < 4,
        )  # fmt: skip
        return cls(config, numbers, kept, zero, model.bits, shapes)

    def longest(self, pairs: int = 1) -> Row:
        """A row of so many pairs, the longest."""
        own = sorted(self.shapes, key=lambda shape: shape.tokens)[-pairs:]
        return Row(sum(shape.tokens for shape in own), sum(map(_answers, own)), sum(map(_patches, own)))

    def of_tokens(self, tokens: int) -> Row:
        """A row of so many tokens, of the pairs that take most answers and patches for theirs."""
        answers, patches = (max(own(s) / s.tokens for s in self.shapes) for own in (_answers, _patches))
        return Row(tokens, math.ceil(answers * tokens), math.ceil(patches * tokens))

    def memory(self, row: Row, world: int, checkpointing: bool | None = None) -> Memory:
        """The estimate for rows of at most this size."""
        kept = self.kept if checkpointing is None else replace(self.kept, checkpointing=checkpointing)
        return estimate_memory(self.config, self.numbers, row, kept, self.zero, world, self.bits)

    def checkpoint_bytes(self) -> float:
        """Of a checkpoint on disk: the optimiser's state, and the trained weights; of full fine-tuning all weights."""
        weights = self.numbers.trained if self.kept.rank else self.numbers.total
        return OPTIMIZER_BYTES * self.numbers.trained + self.kept.dtype_bytes * weights


def _answers(shape: PairShape) -> int:
    return shape.answers


def _patches(shape: PairShape) -> int:
    return sum(shape.patches)


def precision(model: ModelArguments, args: TrainArguments) -> tuple[torch.dtype, torch.dtype]:
    """(dtype of the weights, dtype that they compute in)."""
    # Without DeepSpeed's fp32 master copy, weights that are trained themselves must be fp32 (autocast reduces them).
    trains_base = not (model.lora_enable and model.freeze_mm_mlp_adapter) or args.fp16
    return torch.float32 if trains_base and not args.deepspeed_file else args.dtype, args.dtype


def gpu_memory(args: TrainArguments) -> int | None:
    """Bytes of the smallest GPU that any process of this job sees; None on a CPU."""
    if args.use_cpu:
        return None
    seen = [torch.cuda.get_device_properties(n).total_memory for n in range(torch.cuda.device_count())]
    return min(gather_object([min(seen)]))


def choose(args: TrainArguments, needs: Callable[[], Needs], world: int, gpu: int | None) -> dict[str, str]:
    """Set what `args` leave open, checkpointing and tokens of a row; what was chosen and why, in words for the plan.

    `gpu`: bytes of its memory; None: a CPU. Says so if even the longest pair alone is estimated not to fit.
    """
    if gpu is None:
        args.tokens_per_batch = args.tokens_per_batch or 0
        why = "on: there is no GPU here; on one its memory decides"  # as `arguments` has it
        return {"checkpointing": why} if args.chooses_checkpointing else {}
    found, said = needs(), {}
    estimate, alone = partial(found.memory, world=world), found.longest()
    if args.chooses_checkpointing:
        without = estimate(alone, checkpointing=False)
        args.activation_checkpointing = not _fits(without, gpu)
        said["checkpointing"] = (
            f"{'on' if args.activation_checkpointing else 'off'}: without it the longest pair's row, {alone.tokens:,} "
            f"tokens, is estimated to take {_gib(without.device)} and {_gib(OVERHEAD)} of overhead (assumed) of the "
            f"GPU's {_gib(gpu)} (--gradient_checkpointing auto)"
        )
    estimate = partial(estimate, checkpointing=bool(args.activation_checkpointing))
    if args.tokens_per_batch is None:
        sizes = range(MOST_TOKENS, alone.tokens, -STEP)
        fitting = (size for size in sizes if _fits(estimate(found.of_tokens(size)), gpu))
        args.tokens_per_batch = next(fitting, alone.tokens)
        said["row size"] = (
            f"at most {args.tokens_per_batch:,} tokens: what is estimated to fit, up to {MOST_TOKENS:,}, at least the "
            "longest pair (--tokens_per_batch)"
        )
    _warn_if_short(estimate(alone), alone, gpu)
    return said


def _fits(memory: Memory, gpu: int) -> bool:
    return memory.device + OVERHEAD <= gpu


def _warn_if_short(memory: Memory, row: Row, gpu: int) -> None:
    if not _fits(memory, gpu):
        _warn(
            f"the longest pair's row, {row.tokens:,} tokens, is estimated to need {_gib(memory.device + OVERHEAD)} of "
            f"the GPU's {_gib(gpu)}: should it fail, use --gradient_checkpointing True, --deepspeed "
            "scripts/zero3.json, --bits 4, a smaller --model_max_length, or more GPUs"
        )


def describe_room(args: TrainArguments, needs: Needs, memory: Memory, world: int) -> dict[str, str]:
    """Rows of the plan on the host's memory and on the disk; warns where either has too little."""
    rows, here = {}, min(world, int(os.environ.get("NPROC") or os.environ.get("LOCAL_WORLD_SIZE") or world))
    # Under ZeRO-3 every process reads all weights into the host's memory before they are shared out.
    host = max(memory.host, needs.numbers.total * needs.numbers.bytes_each if needs.zero.stage == 3 else 0)
    if host:
        allowed = host_memory()
        rows["host memory"] = f"{_gib(host)} a process, {_gib(here * host)} for {here} on this node"
        if here * host > allowed:
            _warn(
                f"ZeRO-3 needs {_gib(here * host)} of this node's memory for {here} processes, which may use "
                f"{_gib(allowed)}: ask Slurm for more with --mem, or use --deepspeed scripts/zero2.json"
            )
    if args.save_strategy != "no":
        kept, each = args.save_total_limit, needs.checkpoint_bytes()
        rows["checkpoints"] = f"{_gib(each)} each, {kept or 'all'} kept"
        there = next(own for own in Path(args.output_dir).absolute().parents if own.exists())
        room, due = shutil.disk_usage(there).free, each * ((kept or 0) + 1)  # the oldest goes last
        if due > room:
            _warn(f"{args.output_dir} has {_gib(room)} free, checkpoints take {_gib(due)}: see --save_total_limit")
    return rows


def _gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB"


def _warn(line: str) -> None:
    if is_main_process():
        logger.warning(line)
