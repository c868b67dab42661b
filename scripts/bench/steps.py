"""One training step without its optimiser, in every way that is compared: a common form, and ours.

A step takes the loss of a batch, reference log-probs included, and its gradients. All have the same weights.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor

from llava.attention import NAME, install, layer_range
from scripts.bench.pairs import Pairs
from train.llava_hound_dpo.arguments import TrainArguments
from train.llava_hound_dpo.batches import make_plan
from train.llava_hound_dpo.losses import PREFERENCE_LOSSES, LossSettings
from train.llava_hound_dpo.plan import shape_of
from train.llava_hound_dpo.scoring import score
from train.llava_hound_dpo.trainer import AttentionAwareDPOTrainer

SETTINGS = LossSettings(dpo_alpha=1.0, gamma=0.0)
NAMES = ("ours", "plain", "trl", "eager")


class Step:
    """A way to train `policy`: a call is a step and gives the loss.

    A kind has `load(pairs)`, which makes them the batch of the next steps, and `forward_and_backward()`.
    """

    def __init__(self, policy):
        self.policy = policy

    def __call__(self, repeat: int = 0) -> Tensor:
        self.policy.zero_grad()
        self.policy.train()
        return self.forward_and_backward().detach()

    def gradients(self) -> dict[str, Tensor]:
        """Copies of the gradients of the last step by name."""
        return {n: p.grad.detach().float().clone() for n, p in self.policy.named_parameters() if p.grad is not None}


class TrainerStep(Step):
    """A step of a transformers Trainer, as its training loop does it."""

    def __init__(self, trainer, attention: str):
        super().__init__(trainer.model)
        self.trainer, self.attention, self.batch = trainer, attention, None
        self.prepared = trainer.accelerator.prepare_model(trainer.model)

    def forward_and_backward(self) -> Tensor:
        """As `Trainer.training_step`."""
        self.policy.get_base_model().set_attn_implementation({"text_config": self.attention})
        inputs = self.trainer._prepare_inputs(self.batch)
        with self.trainer.compute_loss_context_manager():
            loss = self.trainer.compute_loss(self.prepared, inputs)
        self.trainer.accelerator.backward(loss)
        return loss


class Ours(TrainerStep):
    """`AttentionAwareDPOTrainer`, or a kind of it."""

    def __init__(self, policy, pairs: Pairs, folder: Path, kind: type[AttentionAwareDPOTrainer]):
        super().__init__(build_trainer(kind, policy, pairs, folder), NAME)

    def load(self, pairs: Pairs) -> None:
        """One packed row."""
        self.trainer.train_dataset = pairs.dataset
        self.batch = self.trainer.data_collator(pairs.items())


class PlainDPOTrainer(AttentionAwareDPOTrainer):
    """The same trainer without the attention term: nothing is probed."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Mean DPO loss of a batch of pairs."""
        row, pictures = inputs["row"], self._pictures(inputs["pixel_values"])
        reference = self._reference(model, inputs, pictures, self.train_dataset)
        z = self._margin(score(model, row, **pictures), reference)
        return PREFERENCE_LOSSES[self.settings.loss_type](z, self.settings.beta, 0.0).mean()


def build_trainer(
    kind: type[AttentionAwareDPOTrainer], policy, pairs: Pairs, folder: Path, **arguments
) -> AttentionAwareDPOTrainer:
    """Our trainer; `arguments` are of `TrainArguments`."""
    base = policy.get_base_model()
    install(base)
    settings = {"bf16": torch.cuda.is_available(), "report_to": [], "save_strategy": "no", "disable_tqdm": True}
    settings |= {"gradient_checkpointing": True, "per_device_train_batch_size": 1, **arguments}
    args = TrainArguments(output_dir=str(folder), **settings)
    lengths = [shape_of(pair, pairs.dataset.grid.num_tokens, with_rejected=True).tokens for pair in pairs.dataset.pairs]
    batches = make_plan(
        lengths, args.per_device_train_batch_size, args.gradient_accumulation_steps, args.world_size, args.seed,
        args.num_train_epochs, args.max_steps,
    )  # fmt: skip
    args.accumulate(batches.accumulation)
    return kind(
        model=policy, args=args, train_dataset=pairs.dataset, batches=batches,
        processing_class=pairs.processor, settings=SETTINGS,
        layers=layer_range(base.config.text_config.num_hidden_layers, "auto"), image_token=base.config.image_token_id,
    )  # fmt: skip


def build_steps(names: Sequence[str], policy, build_base, pairs: Pairs, folder: Path) -> dict[str, Step]:
    """The steps of these names, all but TRL's of one policy; `build_base` makes the base of another one for TRL."""
    from scripts.bench.eager import Eager

    steps: dict[str, Step] = {}
    for name in names:
        if name == "trl":
            from scripts.bench.trl_step import Trl  # takes seconds to import

            steps[name] = Trl(build_base(), policy, pairs, folder / name)
        elif name == "eager":
            steps[name] = Eager(policy, SETTINGS)
        else:
            kind = AttentionAwareDPOTrainer if name == "ours" else PlainDPOTrainer
            steps[name] = Ours(policy, pairs, folder / name, kind)
    return steps


def autocast():
    """bf16 on a GPU, as the trainers have it."""
    return torch.autocast("cuda", torch.bfloat16) if torch.cuda.is_available() else nullcontext()


def difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Norm of what two sets of gradients differ by, over the norm of the first. Raises ValueError if names differ."""
    if ours.keys() != theirs.keys():
        raise ValueError(f"gradients of different weights: {sorted(ours.keys() ^ theirs.keys())[:3]}")
    apart, whole = (torch.stack([(a - b).norm() for a, b in pairs]).norm() for pairs in (
        [(ours[name], theirs[name]) for name in ours], [(grad, 0.0) for grad in ours.values()]
    ))  # fmt: skip
    return (apart / whole).item()
