"""Training steps and batches of prompts, made up on the spot."""

from pathlib import Path

import numpy as np
from PIL import Image

from llava.attention import NAME
from llava.families import Family, Llava15
from llava.generation import PromptBatch, batch_prompts
from llava.records import parse_question
from llava.regions import prompt_regions
from scripts.bench.common import build_llava
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


def prompt_batch(family: Family, count: int, images: int) -> PromptBatch:
    """Prompts about pictures of noise, each a few tokens longer than the one before, so that they are padded."""
    prompts, tokens, regions, pixels = [], [], [], []
    lines = "".join(f"Image{number + 1}:<image>\n" for number in range(images))
    rng = np.random.default_rng(0)
    for number in range(count):
        text = f"{lines}In Image{images}, what is the colour{' of the shape' * number}?"
        raw = {"image": ["-"] * images, "prompt": text, "answer": "red", "image_type": "sequence", "target": images}
        question = parse_question(raw, "a prompt made up")
        noise = rng.integers(0, 256, (images, 64, 64, 3), dtype=np.uint8)
        pictures = [Image.fromarray(picture).resize((family.side, family.side)) for picture in noise]
        own = family.images([picture.size for picture in pictures])
        prompts.append(family.expand(family.encode_prompt(question.prompt), own))
        tokens.append(own)
        regions.append(prompt_regions(question, own))
        pixels.append(family.pixels(pictures))
    return batch_prompts(family, prompts, tokens, regions, family.join(pixels), ["sequence"] * count)
