"""What the benchmarks share: flags, models by size, made-up pairs, interleaved timing, and the tables of results."""

import copy
import gc
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import LlavaForConditionalGeneration

from llava import markdown
from llava.command_line import check_numbers, flag, parse
from llava.families import Family
from llava.families.llava15 import Llava15
from llava.image import ImageStore
from llava.records import read_preferences
from llava.runtime import git_commit, short_commit, user_errors, versions
from scripts.miniature.model import build_config, build_processor
from scripts.miniature.world import ATTRIBUTES
from train.llava_hound_dpo.arguments import ModelArguments
from train.llava_hound_dpo.data import PairDataset, tokenize
from train.llava_hound_dpo.model import make_trainable

RESULTS = Path("output/bench/RESULTS.md")  # from where what is to stay is copied to RESULTS.md beside this file
SIDE, PATCH = 336, 14  # of LLaVA-1.5: real images of 576 tokens
SIZES = {  # language model: hidden, layers, heads, feed-forward; vision tower: hidden, layers, heads
    "tiny": ((64, 4, 2, 128), (64, 2, 1)),
    "small": ((256, 8, 8, 688), (128, 3, 2)),
    "shallow": ((256, 4, 8, 688), (128, 2, 2)),
    "7b": ((4096, 32, 32, 11008), (1024, 24, 16)),
}
LORA_SHARE = 128 / 4096  # rank over hidden size, as of the launch script at 7B
WORDS = [word for values in ATTRIBUTES.values() for word in values]  # one token each


@dataclass(kw_only=True)
class Flags:
    """The flags of every benchmark."""

    size: str = flag("of the random model; 7b needs a GPU", "small", choices=list(SIZES))
    repeats: int = flag("counted runs of each, in turn", 5)

    def __post_init__(self):
        check_numbers(self, repeats=(1, None))


def flags_of(kind: type[Flags], description: str | None) -> Any:
    """One of `kind`, from the command line; ends in one line if that is wrong."""
    with user_errors():
        return parse((kind,), description)[0]


def build_family(size: str) -> Llava15:
    """LLaVA-1.5 with 336 px pictures of 576 tokens, bound to the config of a size and the miniature's tokenizer.

    Below 7B the vocabulary is as small as the miniature's: it keeps the output layer's share of the work at the two
    percent that it has at 7B, so that implementations with logits of every row are not made to look worse.
    """
    processor = build_processor(SIDE, PATCH)
    config = build_config(processor, *SIZES[size])
    config.text_config.max_position_embeddings = 4096
    if size == "7b":
        config.text_config.vocab_size = 32064
    return Llava15(config, processor.tokenizer, processor.image_processor)


def build_base(family: Llava15) -> LlavaForConditionalGeneration:
    """A model of random weights whose attention is far from uniform, so that two implementations could differ.

    On a GPU in bf16, else on the CPU in fp32.
    """
    on_gpu = torch.cuda.is_available()
    torch.manual_seed(0)
    with torch.device("cuda" if on_gpu else "cpu"):
        model = LlavaForConditionalGeneration(copy.deepcopy(family.config))
    model.to(torch.bfloat16 if on_gpu else torch.float32)
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
    assert [(len(p.chosen), *map(len, p.rejected)) for p in pairs] == [(shape.chosen, shape.rejected)] * shape.count
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


def alternate(runs: dict[str, Callable[[int], object]], repeats: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Seconds of every run in every repeat, the runs in turn (A B C, A B C, ...) after `warm_up` of each."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(-warm_up, repeats):
        for name, run in runs.items():
            start = clock()
            run(max(repeat, 0))
            if repeat >= 0:
                seconds[name].append(clock() - start)
    return seconds


def clock() -> float:
    """Seconds, once the GPU has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
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


def table(columns: Sequence[str]) -> list[str]:
    """Head of a table, numbers to the right."""
    return markdown.table(columns, ()).split("\n")


def record(title: str, bench: str, own: Flags, lines: Sequence[str]) -> None:
    """Print a result and append it to the results, with the command, date, machine, commit and versions."""
    words = [f"--{name} {' '.join(map(str, v)) if isinstance(v, list) else v}" for name, v in asdict(own).items()]
    found = versions()
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU {platform.machine()}"
    kept = ", ".join(f"{name} {found[name]}" for name in ("python", "torch", "transformers"))
    threads = f"{torch.get_num_threads()} threads of {os.cpu_count()} cores"
    where = f"{date.today()}, {machine}, {threads}, commit {short_commit(git_commit())}, {kept}"
    command = f"`python -m scripts.bench.{bench} {' '.join(words)}`  "
    text = "\n".join([f"## {title}", "", command, where, "", *lines, ""])
    print(text)
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(f"\n{text}")
