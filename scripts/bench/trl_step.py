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
from trl import DPOConfig, DPOTrainer

from train.llava_hound_dpo.data import PairDataset


def build_trainer(base, policy, pairs: PairDataset, folder: Path) -> DPOTrainer:
    """The trainer of a random base, with LoRA of `policy`'s settings and weights."""
    trainer = DPOTrainer(
        model=base,
        args=DPOConfig(
            output_dir=str(folder), max_length=None, report_to=[], per_device_train_batch_size=1, disable_tqdm=True,
            gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False},
            bf16=torch.cuda.is_available(), use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=Dataset.from_list(examples(pairs)),
        processing_class=pairs.family.processor(),
        peft_config=policy.peft_config["default"],
    )  # fmt: skip
    adapter = {name: weight for name, weight in policy.state_dict().items() if "lora" in name}
    found = trainer.model.load_state_dict(adapter, strict=False)
    assert adapter and not found.unexpected_keys, "TRL's policy has other LoRA weights"
    trainer.model.activation_checkpointing_enable()
    return trainer


def examples(pairs: PairDataset) -> list[dict[str, Any]]:
    """The pairs as TRL takes them."""
    return [
        {
            "images": [pairs.store.open(name) for name in record.images],
            "prompt": "<s>" + pairs.family.render([(record.prompt, None)]),
            "chosen": record.chosen + "</s>",
            "rejected": record.rejected + "</s>",
        }
        for record in (pair.record for pair in pairs.pairs)
    ]
