"""Train a model with attention-aware DPO and SFT: `torchrun -m train.llava_hound_dpo.run_dpo --help`."""

import dataclasses
import hashlib
import logging
import math
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers import Trainer, get_scheduler, set_seed

from llava import runtime
from llava.checkpoints import PEFT_ADAPTER, Checkpoint, adapter_settings, open_checkpoint
from llava.heads import Heads, select_heads
from llava.image import ImageStore
from llava.machine import announce
from llava.run_folder import only_writer
from llava.weights import first_line, local_folder
from train.llava_hound_dpo.arguments import DataArguments, LossArguments, ModelArguments, TrainArguments, parse
from train.llava_hound_dpo.batches import BatchPlan, flags_for, make_plan, num_steps
from train.llava_hound_dpo.checkpoints import (
    check_optim,
    is_finished,
    latest_checkpoint,
    mark_complete,
    whole_or_nothing,
)  # fmt: skip
from train.llava_hound_dpo.data import Pair, PairReader, describe, in_epoch, longest_orders, read_leave_out, split
from train.llava_hound_dpo.fitting import Needs, choose, gpu_memory, precision
from train.llava_hound_dpo.memory import Zero
from train.llava_hound_dpo.model import (
    fuse,
    make_trainable,
    parameter_table,
    quantisation,
    refuse_fused,
    refuse_quantised,
)
from train.llava_hound_dpo.outcome import check_place, draw_curves, licence_of
from train.llava_hound_dpo.plan import Inputs, describe_training, plan, row_tokens, shape_of, world_size
from train.llava_hound_dpo.reference import ReferenceCache, describe_reference
from train.llava_hound_dpo.stopping import one_line_errors
from train.llava_hound_dpo.tracking import check_trackers, prepare_wandb
from train.llava_hound_dpo.trainer import AttentionAwareDPOTrainer

logger = logging.getLogger(__name__)

_held = ExitStack()  # the lock of this run

SCHEDULE = (
    "learning_rate", "lr_scheduler_type", "warmup_steps", "num_train_epochs", "max_steps", "seed", "data_seed", "bf16",
)  # fmt: skip
BEFORE = {"answer_end": "kept", "attention_rows": "all", "attention_gate": "none"}  # what older checkpoints did

MOST_STEPS = 1_000_000  # all of them are planned before the first


def main() -> int:
    """Check, plan, train, save; the exit code is `stopping.STOPPED` if it was asked to stop before the end.

    Bad input ends it with one line and exit code 2 before any weight is loaded.
    """
    runtime.setup_logging()
    runtime.without_compiler()
    with one_line_errors():
        return run()


def run() -> int:
    """As `main`."""
    with runtime.user_errors():
        model_args, data_args, loss_args, args = parse()
        refuse_quantised(model_args, Zero.read(args.deepspeed_file).stage)
        check_trackers(args.report_to)
        check_schedule(args)
        claim(model_args, data_args, args)
        inputs = read_inputs(model_args, data_args, loss_args, args)
        identity = describe_run(model_args, data_args, loss_args, args, inputs)
        if args.deepspeed_file:
            check_optim(args.optim)
        size = {"pairs_per_row": args.per_device_train_batch_size, "world_size": inputs.batches.world_size}
        checkpoint = latest_checkpoint(args.output_dir, identity, partial(flags_for, **size))
        if checkpoint and inputs.reference and model_args.moves_reference:
            inputs.reference.require([*inputs.train, *inputs.evaluation])
        if is_finished(args.output_dir, identity) and not args.dry_run:
            logger.info("%s: finished: nothing to do", args.output_dir)
            return 0
    if checkpoint:
        logger.info("continuing from %s", checkpoint)
    if args.dry_run:
        logger.info(plan(model_args, loss_args, args, inputs))
        return 0
    prepare_wandb(args.report_to, Path(args.output_dir))
    with runtime.user_errors():
        policy = load_policy(inputs.checkpoint, model_args, args)
    announce(args.device, args.dataloader_num_workers, "--dataloader_num_workers")
    trainer = build_trainer(policy, model_args, loss_args, args, inputs, identity)
    record_run(model_args, data_args, loss_args, args, inputs)
    trainer.about = {
        "base": model_args.model_name_or_path,
        "data": f"{Path(data_args.data_path).name}: {identity['train_pairs']}",
        **describe_training(model_args, loss_args, args, inputs),
        "licence": licence_of(local_folder(model_args.model_name_or_path)),
    }
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if not trainer.stop.stopped:
        save(trainer, identity)
    if args.should_save:
        draw_curves(trainer.state.log_history, Path(args.output_dir) / "curves.png")
    runtime.leave(trainer.stop.exit_code)
    return trainer.stop.exit_code


