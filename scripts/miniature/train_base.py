"""Makes the miniature's base model from nothing: `python -m scripts.miniature.train_base --output DIR --seed 0`.

Three stages. The vision tower learns what each patch belongs to. Projector and language model learn to read single
pictures. Then they learn to find the picture asked about among several: one layer's attention is guided there, because
routing that had to be found by chance did not form in thousands of steps. This last stage ends once routing is partly
formed, by a fixed check on held-out prompts, so that what is built on the base has something to improve.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import LlavaForConditionalGeneration, LlavaProcessor
from transformers.utils import logging as transformers_logging

from llava.runtime import ArgumentParser
from scripts.miniature.lessons import PATCHES, Batch, conversation_batch, patch_batch
from scripts.miniature.model import VISION_WIDTH, build_model, build_processor
from scripts.miniature.prompts import sample_prompt
from scripts.miniature.scores import answer, score_base, summarize
from scripts.miniature.world import ATTRIBUTES

VISION_STEPS, VISION_BATCH, VISION_RATE = 1500, 48, 1.5e-3
VISION_MIX = {"single": 0.4, "collage": 0.35, "pip": 0.25}
READING_STEPS, READING_BATCH, READING_RATE = 160, 48, 1e-3
ROUTING_STEPS, ROUTING_RATE = 800, 1e-3  # at most; see CHECK_EVERY
CHECK_EVERY, CHECK_PROMPTS, ROUTED = 10, 150, 60.0  # ends at this accuracy (%) on validation prompts of three pictures
ROUTING_MIX = {"single": 0.25, "sequence": 0.42, "collage": 0.25, "pip": 0.08}
ROUTING_BATCH = {"single": 32, "sequence": 12, "collage": 24, "pip": 24}
SEQUENCE_SCENES = (2, 3, 4, 5)
QUESTIONS = 6  # of a conversation about several pictures; five attributes of a single one
GUIDE_WEIGHT, GUIDE_LAYER = 0.3, 2
WARMUP = 0.05  # share of a stage's steps over which the rate rises
COOLDOWN = 0.25  # share over which it falls again
WEIGHT_DECAY, MAX_GRAD_NORM = 0.01, 1.0
POSITION_WEIGHT = 0.1  # of the head that keeps a patch's place readable from its features


def main() -> None:
    """Trains, scores and saves the base."""
    args = parse_args()
    torch.set_num_threads(1)  # the same sums in the same order on every machine
    transformers_logging.set_verbosity_error()
    rng = np.random.default_rng(args.seed)
    processor = build_processor()
    model = build_model(processor, args.seed)
    steps, seconds = {}, {}
    for stage in (train_vision, train_reading, train_routing):
        start = time.perf_counter()
        steps[stage.__name__] = stage(model, processor, rng)
        seconds[stage.__name__] = round(time.perf_counter() - start)
    save(model, processor, args.output)
    scores = score_base(model.eval(), processor, args.num_test) | {
        "steps": steps,
        "seconds": seconds,
        "seed": args.seed,
    }
    (args.output / "base_scores.json").write_text(json.dumps(scores, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(scores, indent=1))


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--seed", type=int, default=0, help="of weights and lessons")
    parser.add_argument("--num_test", type=int, default=400, help="held-out prompts for each score")
    return parser.parse_args()


def train_vision(model: LlavaForConditionalGeneration, processor: LlavaProcessor, rng: np.random.Generator) -> int:
    """Every patch learns the five attributes of the scene it belongs to, and its own place. Returns the steps made.

    A tower that keeps the regions of one picture apart is what collages and pictures in pictures need.
    """
    tower = model.model.vision_tower
    sizes = [len(values) for values in ATTRIBUTES.values()]
    heads = nn.Linear(VISION_WIDTH, sum(sizes) + PATCHES**2)
    optimizer, schedule = optimizer_for([*tower.parameters(), *heads.parameters()], VISION_RATE, VISION_STEPS)
    names, shares = list(VISION_MIX), list(VISION_MIX.values())
    places = torch.arange(PATCHES**2).repeat(VISION_BATCH)
    progress = tqdm(range(VISION_STEPS), desc="vision")
    for _ in progress:
        image_types = [str(name) for name in rng.choice(names, VISION_BATCH, p=shares)]
        pixels, owners, values = patch_batch(rng, processor, "train", image_types)
        features = tower(pixels, output_hidden_states=True).hidden_states[model.config.vision_feature_layer]
        *logits, place = heads(features[:, 1:]).flatten(0, 1).split([*sizes, PATCHES**2], dim=-1)
        truth = values[torch.arange(len(values))[:, None], owners].flatten(0, 1)  # (patches of all, attributes)
        loss = sum(F.cross_entropy(part, truth[:, i]) for i, part in enumerate(logits)) / len(sizes)
        accuracy = [(part.argmax(-1) == truth[:, i]).float().mean().item() for i, part in enumerate(logits)]
        update(loss + POSITION_WEIGHT * F.cross_entropy(place, places), optimizer, schedule)
        progress.set_postfix(loss=f"{loss.item():.2f}", accuracy=" ".join(f"{value:.2f}" for value in accuracy))
    tower.requires_grad_(False)
    return VISION_STEPS


def train_reading(model: LlavaForConditionalGeneration, processor: LlavaProcessor, rng: np.random.Generator) -> int:
    """Projector and language model learn to answer about one picture, behind the frozen tower."""
    optimizer, schedule = optimizer_for(trained(model), READING_RATE, READING_STEPS)
    progress = tqdm(range(READING_STEPS), desc="reading")
    for _ in progress:
        batch = conversation_batch(rng, processor, "single", None, READING_BATCH, len(ATTRIBUTES))
        learn(model, batch, optimizer, schedule, progress, "single", is_guided=False)
    return READING_STEPS


def train_routing(model: LlavaForConditionalGeneration, processor: LlavaProcessor, rng: np.random.Generator) -> int:
    """They learn all formats, one format a step, with attention guided where pictures or cells compete."""
    optimizer, schedule = optimizer_for(trained(model), ROUTING_RATE, ROUTING_STEPS)
    check = [sample_prompt(np.random.default_rng(n), "validation", "sequence", 3) for n in range(CHECK_PROMPTS)]
    model.set_attn_implementation({"text_config": "eager"})  # the guide reads attention maps
    progress = tqdm(range(1, ROUTING_STEPS + 1), desc="routing")
    for step in progress:
        kind = str(rng.choice(list(ROUTING_MIX), p=list(ROUTING_MIX.values())))
        num_scenes = int(rng.choice(SEQUENCE_SCENES))
        batch = conversation_batch(rng, processor, kind, num_scenes, ROUTING_BATCH[kind], QUESTIONS)
        learn(model, batch, optimizer, schedule, progress, kind, is_guided=kind in ("sequence", "collage"))
        if step % CHECK_EVERY == 0 and summarize(check, answer(model, processor, check))["accuracy"] >= ROUTED:
            break
    model.set_attn_implementation({"text_config": "sdpa"})
    return step


def trained(model: LlavaForConditionalGeneration) -> list[nn.Parameter]:
    """Everything but the frozen tower."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def learn(model, batch: Batch, optimizer, schedule, progress: tqdm, kind: str, is_guided: bool) -> None:
    """One step on the answers of a batch; logits are computed at answers only."""
    before = batch.answers.roll(-1, dims=1)
    before[:, -1] = False
    out = model(
        input_ids=batch.input_ids,
        pixel_values=batch.pixel_values,
        logits_to_keep=before,
        use_cache=False,
        output_attentions=is_guided,
    )
    logits, truth = out.logits.flatten(0, -2), batch.input_ids[batch.answers]
    loss = F.cross_entropy(logits, truth)
    if is_guided:
        loss = loss + GUIDE_WEIGHT * guide(out.attentions[GUIDE_LAYER], before, batch)
    update(loss, optimizer, schedule)
    right = (logits.argmax(-1) == truth)[::2].float().mean().item()  # every second one is the end token
    progress.set_postfix(kind=kind, loss=f"{loss.item():.2f}", accuracy=f"{right:.2f}")


