"""What `--dry_run` prints: a run's size in tokens, parameters, steps, memory, FLOPs and hours, without any weight."""

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from llava.checkpoints import Checkpoint
from llava.heads import Heads
from llava.image import ImageStore
from llava.order import why_fixed
from train.llava_hound_dpo.arguments import LossArguments, ModelArguments, TrainArguments
from train.llava_hound_dpo.batches import BatchPlan, num_steps
from train.llava_hound_dpo.costs import (
    A100_PEAK,
    ForwardFlops,
    PairShape,
    Recipe,
    count,
    filling_flops,
    hours,
    work,
)  # fmt: skip
from train.llava_hound_dpo.data import Pair, PairDataset, describe
from train.llava_hound_dpo.fitting import Needs, describe_room
from train.llava_hound_dpo.memory import GIB, OVERHEAD, Memory
from train.llava_hound_dpo.model import build_on_meta, parameter_table
from train.llava_hound_dpo.reference import ReferenceCache

TERA = 1e12
UNITS = {"GFLOP": 1e9, "TFLOP": 1e12, "PFLOP": 1e15, "EFLOP": 1e18}
CLUSTERS = (1, 2, 8, 64)  # GPUs that the plan compares


@dataclass(frozen=True)
class Inputs:
    """Everything a run reads before its weights, checked."""

    checkpoint: Checkpoint
    store: ImageStore
    layers: frozenset[int]
    heads: Heads | None  # of these layers; None: all
    train: list[Pair]
    evaluation: list[Pair]
    dropped: list[str]  # a line each
    leave_out: frozenset[str]  # names of records that were not looked at
    batches: BatchPlan  # of the training pairs
    reference: ReferenceCache | None = None  # None: computed at every step, or not needed
    chosen: Mapping[str, str] = field(default_factory=dict)  # rows of the plan, of `fitting.choose`
    longest: Sequence[Pair] = ()  # the training pairs, each in the longest of its epochs' orders; (): all have one

    def dataset(self, pairs: Sequence[Pair]) -> PairDataset:
        """The pairs with their pictures."""
        order_seed = self.batches.seed if self.longest else None
        return PairDataset(pairs, self.store, self.checkpoint.family, order_seed)


def world_size() -> int:
    """Processes of the planned run: from the launcher's variables, else the GPUs here, else 1."""
    if "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0  # with an old driver it counts those, too
    per_node = os.environ.get("NPROC") or str(max(1, gpus))
    return int(per_node) * int(os.environ.get("SLURM_NNODES", "1"))


def shape_of(pair: Pair, with_rejected: bool) -> PairShape:
    """A pair's packed row: prompt once, and its answers."""
    rejected = tuple(map(len, pair.rejected)) if with_rejected else ()
    return PairShape(pair.prompt_tokens - 1, len(pair.chosen), rejected, pair.image_tokens, pair.patches)


def row_tokens(pair: Pair, with_rejected: bool) -> int:
    """Tokens of a pair's row: prompt, images and answers."""
    return shape_of(pair, with_rejected).tokens


def plan(model: ModelArguments, loss: LossArguments, args: TrainArguments, inputs: Inputs) -> str:
    """The text of the plan."""
    config, batches = inputs.checkpoint.config, inputs.batches
    policy, costs = build_on_meta(config, model).to(args.dtype), count(config)
    settings = loss.settings()
    shapes = [shape_of(pair, settings.needs_rejected) for pair in inputs.longest or inputs.train]
    needs, most = Needs.of(config, model, args, inputs.layers, shapes, policy), args.tokens_per_batch
    row = needs.of_tokens(most) if most else needs.longest(args.per_device_train_batch_size)
    memory, own = partial(needs.memory, row), needs.memory(row, batches.world_size)
    recipe = Recipe(
        reference="none" if not settings.needs_reference else "cache" if inputs.reference else "step",
        lora_parameters=sum(p.numel() for name, p in policy.named_parameters() if "lora_" in name),
        is_lora=model.lora_enable,
        checkpointing=bool(args.activation_checkpointing),
        trains_projector=not model.freeze_mm_mlp_adapter,
        probed_layers=len(inputs.layers),
    )
    rows = {
        **describe_training(model, loss, args, inputs),
        **inputs.chosen,
        "memory": f"about {own} per process at the longest batch ({row.tokens:,} tokens), estimated for ZeRO "
        f"{needs.zero.stage}; a GPU has {OVERHEAD / GIB:.0f} GiB of overhead beside it (assumed)",
        **describe_room(args, needs, own, batches.world_size),
        **cost(
            costs, shapes, recipe, memory, epochs=batches.total_steps / batches.steps_per_epoch,
            batch=batches.pairs_per_step, per_device=args.per_device_train_batch_size,
            utilization=args.flop_utilization,
        ),
        "output": args.output_dir,
    }  # fmt: skip
    if settings.needs_reference:
        rows["reference"] = f"the {model.reference}{' as it is now' * model.moves_reference}, {rows['reference']}"
    if inputs.reference is not None:
        rows["reference"] += f"; {inputs.reference.status([*inputs.train, *inputs.evaluation])}"
        if not (model.moves_reference or args.reference_cache):
            rows["reference"] += "; by default under ZeRO-3, which fetches nothing ahead where two models alternate"
    table = ["    " + line for line in parameter_table(policy, type(inputs.checkpoint.family)).splitlines()]
    head = ["plan (no weights are loaded)", f"  {'model':<15}{model.model_name_or_path}", *table]
    return "\n".join(head + [f"  {name:<15}{text}" for name, text in rows.items()])