def save(trainer: AttentionAwareDPOTrainer, identity: dict[str, Any]) -> None:
    """What was trained, and last that it is all there."""
    folder = Path(trainer.args.output_dir)
    with whole_or_nothing(folder, "*.safetensors*"):
        trainer.save_model()
        trainer.save_state()
        if trainer.args.should_save:
            mark_complete(folder, identity)
    logger.info("saved %s", folder)


def claim(model: ModelArguments, data: DataArguments, args: TrainArguments) -> None:
    """Hold the output folder's lock until this process ends.

    Raises ValueError if another training has it, if it cannot be written, or if it is something that training reads.
    """
    models = {name: getattr(model, name) for name in ("model_name_or_path", "adapter", "image_tower")}
    pictures = {name: getattr(data, name) for name in ("image_folder", "data_path", "eval_data_path")}
    try:
        check_place(Path(args.output_dir), models, pictures)
        if runtime.is_main_process() and not args.dry_run:
            _held.enter_context(only_writer(Path(args.output_dir) / "training"))
    except OSError as error:
        raise ValueError(f"--output_dir {args.output_dir} cannot be written: {error.strerror}") from error


def check_schedule(args: TrainArguments) -> None:
    """Raises ValueError for an optimiser, or a schedule of the learning rate, that cannot be made of these flags."""
    weight = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=args.learning_rate)
    try:
        Trainer.get_optimizer_cls_and_kwargs(args)
        get_scheduler(args.lr_scheduler_type, weight, 1, 2, args.lr_scheduler_kwargs)
    except (ImportError, ValueError, TypeError) as error:
        given = f"--optim {args.optim.value}, --lr_scheduler_type {args.lr_scheduler_type.value}"
        raise ValueError(f"{given}: {first_line(error)}") from error


