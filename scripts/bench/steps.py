"""One training step without its optimiser, in every way that is compared.

A step takes the loss of a batch, reference log-probs included, and its gradients. All have the same weights.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from datasets import Dataset
from torch import Tensor
from transformers.utils import is_torchvision_available

from llava.attention import NAME, install
from llava.families import Family
from scripts.bench import common, eager
from train.llava_hound_dpo.arguments import TrainArguments
from train.llava_hound_dpo.batches import make_plan
from train.llava_hound_dpo.data import PairDataset
from train.llava_hound_dpo.losses import PREFERENCE_LOSSES, LossSettings
from train.llava_hound_dpo.plan import shape_of
from train.llava_hound_dpo.scoring import score
from train.llava_hound_dpo.trainer import AttentionAwareDPOTrainer

SETTINGS = LossSettings(dpo_alpha=1.0, gamma=0.0, answer_end="kept")  # as TRL
NAMES = ("ours", "plain", "trl", "eager")


class Step:
    """A way to train `policy`: a call is a step and gives the loss. Each kind has `forward_and_backward`."""

    def __init__(self, policy, attention: str):
        self.policy, self.attention = policy, attention

    def __call__(self) -> Tensor:
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
        batch = eager.collate(list(pairs), pairs.family.image_id)
        self.batch = {name: tensor.to(policy.device) for name, tensor in batch.items()}
        self.layers = sorted(common.probed_layers(policy.config))

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
        row, features = inputs["row"], self._encode(inputs["pixels"])
        reference = self._reference(model, inputs, features, self.train_dataset)
        z = self._margin(score(model, row, features), reference, row)
        return PREFERENCE_LOSSES[self.settings.loss_type](z, self.settings.beta, 0.0).mean()


def build_trainer(policy, pairs: PairDataset, folder: Path, kind: type[AttentionAwareDPOTrainer], **flags):
    """Our trainer, or a `kind` of it, under autocast on a GPU unless the flags say otherwise."""
    base = policy.get_base_model()
    install(base)
    defaults = {"bf16": torch.cuda.is_available(), "gradient_checkpointing": True, "per_device_train_batch_size": 1}
    args = TrainArguments(output_dir=str(folder), report_to=[], disable_tqdm=True, **defaults | flags)
    batches = make_plan(
        [shape_of(pair, with_rejected=True).tokens for pair in pairs.pairs], args.per_device_train_batch_size,
        args.gradient_accumulation_steps, args.world_size, args.seed, args.num_train_epochs, args.max_steps,
    )  # fmt: skip
    args.accumulate(batches.accumulation)
    return kind(
        model=policy, args=args, train_dataset=pairs, batches=batches, processing_class=pairs.family.processor(),
        settings=SETTINGS, family=pairs.family,
        layers=common.probed_layers(base.config),
    )  # fmt: skip


def lacks_trl(family: Family) -> bool:
    """Whether transformers' processor of a family, which TRL takes, cannot be had here."""
    return not family.fixed and not is_torchvision_available()


def stock_processor(family: Family):
    """transformers' processor of a family; Qwen2.5-VL's has one for videos, which needs torchvision."""
    if family.fixed:
        return family.processor()
    from transformers import Qwen2_5_VLProcessor, Qwen2VLVideoProcessor

    return Qwen2_5_VLProcessor(family.image_processor, family.tokenizer, Qwen2VLVideoProcessor(), family.chat_template)


def build_trl(base, policy, pairs: PairDataset, folder: Path) -> TrainerStep:
    """TRL's DPOTrainer at its best settings, on a `base` of its own with LoRA of `policy`'s settings and weights.

    That is: SDPA, no truncation, its fused output layer, reference by switching the adapter off, checkpointing without
    re-entry, bf16 on a GPU. It has no precomputed reference for pictures and no packing. With LoRA and checkpointing
    its trainer makes all embeddings require gradients, so that the frozen vision tower has a backward pass (two or
    three percent of its step at our small size); that stays, as every user of it has it.
    """
    from trl import DPOConfig, DPOTrainer  # takes seconds to import

    begin = pairs.family.tokenizer.bos_token or ""
    examples = [
        {
            "images": [pairs.store.open(name) for name in record.images],
            "prompt": begin + pairs.family.render([(record.prompt, None)]),
            "chosen": record.chosen + pairs.family.end,
            "rejected": record.rejected[0] + pairs.family.end,
        }
        for record in (pair.record for pair in pairs.pairs)
    ]
    trainer = DPOTrainer(
        model=base,
        args=DPOConfig(
            output_dir=str(folder), max_length=None, report_to=[], per_device_train_batch_size=1, disable_tqdm=True,
            gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False},
            bf16=torch.cuda.is_available(), use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=Dataset.from_list(examples),
        processing_class=stock_processor(pairs.family),
        peft_config=policy.peft_config["default"],
    )  # fmt: skip
    adapter = {name: weight for name, weight in policy.state_dict().items() if "lora" in name}
    found = trainer.model.load_state_dict(adapter, strict=False)
    assert adapter and not found.unexpected_keys, "TRL's policy has other LoRA weights"
    trainer.model.activation_checkpointing_enable()
    return TrainerStep(trainer, "sdpa", examples)


def build_steps(
    names: Sequence[str], policy, build_base: Callable, pairs: PairDataset, folder: Path
) -> dict[str, Step]:
    """The steps of these names, all but TRL's of one policy; `build_base` makes the base of another one for TRL."""
    steps: dict[str, Step] = {}
    for name in names:
        if name == "trl":
            steps[name] = build_trl(build_base(), policy, pairs, folder / name)
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
