"""`AttentionAwareDPOTrainer`: transformers' Trainer with the losses of `losses.py` on packed rows."""

import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor
from transformers import Trainer, TrainerCallback
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.trainer import SCHEDULER_NAME
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from llava.attention import attention_ratio, mean_over_layers
from llava.families import Family
from llava.records import FORMATS
from llava.runtime import Progress, is_main_process
from train.llava_hound_dpo import checkpoints
from train.llava_hound_dpo.batches import BatchPlan, RowLoader
from train.llava_hound_dpo.data import PairCollator, PairDataset
from train.llava_hound_dpo.losses import LossSettings, logits_margin, mean_by_pair, prefers_chosen, total_loss
from train.llava_hound_dpo.modes import adapter_off, already_training, checkpointing, switches, without_gradient
from train.llava_hound_dpo.outcome import write_card
from train.llava_hound_dpo.packing import PackedRow
from train.llava_hound_dpo.progress import StepLines, WatchChosen
from train.llava_hound_dpo.reference import ReferenceCache
from train.llava_hound_dpo.scoring import Scores, score
from train.llava_hound_dpo.stopping import StopOnRequest, start_loader

logger = logging.getLogger(__name__)

METRICS = (
    "losses/total", "losses/dpo", "losses/sft", "losses/attention",
    "attention/ratio", *(f"attention/ratio_{name}" for name in FORMATS), "attention/image_mass",
    "attention/open", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies",
    "logps/chosen", "logps/rejected", "logps/chosen_end", "reference/chosen", "reference/chosen_end",
)  # fmt: skip
LOADER_OPTIONS = (
    "num_workers", "pin_memory", "persistent_workers", "multiprocessing_context", "prefetch_factor", "in_order",
)  # fmt: skip