def read_inputs(model: ModelArguments, data: DataArguments, loss: LossArguments, args: TrainArguments) -> Inputs:
    """Read and check config, processor, records and pictures. Raises ValueError or FileNotFoundError for bad input."""
    pad, most = data.image_aspect_ratio == "pad", data.max_image_tokens
    checkpoint = open_checkpoint(
        model.model_name_or_path, image_tower=model.image_tower, pad=pad, max_image_tokens=most
    )
    if checkpoint.base:
        raise ValueError(
            f"{checkpoint}: training starts from a whole model; to train on from an adapter name it with --adapter, "
            "or merge it with `python -m scripts.export` first"
        )
    logger.info("model: %s", checkpoint)
    if args.liger:
        refuse_fused(checkpoint.config)
    if Zero.read(args.deepspeed_file).stage == 3 and getattr(checkpoint.config.get_text_config(), "num_experts", None):
        raise ValueError(
            f"{checkpoint}: transformers does not read joined experts under ZeRO-3: use --deepspeed scripts/zero2.json"
        )
    family = checkpoint.family
    adapter = open_adapter(checkpoint, model, Zero.read(args.deepspeed_file).stage) if model.adapter else None
    layers, heads = _probed(loss, checkpoint)
    store = ImageStore(data.image_folder)
    reader = PairReader(
        family, store, data.model_max_length, data.overlong, data.bad_records, data.check_images,
        read_leave_out(data.leave_out),
    )  # fmt: skip
    pairs, dropped = reader.read(data.data_path)
    if data.eval_data_path:
        train = pairs
        evaluation, dropped_too = reader.read(data.eval_data_path)
        dropped = dropped + dropped_too
    else:
        train, evaluation = split(pairs, data.eval_split, args.seed)
    if args.eval_strategy != "no" and not evaluation:
        raise ValueError("--eval_strategy needs something to evaluate on: give --eval_split or --eval_data_path")
    shown, longest = partial(in_epoch, seed=args.order_seed, family=family, store=store), ()
    if data.permute_images:
        tokens_of = partial(row_tokens, with_rejected=loss.settings().needs_rejected)
        longest = longest_orders(train, num_epochs(len(train), args), shown, data.model_max_length, tokens_of)
    chosen = choose_by_memory(checkpoint, layers, longest or train, model, loss, args)
    batches = plan_batches(longest or train, loss, args)
    reference = open_reference(adapter if model.reference == "adapter" else checkpoint, model, loss, args, store)
    if longest and reference:
        raise ValueError(
            "--permute_images: stored reference log-probs are of one order; do without --reference_cache, --reference "
            "adapter, full fine-tuning and ZeRO-3, which store them, or without DPO (--dpo_alpha 0)"
        )
    return Inputs(
        checkpoint, store, layers, heads, train, evaluation, dropped, reader.leave_out, batches, reference, chosen,
        longest,
    )  # fmt: skip


def choose_by_memory(checkpoint: Checkpoint, layers, pairs: Sequence[Pair], model, loss, args) -> dict[str, str]:
    """As `fitting.choose`, and a line of it, which the plan has anyway."""
    shapes = [shape_of(pair, loss.settings().needs_rejected) for pair in pairs]
    needs, processes = partial(Needs.of, checkpoint.config, model, args, layers, shapes), num_processes(args)
    chosen = choose(args, needs, processes, gpu_memory(args))
    if chosen and not args.dry_run:
        logger.info("; ".join(f"{name} {why}" for name, why in chosen.items()))
    return chosen


def num_processes(args: TrainArguments) -> int:
    """Of this run, or of the one that is planned."""
    return world_size() if args.dry_run else args.world_size


def open_adapter(checkpoint: Checkpoint, model: ModelArguments, zero_stage: int) -> Checkpoint:
    """What `--adapter` names, on this base, whose settings the flags then have.

    Raises ValueError for anything but a LoRA adapter in PEFT's format, or one that these flags cannot train.
    """
    opened = open_checkpoint(
        model.adapter, checkpoint.path, model.image_tower, checkpoint.pad, checkpoint.max_image_tokens
    )
    if opened.dialect != PEFT_ADAPTER or opened.base is None or opened.base.base:
        raise ValueError(f"--adapter {opened}: training goes on from a LoRA adapter in PEFT's format on a whole model")
    settings = adapter_settings(Path(model.adapter), type(checkpoint.family))
    if not isinstance(settings, LoraConfig):
        raise ValueError(f"--adapter {model.adapter}: holds {settings.peft_type.value} where LoRA is due")
    model.go_on_from(settings, checkpoint.family.projectors)
    if zero_stage == 3 and not model.freeze_mm_mlp_adapter:
        raise ValueError(f"--adapter {model.adapter} has a projector, which ZeRO-3 shares out: use scripts/zero2.json")
    return opened


def num_epochs(num_pairs: int, args: TrainArguments) -> int:
    """Epochs that a run at least begins. Raises ValueError for too many steps."""
    per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * num_processes(args)
    per_epoch = num_steps(num_pairs, per_step)
    steps = args.max_steps if args.max_steps > 0 else per_epoch * args.num_train_epochs
    if steps > MOST_STEPS:
        flag = "--max_steps" if args.max_steps > 0 else "--num_train_epochs"
        raise ValueError(f"{flag}: {steps:,.0f} steps; at most {MOST_STEPS:,} are planned")
    return math.ceil(steps / per_epoch)


