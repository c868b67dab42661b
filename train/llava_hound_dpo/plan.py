"""What `--dry_run` prints: a run's size in tokens, parameters, steps, memory, FLOPs and hours, without any weight.

`python -m train.llava_hound_dpo.plan --pairs 27000 --images 3` plans for a data set that is not there.
"""

import argparse
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

from llava.checkpoints import open_checkpoint
from llava.runtime import ArgumentParser, setup_logging, user_errors
from train.llava_hound_dpo.arguments import LossArguments, ModelArguments, TrainArguments, refuse_missing_deepspeed
from train.llava_hound_dpo.batches import BatchPlan
from train.llava_hound_dpo.data import Pair, describe
from train.llava_hound_dpo.flops import A100_PEAK, PairShape, Recipe, epoch_work, filling_flops, hours
from train.llava_hound_dpo.memory import Memory, Zero, estimate_memory
from train.llava_hound_dpo.model import build_on_meta, count_parameters, parameter_table
from train.llava_hound_dpo.reference import ReferenceCache

logger = logging.getLogger(__name__)

TERA = 1e12
UNITS = {"GFLOP": 1e9, "TFLOP": 1e12, "PFLOP": 1e15, "EFLOP": 1e18}
CLUSTERS = (1, 2, 8, 64)  # GPUs that the plan compares
ZERO2 = Path(__file__).parents[2] / "scripts/zero2.json"
SIZES = {"7b": (4096, 11008, 32, 32), "13b": (5120, 13824, 40, 40)}  # width, feed-forward, blocks, heads


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


def recipe_of(model: ModelArguments, loss: LossArguments, args: TrainArguments, num_lora: int) -> Recipe:
    """What a run computes for every pair."""
    is_cached = bool(args.reference_cache) or not model.lora_enable
    return Recipe(
        reference="none" if loss.dpo_alpha == 0 else "cache" if is_cached else "step",
        lora_parameters=num_lora,
        is_lora=model.lora_enable,
        checkpointing=bool(args.activation_checkpointing),
        trains_projector=not model.freeze_mm_mlp_adapter,
    )


def plan(
    model_arguments: ModelArguments, loss: LossArguments, args: TrainArguments, config: LlavaConfig,
    pairs: Sequence[Pair], held_out: Sequence[Pair], dropped: Sequence[Pair],
    batches: BatchPlan, reference: ReferenceCache | None = None,
) -> str:  # fmt: skip
    """The text of the plan."""
    world, zero = world_size(), Zero.read(getattr(args, "deepspeed_file", None))
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
    model = build_on_meta(config, model_arguments).to(dtype)
    num_all, num_trained = count_parameters(model)
    num_lora = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    shapes = [shape_of(pair, loss.dpo_alpha > 0) for pair in pairs]
    batch = sorted(shapes, key=lambda shape: shape.tokens)[-args.per_device_train_batch_size :]
    tokens = args.tokens_per_batch or sum(shape.tokens for shape in batch)  # a row holds so many at most
    answers = sum(shape.answers for shape in batch)
    memory = partial(
        estimate_memory, config, num_all, num_trained, tokens, answers, dtype.itemsize, zero,
        checkpointing=bool(args.activation_checkpointing), bits=model_arguments.bits,
    )  # fmt: skip
    counts = describe(pairs)
    lengths = counts["tokens"]
    per_device, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
    steps, total, effective = batches.steps_per_epoch, batches.total_steps, batches.pairs_per_step
    recipe = recipe_of(model_arguments, loss, args, num_lora)
    job = Job(shapes, recipe, total / steps, effective, per_device, args.flop_utilization, args.gpu_hour_price)
    weight = f"{loss.attention_weight:g} x attention"
    rows = {
        "pairs": f"{len(pairs):,} to train on, {len(held_out):,} held out, {len(dropped):,} dropped as too long",
        "formats": _counts(counts["by_format"]),
        "images": f"{_counts(counts['by_images'])} (images: pairs), {_per_image(pairs)} tokens each",
        "tokens/pair": f"{lengths['min']:,} to {lengths['max']:,}, median {lengths['median']:,} (longer answer)",
        "loss": f"{loss.dpo_alpha:g} x (dpo + {weight}) + {loss.gamma:g} x (sft + {weight})",
        "batch": f"{effective} pairs = {per_device} x {accumulation} accumulated x {world} processes",
        "rows": str(batches),
        "steps": f"{steps:,} per epoch, {total:,} in all",
        "memory": f"about {memory(world)} per process at the longest batch ({tokens:,} tokens), estimated for ZeRO "
        f"{zero.stage}",
        **cost(config, job, memory),
        "output": args.output_dir,
    }
    if reference is not None:
        rows["reference"] += f"; {reference.status([*pairs, *held_out])}"
    table = ["    " + line for line in parameter_table(model).splitlines()]
    head = ["plan (no weights are loaded)", f"  {'model':<15}{model_arguments.model_name_or_path}", *table]
    return "\n".join(head + [f"  {name:<15}{text}" for name, text in rows.items()])


