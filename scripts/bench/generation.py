"""What answering costs, lever by lever: `python -m scripts.bench.generation` (minutes on a CPU; --size 7b on a GPU)

Each way is one call of `generate` on the same batch of prompts, prefill and so many tokens; all ways take turns in one
run. The plain way has the cache with room, the probe and the adapter apart; every other one differs in one thing.
"""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from transformers import Cache, DynamicLayer

from llava import generation
from llava.attention import install, layer_range
from llava.command_line import check_numbers, flag, parse
from llava.families import Family
from llava.generation import PromptBatch, batch_prompts, generate
from llava.markdown import table
from llava.merging import merge
from llava.runtime import user_errors
from llava.scaling import Scale
from scripts.bench import common
from scripts.bench.common import ratio

COLUMNS = ("ways", "time: first / second", "answers equal")
# What is compared: name, first way, second way.
PAIRS = (
    ("transformers' cache / with room", "dynamic", "plain"), ("probe on / off", "plain", "unprobed"),
    ("adapter apart / merged", "plain", "merged"), ("AdaptViz / plain", "scaled", "plain"),
    ("the call / its first token", "plain", "first"),
)  # fmt: skip


@dataclass(kw_only=True)
class Flags:
    """What is measured."""

    family: str = flag("of the random model", "llava", choices=list(common.FAMILIES))
    size: str = flag("of the model; 7b needs a GPU", "shallow", choices=list(common.SIZES))
    prompts: int = flag("of the batch", 4)
    images: int = flag("of a prompt", 2)
    new_tokens: int = flag("of every answer", 64)
    repeats: int = flag("counted runs of each, in turn", 5)
    publish: bool = flag("append to scripts/bench/RESULTS.md, which git keeps, and not to output/bench/", False)

    def __post_init__(self):
        check_numbers(self, repeats=(1, 1000), images=(1, 100), prompts=(1, 1000), new_tokens=(2, 4096))


def main() -> None:
    """Measures and appends the table."""
    with user_errors():
        (own,) = parse((Flags,), __doc__)
    ways = build_ways(own, common.FAMILIES[own.family](own.size))
    answers = {name: [one.tokens for one in way()] for name, way in ways.items()}  # warms up as well
    seconds = common.alternate(ways, own.repeats)
    rows = [
        (title, ratio(seconds[first], seconds[second]), same(answers[first], answers[second]))
        for title, first, second in PAIRS
    ]
    flags = " ".join(f"--{name} {getattr(own, name)}" for name in ("family", "size", "prompts", "images", "new_tokens"))
    command = f"python -m scripts.bench.generation {flags} --repeats {own.repeats}"
    title = "Answering: time, median (lowest to highest) of paired runs"
    common.record(title, command, table(COLUMNS, rows), common.PUBLISHED if own.publish else common.RESULTS)


def same(ours: list[list[int]], theirs: list[list[int]]) -> str:
    """How many answers begin alike for as long as the shorter one is."""
    equal = sum(a[: len(b)] == b[: len(a)] for a, b in zip(ours, theirs, strict=True))
    return f"{equal} of {len(ours)}"


@torch.no_grad()
def build_ways(own: Flags, family: Family) -> dict[str, Callable]:
    """Every way to answer the batch; a call gives the answers."""
    base = common.build_base(family)
    install(base)
    apart = common.add_lora(base, family).to(base.dtype).eval()
    merged, _ = merge(copy.deepcopy(apart))
    batch, layers = build_batch(family, own), sorted(layer_range(len(base.model.language_model.layers), "auto"))

    def way(model=apart, layers=layers, steer=None, cache=None, tokens=own.new_tokens):
        with patch.object(generation, "new_cache", cache) if cache else nullcontext():
            return generate(model, family, batch, layers, steer, max_new_tokens=tokens, min_new_tokens=tokens)

    return {
        "plain": way,
        "dynamic": partial(way, cache=lambda: Cache(layer_class_to_replicate=DynamicLayer)),
        "unprobed": partial(way, layers=[]),
        "merged": partial(way, model=merged),
        "scaled": partial(way, steer=boost),
        "first": partial(way, tokens=1),
    }


def boost(confidence: torch.Tensor, batch: PromptBatch) -> Scale:
    """Attention on every prompt's target times 1.5 at the first token, as AdaptViz does it where it is unsure."""
    regions = batch.regions
    return Scale.of_last_row(torch.full((len(confidence),), 1.5), regions[..., 0], regions[..., 1] > 0)


def build_batch(family: Family, own: Flags) -> PromptBatch:
    """Prompts about their last of several pictures of noise, equally long."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (own.prompts, own.images, common.SIDE, common.SIDE, 3), dtype=np.uint8)
    pixels = family.join([family.pixels([Image.fromarray(one) for one in pictures]) for pictures in noise])
    images = family.images([(common.SIDE, common.SIDE)] * own.images)
    target = torch.cat([torch.full((len(i.areas),), float(n == own.images - 1)) for n, i in enumerate(images)])
    text = "".join(f"Image{n + 1}:<image>\n" for n in range(own.images)) + "What colour is the shape?"
    prompt = family.expand(family.encode_prompt(text), images)
    regions = torch.stack([target, torch.ones_like(target)])
    every = own.prompts
    return batch_prompts(family, [prompt] * every, [images] * every, [regions] * every, pixels)


if __name__ == "__main__":
    main()