def plan_batches(pairs: Sequence[Pair], loss: LossArguments, args: TrainArguments) -> BatchPlan:
    """Steps and rows of the run. Raises ValueError for a pair longer than --tokens_per_batch, or too many steps."""
    lengths = [row_tokens(pair, loss.settings().needs_rejected) for pair in pairs]
    limit, processes = args.tokens_per_batch, num_processes(args)
    if limit and max(lengths) > limit:
        longest = pairs[lengths.index(max(lengths))]
        raise ValueError(
            f"{longest.record.where}: {max(lengths):,} tokens in its row (prompt, images and answers), above "
            f"--tokens_per_batch {limit:,}, as are {sum(n > limit for n in lengths):,} pairs in all: raise it"
        )
    num_epochs(len(pairs), args)
    return make_plan(
        lengths, args.per_device_train_batch_size, args.gradient_accumulation_steps, processes,
        args.order_seed, args.num_train_epochs, args.max_steps, limit,
    )  # fmt: skip


def open_reference(checkpoint: Checkpoint, model, loss, args, store: ImageStore) -> ReferenceCache | None:
    """The cache of reference log-probs, read; None where they are computed at every step, or not needed.

    Raises ValueError if it was made from something else, or is damaged.
    """
    if not loss.settings().needs_reference:
        if args.reference_cache:
            logger.info("--reference_cache %s is not used: without DPO there is no reference", args.reference_cache)
        return None
    # Under ZeRO-3 reference and policy in turn would make DeepSpeed forget, each time, what to fetch ahead.
    if not (model.moves_reference or args.reference_cache or Zero.read(args.deepspeed_file).stage == 3):
        return None
    dtypes = " computed in ".join(str(dtype).removeprefix("torch.") for dtype in precision(model, args))
    exact = dtypes if model.bits == 16 else f"{model.bits} bits and {dtypes}"
    exact += " with liger-kernel" if args.liger else ""
    folder = Path(args.reference_cache or Path(args.output_dir) / "reference")
    cache = ReferenceCache(folder, describe_reference(checkpoint, exact), store)
    cache.load()
    return cache


def _probed(loss: LossArguments, checkpoint: Checkpoint) -> tuple[frozenset[int], Heads | None]:
    """Layers and heads of the attention term."""
    layers = loss.layers(checkpoint.num_layers)
    if not loss.attention_heads:
        return layers, None
    among = None if loss.attention_layers == "auto" else layers
    heads = select_heads(loss.attention_heads, loss.top_heads, checkpoint, among)
    return heads.layers, heads


def load_policy(checkpoint: Checkpoint, model: ModelArguments, args: TrainArguments):
    """The policy in the training precision. Must come after TrainArguments exist, or ZeRO-3 is not seen.

    Raises ValueError where the Trainer would fall back to threads over several GPUs, which packed rows cannot be.
    """
    if args.n_gpu > 1:
        raise ValueError(f"{args.n_gpu} GPUs but one process: start with torchrun --nproc_per_node={args.n_gpu} -m ...")
    if args.deepspeed and args.use_cpu:
        import deepspeed

        # Without it DeepSpeed believes in one process while the weights are partitioned.
        deepspeed.init_distributed(dist_backend="gloo")
    dtype, computed = precision(model, args)
    family = type(checkpoint.family)
    # Straight to the GPU: every process would have all weights in the host's memory first. ZeRO-3 knows no such map.
    direct = not args.use_cpu and Zero.read(args.deepspeed_file).stage < 3
    where = {"device_map": {"": str(args.device)}} if direct else {}
    policy = checkpoint.load(dtype, **where | quantisation(model.bits, family, computed, args.device))
    if args.liger:
        fuse(policy, family)
    set_seed(args.seed)  # after loading, which draws differently under ZeRO-3: LoRA starts the same everywhere
    return make_trainable(policy, family, model, fp32_adapter=not args.deepspeed)


