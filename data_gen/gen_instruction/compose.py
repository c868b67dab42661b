"""One prompt from its task: what is drawn by chance, the pictures, the record.

A prompt depends on the recipe and its own task only, so that any process may make it, in any order.
"""

from bisect import bisect
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np

from data_gen.drops import Drop, Unusable
from data_gen.gen_instruction.collage import Box, Collage
from data_gen.gen_instruction.companions import Member, members
from data_gen.gen_instruction.output import PictureFolder
from data_gen.gen_instruction.pic_in_pic import paste_inside
from data_gen.gen_instruction.rewriting import CENTRE_PHRASES, ask, ask_all, conversation, numbered, refusal
from data_gen.gen_instruction.schedule import PROMPTS, Task
from data_gen.gen_instruction.sequence import placeholders
from data_gen.pictures import encode
from data_gen.sources import Source, Sources
from llava.records import IMAGE


@dataclass(frozen=True)
class Recipe:
    """What all prompts of a run are made with."""

    sources: Sources
    folder: PictureFolder
    seed: int
    sequence_shares: dict[int, float]  # number of pictures: weight
    collage_shares: dict[int, float]
    num_asking: dict[int, int]  # pictures of a collage: records that ask in it
    refusals: float  # share of sequences and collages that ask about a picture that is not there
    uncut: np.ndarray  # records that must not ask in collages
    picture_format: str  # jpg or png
    copies_sequences: bool  # whether pictures of sequences are put into the output folder


@dataclass(frozen=True)
class Draft:
    """What chance decides about a prompt."""

    task: Task
    rng: np.random.Generator  # for the draws that follow
    num_images: int
    target: int  # 0-based position of the record that asks
    is_refused: bool  # asks about the picture after the last one instead

    @property
    def positions(self) -> list[int]:
        """Where the target goes, then the companions."""
        return [self.target, *(position for position in range(self.num_images) if position != self.target)]


@dataclass(frozen=True)
class Made:
    """A finished prompt, or None with the reason among `drops`."""

    index: int
    record: dict[str, Any] | None
    drops: list[Drop]


def make(recipe: Recipe, task: Task) -> Made:
    """The prompt of a task; its pictures are on disk when this returns."""
    draft, drops = draw(recipe, task), []
    compose = {"sequence": _sequence, "collage": _collage, "pip": _pic_in_pic}[task.image_type]
    try:
        record = compose(recipe, draft, drops)
    except Unusable as error:
        source = recipe.sources[task.source]
        return Made(task.index, None, [*drops, Drop.of(error, source.id, source.where)])
    return Made(task.index, record, drops)


def draw(recipe: Recipe, task: Task) -> Draft:
    """Number of pictures by the format's shares, target position uniform."""
    rng = np.random.default_rng([recipe.seed, PROMPTS, task.index])
    if task.image_type == "pip":
        return Draft(task, rng, 2, 0, False)
    shares = recipe.sequence_shares if task.image_type == "sequence" else recipe.collage_shares
    ends = list(accumulate(shares.values()))
    num_images = list(shares)[bisect(ends, rng.random() * ends[-1])]
    return Draft(task, rng, num_images, int(rng.integers(num_images)), bool(rng.random() < recipe.refusals))


def _sequence(recipe: Recipe, draft: Draft, drops: list[Drop]) -> dict[str, Any]:
    found: dict[int, Member] = dict(_placed(recipe, draft, drops))
    in_order = [found[position] for position in range(draft.num_images)]
    images = [_stored(recipe, member) for member in in_order]
    turns = _asked(draft, found[draft.target].source)
    return _record(draft, images, placeholders(draft.num_images), turns, [member.source for member in in_order])


def _collage(recipe: Recipe, draft: Draft, drops: list[Drop]) -> dict[str, Any]:
    collage = Collage(draft.num_images)
    boxes: dict[int, Box] = {}
    sources: dict[int, Source] = {}
    turns, turn_targets = [], []
    num_asking = 1 if draft.is_refused else recipe.num_asking[draft.num_images]
    for position, member in _placed(recipe, draft, drops):
        boxes[position], sources[position] = collage.paste(position, member.picture.pixels), member.source
        if num_asking and (position == draft.target or not recipe.uncut[member.index]):
            own = _asked(draft, member.source, position)
            turns += own
            turn_targets += [position + 1] * len(own)
            num_asking -= 1
    image = recipe.folder.write(_name(recipe, draft.task), encode(collage.canvas, recipe.picture_format))
    fields: dict[str, Any] = {"target_box": None if draft.is_refused else boxes[draft.target], "grid": collage.grid}
    if len(set(turn_targets)) > 1:
        fields["turn_targets"] = turn_targets
    in_order = [sources[position] for position in range(draft.num_images)]
    return _record(draft, [image], f"{IMAGE}\n", turns, in_order, **fields)


def _pic_in_pic(recipe: Recipe, draft: Draft, drops: list[Drop]) -> dict[str, Any]:
    inner, outer = (member for _, member in _placed(recipe, draft, drops))
    picture, box = paste_inside(inner.picture.pixels, outer.picture.pixels)
    image = recipe.folder.write(_name(recipe, draft.task), encode(picture, recipe.picture_format))
    turns = ask_all(inner.source.turns, lambda: CENTRE_PHRASES[draft.rng.integers(len(CENTRE_PHRASES))])
    return _record(draft, [image], f"{IMAGE}\n", turns, [inner.source, outer.source], target_box=box)


def _placed(recipe: Recipe, draft: Draft, drops: list[Drop]) -> Iterator[tuple[int, Member]]:
    """The target and its companions, each with its position."""
    task = draft.task
    found = members(recipe.sources, task.source, draft.num_images, draft.rng, drops, task.id)
    return zip(draft.positions, found, strict=True)


def _asked(draft: Draft, source: Source, position: int | None = None) -> list[tuple[str, str]]:
    if draft.is_refused:
        return [(ask(numbered(draft.num_images), source.turns[0][0]), refusal(draft.num_images))]
    return ask_all(source.turns, lambda: numbered(draft.target if position is None else position))


def _stored(recipe: Recipe, member: Member) -> str:
    """Where a picture of a sequence is found; what other readers would see otherwise is copied as it is seen."""
    path, picture, files = member.source.path, member.picture, recipe.sources.files
    if not recipe.copies_sequences:
        return path
    if not picture.is_plain:
        return recipe.folder.copy(path + ".png", encode(picture.pixels, "png"), None)
    if recipe.sources.is_embedded(member.index):
        return recipe.folder.copy(path + picture.suffix, picture.data, None)
    return recipe.folder.copy(path, picture.data, files.path / path if files.kind == "folder" else None)


def _name(recipe: Recipe, task: Task) -> str:
    """A place for a made picture; folders of a thousand files are fast everywhere."""
    return f"made/{task.image_type}/{task.index // 1000:04d}/{task.index:07d}.{recipe.picture_format}"


def _record(
    draft: Draft, images: list[str], head: str, turns: list[tuple[str, str]], sources: list[Source], **fields: Any
) -> dict[str, Any]:
    record = {
        "id": draft.task.id,
        "image": images,
        "conversations": conversation(head, turns),
        "image_type": draft.task.image_type,
        "target": None if draft.is_refused else draft.target + 1,
        **fields,
        "sources": [{"id": source.id, "path": source.path} for source in sources],
    }
    return record | ({"is_refusal": True} if draft.is_refused else {})
