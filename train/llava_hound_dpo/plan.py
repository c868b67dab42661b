"""What `--dry_run` prints: the run's size in tokens, parameters, steps and memory, without loading a weight."""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import LlavaConfig

from train.llava_hound_dpo.arguments import LossArguments, ModelArguments, TrainArguments
from train.llava_hound_dpo.data import Pair, describe
from train.llava_hound_dpo.model import build_on_meta, count_parameters, parameter_table

GIB = 1024**3


@dataclass(frozen=True)
class Memory:
    """Estimated bytes per process at the longest batch. Formulas in `estimate_memory`."""

    weights: float
    gradients_and_optimizer: float
    activations: float
    logits: float

    def __str__(self) -> str:
        parts = {name.replace("_", " "): size / GIB for name, size in vars(self).items()}
        listed = ", ".join(f"{name} {size:.2f}" for name, size in parts.items())
        return f"{sum(parts.values()):.2f} GiB ({listed})"


def world_size() -> int:
    """Processes of the planned run: from the launcher's variables, else the GPUs here, else 1."""
    if "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    per_node = os.environ.get("NPROC") or str(max(1, torch.cuda.device_count()))
    return int(per_node) * int(os.environ.get("SLURM_NNODES", "1"))


def zero_stage(deepspeed_file: str | None) -> int:
    """ZeRO stage of a DeepSpeed config, 0 without one."""
    if not deepspeed_file:
        return 0
    return json.loads(Path(deepspeed_file).read_text(encoding="utf-8")).get("zero_optimization", {}).get("stage", 0)


def packed_tokens(pair: Pair, tokens_per_image: int, with_rejected: bool) -> int:
    """Tokens of a pair's packed row: prompt once, and both answers."""
    prompt = len(pair.prompt) - 1 + (tokens_per_image - 1) * len(pair.record.images)
    return prompt + len(pair.chosen) + (len(pair.rejected) if with_rejected else 0)


def steps_per_epoch(num_pairs: int, per_device: int, accumulation: int, world: int) -> int:
    """Optimiser steps of one epoch, as the Trainer counts them."""
    micro_batches = math.ceil(math.ceil(num_pairs / per_device) / world)
    return max(1, math.ceil(micro_batches / accumulation))


def estimate_memory(
    config: LlavaConfig, num_all: int, num_trained: int, tokens: int, answers: int, dtype_bytes: int, stage: int,
    world: int, checkpointing: bool,
) -> Memory:  # fmt: skip
    """Bytes per process; an estimate from shapes, to compare settings by, not a measurement.

    weights: all parameters, shared out under ZeRO-3. Gradients in the training dtype, Adam's two moments and (below
    fp32) a master copy in fp32 for trained ones, shared out from ZeRO-2 on. Activations per token: the inputs of every
    block when checkpointing plus one block in full, else every block in full; a block keeps about 12 hidden and 3
    feed-forward vectors. Logits at answer rows only, in the training dtype and twice in fp32.
    """
    text = config.text_config
    moments = 8 + (4 if dtype_bytes < 4 else 0)
    shared = world if stage >= 2 else 1
    block = 12 * text.hidden_size + 3 * text.intermediate_size
    layers = text.num_hidden_layers
    kept = layers * text.hidden_size + block if checkpointing else layers * block
    return Memory(
        weights=num_all * dtype_bytes / (world if stage == 3 else 1),
        gradients_and_optimizer=num_trained * (dtype_bytes + moments) / shared,
        activations=tokens * kept * dtype_bytes,
        logits=answers * text.vocab_size * (dtype_bytes + 8),
    )


def plan(
    model_arguments: ModelArguments, loss: LossArguments, args: TrainArguments, config: LlavaConfig,
    pairs: Sequence[Pair], held_out: Sequence[Pair], dropped: Sequence[Pair], tokens_per_image: int,
) -> str:  # fmt: skip
    """The text of the plan."""
    world, stage = world_size(), zero_stage(getattr(args, "deepspeed_file", None))
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
    model = build_on_meta(config, model_arguments).to(dtype)
    num_all, num_trained = count_parameters(model)
    with_rejected = loss.dpo_alpha > 0
    longest = sorted(pairs, key=lambda pair: packed_tokens(pair, tokens_per_image, with_rejected))
    batch = longest[-args.per_device_train_batch_size :]
    tokens = sum(packed_tokens(pair, tokens_per_image, with_rejected) for pair in batch)
    answers = sum(len(pair.chosen) + (len(pair.rejected) if with_rejected else 0) for pair in batch)
    memory = estimate_memory(
        config, num_all, num_trained, tokens, answers, dtype.itemsize, stage, world,
        bool(args.activation_checkpointing),
    )  # fmt: skip
    counts = describe(pairs)
    lengths = counts["tokens"]
    per_device, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
    steps = steps_per_epoch(len(pairs), per_device, accumulation, world)
    total = args.max_steps if args.max_steps > 0 else math.ceil(steps * args.num_train_epochs)
    effective = per_device * accumulation * world
    weight = f"{loss.attention_weight:g} x attention"
    rows = {
        "pairs": f"{len(pairs):,} to train on, {len(held_out):,} held out, {len(dropped):,} dropped as too long",
        "formats": _counts(counts["by_format"]),
        "images": f"{_counts(counts['by_images'])} (images: pairs), {tokens_per_image} tokens each",
        "tokens/pair": f"{lengths['min']:,} to {lengths['max']:,}, median {lengths['median']:,} (longer answer)",
        "loss": f"{loss.dpo_alpha:g} x (dpo + {weight}) + {loss.gamma:g} x (sft + {weight})",
        "batch": f"{effective} pairs = {per_device} x {accumulation} accumulated x {world} processes",
        "steps": f"{steps:,} per epoch, {total:,} in all",
        "memory": f"about {memory} per process at the longest batch ({tokens:,} tokens), estimated for ZeRO {stage}",
        "output": args.output_dir,
    }
    table = ["    " + line for line in parameter_table(model).splitlines()]
    head = ["plan (no weights are loaded)", f"  {'model':<15}{model_arguments.model_name_or_path}", *table]
    return "\n".join(head + [f"  {name:<15}{text}" for name, text in rows.items()])


def _counts(counts: dict) -> str:
    return ", ".join(f"{name}: {count:,}" for name, count in counts.items())
