"""What is measured and how: models by size, made-up pairs, timing in turn, and where the results go."""

import copy
import gc
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from llava.families import Family, Llava15, QwenVL
from llava.image import ImageStore
from llava.records import read_preferences
from llava.runtime import git_commit, short_commit, versions
from scripts.miniature import qwen
from scripts.miniature.model import build_config, build_processor
from scripts.miniature.world import ATTRIBUTES
from train.llava_hound_dpo.arguments import LossArguments, ModelArguments
from train.llava_hound_dpo.data import PairDataset, tokenize
from train.llava_hound_dpo.model import make_trainable

RESULTS = Path("output/bench/RESULTS.md")
PUBLISHED = Path(__file__).parent / "RESULTS.md"  # what is to stay
SIDE, PATCH = 336, 14  # of LLaVA-1.5: real images of 576 tokens; 144 of Qwen2.5-VL
SIZES = {  # language model: hidden, layers, heads, feed-forward; vision tower: hidden, layers, heads
    "tiny": ((64, 4, 2, 128), (64, 2, 1)),
    "shallow": ((256, 4, 8, 688), (128, 2, 2)),
    "7b": ((4096, 32, 32, 11008), (1024, 24, 16)),
    "13b": ((5120, 40, 40, 13824), (1024, 24, 16)),
}
LORA_SHARE = 128 / 4096  # rank over hidden size, as of the launch script at 7B
WORDS = [word for values in ATTRIBUTES.values() for word in values]  # one token each


def probed_layers(config) -> frozenset[int]:
    """The layers of a model of this config that training probes by default."""
    return LossArguments().layers(config.get_text_config().num_hidden_layers)


def build_llava(size: str) -> Llava15:
    """LLaVA-1.5 with 336 px pictures of 576 tokens, bound to the config of a size and the miniature's tokenizer.

    Below 7B the vocabulary is as small as the miniature's: it keeps the output layer's share of the work at the two
    percent that it has at 7B, so that implementations with logits of every row are not made to look worse.
    """
    processor = build_processor(SIDE, PATCH)
    config = build_config(processor, *SIZES[size])
    config.text_config.max_position_embeddings = 4096
    if size in ("7b", "13b"):
        config.text_config.vocab_size = 32064
    return Llava15(config, processor.tokenizer, processor.image_processor)


def build_qwen(size: str) -> QwenVL:
    """Qwen2.5-VL with pictures as published and 336 px ones of 144 tokens, of the same sizes and as few words.

    Four heads share keys and values, and all blocks of the tower but the last look at windows.
    """
    (width, layers, heads, inner), (seen, depth, eyes) = SIZES[size]
    tokenizer = qwen.build_tokenizer([f" {word}" for word in WORDS])
    axis = width // heads // 16  # numbers of a head that turn with time are two parts of eight, with either side three
    text = {
        "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads, "intermediate_size": inner,
        "num_key_value_heads": max(1, heads // 4), "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2 * axis, 3 * axis, 3 * axis]},
        **({"vocab_size": 152064} if size in ("7b", "13b") else {}),
    }  # fmt: skip
    vision = {
        "hidden_size": seen, "depth": depth, "num_heads": eyes, "intermediate_size": 8 * seen // 3, "patch_size": PATCH,
        "window_size": 8 * PATCH, "fullatt_block_indexes": [depth - 1], "out_hidden_size": width,
    }  # fmt: skip
    return QwenVL(qwen.build_config(tokenizer, text, vision), tokenizer, Qwen2VLImageProcessorPil())


FAMILIES = {"llava": build_llava, "qwen": build_qwen}


def build_base(family: Family, device: str | None = None):
    """A model of random weights whose attention is far from uniform, so that two implementations could differ.

    On a GPU in bf16, drawn as such, else on the CPU in fp32; `device` says which, else a GPU where there is one.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32 if device.type == "cpu" else torch.bfloat16)
    try:
        with device:
            model = family.model_class(family.config)(copy.deepcopy(family.config))
    finally:
        torch.set_default_dtype(before)
    with torch.no_grad():
        for layer in model.model.language_model.layers:
            for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
                projection.weight.mul_(1.8 / (projection.weight.std() * projection.in_features**0.5))
    return model.eval()


@dataclass(frozen=True)
class Shape:
    """Pairs of the same size; the answers' tokens include the end token."""

    images: int = 4
    chosen: int = 75
    rejected: int = 60
    count: int = 1


def build_pairs(folder: Path, shape: Shape, family: Family) -> PairDataset:
    """Sequence pairs about their last image, written below `folder`; the same ones every time."""
    rng, side = np.random.default_rng(shape.images), family.side if family.fixed else SIDE
    folder.mkdir(parents=True, exist_ok=True)
    raw = []
    for number in range(shape.count):
        names = [f"{number}_{image}.png" for image in range(shape.images)]
        for name in names:
            noise = rng.integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8)
            Image.fromarray(noise).resize((side, side), Image.Resampling.BICUBIC).save(folder / name)
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
    assert [(len(p.chosen), *map(len, p.rejected)) for p in pairs] == [(shape.chosen, shape.rejected)] * shape.count
    return PairDataset(pairs, store, family)


def add_lora(model, family: Family, rank: int | None = None, fp32_adapter: bool = True):
    """The policy, its adapter off its zero start so that policy and reference differ, checkpointing on."""
    rank = rank or max(1, round(LORA_SHARE * model.config.text_config.hidden_size))
    arguments = ModelArguments("", lora_r=rank, lora_alpha=2 * rank)
    policy = make_trainable(model, type(family), arguments, fp32_adapter)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in sorted(policy.named_parameters()):
            if "lora_B" in name:
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    policy.activation_checkpointing_enable()
    return policy


def alternate(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of every run in every repeat, the runs in turn: A B C, A B C, ..."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            start = clock()
            run()
            seconds[name].append(clock() - start)
    return seconds


def clock() -> float:
    """Seconds, once the GPU has done what it was given; of one thread on a CPU those it ran, whoever else was there."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    elif torch.get_num_threads() == 1:
        return time.process_time()
    return time.perf_counter()


def release() -> None:
    """Give back what dropped models held; trainers are cycles, which only the collector finds."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def ratio(first: Sequence[float], second: Sequence[float]) -> str:
    """Median, lowest and highest of first / second, pair by pair."""
    pairs = [a / b for a, b in zip(first, second, strict=True)]
    return f"{statistics.median(pairs):.2f} ({min(pairs):.2f} to {max(pairs):.2f})"


def record(title: str, command: str, table: str, results: Path) -> None:
    """Print a table and append it to a file, with the command, date, machine, commit and versions."""
    found = versions()
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU {platform.machine()}"
    kept = ", ".join(f"{name} {found[name]}" for name in ("python", "torch", "transformers"))
    threads = f"{torch.get_num_threads()} threads of {os.cpu_count()} cores"
    where = f"{date.today()}, {machine}, {threads}, commit {short_commit(git_commit())}, {kept}"
    text = f"## {title}\n\n`{command}`  \n{where}\n\n{table}\n"
    print(text)
    results.parent.mkdir(parents=True, exist_ok=True)
    with results.open("a", encoding="utf-8") as file:
        file.write(f"\n{text}")
