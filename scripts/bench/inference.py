"""Inference with attention ratios against generation without, and against one prompt at a time with attention maps:
`python -m scripts.bench.inference` (some minutes on a CPU; --size 7b on a GPU)

In turn, over the same prompts (about as long as each other, as batches sorted by length are): ours (batched, attention
probed), `generate` batched without attention, and one prompt at a time, eager, with `output_attentions`, reading off
only the rows it needs.
"""

import copy
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from llava.attention import install, layer_range
from llava.command_line import flag
from llava.generation import PromptBatch, generate
from scripts.bench import common
from scripts.miniature.model import build_model, build_processor


@dataclass(kw_only=True)
class Flags(common.Flags):
    """What is generated."""

    new_tokens: int = flag("tokens of every answer", 32)
    batch_size: int = flag("prompts at a time of the random model", 4)


def main() -> None:
    """Times the three on a random model, with 2 and with 5 images, and on the miniature."""
    own = common.flags_of(Flags, __doc__)
    device, dtype = common.device_and_dtype()
    small = build_model(build_processor(), seed=0).to(device, dtype).eval()
    big, tiny = common.build(own.size, device, dtype), common.Pictures(36, 72, small.config.image_token_id)
    lines = common.table([
        "model, prompts", "ours / `generate` without attention", "one at a time, eager / ours", "ours, prompts per s",
        "ratios differ by",
    ])  # fmt: skip
    for name, model, kind, size, images in (
        (f"{own.size}, 576 tokens an image", big, common.Pictures(), own.batch_size, 2),
        (f"{own.size}, 576 tokens an image", big, common.Pictures(), own.batch_size, 5),
        ("miniature, 36 tokens an image", small, tiny, 64, 4),
    ):
        batch = partial(common.batch_of, size, images, images, kind)
        cells = compare(copy.deepcopy(model), batch().to(device), [batch(only=n).to(device) for n in range(size)], own)
        lines.append(common.row([f"{name}, {size} x {images} images", *cells]))
    common.record("Inference: time, median (lowest to highest) of paired runs", "inference", own, lines)


def compare(model, batch: PromptBatch, alone: Sequence[PromptBatch], own: Flags) -> list[str]:
    """Cells of a row of the table; `alone` are the prompts of the batch."""
    layers = sorted(layer_range(model.config.text_config.num_hidden_layers, "auto"))
    plain, eager, tokenizer = copy.deepcopy(model), copy.deepcopy(model), common.tokenizer()
    install(model)
    eager.set_attn_implementation({"text_config": "eager"})
    length = {"min_new_tokens": own.new_tokens, "max_new_tokens": own.new_tokens}
    settings = {"do_sample": False, "pad_token_id": 0, **length}
    ratios: dict[str, list[float]] = {}

    def ours(repeat: int) -> None:
        ratios["ours"] = [answer.ratio for answer in generate(model, tokenizer, batch, layers, **settings)]

    def loop(repeat: int) -> None:
        ratios["eager"] = [one_by_one(eager, one, layers, settings) for one in alone]

    def without(repeat: int) -> None:
        with torch.no_grad():
            plain.generate(**inputs_of(batch), **settings)

    seconds = common.alternate({"ours": ours, "without": without, "loop": loop}, own.repeats)
    difference = max(abs(a - b) for a, b in zip(ratios["ours"], ratios["eager"], strict=True))
    rate = len(batch.input_ids) / statistics.median(seconds["ours"])
    times = [common.ratio(seconds[a], seconds[b]) for a, b in (("ours", "without"), ("loop", "ours"))]
    return [*times, f"{rate:.2f}", f"{difference:.1e}"]


def inputs_of(batch: PromptBatch) -> dict[str, torch.Tensor]:
    """What `generate` of transformers takes."""
    return {name: getattr(batch, name) for name in ("input_ids", "attention_mask", "pixel_values")}


@torch.no_grad()
def one_by_one(model, one: PromptBatch, layers: list[int], settings: dict) -> float:
    """The attention ratio of one answer, from attention maps."""
    out = model.generate(**inputs_of(one), output_attentions=True, return_dict_in_generate=True, **settings)
    length, ratios = one.input_ids.shape[1], []
    for layer in layers:  # of each step (1, H, S, S), then (1, H, 1, S + t): the last row
        rows = torch.stack([step[layer][0, :, -1, :length] for step in out.attentions], dim=1)
        target, images = rows.float().mean(dim=(0, 1)) @ one.regions[0, :, :2].float().to(rows.device)
        ratios.append(target / images)
    return torch.stack(ratios).mean().item()


if __name__ == "__main__":
    main()
