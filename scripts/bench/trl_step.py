"""TRL's DPOTrainer on the same pairs, at its best settings.

That is: SDPA, no truncation, its fused output layer, reference by switching the adapter off, checkpointing without
re-entry, bf16 on a GPU. It has no precomputed reference for pictures and no packing. With LoRA and checkpointing its
trainer makes all embeddings require gradients, so that the frozen vision tower has a backward pass (two or three
percent of its step at our small size); that stays, as every user of it has it.
"""

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from PIL import Image
from trl import DPOConfig, DPOTrainer

from llava.families.llava15 import vicuna_v1
from scripts.bench.pairs import Pairs
from scripts.bench.steps import TrainerStep


class Trl(TrainerStep):
    """`DPOTrainer`, with a policy of its own that has `policy`'s LoRA weights."""

    def __init__(self, base, policy, pairs: Pairs, folder: Path):
        super().__init__(build_trl(base, policy.peft_config["default"], pairs, folder), "sdpa")
        adapter = {name: weight for name, weight in policy.state_dict().items() if "lora" in name}
        found = self.policy.load_state_dict(adapter, strict=False)
        assert adapter and not found.unexpected_keys, "TRL's policy has other LoRA weights"
        self.policy.activation_checkpointing_enable()

    def load(self, pairs: Pairs) -> None:
        """A padded batch, chosen and rejected below each other, pictures twice."""
        self.batch = self.trainer.data_collator(examples(pairs))


def build_trl(base, settings, pairs: Pairs, folder: Path) -> DPOTrainer:
    """The trainer of a random base with LoRA of the given `settings` (a `LoraConfig`)."""
    return DPOTrainer(
        model=base,
        args=DPOConfig(
            output_dir=str(folder), max_length=None, report_to=[], per_device_train_batch_size=1, disable_tqdm=True,
            gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False},
            bf16=torch.cuda.is_available(), use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=Dataset.from_list(examples(pairs)),
        processing_class=pairs.processor,
        peft_config=settings,
    )  # fmt: skip


def examples(pairs: Pairs) -> list[dict[str, Any]]:
    """The pairs as TRL takes them."""
    folder = pairs.dataset.store.path
    return [
        {
            "images": [Image.open(folder / name) for name in record.images],
            "prompt": "<s>" + vicuna_v1([(record.prompt, None)]),
            "chosen": record.chosen + "</s>",
            "rejected": record.rejected + "</s>",
        }
        for record in pairs.records
    ]