def guide(maps: torch.Tensor, before: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Mean -log of the attention that each answer's row puts on the scene asked about; `maps`: (batch, heads, q, k)."""
    rows = before.nonzero()[::2, 1].view(len(maps), -1)  # the rows that predict words, not end tokens
    attended = maps[torch.arange(len(maps))[:, None], :, rows].mean(dim=2)  # (batch, questions, k), mean over heads
    is_target = batch.owners[:, None] == batch.targets[:, :, None]
    return -(attended * is_target).sum(-1).clamp(min=1e-6).log().mean()


def optimizer_for(parameters: list[nn.Parameter], rate: float, steps: int):
    """AdamW and its schedule: a short rise, a long plateau (routing forms at the full rate or not), a linear fall."""
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.98), weight_decay=WEIGHT_DECAY)
    rise, fall = max(1, round(WARMUP * steps)), max(1, round(COOLDOWN * steps))

    def factor(step: int) -> float:
        return min(1.0, (step + 1) / rise, max(0.02, (steps - step) / fall))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def update(loss: torch.Tensor, optimizer, schedule) -> None:
    """One optimizer step."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], MAX_GRAD_NORM)
    optimizer.step()
    schedule.step()


def save(model: LlavaForConditionalGeneration, processor: LlavaProcessor, folder: Path) -> None:
    """A normal Hugging Face checkpoint in half precision; the model in memory becomes what was saved."""
    model.half().save_pretrained(folder)
    processor.save_pretrained(folder)
    model.float()


if __name__ == "__main__":
    main()