def _per_image(pairs: Sequence[Pair]) -> str:
    """Fewest and most image tokens of a picture, as a mean of each prompt's."""
    means = [pair.image_tokens / len(pair.record.images) for pair in pairs]
    return " to ".join(dict.fromkeys(f"{value:,.0f}" for value in (min(means), max(means))))


def cost(
    config: LlavaConfig, job: Job, memory: Callable[[int], Memory], clusters: Sequence[int] = CLUSTERS
) -> dict[str, str]:
    """Rows of the plan on tokens, FLOPs, hours, memory and, with a price, money. Formulas in `flops` and `memory`.

    `memory` is the estimate for a number of processes.
    """
    count = len(job.shapes)
    epoch = epoch_work(config, job.shapes, job.recipe)
    filling = sum(filling_flops(config, shape) for shape in job.shapes) if job.recipe.reference == "cache" else 0
    total = job.epochs * epoch.total + filling
    tokens = sum(shape.tokens for shape in job.shapes)
    parts = ", ".join(f"{name} {flops / count / TERA:.4g}" for name, flops in vars(epoch).items() if flops)
    rows = {
        "tokens": f"{tokens:,} per epoch, {tokens / count:,.0f} a pair (packed rows: prompt once, both answers)",
        "reference": _reference(job, epoch.reference, filling),
        "FLOPs": f"{epoch.total / count / TERA:.4g} TFLOP a pair ({parts}), {_flops(job.batch * epoch.total / count)} "
        f"a step, {_flops(total)} in {job.epochs:.3g} epochs",
        "assumed": f"a GPU does {job.utilization:.0%} of an A100's {A100_PEAK / TERA:.0f} TFLOP/s, recomputation "
        "counted, waiting not: --flop_utilization, not measured",
    }
    for gpus in clusters:
        taken = hours(total, gpus, job.utilization)
        money = f", {taken * gpus * job.price:,.2f} at {job.price:g} per GPU-hour" if job.price is not None else ""
        name = f"{gpus} A100{'s' if gpus > 1 else ''}"
        spent = f"{taken:,.3g} hours, {taken * gpus:,.4g} GPU-hours{money}, {memory(gpus).short()} each"
        rows[name] = f"{spent}; {_accumulation(job, gpus)}"
    return rows


def _reference(job: Job, at_every_step: float, filling: float) -> str:
    if job.recipe.reference == "none":
        return "none: without DPO there is nothing to compare with"
    if job.recipe.reference == "cache":
        return f"from a cache, filled before the first step with {_flops(filling)}"
    return f"at every step, {_flops(at_every_step)} per epoch (--reference_cache: once)"


def _accumulation(job: Job, gpus: int) -> str:
    """How the same batch is spread over so many GPUs."""
    accumulation, rest = divmod(job.batch, job.per_device * gpus)
    if not accumulation or rest:
        return f"a batch of {job.batch} pairs has no equal shares there"
    return f"--gradient_accumulation_steps {accumulation} keeps the batch"


def _flops(number: float) -> str:
    """In a unit that leaves at most three digits before the point."""
    unit, size = next(((unit, size) for unit, size in UNITS.items() if number < 1e3 * size), ("EFLOP", 1e18))
    return f"{number / size:.4g} {unit}"


def _counts(counts: dict) -> str:
    return ", ".join(f"{name}: {count:,}" for name, count in counts.items())


