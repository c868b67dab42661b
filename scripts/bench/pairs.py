"""What the training benchmarks train: made-up pairs of noise pictures, and a random policy with LoRA."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from llava.families import Family
from llava.image import ImageStore
from llava.records import read_preferences
from scripts.bench.common import SIDE
from scripts.miniature.world import ATTRIBUTES
from train.llava_hound_dpo.arguments import ModelArguments
from train.llava_hound_dpo.data import PairDataset, tokenize
from train.llava_hound_dpo.model import make_trainable

LORA_SHARE = 128 / 4096  # rank over hidden size, as of the launch script at 7B
WORDS = [word for values in ATTRIBUTES.values() for word in values]  # one token each


@dataclass(frozen=True)
class Shape:
    """Pairs of the same size; the answers' tokens include the end token."""

    images: int = 4
    chosen: int = 75
    rejected: int = 60
    count: int = 1
    side: tuple[int, int] = (SIDE, SIDE)  # (width, height) of the stored pictures, px
    suffix: str = ".png"


def build_pairs(folder: Path, shape: Shape, family: Family) -> PairDataset:
    """Sequence pairs about their last image, written below `folder`; the same ones every time."""
    rng = np.random.default_rng(shape.images)
    folder.mkdir(parents=True, exist_ok=True)
    raw = []
    for number in range(shape.count):
        names = [f"{number}_{image}{shape.suffix}" for image in range(shape.images)]
        for name in names:
            noise = rng.integers(0, 256, (shape.side[1] // 8, shape.side[0] // 8, 3), dtype=np.uint8)
            Image.fromarray(noise).resize(shape.side, Image.Resampling.BICUBIC).save(folder / name)
        lines = "".join(f"Image{image + 1}:<image>\n" for image in range(shape.images))
        answers = {
            name: " ".join(rng.choice(WORDS, length - 1))  # and the end token
            for name, length in (("chosen", shape.chosen), ("rejected", shape.rejected))
        }
        prompt = f"{lines}In Image{shape.images}, what colour is the shape?"
        # Named, because "In Image1" about one picture would be read as a collage's.
        raw.append({"image": names, "prompt": prompt, "image_type": "sequence", "target": shape.images, **answers})
    (folder / "train.json").write_text(json.dumps(raw), encoding="utf-8")
    store = ImageStore(folder)
    pairs = tokenize(read_preferences(folder / "train.json"), family, store)
    assert [(len(p.chosen), len(p.rejected)) for p in pairs] == [(shape.chosen, shape.rejected)] * shape.count
    return PairDataset(pairs, store, family)


def add_lora(model, family: Family, rank: int | None = None):
    """The policy, its adapter off its zero start so that policy and reference differ, checkpointing on."""
    rank = rank or max(1, round(LORA_SHARE * model.config.text_config.hidden_size))
    arguments = ModelArguments("", lora_r=rank, lora_alpha=2 * rank)
    policy = make_trainable(model, type(family), arguments, fp32_adapter=True)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in sorted(policy.named_parameters()):
            if "lora_B" in name:
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    policy.activation_checkpointing_enable()
    return policy
