"""Makes the miniature's base model from nothing: `python -m scripts.miniature.train_base --output DIR --seed 0`.

Three stages. The vision tower learns what each patch belongs to. Projector and language model learn to read single
pictures. Then they learn to find the picture asked about among several. That routing does not form by chance in
thousands of steps, so a second lesson names things: halfway up the language model, one linear map must read from an
image token which picture it belongs to, and from an answer's row which picture is asked about. No attention is guided:
where and how the rows look the picture up is the model's own. The stage ends once routing is partly formed, by a fixed
check on held-out prompts, so that what is built on the base has something to improve.

It is a tiny LLaVA-1.5, or with `--family qwen` a tiny Qwen2.5-VL of the same size by the same course.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from llava.command_line import check_numbers, flag, parse
from llava.families import Family
from llava.runtime import Progress, user_errors, write_text
from scripts.miniature import model as llava
from scripts.miniature import qwen
from scripts.miniature.lessons import PATCHES, Batch, conversation_batch, encode, patch_batch
from scripts.miniature.model import TEXT_WIDTH
from scripts.miniature.prompts import SEQUENCE_LENGTHS, Prompt, sample_prompt
from scripts.miniature.world import ATTRIBUTES

WARMUP = 0.05  # share of a stage's steps over which the rate rises
COOLDOWN = 0.25  # share over which it falls again
WEIGHT_DECAY, MAX_GRAD_NORM = 0.01, 1.0
SCORED_AT_ONCE = 50  # prompts
SETS = [("single", None), *(("sequence", n) for n in SEQUENCE_LENGTHS), ("collage", None), ("pip", None)]
MAKERS = {"llava": llava, "qwen": qwen}  # modules with `build`, `features`, FEATURES_WIDTH and `save`
LLAVA = {
    "vision": {"steps": 1500, "batch": 48, "rate": 1.5e-3, "mix": {"single": 0.4, "collage": 0.35, "pip": 0.25},
               "position_weight": 0.1},  # of the head that keeps a patch's place readable from its features
    "reading": {"steps": 160, "batch": 48, "rate": 1e-3},
    "routing": {
        "steps": 1200,  # at most: it ends at `wanted` (%) on so many validation prompts of three pictures
        "rate": 1e-3,
        "mix": {"single": 0.25, "sequence": 0.46, "collage": 0.26, "pip": 0.03},  # one format a step
        "batch": {"single": 32, "sequence": 12, "collage": 24, "pip": 24},
        "scenes": (2, 3, 4, 5),
        "questions": 6,  # of a conversation about several pictures; five attributes of a single one
        "check_every": 10, "prompts": 150, "wanted": 60.0,
        "naming_weight": 0.3, "naming_layer": 2,  # the lesson reads what enters this layer
    },
}  # fmt: skip
QWEN = LLAVA | {  # its tower sees four times as many patches of a picture: fewer pictures a step
    "vision": LLAVA["vision"] | {"batch": 16, "rate": 2e-3},
    "reading": LLAVA["reading"] | {"batch": 24},
}
RECIPES = {"llava": LLAVA, "qwen": QWEN}


@dataclass(frozen=True)
class BaseFlags:
    """The command line."""

    _argument_group_name = "base"
    output: Path = flag("folder of the checkpoint")
    family: str = flag("LLaVA-1.5 or Qwen2.5-VL", "llava", choices=list(MAKERS))
    seed: int = flag("of weights and lessons", 0)
    num_test: int = flag("held-out prompts for each score", 400)

    def __post_init__(self):
        check_numbers(self, seed=(0, 10**15), num_test=(1, 1_000_000))


def main() -> None:
    """Trains, scores and saves the base."""
    torch.set_num_threads(1)  # the same sums in the same order on every machine
    transformers_logging.set_verbosity_error()
    with user_errors():
        (flags,) = parse([BaseFlags], __doc__)
    maker, rng, steps = MAKERS[flags.family], np.random.default_rng(flags.seed), {}
    model, family = maker.build(flags.seed)
    for number, stage in enumerate((vision, reading, routing)):
        torch.manual_seed(1000 * flags.seed + number)  # of the stage's head
        steps[stage.__name__] = stage(flags.family, model, family, rng)
    model.half().save_pretrained(flags.output)  # a normal Hugging Face checkpoint
    maker.save(family, flags.output)
    model.float()  # from now on, what was saved
    found = score_base(model.eval(), family, flags.num_test)
    scores = json.dumps(found | {"steps": steps, "seed": flags.seed}, indent=1)
    write_text(flags.output / "base_scores.json", scores + "\n")
    print(scores)


def run(
    name: str, recipe: Mapping, parameters: Iterable[nn.Parameter], lesson: Callable[[], tuple[Tensor, dict[str, str]]],
    is_over: Callable[[int], bool] = lambda step: False,
) -> int:  # fmt: skip
    """The steps of a stage, at most those of its recipe, and their number.

    `lesson` gives the loss of a step and what the progress bar shows of it. The rate rises for a short time, stays
    (routing forms at the full rate or not) and falls linearly.
    """
    parameters, steps = list(parameters), recipe["steps"]
    optimizer = torch.optim.AdamW(parameters, lr=recipe["rate"], betas=(0.9, 0.98), weight_decay=WEIGHT_DECAY)
    rise, fall = max(1, round(WARMUP * steps)), max(1, round(COOLDOWN * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / rise, max(0.02, (steps - step) / fall))
    )
    progress = Progress(range(1, steps + 1), desc=name)
    for step in progress:
        loss, shown = lesson()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
        optimizer.step()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.2f}", **shown)
        if is_over(step):
            break
    return step


def vision(name: str, model: PreTrainedModel, family: Family, rng: np.random.Generator) -> int:
    """Every patch learns the five attributes of the scene it belongs to, and its own place.

    A tower that keeps the regions of one picture apart is what collages and pictures in pictures need.
    """
    recipe, maker, tower = RECIPES[name]["vision"], MAKERS[name], getattr(model.model, family.tower)
    sizes = [len(values) for values in ATTRIBUTES.values()]
    head = nn.Linear(maker.FEATURES_WIDTH, sum(sizes) + PATCHES**2)
    names, shares = list(recipe["mix"]), list(recipe["mix"].values())

    def lesson() -> tuple[Tensor, dict[str, str]]:
        image_types = [str(name) for name in rng.choice(names, recipe["batch"], p=shares)]
        pixels, truth, places = patch_batch(rng, family, "train", image_types)
        *logits, place = head(maker.features(model, pixels)).flatten(0, -2).split([*sizes, PATCHES**2], dim=-1)
        loss = sum(F.cross_entropy(part, truth[:, i]) for i, part in enumerate(logits)) / len(sizes)
        right = [(part.argmax(-1) == truth[:, i]).float().mean().item() for i, part in enumerate(logits)]
        loss = loss + recipe["position_weight"] * F.cross_entropy(place, places)
        return loss, {"accuracy": " ".join(f"{value:.2f}" for value in right)}

    return run("vision", recipe, [*tower.parameters(), *head.parameters()], lesson)


def reading(name: str, model: PreTrainedModel, family: Family, rng: np.random.Generator) -> int:
    """Projector and language model learn to answer about one picture, behind the frozen tower."""
    recipe = RECIPES[name]["reading"]

    def lesson() -> tuple[Tensor, dict[str, str]]:
        batch = conversation_batch(rng, family, "single", None, recipe["batch"], len(ATTRIBUTES))
        loss, accuracy, _ = answer_loss(model, batch)
        return loss, {"accuracy": f"{accuracy:.2f}"}

    return run("reading", recipe, behind_the_tower(model, family), lesson)


def routing(name: str, model: PreTrainedModel, family: Family, rng: np.random.Generator) -> int:
    """They learn all formats, one format a step, and the lesson of naming where pictures or cells have numbers."""
    recipe = RECIPES[name]["routing"]
    head = nn.Linear(TEXT_WIDTH, max(recipe["scenes"]))
    names, shares = list(recipe["mix"]), list(recipe["mix"].values())
    held_out = [sample_prompt(np.random.default_rng(n), "validation", "sequence", 3) for n in range(recipe["prompts"])]

    def lesson() -> tuple[Tensor, dict[str, str]]:
        kind, num_scenes = str(rng.choice(names, p=shares)), int(rng.choice(recipe["scenes"]))
        batch = conversation_batch(rng, family, kind, num_scenes, recipe["batch"][kind], recipe["questions"])
        has_numbers = kind in ("sequence", "collage")
        loss, accuracy, states = answer_loss(model, batch, recipe["naming_layer"] if has_numbers else None)
        if has_numbers:
            loss = loss + recipe["naming_weight"] * naming_loss(head, states, batch)
        return loss, {"kind": kind, "accuracy": f"{accuracy:.2f}"}

    def is_over(step: int) -> bool:
        return step % recipe["check_every"] == 0 and accuracy(model, family, held_out) >= recipe["wanted"]

    return run("routing", recipe, [*behind_the_tower(model, family), *head.parameters()], lesson, is_over)


def behind_the_tower(model: PreTrainedModel, family: Family) -> list[nn.Parameter]:
    """Everything but the tower, which is frozen."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(family.part_of(name) != family.tower)
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def answer_loss(model: PreTrainedModel, batch: Batch, layer: int | None = None) -> tuple[Tensor, float, Tensor | None]:
    """Loss of the answers, share of right words, and, if asked for, (batch, tokens, hidden) states entering a layer."""
    out = model(**batch.inputs, use_cache=False, output_hidden_states=layer is not None)
    logits, truth = out.logits.flatten(0, -2), batch.input_ids[batch.answers]
    right = (logits.argmax(-1) == truth)[::2].float().mean().item()  # every second one is the end token
    return F.cross_entropy(logits, truth), right, None if layer is None else out.hidden_states[layer]


