"""Training steps and batches of prompts, made up on the spot."""

from pathlib import Path

import torch

from llava.attention import NAME
from llava.families import Family, Llava15
from llava.generation import PromptBatch, batch_prompts
from scripts.bench.common import Shape, build_llava, build_pairs
from scripts.bench.steps import TrainerStep, build_trainer
from scripts.gpu_check.common import Settings
from scripts.miniature.model import build
from train.llava_hound_dpo.data import PairDataset
from train.llava_hound_dpo.trainer import AttentionAwareDPOTrainer


def family_of(settings: Settings) -> Llava15:
    """LLaVA-1.5 at 7B's size, or the miniature."""
    return build_llava("7b") if settings.size == "7b" else build(0)[1]


def production_step(
    policy, pairs: PairDataset, folder: Path, device: str, kind: type[AttentionAwareDPOTrainer]
) -> TrainerStep:
    """A step of a trainer on these pairs as one row, as under DeepSpeed: in the weights' precision, no autocast."""
    trainer = build_trainer(policy, pairs, folder, kind, bf16=False, use_cpu=device == "cpu")
    return TrainerStep(trainer, NAME, list(pairs))


def prompt_batch(family: Family, settings: Settings, count: int, images: int) -> PromptBatch:
    """Prompts about pictures of noise, the last with one picture less, so that it is padded."""
    shapes = (Shape(images, count=count - 1), Shape(images - 1))
    items = [item for shape in shapes for item in build_pairs(settings.folder / f"{shape.images}", shape, family)]
    encoded = [item["pair"] for item in items]
    own = [family.images([(family.side, family.side)] * number) for number in [images] * (count - 1) + [images - 1]]
    regions = [torch.stack([pair.target, torch.ones_like(pair.target)]) for pair in encoded]
    pixels = family.join([item["pixels"] for item in items])
    return batch_prompts(family, [pair.prompt for pair in encoded], own, regions, pixels, [(0,)] * count)
