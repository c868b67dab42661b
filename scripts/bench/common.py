"""What the benchmarks share: models by size, prompts, interleaved timing, and the table of results."""

import argparse
import gc
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration

from llava.generation import PromptBatch, batch_prompts
from llava.runtime import ArgumentParser, git_commit, short_commit, versions
from scripts.miniature.model import build_processor

RESULTS = Path(__file__).parent / "RESULTS.md"
SIDE, PATCH = 336, 14  # of LLaVA-1.5: real images of 576 tokens
SIZES = {  # language model: hidden, layers, heads, feed-forward; vision tower: hidden, layers
    "tiny": (64, 4, 2, 128, 64, 2),
    "small": (256, 8, 8, 688, 128, 3),
    "shallow": (256, 4, 8, 688, 128, 2),
    "shallow_128": (256, 4, 2, 688, 128, 2),  # heads as large as those of 7b
    "medium": (768, 12, 12, 2048, 384, 6),
    "7b": (4096, 32, 32, 11008, 1024, 24),
}


def config_of(size: str, vocabulary: int = 32064, image_token: int = 32000) -> LlavaConfig:
    """A LLaVA-1.5's shape with 336 px images of 576 tokens."""
    hidden, layers, heads, feed_forward, vision_hidden, vision_layers = SIZES[size]
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    text = {
        "model_type": "llama", "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
        "intermediate_size": feed_forward, "vocab_size": vocabulary, "max_position_embeddings": 4096, **ids,
    }  # fmt: skip
    vision = {
        "model_type": "clip_vision_model", "hidden_size": vision_hidden, "num_hidden_layers": vision_layers,
        "num_attention_heads": vision_hidden // 64, "intermediate_size": 4 * vision_hidden, "image_size": SIDE,
        "patch_size": PATCH, "projection_dim": vision_hidden,
    }  # fmt: skip
    return LlavaConfig(
        text_config=text, vision_config=vision, image_token_index=image_token, vision_feature_layer=-2,
        vision_feature_select_strategy="default", **ids,
    )  # fmt: skip


def build(size: str, device: torch.device, dtype: torch.dtype, **config: int) -> LlavaForConditionalGeneration:
    """A model of random weights; `config` as of `config_of`."""
    torch.manual_seed(0)
    with torch.device(device):
        model = LlavaForConditionalGeneration(config_of(size, **config)).to(dtype)
    return model.eval()


def tokenizer():
    """Any tokenizer with the end token 2: random weights say nothing that could be read."""
    return build_processor().tokenizer


@dataclass(frozen=True)
class Pictures:
    """What one image is to a model."""

    tokens: int = 576
    side: int = SIDE
    image_token: int = 32000


def batch_of(counts: Sequence[int], words: int, seed: int, kind: Pictures = Pictures()) -> PromptBatch:
    """A batch of random sequence prompts of so many images each, the last image asked about."""
    generator = torch.Generator().manual_seed(seed)
    prompts, regions = [], []
    for number, count in enumerate(counts):
        text = torch.randint(300, 350, (words + seed % 5 + number,), generator=generator).tolist()
        images = [token for n in range(count) for token in (*text[:4], *[kind.image_token] * kind.tokens, 30 + n)]
        parts = torch.eye(count).repeat_interleave(kind.tokens, dim=1)
        prompts.append([1, *images, *text])
        regions.append(torch.cat([parts[-1:], torch.ones_like(parts[:1]), parts]))
    pixels = torch.randn(sum(counts), 3, kind.side, kind.side, generator=generator)
    return batch_prompts(prompts, regions, pixels, kind.image_token, 0, ["sequence"] * len(counts))


def alternate(runs: dict[str, Callable[[int], object]], repeats: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Seconds of every run in every repeat, the runs in turn (A B C, A B C, ...) after `warm_up` of each."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(-warm_up, repeats):
        for name, run in runs.items():
            _wait()
            start = time.perf_counter()
            run(max(repeat, 0))
            _wait()
            if repeat >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def release() -> None:
    """Give back what dropped models held; trainers are cycles, which only the collector finds."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def ratio(first: Sequence[float], second: Sequence[float]) -> str:
    """Median, lowest and highest of first / second, pair by pair."""
    pairs = [a / b for a, b in zip(first, second, strict=True)]
    return f"{statistics.median(pairs):.2f} ({min(pairs):.2f} to {max(pairs):.2f})"


def record(title: str, command: str, lines: Sequence[str]) -> None:
    """Print a result and append it to RESULTS.md with date, machine, commit and versions."""
    found = versions()
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU {platform.machine()}"
    kept = ", ".join(f"{name} {found[name]}" for name in ("python", "torch", "transformers"))
    threads = f"{torch.get_num_threads()} threads of {os.cpu_count()} cores"
    where = f"{date.today()}, {machine}, {threads}, commit {short_commit(git_commit(apart_from=RESULTS))}, {kept}"
    text = "\n".join([f"## {title}", "", f"`{command}`  ", where, "", *lines, ""])
    print(text)
    before = RESULTS.read_text(encoding="utf-8") if RESULTS.exists() else "# Results of the benchmarks\n"
    RESULTS.write_text(f"{before}\n{text}", encoding="utf-8")


def parser(description: str | None, size: str = "small", repeats: int = 5) -> argparse.ArgumentParser:
    """The flags of every benchmark, with their defaults."""
    parser = ArgumentParser(description=description, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default=size, help="of the random model; 7b needs a GPU")
    parser.add_argument("--repeats", type=int, default=repeats, help="counted runs of each, in turn")
    return parser


def device_and_dtype() -> tuple[torch.device, torch.dtype]:
    """bf16 on a GPU, else fp32 on the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda"), torch.bfloat16
    return torch.device("cpu"), torch.float32
