"""One training step without its optimiser, in every way that is compared.

A step takes the loss of a batch, reference log-probs included, and its gradients. All have the same weights.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor

from llava.attention import NAME, install, layer_range
from scripts.bench import eager
from train.llava_hound_dpo.arguments import TrainArguments
from train.llava_hound_dpo.batches import make_plan
from train.llava_hound_dpo.data import PairDataset
from train.llava_hound_dpo.losses import PREFERENCE_LOSSES, LossSettings
from train.llava_hound_dpo.plan import shape_of
from train.llava_hound_dpo.scoring import score
from train.llava_hound_dpo.trainer import AttentionAwareDPOTrainer

SETTINGS = LossSettings(dpo_alpha=1.0, gamma=0.0)
NAMES = ("ours", "plain", "trl", "eager")


class Step:
    """A way to train `policy`: a call is a step and gives the loss. Each kind has `forward_and_backward`."""

    def __init__(self, policy, attention: str):
        self.policy, self.attention = policy, attention

    def __call__(self, repeat: int = 0) -> Tensor:
        self.policy.zero_grad()
        self.policy.train()
        self.policy.get_base_model().set_attn_implementation({"text_config": self.attention})
        return self.forward_and_backward().detach()

    def gradients(self) -> dict[str, Tensor]:
        """Copies of the gradients of the last step by name."""
        return {n: p.grad.detach().float().clone() for n, p in self.policy.named_parameters() if p.grad is not None}


class TrainerStep(Step):
    """A step of a transformers Trainer on the first row of examples, as its training loop does it."""

    def __init__(self, trainer, attention: str, examples: Sequence):
        super().__init__(trainer.model, attention)
        self.trainer, self.batch = trainer, trainer.data_collator(examples)
        self.prepared = trainer.accelerator.prepare_model(trainer.model)

    def forward_and_backward(self) -> Tensor:
        """As `Trainer.training_step`."""
        inputs = self.trainer._prepare_inputs(self.batch)
        with self.trainer.compute_loss_context_manager():
            loss = self.trainer.compute_loss(self.prepared, inputs)
        self.trainer.accelerator.backward(loss)
        return loss


class Eager(Step):
    """A training loop written by hand around `attention_aware_dpo`."""

    def __init__(self, policy, pairs: PairDataset):
        super().__init__(policy, "eager")
        self.batch = eager.collate(list(pairs), pairs.family.image_id, policy.device)
        self.layers = sorted(layer_range(policy.config.text_config.num_hidden_layers, "auto"))

    def forward_and_backward(self) -> Tensor:
        """In bf16 on a GPU, as the trainers."""
        with torch.autocast("cuda", torch.bfloat16) if torch.cuda.is_available() else nullcontext():
            loss = eager.attention_aware_dpo(self.policy, self.batch, self.layers, SETTINGS)
        loss.backward()
        return loss


class PlainDPOTrainer(AttentionAwareDPOTrainer):
    """The same trainer without the attention term: nothing is probed."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Mean DPO loss of a batch of pairs."""
        row, pictures = inputs["row"], self._pictures(inputs["pixels"])
        reference = self._reference(model, inputs, pictures, self.train_dataset)
        z = self._margin(score(model, row, **pictures), reference)
        return PREFERENCE_LOSSES[self.settings.loss_type](z, self.settings.beta, 0.0).mean()


def build_trainer(policy, pairs: PairDataset, folder: Path, kind=AttentionAwareDPOTrainer, **arguments):
    """Our trainer, or a `kind` of it; `arguments` are of `TrainArguments`."""
    base = policy.get_base_model()
    install(base)
    settings = {"bf16": torch.cuda.is_available(), "report_to": [], "save_strategy": "no", "disable_tqdm": True}
    settings |= {"gradient_checkpointing": True, "per_device_train_batch_size": 1, **arguments}
    args = TrainArguments(output_dir=str(folder), **settings)
    batches = make_plan(
        [shape_of(pair, with_rejected=True).tokens for pair in pairs.pairs], args.per_device_train_batch_size,
        args.gradient_accumulation_steps, args.world_size, args.seed, args.num_train_epochs, args.max_steps,
    )  # fmt: skip
    args.accumulate(batches.accumulation)
    return kind(
        model=policy, args=args, train_dataset=pairs, batches=batches, processing_class=pairs.family.processor(),
        settings=SETTINGS, layers=layer_range(base.config.text_config.num_hidden_layers, "auto"), family=pairs.family,
    )  # fmt: skip


def build_steps(
    names: Sequence[str], policy, build_base: Callable, pairs: PairDataset, folder: Path
) -> dict[str, Step]:
    """The steps of these names, all but TRL's of one policy; `build_base` makes the base of another one for TRL."""
    steps: dict[str, Step] = {}
    for name in names:
        if name == "trl":
            from scripts.bench import trl_step  # takes seconds to import

            trainer = trl_step.build_trainer(build_base(), policy, pairs, folder / name)
            steps[name] = TrainerStep(trainer, "sdpa", trl_step.examples(pairs))
        elif name == "eager":
            steps[name] = Eager(policy, pairs)
        else:
            kind = AttentionAwareDPOTrainer if name == "ours" else PlainDPOTrainer
            steps[name] = TrainerStep(build_trainer(policy, pairs, folder / name, kind), NAME, list(pairs))
    return steps


def difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Norm of what two sets of gradients differ by, over the norm of the first. Raises ValueError if names differ."""
    if ours.keys() != theirs.keys():
        raise ValueError(f"gradients of different weights: {sorted(ours.keys() ^ theirs.keys())[:3]}")
    apart, whole = (torch.stack([(a - b).norm() for a, b in pairs]).norm() for pairs in (
        [(ours[name], theirs[name]) for name in ours], [(grad, 0.0) for grad in ours.values()]
    ))  # fmt: skip
    return (apart / whole).item()
