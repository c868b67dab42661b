"""What `--dry_run` prints: a run's size in tokens, parameters, steps, memory, FLOPs and hours, without any weight."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from transformers import PretrainedConfig

from llava.families import find_family
from train.llava_hound_dpo.arguments import LossArguments, ModelArguments, TrainArguments
from train.llava_hound_dpo.batches import BatchPlan
from train.llava_hound_dpo.data import Pair, describe
from train.llava_hound_dpo.flops import A100_PEAK, ForwardFlops, PairShape, Recipe, count, filling_flops, hours, work
from train.llava_hound_dpo.memory import Memory, Zero, estimate_memory
from train.llava_hound_dpo.model import build_on_meta, count_parameters, parameter_table
from train.llava_hound_dpo.reference import ReferenceCache

TERA = 1e12
UNITS = {"GFLOP": 1e9, "TFLOP": 1e12, "PFLOP": 1e15, "EFLOP": 1e18}
CLUSTERS = (1, 2, 8, 64)  # GPUs that the plan compares


@dataclass(frozen=True)
class Job:
    """What decides the hours: the pairs of an epoch and what is done with them."""

    shapes: Sequence[PairShape]
    recipe: Recipe
    epochs: float
    batch: int  # pairs of an optimiser step, over all processes
    per_device: int
    utilization: float
    price: float | None = None


def world_size() -> int:
    """Processes of the planned run: from the launcher's variables, else the GPUs here, else 1."""
    if "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    per_node = os.environ.get("NPROC") or str(max(1, torch.cuda.device_count()))
    return int(per_node) * int(os.environ.get("SLURM_NNODES", "1"))


def shape_of(pair: Pair, with_rejected: bool) -> PairShape:
    """A pair's packed row: prompt once, and both answers."""
    rejected = len(pair.rejected) if with_rejected else 0
    return PairShape(pair.prompt_tokens - 1, len(pair.chosen), rejected, len(pair.record.images))


def recipe_of(model: ModelArguments, loss: LossArguments, args: TrainArguments, num_lora: int, probed: int) -> Recipe:
    """What a run computes for every pair."""
    is_cached = bool(args.reference_cache) or not model.lora_enable
    return Recipe(
        reference="none" if loss.dpo_alpha == 0 else "cache" if is_cached else "step",
        lora_parameters=num_lora,
        is_lora=model.lora_enable,
        checkpointing=bool(args.activation_checkpointing),
        trains_projector=not model.freeze_mm_mlp_adapter,
        probed_layers=probed,
    )


def plan(
    model: ModelArguments, loss: LossArguments, args: TrainArguments, config: PretrainedConfig, probed_layers: int,
    pairs: Sequence[Pair], held_out: Sequence[Pair], dropped: Sequence[Pair],
    batches: BatchPlan, reference: ReferenceCache | None = None,
) -> str:  # fmt: skip
    """The text of the plan."""
    world, zero = world_size(), Zero.read(getattr(args, "deepspeed_file", None))
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
    policy, costs = build_on_meta(config, model).to(dtype), count(config)
    shapes = [shape_of(pair, loss.dpo_alpha > 0) for pair in pairs]
    per_device, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
    longest = sorted(shapes, key=lambda shape: shape.tokens)[-per_device:]
    tokens = args.tokens_per_batch or sum(shape.tokens for shape in longest)  # a row holds so many at most
    memory = partial(
        estimate_memory, config, *count_parameters(policy), costs.token / 2, tokens,
        sum(shape.answers for shape in longest), dtype.itemsize, zero,
        checkpointing=bool(args.activation_checkpointing), bits=model.bits,
    )  # fmt: skip
    num_lora = sum(p.numel() for name, p in policy.named_parameters() if "lora_" in name)
    steps, total = batches.steps_per_epoch, batches.total_steps
    job = Job(
        shapes, recipe_of(model, loss, args, num_lora, probed_layers), total / steps, batches.pairs_per_step,
        per_device, args.flop_utilization, args.gpu_hour_price,
    )  # fmt: skip
    counts, weight = describe(pairs), f"{loss.attention_weight:g} x attention"
    lengths = counts["tokens"]
    rows = {
        "trained": model.trained,
        "pairs": f"{len(pairs):,} to train on, {len(held_out):,} held out, {len(dropped):,} dropped as too long",
        "formats": _counts(counts["by_format"]),
        "images": f"{_counts(counts['by_images'])} (images: pairs), {_per_image(pairs)} tokens each",
        "tokens/pair": f"{lengths['min']:,} to {lengths['max']:,}, median {lengths['median']:,} (longer answer)",
        "loss": f"{loss.dpo_alpha:g} x (dpo + {weight}) + {loss.gamma:g} x (sft + {weight})",
        "batch": f"{batches.step_sizes} = {per_device} x {accumulation} accumulated x {world} processes",
        "rows": str(batches),
        "steps": f"{steps:,} per epoch, {total:,} in all",
        "memory": f"about {memory(world)} per process at the longest batch ({tokens:,} tokens), estimated for ZeRO "
        f"{zero.stage}",
        **cost(costs, job, memory),
        "output": args.output_dir,
    }
    if reference is not None:
        rows["reference"] += f"; {reference.status([*pairs, *held_out])}"
    table = ["    " + line for line in parameter_table(policy, find_family(config.model_type)).splitlines()]
    head = ["plan (no weights are loaded)", f"  {'model':<15}{model.model_name_or_path}", *table]
    return "\n".join(head + [f"  {name:<15}{text}" for name, text in rows.items()])


