"""Batches that teach the base: pictures with labelled patches, and conversations of several questions.

Several questions about the same pictures supervise a prompt more densely than one; the first of them is
exactly the one-question prompt that the product asks.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from llava.families import Family, ImageTokens
from scripts.miniature import draw
from scripts.miniature.model import PATCH_SIDE
from scripts.miniature.prompts import Prompt, sample_prompt
from scripts.miniature.world import ATTRIBUTES, Scene

PATCHES = draw.SIDE // PATCH_SIDE  # along a side
Turns = Sequence[tuple[str, str]]  # (prompt, answer)


@dataclass(frozen=True)
class Batch:
    """Right-padded conversations of one format. `answers` marks the tokens to be learnt."""

    input_ids: Tensor  # (batch, tokens)
    pixels: dict[str, Tensor]  # of the pictures of all rows in order, as the family's model takes them
    answers: Tensor  # (batch, tokens), bool
    is_image: Tensor  # (batch, tokens), bool
    owners: Tensor | None = None  # (batch, tokens), scene number of each image token, -1 elsewhere
    targets: Tensor | None = None  # (batch, questions), scene number that each question asks about

    @property
    def before(self) -> Tensor:
        """(batch, tokens) bool: the rows that predict the answers."""
        before = self.answers.roll(-1, dims=1)
        before[:, -1] = False
        return before

    @property
    def inputs(self) -> dict[str, Tensor]:
        """What the model takes, to give the logits of `before` alone."""
        inputs = {"input_ids": self.input_ids, **self.pixels, "logits_to_keep": self.before}
        if "image_grid_thw" in self.pixels:  # transformers then counts positions on three axes
            inputs["mm_token_type_ids"] = self.is_image.int()
        return inputs


def patch_batch(
    rng: np.random.Generator, family: Family, split: str, image_types: list[str]
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Pixels, and of the patches of all pictures the values (patches, attributes) of their scenes and their places."""
    prompts = [sample_prompt(rng, split, image_type) for image_type in image_types]
    pictures = [prompt.pictures()[0] for prompt in prompts]
    images = [family.image(picture.size) for picture in pictures]
    values = [
        torch.tensor([_values(scene) for scene in prompt.scenes])[_owners(prompt, [image])]
        for prompt, image in zip(prompts, images, strict=True)
    ]
    return family.pixels(pictures), torch.cat(values), torch.cat([_places(image) for image in images])


def conversation_batch(
    rng: np.random.Generator, family: Family, image_type: str, num_scenes: int | None, size: int, num_questions: int
) -> Batch:
    """Conversations about train scenes, all of the same number of scenes."""
    chats, pictures, targets, owners = [], [], [], []
    for _ in range(size):
        first = sample_prompt(rng, "train", image_type, num_scenes)
        prompts = [first, *_follow_ups(rng, first, num_questions - 1)]
        chats.append([(p.text if p is first else p.question, p.answer) for p in prompts])
        pictures.append(first.pictures())
        targets.append([p.target for p in prompts])
        owners.append(_owners(first, family.images([picture.size for picture in pictures[-1]])))
    batch = encode(family, chats, pictures)
    numbers = torch.full_like(batch.input_ids, -1)
    numbers[batch.is_image] = torch.cat(owners)
    return replace(batch, owners=numbers, targets=torch.tensor(targets))


def encode(family: Family, chats: Sequence[Turns], pictures: Sequence[list[Image.Image]]) -> Batch:
    """Conversations about the pictures of each as one padded batch."""
    images = [family.images([picture.size for picture in own]) for own in pictures]
    rows, answers = zip(*(_tokens(family, *both) for both in zip(chats, images, strict=True)), strict=True)
    input_ids = pad_sequence(rows, batch_first=True, padding_value=family.tokenizer.pad_token_id)
    pixels = family.pixels([picture for own in pictures for picture in own])
    return Batch(input_ids, pixels, pad_sequence(answers, batch_first=True), input_ids == family.image_id)


def _tokens(family: Family, turns: Turns, images: Sequence[ImageTokens]) -> tuple[Tensor, Tensor]:
    """Ids of a conversation, and which of them are answers: each is one token and the end token."""
    starts, context = [], []
    for prompt, answer in turns:
        ids = family.expand(family.encode_prompt(prompt, context), images)
        starts.append(len(ids))
        context += [("user", prompt), ("assistant", answer)]
    ids += family.encode_answer(*turns[-1], context[:-2])
    is_answer = torch.zeros(len(ids), dtype=torch.bool)
    is_answer[[place for start in starts for place in (start, start + 1)]] = True
    return torch.tensor(ids), is_answer


def _follow_ups(rng: np.random.Generator, first: Prompt, number: int) -> list[Prompt]:
    targets = [0] if first.image_type in ("single", "pip") else range(len(first.scenes))
    pairs = [(t, name) for t in targets for name in ATTRIBUTES if (t, name) != (first.target, first.attribute)]
    drawn = rng.permutation(len(pairs))[:number]
    return [replace(first, target=pairs[i][0], attribute=pairs[i][1]) for i in drawn]


def _values(scene: Scene) -> list[int]:
    return [values.index(getattr(scene, name)) for name, values in ATTRIBUTES.items()]


def _owners(prompt: Prompt, images: Sequence[ImageTokens]) -> Tensor:
    """Number of the scene under the middle of each token of the pictures of a prompt."""
    if prompt.image_type == "sequence":
        return torch.arange(len(images)).repeat_interleave(torch.tensor([len(image.ids) for image in images]))
    x, y = _middles(images[0]).unbind(-1)
    if prompt.image_type == "collage":
        return 2 * (y > draw.SIDE / 2).long() + (x > draw.SIDE / 2).long()
    if prompt.image_type == "pip":
        start, _, end, _ = draw.inner_box()
        return 1 - ((x > start) & (x < end) & (y > start) & (y < end)).long()
    return torch.zeros(len(x), dtype=torch.long)


def _places(image: ImageTokens) -> Tensor:
    """Number of each token's place among PATCHES x PATCHES of the picture, row by row."""
    column, row = (_middles(image) // PATCH_SIDE).long().unbind(-1)
    return PATCHES * row + column


def _middles(image: ImageTokens) -> Tensor:
    """(P, 2) x and y of the middle of each token, in px of a picture of the world's size."""
    middles = (image.areas[:, :2] + image.areas[:, 2:]) / 2
    return middles * draw.SIDE / torch.tensor(image.size)