def describe_training(
    model: ModelArguments, loss: LossArguments, args: TrainArguments, inputs: Inputs
) -> dict[str, str]:
    """Rows of the plan, and of the trained weights' card: what is trained on which pairs, in which steps."""
    counts, batches, weight = describe(inputs.train), inputs.batches, f"{loss.attention_weight:g} x attention"
    lengths, split = counts["tokens"], (len(inputs.train), len(inputs.evaluation), len(inputs.dropped))
    return {
        "trained": model.trained,
        "pairs": "{:,} to train on, {:,} held out, {:,} dropped".format(*split)
        + (f", {len(inputs.leave_out):,} named by --leave_out" if inputs.leave_out else "")
        + (f"; {counts['several_rejected']:,} with several rejected answers" if counts["several_rejected"] else ""),
        "formats": f"{_counts(counts['by_format'])} ({counts['derived_formats']:,} derived from prompts)",
        "images": f"{_counts(counts['by_images'])} (images: pairs), {_per_image(inputs.train)} tokens each",
        **({"order": _orders(inputs.train)} if inputs.longest else {}),
        "tokens/pair": f"{lengths['min']:,} to {lengths['max']:,}, median {lengths['median']:,} (longer answer)",
        "loss": f"{loss.dpo_alpha:g} x ({_dpo(loss)} + {weight}) + {loss.gamma:g} x (sft + {weight})",
        "batch": f"{batches.step_sizes} = {args.per_device_train_batch_size} x {args.gradient_accumulation_steps} "
        f"accumulated x {batches.world_size} processes",
        "rows": str(batches),
        "steps": f"{batches.steps_per_epoch:,} per epoch, {batches.total_steps:,} in all",
        "rate": f"{args.learning_rate:g}, {args.lr_scheduler_type.value}, warm-up {args.warmup_steps:g}",
    }


def _orders(pairs: Sequence[Pair]) -> str:
    """How many pairs are shown in other orders, and why the others are not."""
    reasons = Counter(why_fixed(pair.record) or "another each epoch" for pair in pairs)
    return f"pictures of a pair by seed, id and epoch ({_counts(reasons)})"


def _dpo(loss: LossArguments) -> str:
    """DPO and what it does with the end of answers, in words."""
    added = f"dpo + {loss.answer_end_weight:g} x end"
    return {"kept": "dpo", "left_out": "dpo without the end token", "likelihood": added}[loss.answer_end]


def _per_image(pairs: Sequence[Pair]) -> str:
    """Fewest and most image tokens of a picture, as a mean of each prompt's."""
    means = [pair.image_tokens / len(pair.record.images) for pair in pairs]
    return " to ".join(dict.fromkeys(f"{value:,.0f}" for value in (min(means), max(means))))


def cost(
    costs: ForwardFlops, shapes: Sequence[PairShape], recipe: Recipe, memory: Callable[[int], Memory],
    epochs: float, batch: int, per_device: int, utilization: float,
) -> dict[str, str]:  # fmt: skip
    """Rows of the plan on tokens, FLOPs, hours and memory. Formulas in `costs`.

    `shapes` are the pairs of an epoch, `memory` is the estimate for a number of processes, and `batch` are the pairs
    of an optimiser step over all of them.
    """
    epoch, tokens = work(costs, shapes, recipe), sum(shape.tokens for shape in shapes)
    steps = num_steps(len(shapes), batch)  # of which the last need not be full
    filling = filling_flops(costs, shapes) if recipe.reference == "cache" else 0
    total, a_pair = epochs * epoch.total + filling, epoch.total / len(shapes)
    parts = ", ".join(f"{name} {flops / len(shapes) / TERA:.4g}" for name, flops in vars(epoch).items() if flops)
    rows = {
        "tokens": f"{tokens:,} per epoch, {tokens / len(shapes):,.0f} a pair (packed rows: prompt once, its answers)",
        "reference": {
            "none": "none: without DPO there is nothing to compare with",
            "cache": f"from a cache, filled before the first step with {_flops(filling)}",
            "step": f"at every step, {_flops(epoch.reference)} per epoch (--reference_cache: once)",
        }[recipe.reference],
        "FLOPs": f"{a_pair / TERA:.4g} TFLOP a pair ({parts}), {_flops(epoch.total / steps)} a step of "
        f"{len(shapes) / steps:.4g} pairs, {_flops(total)} in {epochs:.3g} epochs",
        "assumed": f"a GPU does {utilization:.0%} of an A100's {A100_PEAK / TERA:.0f} TFLOP/s, recomputation "
        "counted, waiting not: --flop_utilization, not measured",
    }
    for gpus in CLUSTERS:
        taken = hours(total, gpus, utilization)
        spent = f"{_hours(taken, 3)} hours, {_hours(taken * gpus, 4)} GPU-hours, {memory(gpus).short()} each"
        accumulation, rest = divmod(batch, per_device * gpus)
        share = f"--gradient_accumulation_steps {accumulation} keeps the batch"
        if rest:
            share = f"a batch of {batch} pairs has no equal shares there"
        rows[f"{gpus} A100{'s' if gpus > 1 else ''}"] = f"{spent}; {share}"
    return rows


def _hours(number: float, digits: int) -> str:
    return f"{number:,.{digits}g}" if number >= 1e-3 else "under 0.001"


def _flops(number: float) -> str:
    """In a unit that leaves at most three digits before the point."""
    unit, size = next(((unit, size) for unit, size in UNITS.items() if number < 1e3 * size), ("EFLOP", 1e18))
    return f"{number / size:.4g} {unit}"


def _counts(counts: dict) -> str:
    return ", ".join(f"{name}: {count:,}" for name, count in counts.items())