def naming_loss(head: nn.Linear, states: Tensor, batch: Batch) -> Tensor:
    """One map for both: the number of the picture of every image token, and of that asked about in every answer's row.

    `states`: (batch, tokens, hidden). What has the same name then lies in the same directions, where a dot product of
    query and key can find it.
    """
    states = F.layer_norm(states, states.shape[-1:])
    is_image = batch.owners >= 0
    rows = batch.before.nonzero()[::2]  # those that predict words, not end tokens
    owners = F.cross_entropy(head(states[is_image]), batch.owners[is_image])
    return owners + F.cross_entropy(head(states[rows[:, 0], rows[:, 1]]), batch.targets.flatten())


def score_base(model: PreTrainedModel, family: Family, num_test: int) -> dict:
    """Accuracy in % on `num_test` test prompts of every format."""
    scores = {}
    for number, (image_type, num_scenes) in enumerate(SETS):
        rng = np.random.default_rng([0, number])
        prompts = [sample_prompt(rng, "test", image_type, num_scenes) for _ in range(num_test)]
        name = f"{image_type}_{num_scenes}" if num_scenes else image_type
        scores[name] = {"accuracy": accuracy(model, family, prompts), "num_prompts": num_test}
    return scores


def accuracy(model: PreTrainedModel, family: Family, prompts: list[Prompt]) -> float:
    """Share in % of prompts whose greedy answer is the true word and then the end token."""
    right = []
    for start in range(0, len(prompts), SCORED_AT_ONCE):
        part = prompts[start : start + SCORED_AT_ONCE]
        chats = [[(prompt.text, prompt.answer)] for prompt in part]
        batch = encode(family, chats, [prompt.pictures() for prompt in part])
        with torch.inference_mode():
            logits = model(**batch.inputs).logits
        found, truth = logits.flatten(0, -2).argmax(-1), batch.input_ids[batch.answers]
        right += (found == truth).view(-1, 2).all(-1).tolist()
    return round(100 * float(np.mean(right)), 1)


if __name__ == "__main__":
    main()
