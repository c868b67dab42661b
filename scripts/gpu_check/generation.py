"""Answers to a batch of prompts with several pictures each: ours, transformers' own, and steered."""

import math
from collections.abc import Iterator
from functools import partial

import torch

from llava.adaptviz import AdaptViz
from llava.attention import install, layer_range
from llava.families import Family, model_inputs
from llava.generation import PromptBatch, generate
from scripts.bench.common import build_base
from scripts.gpu_check.common import Finding, Settings, aimed, judged, peak_gib, seconds
from scripts.gpu_check.models import family_of, prompt_batch

SECTION = "generation"


def run(settings: Settings) -> Iterator[Finding]:
    """Memory, and of each way the time of the first token and of those after it."""
    family, own = family_of(settings), settings.sizes
    model = build_base(family, settings.device)
    install(model)
    layers = sorted(layer_range(model.config.text_config.num_hidden_layers, "auto"))
    batch = prompt_batch(family, settings, own.prompts, own.prompt_images)
    steer = AdaptViz().steer
    ways = {
        "ours": lambda tokens: generate(model, family, batch, layers, **fixed(tokens)),
        "plain generate": lambda tokens: plain(model, family, batch, tokens),
        "AdaptViz": lambda tokens: generate(model, family, batch, layers, steer, **fixed(tokens)),
    }
    found, taken = {}, {}
    peak = peak_gib(settings, lambda: found.update(ours=ways["ours"](own.new_tokens)))
    yield Finding(SECTION, f"peak memory of {own.prompts} prompts of {own.prompt_images} images", peak, "GiB")
    ratios = [answer.ratio for answer in found["ours"]]
    is_right = all(ratio is not None and math.isfinite(ratio) for ratio in ratios)
    shown = sum(ratios) / len(ratios) if is_right else str(ratios)
    yield judged(SECTION, "mean ratio", shown, is_right, "attention gives numbers that are none here: see the kernels")
    for name, way in ways.items():
        way(2)  # warms up
        first, taken[name] = (seconds(settings, partial(way, count), own.repeats) for count in (1, own.new_tokens))
        yield Finding(SECTION, f"{name}: prefill", first, "s")
        yield Finding(SECTION, f"{name}: a token", 1e3 * (taken[name] - first) / (own.new_tokens - 1), "ms")
    told = "the probe of every token, or the cache, costs too much"
    yield aimed(settings, SECTION, "ours / plain generate", taken["ours"] / taken["plain generate"], 1.05, 1.3, told)
    told = "only the last row of the prompt should be computed again"
    yield aimed(settings, SECTION, "AdaptViz / ours", taken["AdaptViz"] / taken["ours"], 1.05, 1.3, told)


def fixed(tokens: int) -> dict[str, int]:
    """Settings of answers of exactly so many tokens."""
    return {"max_new_tokens": tokens, "min_new_tokens": tokens}


@torch.no_grad()
def plain(model, family: Family, batch: PromptBatch, tokens: int) -> None:
    """Answers by transformers alone, with its own attention, and nothing measured of it."""
    model.set_attn_implementation({"text_config": "sdpa"})
    batch = batch.to(model.device)
    pictures = model_inputs(family.encode(model, batch.pixels), batch.positions)
    model.generate(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, do_sample=False,
        pad_token_id=family.tokenizer.pad_token_id, eos_token_id=family.end_id, **pictures, **fixed(tokens),
    )  # fmt: skip
    install(model)
