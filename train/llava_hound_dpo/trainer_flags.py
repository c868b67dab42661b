"""Every field of transformers.TrainingArguments, sorted once: what works here, and what is refused, and why."""

import dataclasses

from transformers import TrainingArguments

from llava.command_line import ABOVE_0, BELOW_1

# Tested, or passed through to code that does not depend on what a batch is.
WORKS = frozenset("""
    output_dir per_device_train_batch_size num_train_epochs max_steps learning_rate lr_scheduler_type
    lr_scheduler_kwargs warmup_steps optim optim_args weight_decay adam_beta1 adam_beta2 adam_epsilon
    gradient_accumulation_steps max_grad_norm bf16 fp16 tf32 activation_checkpointing activation_checkpointing_kwargs
    gradient_checkpointing gradient_checkpointing_kwargs torch_empty_cache_steps logging_strategy logging_steps
    logging_first_step log_on_each_node log_level log_level_replica disable_tqdm report_to run_name project
    trackio_space_id trackio_bucket_id trackio_static_space_id eval_strategy eval_steps eval_delay
    per_device_eval_batch_size eval_on_start eval_accumulation_steps save_strategy save_steps save_total_limit
    load_best_model_at_end metric_for_best_model greater_is_better full_determinism seed data_seed use_cpu
    dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor
    dataloader_multiprocessing_context dataloader_in_order ddp_find_unused_parameters ddp_bucket_cap_mb
    ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout deepspeed skip_memory_metrics do_train local_rank
""".split())  # fmt: skip

_ORDER = "which pairs form which step is fixed before the start"
_COMPILE = "every packed row has a shape of its own, and the attention function is not made for it"
_LIGER = "it replaces the logits that the losses are read from; for its other kernels use --liger True"
_HUB = "upload the finished folder with `hf upload`"
_FSDP = "use --deepspeed scripts/zero3.json"
_BATCH = "a batch is a packed row, not columns"
_METRICS = "evaluation gives the means of all losses, each pair counted once"
_TOKENS = "the plan of --dry_run counts the tokens"

# Must keep the value that they have here, which is transformers' own but where `arguments.TrainArguments` says another.
REFUSED = {
    "neftune_noise_alpha": "noise in the policy alone is a difference to the reference that nothing has learned",
    "label_smoothing_factor": "it smooths labels of tokens; of pairs it is --label_smoothing",
    "average_tokens_across_devices": "the loss is a mean over pairs, on any number of processes",
    "bf16_full_eval": "evaluation computes as training does, with --bf16",
    "fp16_full_eval": "evaluation computes as training does, with --fp16",
    "optim_target_modules": "optimisers that project gradients are not made for LoRA",
    "torch_compile": _COMPILE, "torch_compile_backend": _COMPILE, "torch_compile_mode": _COMPILE,
    "use_liger_kernel": _LIGER, "liger_kernel_config": _LIGER,
    "use_cache": "nothing is generated while training",
    "auto_find_batch_size": f"{_ORDER}; --tokens_per_batch bounds the memory of a row",
    "dataloader_drop_last": _ORDER, "ignore_data_skip": _ORDER, "train_sampling_strategy": _ORDER,
    "length_column_name": _ORDER, "accelerator_config": _ORDER, "parallelism_config": _FSDP,
    "fsdp": _FSDP, "fsdp_config": _FSDP,
    "remove_unused_columns": _BATCH, "label_names": _BATCH, "include_for_metrics": _METRICS,
    "prediction_loss_only": _METRICS, "eval_do_concat_batches": _METRICS, "eval_use_gather_object": _METRICS,
    "batch_eval_metrics": _METRICS, "do_eval": "use --eval_strategy", "do_predict": "use inference.llava_hound_dpo",
    "include_num_input_tokens_seen": _TOKENS,
    "logging_nan_inf_filter": "a loss that is not finite ends the run, and names its pairs",
    "debug": "a loss that is not finite ends the run, and names its pairs",
    "save_only_model": "nothing could go on from such a checkpoint: use --save_strategy no, or --save_total_limit 1",
    "save_on_each_node": "all nodes write into one --output_dir, which they must see",
    "enable_jit_checkpoint": "SIGTERM and SIGUSR1 save a checkpoint anyway",
    "restore_callback_states_from_checkpoint": "no callback here has a state",
    "resume_from_checkpoint": "the same command goes on from the newest checkpoint of --output_dir",
    **dict.fromkeys(
        ("push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push",
         "hub_revision"), _HUB,
    ),
}  # fmt: skip

# Least and most of numbers; None: no limit.
RANGES: dict[str, tuple[float | None, float | None]] = {
    "learning_rate": (ABOVE_0, None), "weight_decay": (0, None), "max_grad_norm": (0, None),
    "adam_beta1": (0, BELOW_1), "adam_beta2": (0, BELOW_1), "adam_epsilon": (0, None), "warmup_steps": (0, None),
    "num_train_epochs": (ABOVE_0, None), "max_steps": (-1, None), "per_device_train_batch_size": (1, 10_000),
    "per_device_eval_batch_size": (1, 10_000), "gradient_accumulation_steps": (1, 1_000_000),
    "logging_steps": (ABOVE_0, None), "eval_steps": (ABOVE_0, None), "eval_delay": (0, None),
    "eval_accumulation_steps": (1, None), "save_steps": (ABOVE_0, None), "save_total_limit": (1, None),
    "torch_empty_cache_steps": (1, None), "dataloader_num_workers": (0, 1024), "dataloader_prefetch_factor": (1, None),
    "seed": (0, 2**32 - 1), "data_seed": (0, 2**32 - 1), "ddp_timeout": (1, 10**9), "ddp_bucket_cap_mb": (1, None),
}  # fmt: skip


def refuse(args: TrainingArguments) -> None:
    """Raises ValueError for a field of `REFUSED` that was given another value than it has here."""
    for field in dataclasses.fields(args):
        reason, value = REFUSED.get(field.name), getattr(args, field.name)
        kept = field.default if field.default is not dataclasses.MISSING else field.default_factory()
        if reason and value != kept and (value or kept is True):  # scripts pass empty strings for nothing
            raise ValueError(f"--{field.name} {value!s:.60} must stay {kept}: {reason}")
