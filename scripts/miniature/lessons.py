"""Batches that teach the base: pictures with labelled patches, and conversations of several questions.

Several questions about the same pictures supervise a prompt more densely than one; the first of them is
exactly the one-question prompt that the product asks.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from transformers import LlavaProcessor

from llava.families.llava15 import vicuna_v1
from scripts.miniature import draw
from scripts.miniature.model import PATCH_SIDE
from scripts.miniature.prompts import Prompt, sample_prompt
from scripts.miniature.world import ATTRIBUTES, Scene

PATCHES = draw.SIDE // PATCH_SIDE  # along a side


@dataclass(frozen=True)
class Batch:
    """Right-padded conversations of one format. `answers` marks the tokens to be learnt."""

    input_ids: torch.Tensor  # (batch, tokens)
    pixel_values: torch.Tensor  # (pictures of all rows in order, 3, side, side)
    answers: torch.Tensor  # (batch, tokens), bool
    owners: torch.Tensor | None = None  # (batch, tokens), scene number of each image token, -1 elsewhere
    targets: torch.Tensor | None = None  # (batch, questions), scene number that each question asks about

    @property
    def before(self) -> torch.Tensor:
        """(batch, tokens) bool: the rows that predict the answers."""
        before = self.answers.roll(-1, dims=1)
        before[:, -1] = False
        return before

    @property
    def inputs(self) -> dict[str, torch.Tensor]:
        """What the model takes, to give the logits of `before` alone."""
        return {"input_ids": self.input_ids, "pixel_values": self.pixel_values, "logits_to_keep": self.before}


def patch_batch(
    rng: np.random.Generator, processor: LlavaProcessor, split: str, image_types: list[str]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pixels, the scene number of every patch (pictures, patches), and the scenes' values
    (pictures, scenes, attributes), rows of absent scenes being -1."""
    prompts = [sample_prompt(rng, split, image_type) for image_type in image_types]
    pictures = [prompt.pictures()[0] for prompt in prompts]
    values = np.full((len(prompts), 4, len(ATTRIBUTES)), -1)
    for row, prompt in enumerate(prompts):
        values[row, : len(prompt.scenes)] = [_values(scene) for scene in prompt.scenes]
    owners = np.stack([_patch_owners(prompt) for prompt in prompts])
    return to_pixels(processor, pictures), torch.tensor(owners), torch.tensor(values)


def conversation_batch(
    rng: np.random.Generator, processor: LlavaProcessor, image_type: str, num_scenes: int | None, size: int,
    num_questions: int,
) -> Batch:  # fmt: skip
    """Conversations about train scenes, all of the same number of scenes."""
    texts, pictures, targets = [], [], []
    for _ in range(size):
        first = sample_prompt(rng, "train", image_type, num_scenes)
        prompts = [first, *_follow_ups(rng, first, num_questions - 1)]
        texts.append(vicuna_v1([(p.text if p is first else p.question, p.answer) for p in prompts]))
        pictures += first.pictures()
        targets.append([p.target for p in prompts])
    batch = encode(processor, texts, pictures)
    owners = torch.full_like(batch.input_ids, -1)
    is_image = batch.input_ids == processor.tokenizer.convert_tokens_to_ids("<image>")
    in_order = range(len(pictures) // size) if image_type == "sequence" else _patch_owners(first)
    each = PATCHES**2 if image_type == "sequence" else 1
    owners[is_image] = torch.tensor(np.tile(np.repeat(in_order, each), size))
    return replace(batch, owners=owners, targets=torch.tensor(targets))


def encode(processor: LlavaProcessor, texts: list[str], pictures: list[Image.Image]) -> Batch:
    """The texts as one padded batch, each `<image>` as many times as a picture has patches."""
    tokenizer = processor.tokenizer
    expanded = [text.replace("<image>", "<image>" * PATCHES**2) for text in texts]
    rows = tokenizer(expanded, padding=True, return_tensors="pt")["input_ids"]
    ends = rows == tokenizer.eos_token_id
    answers = ends | ends.roll(-1, dims=1)  # an answer is one token and the end token
    return Batch(rows, to_pixels(processor, pictures), answers)


def to_pixels(processor: LlavaProcessor, pictures: list[Image.Image]) -> torch.Tensor:
    """What the image processor gives for pictures that already have the model's size, but faster."""
    image = processor.image_processor
    pixels = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).float() / 255
    return ((pixels - torch.tensor(image.image_mean)) / torch.tensor(image.image_std)).permute(0, 3, 1, 2)


def _follow_ups(rng: np.random.Generator, first: Prompt, number: int) -> list[Prompt]:
    targets = [0] if first.image_type in ("single", "pip") else range(len(first.scenes))
    pairs = [(t, name) for t in targets for name in ATTRIBUTES if (t, name) != (first.target, first.attribute)]
    drawn = rng.permutation(len(pairs))[:number]
    return [replace(first, target=pairs[i][0], attribute=pairs[i][1]) for i in drawn]


def _values(scene: Scene) -> list[int]:
    return [values.index(getattr(scene, name)) for name, values in ATTRIBUTES.items()]


def _patch_owners(prompt: Prompt) -> np.ndarray:
    """Number of the scene under each patch's middle."""
    middle = (np.arange(PATCHES) + 0.5) * draw.SIDE / PATCHES
    if prompt.image_type == "collage":
        half = (middle > draw.SIDE / 2).astype(int)
        return (2 * half[:, None] + half[None, :]).ravel()
    if prompt.image_type == "pip":
        start, _, end, _ = draw.inner_box()
        inside = (middle > start) & (middle < end)
        return 1 - (inside[:, None] & inside[None, :]).astype(int).ravel()
    return np.zeros(PATCHES**2, dtype=int)
