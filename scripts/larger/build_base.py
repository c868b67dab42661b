"""Builds and trains the larger base: `python -m scripts.larger.build_base --output DIR --seed 0`, on a GPU.

A LLaVA of SmolLM2-135M and DINOv2-small, as fetch has extracted them, and a fresh projector. Three stages, the tower
frozen in all: the projector learns behind the language model as it is; both learn to read single emoji, until a check
on held-out ones is passed; both learn the multi-image formats, until routing is partly formed, by a check as that of
scripts.miniature.train_base and with its lesson of naming. Everything drawn is of the training glyphs and style.

A killed run goes on where it was, if started again with the same --output. `--quick` is a few steps on a CPU, to see
that all of it works and that the loss falls; what it saves has learnt next to nothing.
"""

import argparse
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration, LlavaProcessor
from transformers.utils import logging as transformers_logging

from llava.runtime import ArgumentParser, setup_logging, user_errors, write_text
from scripts.larger.draw import PATCH, SIDE
from scripts.larger.fetch import PARTS
from scripts.larger.model import assemble, build_processor
from scripts.larger.parts import parity, read_language_model, read_vision_tower
from scripts.larger.prompts import EmojiPrompt, sampler
from scripts.larger.world import ATTRIBUTES, read_emoji
from scripts.miniature.course import Course, Stage, until
from scripts.miniature.lessons import conversation_batch
from scripts.miniature.scores import score_base, validation_accuracy
from scripts.miniature.train_base import answer_loss, behind_the_tower, naming_loss, save

logger = logging.getLogger("scripts.larger.build_base")

RECIPE = {
    "projector": {"steps": 500, "batch": 48, "rate": 1e-3},
    "reading": {"steps": 3000, "batch": 48, "rate": 1e-4,
                "check_every": 100, "prompts": 300, "wanted": 82.0},  # % of validation prompts
    "routing": {
        "steps": 4000, "rate": 1e-4,
        "mix": {"single": 0.25, "sequence": 0.4, "collage": 0.25, "pip": 0.1},  # one format a step
        "batch": {"single": 32, "sequence": 12, "collage": 24, "pip": 24},
        "scenes": (2, 3, 4, 5),
        "questions": 6,  # of a conversation about several pictures, at most
        "check_every": 25, "prompts": 200, "wanted": 55.0,  # % of validation prompts of three pictures
        "naming_weight": 0.3, "naming_layer": 15,  # of 30
    },
}  # fmt: skip
QUICK = {
    "projector": {"steps": 10, "batch": 2, "rate": 3e-3},
    "reading": {"steps": 4, "batch": 2, "rate": 1e-4, "check_every": 100, "prompts": 1, "wanted": 100.0},
    "routing": RECIPE["routing"] | {"steps": 2, "batch": dict.fromkeys(RECIPE["routing"]["mix"], 1), "scenes": (2,)},
}
SAVE_EVERY = 250  # steps: a state is 1.8 GB


@dataclass(frozen=True)
class Lessons:
    """What every stage needs."""

    model: LlavaForConditionalGeneration
    processor: LlavaProcessor
    rng: np.random.Generator
    sample: Callable[..., EmojiPrompt]
    recipe: dict

    def loss(self, kind: str, num_scenes: int | None, size: int, questions: int, naming=None) -> tuple[Tensor, dict]:
        """Of the answers of one batch, and what the progress bar shows; `naming` is (head, weight, layer)."""
        batch = conversation_batch(self.rng, self.processor, kind, num_scenes, size, questions, self.sample)
        batch = batch.to(self.model.device)
        with precision(self.model.device):
            loss, accuracy, states = answer_loss(self.model, batch, naming[2] if naming else None)
            if naming:
                loss = loss + naming[1] * naming_loss(naming[0], states, batch)
        return loss, {"kind": kind, "accuracy": f"{accuracy:.2f}"}

    def accuracy(self, kind: str, num_scenes: int | None, count: int) -> float:
        """Of the first `count` validation prompts of a format, in %; always the same ones."""
        with precision(self.model.device):
            return validation_accuracy(self.model, self.processor, kind, num_scenes, count, self.sample)