class AttentionAwareDPOTrainer(Trainer):
    """Trains a vision-language model, with or without LoRA, on packed preference pairs.

    `layers` are the probed layers of the language model, `heads` (L, H) has a 1 for those of their heads that count
    (None: all). `reference` is needed for a DPO share where the reference is the policy as it starts: in full
    fine-tuning, and `on_adapter`. Without it, it is the model with its LoRA adapter off, computed at every step.
    `identity` describes the experiment; a checkpoint of another one is not resumed. `batches` says which pairs form
    which step and row.
    """

    def __init__(
        self, *args, settings: LossSettings, layers: frozenset[int], family: Family, batches: BatchPlan,
        heads: Tensor | None = None, reference: ReferenceCache | None = None,
        identity: Mapping[str, Any] | None = None, on_adapter: bool = False, **kwargs,
    ):  # fmt: skip
        super().__init__(*args, data_collator=PairCollator(family, settings.needs_rejected), **kwargs)
        given = self.args.activation_checkpointing_kwargs
        self.args.activation_checkpointing_kwargs = checkpointing(self.model) | (given or {})
        self.settings, self.layers, self.heads, self.reference = settings, layers, heads, reference
        self.family, self.batches, self.identity, self._saved_step = family, batches, dict(identity or {}), None
        assert self.args.gradient_accumulation_steps == batches.accumulation
        assert self.args.world_size == batches.world_size
        self.model_accepts_loss_kwargs = False  # our loss is a mean over pairs: let the Trainer average micro-batches
        self.compute_metrics = _mean_metrics
        self._has_entered = False  # training mode
        self.about: Mapping[str, Any] = {}  # of the card that lies beside weights
        self._sums = torch.zeros(2, len(METRICS), dtype=torch.float64)
        self.shares_images = not any(p.requires_grad for p in self._projector())
        names = self.family.vectors
        self._vectors = [p for name, p in self.model.named_parameters() if any(vector in name for vector in names)]
        self._switches = switches(self.model)
        self._layers = [part for part in self.model.modules() if isinstance(part, GradientCheckpointingLayer)]
        self.starts_as_reference = on_adapter or not isinstance(self.model, PeftModel)
        is_known = not self.starts_as_reference or reference is not None
        assert is_known or not settings.needs_reference, "no source of reference log-probs"
        for standard in (ProgressCallback, PrinterCallback):
            self.remove_callback(standard)
        self.stop = StopOnRequest()
        for callback in (self.stop, StepLines(), WatchChosen()):
            self.add_callback(callback)
        if reference is not None:
            self.add_callback(_ComputeReference(self))

    def training_step(self, model, inputs, num_items_in_batch=None):
        """As the Trainer's, which has all modules enter training mode at every micro-batch; here when they have to."""
        # The first time it must: a wrapper begins in training mode, the model inside it in that of `from_pretrained`.
        has_entered, self._has_entered = self._has_entered and model.training, True
        with already_training(model) if has_entered else nullcontext():
            return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Mean loss of a batch of pairs; with `return_outputs` also the (N, metrics) matrix, NaN where undefined.

        Of a row of a step it is what the row adds to the mean over the step's pairs, times the rows of the step: the
        Trainer averages over micro-batches, and the processes average their gradients. Raises FloatingPointError,
        before any update, if the loss of a pair is not finite.
        """
        row, features = inputs["row"], self._encode(inputs["pixels"], self.shares_images)
        dataset = self.train_dataset if model.training else self.eval_dataset
        reference = self._reference(model, inputs, features, dataset) if self.settings.needs_reference else None
        policy = score(model, row, features, self.layers, self.heads, self.settings.attention_rows)
        ratio = mean_over_layers(attention_ratio(policy.masses), self.heads)
        z = self._margin(policy, reference, row) if reference else None
        is_open = None
        if self.settings.is_gated:
            is_open = prefers_chosen(*self._sides(policy, row), row.rejected_owner, row.num_pairs)
        loss, parts = total_loss(
            self.settings, policy.chosen, row.answer_tokens[row.chosen].to(policy.chosen.dtype), ratio, z,
            row.rejected_owner if reference else None, policy.chosen_end, is_open,
        )
        if not torch.isfinite(parts["total"]).all():
            bad = inputs["index"][~torch.isfinite(parts["total"]).cpu()].tolist()
            names = ", ".join(dataset.pairs[i].record.where for i in bad)
            raise FloatingPointError(f"the loss is not finite at step {self.state.global_step + 1}: {names}")
        metrics = self._metrics(parts, policy, reference, ratio, is_open, inputs["format"], row)
        step_pairs = inputs.get("step_pairs")
        if step_pairs is not None:
            share = torch.where(step_pairs > 0, self.batches.rows_per_step / step_pairs, 0)
            loss = (parts["total"] * share).sum()
            metrics = metrics.where(step_pairs[:, None] > 0, math.nan)  # of no pair of the step: not counted
        if model.training:
            found = metrics.double()
            sums = torch.stack([found.nansum(dim=0), (~found.isnan()).sum(dim=0)])
            self._sums = sums + self._sums.to(sums.device, non_blocking=True)  # there, and read when logged
        return (loss, metrics) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Metrics of a batch as "logits", so that the Trainer gathers and counts every pair exactly once."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            _, metrics = self.compute_loss(model, inputs, return_outputs=True)
        return None, metrics, inputs["index"].to(metrics.device)

    def get_train_dataloader(self) -> RowLoader:
        """This process's rows, decoded ahead of the step by `dataloader_num_workers` processes."""
        args = self.args
        return RowLoader(
            self.train_dataset, self.batches, args.process_index, collate_fn=self.data_collator,
            worker_init_fn=partial(start_loader, num_workers=args.dataloader_num_workers, rank=args.process_index),
            **{name: getattr(args, f"dataloader_{name}") for name in LOADER_OPTIONS},
        )  # fmt: skip

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means of all metrics since the last log, over all processes, to a training step's log."""
        if "loss" in logs:
            sums = self.accelerator.reduce(self._sums.to(self.args.device), reduction="sum").cpu()
            logs.update({name: (s / n).item() for name, s, n in zip(METRICS, *sums, strict=True) if n})
            self._sums.zero_()
        super().log(logs, start_time)

    def create_optimizer(self, model=None):
        """As the Trainer's, with the projector's weights at their own learning rate if one is set."""
        optimizer = super().create_optimizer(model)
        rate = getattr(self.args, "mm_projector_lr", None)
        if rate is None:
            return optimizer
        projector = {id(p) for p in self._projector() if p.requires_grad}
        for group in list(optimizer.param_groups):
            moved = [p for p in group["params"] if id(p) in projector]
            if moved:
                group["params"] = [p for p in group["params"] if id(p) not in projector]
                optimizer.add_param_group({**group, "params": moved, "lr": rate})
        return optimizer

    def _prepare_inputs(self, inputs):
        """As the Trainer's, with the row; what is read on the CPU stays there."""
        pixels = inputs["pixels"]
        shapes = {name: pixels[name] for name in self.family.shapes if name in pixels}
        pixels = {name: value for name, value in pixels.items() if name not in shapes}
        moved = super()._prepare_inputs({**inputs, "index": (), "pixels": pixels})
        row = inputs["row"].to(self.args.device, non_blocking=True)
        return {**moved, "row": row, "index": inputs["index"], "pixels": moved["pixels"] | shapes}

    def _prepare_input(self, data):
        """As the Trainer's, without waiting for the copy of what lies in pinned memory."""
        if isinstance(data, Tensor):
            data = data.to(self.args.device, non_blocking=True)
        return super()._prepare_input(data)

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        """As the Trainer's, but DeepSpeed's state comes from our own files, and embeddings need no gradient.

        transformers gives them one with checkpointing, for the way of re-entry, which we refuse: a backward pass
        through the first layer's inputs for nothing.
        """
        self.model.disable_input_require_grads()
        if not self.is_deepspeed_enabled:
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        checkpoints.check_engine(self.deepspeed)
        if resume_from_checkpoint:
            checkpoints.load_state(self.deepspeed, Path(resume_from_checkpoint) / checkpoints.STATE)
            self._load_optimizer_and_scheduler(resume_from_checkpoint)  # of DeepSpeed's runs the scheduler only
        return prepared

    def _save_checkpoint(self, model, trial):
        if self._saved_step == self.state.global_step:
            return  # nothing has changed since, and rewriting it would make a kill leave half of it
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            checkpoints.remove_interrupted(folder)
        self.accelerator.wait_for_everyone()
        limit, self.args.save_total_limit = self.args.save_total_limit, None  # older ones go when this one is complete
        try:
            with checkpoints.whole_or_nothing(folder):
                super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            checkpoints.complete(folder, self.identity, limit, self.state.best_model_checkpoint)
        self._saved_step = self.state.global_step

    def _save(self, output_dir=None, state_dict=None):
        """As the Trainer's, with all that reads pictures, and a card in place of peft's empty template."""
        super()._save(output_dir, state_dict)
        folder = Path(output_dir or self.args.output_dir)
        if self.args.should_save:
            self.family.save(folder)
        if self.args.should_save and self.about:
            write_card(folder, self.about, self.state.log_history)

    def _save_optimizer_and_scheduler(self, output_dir):
        if not self.is_deepspeed_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        checkpoints.save_state(self.deepspeed, Path(output_dir) / checkpoints.STATE)
        if self.args.should_save and self.deepspeed.lr_scheduler is None:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_best_model(self):
        if not self.is_deepspeed_enabled:
            super()._load_best_model()
            return
        checkpoints.load_state(self.deepspeed, Path(self.state.best_model_checkpoint) / checkpoints.STATE)

    def fill_reference(self, dataset: PairDataset, missing: Sequence[int]) -> None:
        """Compute and store the reference log-probs of the missing pairs, shared out over the processes."""
        args, model = self.args, self.model_wrapped
        size = args.per_device_eval_batch_size
        batches = [missing[start : start + size] for start in range(0, len(missing), size)]
        was_training = model.training
        model.eval()
        # Every process makes the same number of forwards: under ZeRO-3 they are collective.
        rounds = range(0, len(batches), args.world_size)
        for start in Progress(rounds, desc="reference log-probs", disable=not is_main_process()):
            own = start + args.process_index
            indices = batches[own] if own < len(batches) else batches[0]
            inputs = self._prepare_inputs(self.data_collator([dataset[index] for index in indices]))
            with torch.no_grad(), self._as_reference(), self.compute_loss_context_manager():
                scores = score(model, inputs["row"], self._encode(inputs["pixels"]))
            if own < len(batches):
                self.reference.append([dataset.pairs[i] for i in indices], scores)
        model.train(was_training)
        self.reference.share()

    def _projector(self) -> list[Tensor]:
        part_of, projector = self.family.part_of, self.family.projectors[0]
        return [p for name, p in self.model.named_parameters() if part_of(name) == projector]

    def _encode(self, pixels: Mapping[str, Tensor], is_frozen: bool = True) -> Any:
        """Pictures as the language model reads them, without gradient where nothing before it is trained."""
        for parameter in filter(is_partitioned, self._vectors):
            parameter.all_gather()  # ZeRO-3 does it when the module that holds them is called: here its parts alone are
        with without_gradient(self._layers) if is_frozen else nullcontext():
            return self.family.encode(self.model, pixels)

    def _reference(self, model, inputs, features: Any, dataset: PairDataset) -> Scores:
        if self.reference is not None:
            pairs = [dataset.pairs[index] for index in inputs["index"].tolist()]
            return self.reference.lookup(pairs).to(inputs["row"].labels.device)
        # The two may see pictures through different projectors.
        with without_gradient(self._layers), self._as_reference():
            return score(model, inputs["row"], features if self.shares_images else self._encode(inputs["pixels"]))

    def _as_reference(self):
        """A context in which the model is the reference; before the first step, where it only then is."""
        return nullcontext() if self.starts_as_reference else adapter_off(self._switches)

    def _compared(self, scores: Scores) -> Scores:
        """What DPO sees of the answers: all of them, or all but their end."""
        return scores.without_end() if self.settings.leaves_out_end else scores

    def _sides(self, scores: Scores, row: PackedRow) -> tuple[Tensor, Tensor]:
        """(M,) log-probs of every rejected answer's chosen one, and its own, as DPO compares them."""
        seen = self._compared(scores)
        chosen, rejected = seen.chosen, seen.rejected
        if self.settings.averages_logps:
            tokens = row.answer_tokens - int(self.settings.leaves_out_end)
            chosen, rejected = chosen / tokens[row.chosen], rejected / tokens[row.rejected]
        return chosen[row.rejected_owner], rejected

    def _margin(self, policy: Scores, reference: Scores, row: PackedRow) -> Tensor:
        """(M,) z of every rejected answer."""
        return logits_margin(*self._sides(policy, row), *self._sides(reference, row))

    def _metrics(
        self, parts: dict, policy: Scores, reference: Scores | None, ratio: Tensor, is_open: Tensor | None,
        formats: Tensor, row: PackedRow,
    ) -> Tensor:  # fmt: skip
        """(N, metrics) matrix of one batch, NaN where a metric does not apply to a pair; of rejected answers means."""
        found = {f"losses/{name}": value for name, value in parts.items()}
        found |= {f"attention/ratio_{name}": ratio.where(formats == n, math.nan) for n, name in enumerate(FORMATS)}
        found |= {
            "logps/chosen": policy.chosen,
            "logps/chosen_end": policy.chosen_end,
            "attention/ratio": ratio,
            "attention/image_mass": mean_over_layers(policy.masses[..., 1], self.heads),
        }
        if is_open is not None:
            found["attention/open"] = is_open
        if reference is not None:
            mean = partial(mean_by_pair, owner=row.rejected_owner, num_pairs=row.num_pairs)
            seen, theirs = self._compared(policy), self._compared(reference)
            chosen = self.settings.beta * (seen.chosen - theirs.chosen)
            rejected = self.settings.beta * (seen.rejected - theirs.rejected)
            found |= {
                "rewards/chosen": chosen,
                "rewards/rejected": mean(rejected),
                "rewards/margins": chosen - mean(rejected),
                "rewards/accuracies": mean((chosen[row.rejected_owner] > rejected).float()),
                "logps/rejected": mean(policy.rejected),
                "reference/chosen": reference.chosen,
                "reference/chosen_end": reference.chosen_end,
            }
        absent = torch.full_like(ratio, math.nan)
        return torch.stack([found.get(name, absent).detach().float() for name in METRICS], dim=1)


def is_partitioned(parameter: Tensor) -> bool:
    """Whether ZeRO-3 has shared a parameter out."""
    return hasattr(parameter, "ds_id")


def _mean_metrics(predictions) -> dict[str, float]:
    """Mean of every metric over the evaluation set; `loss` is the mean total."""
    matrix = np.asarray(predictions.predictions, dtype=np.float64).reshape(-1, len(METRICS))
    means = {name: float(np.nanmean(c)) for name, c in zip(METRICS, matrix.T, strict=True) if not np.isnan(c).all()}
    return {"loss": means["losses/total"], **means}


class _ComputeReference(TrainerCallback):
    """Fills the reference cache before the first step, while the policy, perhaps without adapter, is the reference."""

    def __init__(self, trainer: AttentionAwareDPOTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        cache = self.trainer.reference
        cache.share()  # all processes must agree on what is missing, or they would wait for each other forever
        for dataset in filter(None, (self.trainer.train_dataset, self.trainer.eval_dataset)):
            if state.global_step and self.trainer.starts_as_reference:
                cache.require(dataset.pairs)  # the weights are no longer the reference's
            logger.info("reference log-probs: %s", cache.status(dataset.pairs))
            self.trainer.fill_reference(dataset, cache.missing(dataset.pairs))
