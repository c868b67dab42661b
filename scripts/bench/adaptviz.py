"""What AdaptViz costs: `python -m scripts.bench.adaptviz` (some minutes on a CPU; --size 7b on a GPU)

In turn, over the same prompts of 2 and of 5 images: plain generation, AdaptViz (every sample scaled, so that the last
prompt token is always run again), and the tuner's grid of 37 variants for short answers.
"""

import copy

import torch

from inference_optimization.llava_hound_dpo.adaptviz import AdaptViz, Bands
from inference_optimization.llava_hound_dpo.grid import PLAIN, Variant, answer_grid
from llava.attention import install
from llava.families import Family
from llava.generation import PromptBatch, batch_prompts, generate
from llava.markdown import row
from scripts.bench import common

FACTORS = (0.5, 0.8, 1.2, 1.5, 2.0, 3.0)
GRID = [PLAIN, *(Variant(s, r, f) for s in ("target", "all", "balance") for r in ("multiply", "add") for f in FACTORS)]
LONG, SHORT = 64, 8  # tokens of an answer, and of a short one, as the tuner is for
BATCH = 2


def main() -> None:
    """Times all of them on a random model."""
    own = common.flags_of(common.Flags, __doc__)
    family = common.build_family(own.size)
    model = common.build_base(family)
    install(model)
    grid = f"grid of {len(GRID)} / plain, {SHORT} tokens"
    lines = common.table(["images", f"AdaptViz / plain, {LONG} tokens", grid])
    lines += [compare(model, family, images, own.repeats) for images in (2, 5)]
    common.record("AdaptViz: time, median (lowest to highest) of paired runs", "adaptviz", own, lines)


def compare(model, family: Family, images: int, repeats: int) -> str:
    """A row of the table."""
    batch = batch_of(family, images).to(model.device)
    steer = AdaptViz(bands=Bands.fixed(1.5)).steer
    no_end = copy.deepcopy(family.tokenizer)
    no_end.eos_token = "<unk>"  # answers of the grid do not end early, so that they are as long as the plain ones

    def ours(tokens: int, steer=None) -> None:
        generate(model, family, batch, [], steer, min_new_tokens=tokens, max_new_tokens=tokens)

    seconds = common.alternate({
        "plain": lambda repeat: ours(LONG),
        "adaptviz": lambda repeat: ours(LONG, steer),
        "short": lambda repeat: ours(SHORT),
        "grid": lambda repeat: answer_grid(model, no_end, batch, GRID, SHORT),
    }, repeats)  # fmt: skip
    pairs = (("adaptviz", "plain"), ("grid", "short"))
    return row([images, *(common.ratio(seconds[a], seconds[b]) for a, b in pairs)])


def batch_of(family: Family, images: int) -> PromptBatch:
    """Sequence prompts of random words, each a word longer than the one before, the last image asked about."""
    generator = torch.Generator().manual_seed(images)
    side, picture = common.SIDE, family.image((common.SIDE, common.SIDE))
    parts = torch.eye(images).repeat_interleave(len(picture.ids), dim=1)
    prompts = []
    for number in range(BATCH):
        text = torch.randint(300, 350, (40 + number,), generator=generator).tolist()
        prompts.append(family.expand([1, *[*text[:4], family.image_id] * images, *text], [picture] * images))
    regions = [torch.cat([parts[-1:], torch.ones_like(parts[:1]), parts])] * BATCH
    pixels = {"pixel_values": torch.randn(BATCH * images, 3, side, side, generator=generator)}
    return batch_prompts(family, prompts, regions, pixels, ["sequence"] * BATCH)


if __name__ == "__main__":
    main()
