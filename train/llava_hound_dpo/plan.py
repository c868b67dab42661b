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

    @property
    def total(self) -> float:
        """Their sum."""
        return self.weights + self.gradients_and_optimizer + self.activations + self.logits


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
    model = build_on_meta(config, model_arguments)
    num_all, num_trained = count_parameters(model)
    with_rejected = loss.dpo_alpha > 0
    longest = sorted(pairs, key=lambda pair: packed_tokens(pair, tokens_per_image, with_rejected))
    batch = longest[-args.per_device_train_batch_size :]
    tokens = sum(packed_tokens(pair, tokens_per_image, with_rejected) for pair in batch)
    answers = sum(len(pair.chosen) + (len(pair.rejected) if with_rejected else 0) for pair in batch)
    memory = estimate_memory(
        config, num_all, num_trained, tokens, answers, 2 if args.bf16 or args.fp16 else 4, stage, world,
        bool(args.activation_checkpointing),
    )  # fmt: skip
    counts = describe(pairs)
    steps = steps_per_epoch(len(pairs), args.per_device_train_batch_size, args.gradient_accumulation_steps, world)
    total = args.max_steps if args.max_steps > 0 else math.ceil(steps * args.num_train_epochs)
    effective = args.per_device_train_batch_size * args.gradient_accumulation_steps * world
    return "\n".join(
        [
            "plan (nothing is loaded)",
            f"  model          {model_arguments.model_name_or_path}",
            *("    " + line for line in parameter_table(model).splitlines()),
            f"  pairs          {len(pairs):,} to train on, {len(held_out):,} held out, {len(dropped):,} dropped as too long",
            f"  formats        {_counts(counts['by_format'])}",
            f"  images         {_counts(counts['by_images'])} (images: pairs), {tokens_per_image} tokens each",
            f"  tokens/pair    {counts['tokens']['min']:,} to {counts['tokens']['max']:,}, median {counts['tokens']['median']:,}"
            " (prompt and longer answer)",
            f"  loss           {loss.dpo_alpha:g} x (dpo + {loss.attention_weight:g} x attention) + {loss.gamma:g} x "
            f"(sft + {loss.attention_weight:g} x attention)",
            f"  batch          {effective} pairs = {args.per_device_train_batch_size} x {args.gradient_accumulation_steps} "
            f"accumulated x {world} processes",
            f"  steps          {steps:,} per epoch, {total:,} in all",
            f"  memory         about {memory.total / GIB:.1f} GiB per process at the longest batch ({tokens:,} tokens): weights "
            f"{memory.weights / GIB:.1f}, gradients and optimiser {memory.gradients_and_optimizer / GIB:.1f}, activations "
            f"{memory.activations / GIB:.1f}, logits {memory.logits / GIB:.1f} (estimated, ZeRO stage {stage})",
            f"  output         {args.output_dir}",
        ]
    )


def _counts(counts: dict) -> str:
    return ", ".join(f"{name}: {count:,}" for name, count in counts.items())
