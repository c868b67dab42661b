"""What the benchmarks share: flags, models by size, prompts, interleaved timing, and the tables of results."""

import gc
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from datetime import date
from pathlib import Path
from typing import Any

import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration

from llava.command_line import check_numbers, flag, parse
from llava.generation import PromptBatch, batch_prompts
from llava.runtime import git_commit, short_commit, user_errors, versions
from scripts.miniature.model import build_processor

RESULTS = Path("output/bench/RESULTS.md")
PUBLISHED = Path(__file__).parent / "RESULTS.md"
SIDE, PATCH = 336, 14  # of LLaVA-1.5: real images of 576 tokens
SIZES = {  # language model: hidden, layers, heads, feed-forward; vision tower: hidden, layers
    "tiny": (64, 4, 2, 128, 64, 2),
    "small": (256, 8, 8, 688, 128, 3),
    "shallow": (256, 4, 8, 688, 128, 2),
    "medium": (768, 12, 12, 2048, 384, 6),
    "7b": (4096, 32, 32, 11008, 1024, 24),
}


@dataclass(kw_only=True)
class Flags:
    """The flags of every benchmark."""

    size: str = flag("of the random model; 7b needs a GPU", "small", choices=list(SIZES))
    repeats: int = flag("counted runs of each, in turn", 5)
    publish: bool = flag("append to RESULTS.md beside the code, not to output/bench/RESULTS.md", False)

    def __post_init__(self):
        check_numbers(self, repeats=(1, None))


def flags_of(kind: type[Flags], description: str | None) -> Any:
    """One of `kind`, from the command line; ends in one line if that is wrong."""
    with user_errors():
        return parse((kind,), description)[0]


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


def batch_of(count: int, images: int, seed: int, kind: Pictures = Pictures(), only: int | None = None) -> PromptBatch:
    """A batch of `count` random sequence prompts, or one of them alone, the last image asked about."""
    generator, words = torch.Generator().manual_seed(seed), 40
    prompts, regions = [], []
    parts = torch.eye(images).repeat_interleave(kind.tokens, dim=1)
    for number in range(count):
        text = torch.randint(300, 350, (words + seed % 5 + number,), generator=generator).tolist()
        pictures = [token for n in range(images) for token in (*text[:4], *[kind.image_token] * kind.tokens, 30 + n)]
        prompts.append([1, *pictures, *text])
        regions.append(torch.cat([parts[-1:], torch.ones_like(parts[:1]), parts]))
    pixels = torch.randn(count, images, 3, kind.side, kind.side, generator=generator)
    rows = slice(None) if only is None else slice(only, only + 1)
    own = prompts[rows], regions[rows], pixels[rows].flatten(0, 1)
    return batch_prompts(*own, kind.image_token, 0, ["sequence"] * len(own[0]))


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


def table(columns: Sequence[str]) -> list[str]:
    """Head of a table, numbers to the right."""
    return [row(columns), row(["---", *["---:"] * (len(columns) - 1)])]


def row(cells: Sequence[Any]) -> str:
    """A line of a table."""
    return f"| {' | '.join(map(str, cells))} |"


def record(title: str, bench: str, own: Flags, lines: Sequence[str]) -> None:
    """Print a result and append it to the results, with the command, date, machine, commit and versions.

    The published results are tracked: a change of theirs is no change of the code that was measured.
    """
    values = {field.name: getattr(own, field.name) for field in fields(own) if field.name != "publish"}
    words = [f"--{name} {' '.join(map(str, v)) if isinstance(v, list) else v}" for name, v in values.items()]
    found = versions()
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU {platform.machine()}"
    kept = ", ".join(f"{name} {found[name]}" for name in ("python", "torch", "transformers"))
    threads = f"{torch.get_num_threads()} threads of {os.cpu_count()} cores"
    where = f"{date.today()}, {machine}, {threads}, commit {short_commit(git_commit(apart_from=PUBLISHED))}, {kept}"
    command = f"`python -m scripts.bench.{bench} {' '.join(words)}`  "
    text = "\n".join([f"## {title}", "", command, where, "", *lines, ""])
    print(text)
    path = PUBLISHED if own.publish else RESULTS
    path.parent.mkdir(parents=True, exist_ok=True)
    before = path.read_text(encoding="utf-8") if path.exists() else "# Results of the benchmarks\n"
    path.write_text(f"{before}\n{text}", encoding="utf-8")


def device_and_dtype() -> tuple[torch.device, torch.dtype]:
    """bf16 on a GPU, else fp32 on the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda"), torch.bfloat16
    return torch.device("cpu"), torch.float32