def build_trainer(policy, model, loss, args, inputs: Inputs, identity: dict[str, Any]) -> AttentionAwareDPOTrainer:
    """The trainer with its data, loss and source of reference log-probs."""
    args.accumulate(inputs.batches.accumulation)  # before the Trainer and DeepSpeed take it from there
    table = parameter_table(policy, type(inputs.checkpoint.family))
    logger.info("%s\ntrained: %s", table, model.trained)
    logger.info("%s per step in %s", inputs.batches.step_sizes, inputs.batches)
    return AttentionAwareDPOTrainer(
        model=policy,
        args=args,
        train_dataset=inputs.dataset(inputs.train),
        eval_dataset=inputs.dataset(inputs.evaluation) if inputs.evaluation else None,
        processing_class=inputs.checkpoint.family.processor(),
        settings=loss.settings(),
        layers=inputs.layers,
        heads=inputs.heads and inputs.heads.selected(inputs.checkpoint.num_heads),
        family=inputs.checkpoint.family,
        reference=inputs.reference,
        identity=identity,
        on_adapter=model.reference == "adapter",
        batches=inputs.batches,
    )


def describe_run(model, data, loss, args, inputs: Inputs) -> dict[str, Any]:
    """What makes two runs the same experiment: a checkpoint resumes only into the same."""
    unused = {name for name, value in BEFORE.items() if getattr(loss, name) == value}
    if loss.answer_end == "kept" or loss.dpo_alpha == 0:
        unused |= {"answer_end", "answer_end_weight"}
    return {
        **dataclasses.asdict(model),
        **{name: value for name, value in dataclasses.asdict(loss).items() if name not in unused},
        "attention_layers": loss.saved_layers,
        "attention_heads": inputs.heads and inputs.heads.to_json(),  # wherever their file lies
        **{name: getattr(args, name) for name in SCHEDULE},
        **({"fp16": True} if args.fp16 else {}),
        **({"liger": True} if args.liger else {}),
        **({"max_image_tokens": data.max_image_tokens} if data.max_image_tokens else {}),
        **({"permute_images": True} if data.permute_images else {}),
        "image_aspect_ratio": data.image_aspect_ratio,
        "pairs_per_step": inputs.batches.pairs_per_step,
        "deepspeed": args.deepspeed_file,
        "bad_records": data.bad_records,
        "leave_out": f"{len(inputs.leave_out)} named ({_digest(sorted(inputs.leave_out))})",
        "dropped": f"{len(inputs.dropped)} ({_digest(inputs.dropped)})",
        "train_pairs": f"{len(inputs.train)} ({_digest([(p.record, p.prompt) for p in inputs.train])})",
    }


def _digest(content: Any) -> str:
    return hashlib.sha256(repr(content).encode()).hexdigest()[:16]


def record_run(model, data, loss, args, inputs: Inputs) -> None:
    """Write run.json, once per job: resolved arguments, versions, commit, counts."""
    if not args.should_save:
        return
    counts = {"train": describe(inputs.train), "dropped": inputs.dropped, "leave_out": sorted(inputs.leave_out)}
    if inputs.evaluation:
        counts["evaluation"] = describe(inputs.evaluation)
    runtime.write_run_json(
        Path(args.output_dir) / "run.json",
        model=dataclasses.asdict(model),
        data=dataclasses.asdict(data),
        loss=dataclasses.asdict(loss),
        attention_layers=sorted(inputs.layers),
        attention_heads=inputs.heads and inputs.heads.to_json(),
        training=args.to_dict(),
        counts=counts,
        batches=f"{inputs.batches.step_sizes} per step in {inputs.batches}",
    )


if __name__ == "__main__":
    sys.exit(main())