def _per_image(pairs: Sequence[Pair]) -> str:
    """Fewest and most image tokens of a picture, as a mean of each prompt's."""
    means = [pair.image_tokens / len(pair.record.images) for pair in pairs]
    return " to ".join(dict.fromkeys(f"{value:,.0f}" for value in (min(means), max(means))))


def cost(costs: ForwardFlops, job: Job, memory: Callable[[int], Memory]) -> dict[str, str]:
    """Rows of the plan on tokens, FLOPs, hours, memory and, with a price, money. Formulas in `flops` and `memory`.

    `memory` is the estimate for a number of processes.
    """
    num_pairs, epoch = len(job.shapes), work(costs, job.shapes, job.recipe)
    filling = filling_flops(costs, job.shapes) if job.recipe.reference == "cache" else 0
    total = job.epochs * epoch.total + filling
    tokens = sum(shape.tokens for shape in job.shapes)
    parts = ", ".join(f"{name} {flops / num_pairs / TERA:.4g}" for name, flops in vars(epoch).items() if flops)
    rows = {
        "tokens": f"{tokens:,} per epoch, {tokens / num_pairs:,.0f} a pair (packed rows: prompt once, both answers)",
        "reference": {
            "none": "none: without DPO there is nothing to compare with",
            "cache": f"from a cache, filled before the first step with {_flops(filling)}",
            "step": f"at every step, {_flops(epoch.reference)} per epoch (--reference_cache: once)",
        }[job.recipe.reference],
        "FLOPs": f"{epoch.total / num_pairs / TERA:.4g} TFLOP a pair ({parts}), "
        f"{_flops(job.batch * epoch.total / num_pairs)} a step of {job.batch} pairs, {_flops(total)} in "
        f"{job.epochs:.3g} epochs",
        "assumed": f"a GPU does {job.utilization:.0%} of an A100's {A100_PEAK / TERA:.0f} TFLOP/s, recomputation "
        "counted, waiting not: --flop_utilization, not measured",
    }
    for gpus in CLUSTERS:
        taken = hours(total, gpus, job.utilization)
        money = f", {taken * gpus * job.price:,.2f} at {job.price:g} per GPU-hour" if job.price is not None else ""
        spent = f"{_hours(taken, 3)} hours, {_hours(taken * gpus, 4)} GPU-hours{money}, {memory(gpus).short()} each"
        rows[f"{gpus} A100{'s' if gpus > 1 else ''}"] = f"{spent}; {_accumulation(job, gpus)}"
    return rows


def _accumulation(job: Job, gpus: int) -> str:
    """How the same batch is spread over so many GPUs."""
    accumulation, rest = divmod(job.batch, job.per_device * gpus)
    if not accumulation or rest:
        return f"a batch of {job.batch} pairs has no equal shares there"
    return f"--gradient_accumulation_steps {accumulation} keeps the batch"


def _hours(number: float, digits: int) -> str:
    return f"{number:,.{digits}g}" if number >= 1e-3 else "under 0.001"


def _flops(number: float) -> str:
    """In a unit that leaves at most three digits before the point."""
    unit, size = next(((unit, size) for unit, size in UNITS.items() if number < 1e3 * size), ("EFLOP", 1e18))
    return f"{number / size:.4g} {unit}"


def _counts(counts: dict) -> str:
    return ", ".join(f"{name}: {count:,}" for name, count in counts.items())