def main(argv: Sequence[str] | None = None) -> None:
    """Print what a data set of given size would cost."""
    setup_logging()
    with user_errors():
        args = parse_args(argv)
        config = _config(args.model)
        rows = cost(config, *_job(args, config), args.gpus)
    text = "\n".join(f"  {name:<15}{row}" for name, row in rows.items())
    trained = f"LoRA of rank {args.lora_r}" if args.lora_r else "full fine-tuning"
    logger.info("plan of %s pairs on a LLaVA-1.5 %s, %s\n%s", f"{args.pairs:,}", args.model, trained, text)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--model", default="7b", help=f"{' or '.join(SIZES)}, or a checkpoint whose config is read")
    add("--pairs", type=int, required=True, help="preference pairs of an epoch")
    add("--images", default="1", help="pictures of a prompt; or several numbers with weights, as 1:2,3:1")
    add("--prompt_tokens", type=int, default=60, help="tokens of a prompt beside its pictures")
    add("--answer_tokens", type=int, default=75, help="tokens of each answer")
    add("--epochs", type=float, default=3, help="passes over the pairs")
    add("--lora_r", type=int, default=128, help="rank of LoRA; 0 trains the whole language model")
    add("--reference", choices=("step", "cache", "none"), help="default: step with LoRA, else cache; none is SFT")
    add("--no_checkpointing", action="store_true", help="keep all activations instead of computing them again")
    add("--batch", type=int, default=64, help="pairs of an optimiser step")
    add("--deepspeed", default=str(ZERO2), help="DeepSpeed config that the memory is estimated for; '' is none")
    add("--gpus", type=int, nargs="+", default=list(CLUSTERS), help="A100s to compare")
    add("--flop_utilization", type=float, default=0.4, help="share of the peak that a GPU does, an assumption")
    add("--gpu_hour_price", type=float, help="price of a GPU-hour")
    args = parser.parse_args(argv)
    if min(args.pairs, args.epochs, args.batch, *args.gpus) <= 0 or not 0 < args.flop_utilization <= 1:
        parser.error("--pairs, --epochs, --batch and --gpus must be above 0, --flop_utilization above 0 and at most 1")
    return args


def _config(model: str) -> LlavaConfig:
    """LLaVA-1.5's shape by its size, or of a checkpoint."""
    if model not in SIZES:
        return open_checkpoint(model).config
    width, feed_forward, blocks, heads = SIZES[model]
    text = LlamaConfig(vocab_size=32064, hidden_size=width, intermediate_size=feed_forward, num_hidden_layers=blocks,
                       num_attention_heads=heads)  # fmt: skip
    vision = CLIPVisionConfig(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
                              image_size=336, patch_size=14)  # fmt: skip
    return LlavaConfig(vision_config=vision, text_config=text, image_token_index=32000, vision_feature_layer=-2)


def _job(args: argparse.Namespace, config: LlavaConfig) -> tuple[Job, Callable[[int], Memory]]:
    """The job in bf16, one pair a row, and its memory by number of GPUs."""
    reference = args.reference or ("step" if args.lora_r else "cache")
    if reference == "step" and not args.lora_r:
        raise ValueError("--reference step needs LoRA: full fine-tuning changes the only copy of the weights")
    if args.deepspeed:
        refuse_missing_deepspeed(args.deepspeed)
    tokens = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
    rejected = 0 if reference == "none" else args.answer_tokens
    shapes = [PairShape(args.prompt_tokens - 1 + tokens * n, args.answer_tokens, rejected, n)
              for n in _spread(args.images, args.pairs)]  # fmt: skip
    is_lora = args.lora_r > 0
    model = build_on_meta(config, ModelArguments(args.model, lora_enable=is_lora, lora_r=args.lora_r))
    num_all, num_trained = count_parameters(model)
    recipe = Recipe(reference, num_trained if is_lora else 0, is_lora, not args.no_checkpointing)
    longest = max(shapes, key=lambda shape: shape.tokens)
    memory = partial(
        estimate_memory, config, num_all, num_trained, longest.tokens, longest.answers, torch.bfloat16.itemsize,
        Zero.read(args.deepspeed), checkpointing=recipe.checkpointing,
    )  # fmt: skip
    return Job(shapes, recipe, args.epochs, args.batch, 1, args.flop_utilization, args.gpu_hour_price), memory


def _spread(images: str, pairs: int) -> list[int]:
    """Pictures of every pair, in the shares of the weights. Raises ValueError."""
    try:
        words = [word.split(":") if ":" in word else (word, "1") for word in images.split(",")]
        weights = {int(number): float(weight) for number, weight in words}
    except ValueError:
        weights = {}
    if not weights or min(weights) < 1 or min(weights.values()) < 0 or not sum(weights.values()):
        raise ValueError(f"--images {images}: write a number, or numbers with weights as 1:2,3:1")
    total, wanted, spread = sum(weights.values()), 0.0, []
    for number, weight in weights.items():
        wanted += weight / total * pairs
        spread += [number] * (round(wanted) - len(spread))
    return spread


if __name__ == "__main__":
    main()