def main() -> None:
    """Builds, trains, saves and scores the base."""
    args = parse_args()
    setup_logging()
    transformers_logging.set_verbosity_error()
    with user_errors():
        device = device_for(args.quick)
        sample = sampler(read_emoji(args.parts / "emoji"))
        model, processor = construct(args.parts, args.seed)
        found = parity(args.parts)
    logger.info("vision tower: %s", f"features within {found:.1e} of the original graph's" if found is not None
                else "not compared with the original graph, onnxruntime is not installed")  # fmt: skip
    recipe = QUICK if args.quick else RECIPE
    course = Course(
        model.to(device), np.random.default_rng(args.seed), args.output / "progress.pt",
        {"recipe": recipe, "seed": args.seed}, save_every=SAVE_EVERY,
    )  # fmt: skip
    with user_errors():
        course.open()
    lessons = Lessons(course.model, processor, course.rng, sample, recipe)
    for number, stage in enumerate((projector, reading, routing)):
        torch.manual_seed(1000 * args.seed + number)  # of the stage's head
        course.run(stage(lessons))
    save(course.model, processor, args.output)
    scores = json.dumps(scored(lessons, args.num_test) | {"steps": course.finished, "seed": args.seed}, indent=1)
    write_text(args.output / "base_scores.json", scores + "\n")
    course.file.unlink()
    print(scores)


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--parts", type=Path, default=PARTS, help=f"what fetch has extracted (default: {PARTS})")
    add("--output", type=Path, required=True, help="folder of the checkpoint")
    add("--seed", type=int, default=0, help="of projector and lessons")
    add("--num_test", type=int, default=400, help="held-out prompts for each score")
    add("--quick", action="store_true", help="a few steps, also on a CPU")
    return parser.parse_args()


def device_for(is_quick: bool) -> torch.device:
    """The GPU. Raises ValueError where there is none, unless a few steps are all that is wanted."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if not is_quick:
        raise ValueError("no GPU was found, and a CPU is too slow to train this base; --quick does a few steps there")
    return torch.device("cpu")


def precision(device: torch.device) -> torch.autocast:
    """bf16 arithmetic on a GPU, fp32 elsewhere; weights and optimizer are fp32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def construct(parts: Path, seed: int) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The untrained base and its processor. Raises FileNotFoundError, ValueError as parts do."""
    language_model, tokenizer = read_language_model(parts)
    old_end = tokenizer.eos_token_id
    processor = build_processor(tokenizer, SIDE, PATCH, language_model.config.max_position_embeddings)
    check_answers(processor)
    return assemble(language_model, read_vision_tower(parts, SIDE), processor, old_end, seed), processor


def check_answers(processor: LlavaProcessor) -> None:
    """Raises ValueError if an answer is not one token behind `ASSISTANT:`, as lessons and scores take it to be."""
    for word in (word for values in ATTRIBUTES.values() for word in values):
        ids = processor.tokenizer(f" {word}", add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            raise ValueError(f"the tokenizer has no token for the answer {word!r}: it is of another language model")


def projector(lessons: Lessons) -> Stage:
    """The projector alone learns what the language model takes."""
    recipe, model = lessons.recipe["projector"], lessons.model
    lesson = partial(lessons.loss, "single", None, recipe["batch"], len(ATTRIBUTES))
    model.requires_grad_(False)
    trained = list(model.model.multi_modal_projector.requires_grad_(True).parameters())
    return Stage("projector", recipe["steps"], recipe["rate"], trained, None, lesson)


def reading(lessons: Lessons) -> Stage:
    """Projector and language model learn to answer about one emoji."""
    recipe = lessons.recipe["reading"]
    lesson = partial(lessons.loss, "single", None, recipe["batch"], len(ATTRIBUTES))
    is_over = until(recipe, partial(lessons.accuracy, "single", None, recipe["prompts"]))
    return Stage("reading", recipe["steps"], recipe["rate"], all_but_the_tower(lessons.model), None, lesson, is_over)


def routing(lessons: Lessons) -> Stage:
    """They learn all formats, one format a step, and the lesson of naming where pictures or cells have numbers."""
    recipe, rng, model = lessons.recipe["routing"], lessons.rng, lessons.model
    head = nn.Linear(model.config.text_config.hidden_size, max(recipe["scenes"] + (4,))).to(model.device)
    names, shares = list(recipe["mix"]), list(recipe["mix"].values())
    naming = (head, recipe["naming_weight"], recipe["naming_layer"])

    def lesson() -> tuple[Tensor, dict[str, str]]:
        kind, num_scenes = str(rng.choice(names, p=shares)), int(rng.choice(recipe["scenes"]))
        has_numbers = kind in ("sequence", "collage")
        pictures = {"sequence": num_scenes, "collage": 4}.get(kind, 1)
        questions = min(recipe["questions"], pictures * len(ATTRIBUTES))
        return lessons.loss(kind, num_scenes, recipe["batch"][kind], questions, naming if has_numbers else None)

    is_over = until(recipe, partial(lessons.accuracy, "sequence", 3, recipe["prompts"]))
    return Stage("routing", recipe["steps"], recipe["rate"], all_but_the_tower(model), head, lesson, is_over)


def all_but_the_tower(model: LlavaForConditionalGeneration) -> list[nn.Parameter]:
    """Their gradients switched on, whatever the stage before did."""
    model.requires_grad_(True)
    return behind_the_tower(model)


def scored(lessons: Lessons, num_test: int) -> dict:
    """Accuracy of every format on validation glyphs, in the training style, and on test glyphs, in the other one."""
    model = lessons.model.eval()
    with precision(model.device):
        return {
            split: score_base(model, lessons.processor, num_test, split, sample=lessons.sample)
            for split in ("validation", "test")
        }


if __name__ == "__main__":
    main()
