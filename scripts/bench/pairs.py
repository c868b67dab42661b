"""What the training benchmarks train: made-up pairs of noise pictures, and a random policy with LoRA."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from llava.image import ImageStore
from llava.records import Preference, read_preferences
from llava.regions import PatchGrid
from scripts.bench import common
from scripts.miniature.model import build_processor
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
    side: tuple[int, int] = (common.SIDE, common.SIDE)  # (width, height) of the stored pictures, px
    suffix: str = ".png"


@dataclass(frozen=True)
class Pairs:
    """Pairs on disk, as both trainers read them."""

    processor: LlavaProcessor
    records: list[Preference]
    dataset: PairDataset

    def items(self) -> list[dict]:
        """All of them, read."""
        return [self.dataset[index] for index in range(len(self.dataset))]

    @property
    def tokens(self) -> int:
        """Tokens of all pairs: prompts once, and both answers."""
        image = self.dataset.grid.num_tokens - 1  # more than its placeholder
        return sum(
            len(p.prompt) + image * len(p.record.images) + len(p.chosen) + len(p.rejected) for p in self.dataset.pairs
        )


def build_pairs(folder: Path, shape: Shape, config, processor: LlavaProcessor | None = None) -> Pairs:
    """Sequence pairs about their last image, written below `folder`; the same ones every time."""
    rng = np.random.default_rng(shape.images)
    processor = processor or build_big_processor()
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
    records = read_preferences(folder / "train.json")
    grid = PatchGrid.of(processor.image_processor, config.vision_config, pad=True)
    pairs = tokenize(records, processor.tokenizer, config.image_token_id, grid.num_tokens)
    assert [(len(p.chosen), len(p.rejected)) for p in pairs] == [(shape.chosen, shape.rejected)] * shape.count
    dataset = PairDataset(pairs, ImageStore(folder), processor.image_processor, grid, config.image_token_id)
    return Pairs(processor, records, dataset)


def build_big_processor() -> LlavaProcessor:
    """The miniature's processor with pictures of LLaVA-1.5's size."""
    processor = build_processor()
    processor.patch_size = common.PATCH
    processor.image_processor.size = {"shortest_edge": common.SIDE}
    processor.image_processor.crop_size = {"height": common.SIDE, "width": common.SIDE}
    return processor


def build_base(size: str) -> LlavaForConditionalGeneration:
    """A random LLaVA whose attention is far from uniform, so that two implementations could differ.

    Below 7B the vocabulary is as small as the miniature's: it keeps the output layer's share of the work at the two
    percent that it has at 7B, so that implementations with logits of every row are not made to look worse.
    """
    device, dtype = common.device_and_dtype()
    tokenizer = build_processor().tokenizer
    vocabulary = 32064 if size == "7b" else len(tokenizer)
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    model = common.build(size, device, dtype, vocabulary=vocabulary, image_token=image_token)
    with torch.no_grad():
        for layer in model.model.language_model.layers:
            for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
                projection.weight.mul_(1.8 / (projection.weight.std() * projection.in_features**0.5))
    return model


def add_lora(model, rank: int | None = None):
    """The policy, its adapter off its zero start so that policy and reference differ, checkpointing on."""
    rank = rank or max(1, round(LORA_SHARE * model.config.text_config.hidden_size))
    policy = make_trainable(model, ModelArguments("", lora_r=rank, lora_alpha=2 * rank), fp32_adapter=True)
    move_adapter(policy)
    policy.activation_checkpointing_enable()
    return policy


def move_adapter(policy) -> None:
    """Random weights in the half of LoRA that starts at zero; the same ones every time."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in sorted(policy.named_parameters()):
            if "lora_B" in name:
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
