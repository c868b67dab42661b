"""One prompt from its task: what is drawn by chance, the pictures, the record.

A prompt depends on the recipe and its own task only, so that any process may make it, in any order.
"""

from bisect import bisect
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import numpy as np

from data_gen.drops import Drop, Unusable
from data_gen.gen_instruction import levels
from data_gen.gen_instruction.companions import Member, members
from data_gen.gen_instruction.formats import Drawn, put_together
from data_gen.gen_instruction.levels import NAMED, Asked
from data_gen.gen_instruction.output import PictureFolder
from data_gen.gen_instruction.rewriting import ask, centre_phrase, conversation, numbered, refusal
from data_gen.gen_instruction.schedule import PROMPTS, Task
from data_gen.pictures import encode
from data_gen.sources import Sources
from llava.asked import placeholders, target_fields


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
    level: str = NAMED  # or MIX


@dataclass(frozen=True)
class Draft:
    """What chance decides about a prompt."""

    task: Task
    rng: np.random.Generator  # for the draws that follow
    num_images: int
    first: list[int]  # 0-based positions of the pictures that are asked about, that of the record that asks first
    is_refused: bool  # asks about the picture after the last one instead
    level: str = NAMED


def make(recipe: Recipe, task: Task) -> tuple[dict[str, Any] | None, list[Drop]]:
    """The record of a task, its pictures on disk, or None; and what could not be used for it."""
    draft, drops = draw(recipe, task), []
    turn = None if draft.level == NAMED else levels.question_of(recipe.sources[task.source], draft.rng)
    uncut = recipe.uncut if task.image_type == "collage" else None
    pools = levels.pools(recipe.sources, task.source, turn, draft.level, draft.num_images, uncut, draft.rng)
    try:
        found = members(recipe.sources, task.source, pools, drops, task.id)
        drawn = put_together(task.image_type, draft.first, draft.num_images, found)
        asked = turn and levels.asked(draft.level, draft.first, drawn.sources, turn)
        return _record(recipe, draft, drawn, asked), drops
    except Unusable as error:
        return None, [*drops, Drop.of(error, recipe.sources[task.source])]


def draw(recipe: Recipe, task: Task) -> Draft:
    """Number of pictures by the format's shares, target position uniform."""
    rng = np.random.default_rng([recipe.seed, PROMPTS, task.index])
    if task.image_type == "pip":
        return Draft(task, rng, 2, [0], False)
    shares = recipe.sequence_shares if task.image_type == "sequence" else recipe.collage_shares
    ends = list(accumulate(shares.values()))
    num_images = list(shares)[bisect(ends, rng.random() * ends[-1])]
    draft = Draft(task, rng, num_images, [int(rng.integers(num_images))], bool(rng.random() < recipe.refusals))
    if recipe.level == NAMED or draft.is_refused:
        return draft
    level = levels.level_of(recipe.level, int(rng.integers(len(levels.LEVELS))))
    return replace(draft, level=level, first=levels.first_of(level, draft.first[0], num_images, rng))


def _record(recipe: Recipe, draft: Draft, drawn: Drawn, asked: Asked | None) -> dict[str, Any]:
    turns, turn_targets = ([asked.turn], []) if asked else _asked(recipe, draft, drawn)
    record = {
        "id": draft.task.id,
        "image": _images(recipe, draft.task, drawn),
        "conversations": conversation(placeholders(draft.task.image_type, draft.num_images), turns),
        "image_type": draft.task.image_type,
        **target_fields([] if draft.is_refused else sorted(draft.first)),
        **drawn.fields,
    }
    if draft.is_refused and "target_box" in record:
        record["target_box"] = None
    if len(set(turn_targets)) > 1:
        record["turn_targets"] = turn_targets
    record |= asked.fields if asked else {}
    if recipe.level != NAMED:
        record["category"] = draft.level
    record["sources"] = [{"id": source.id, "path": source.path} for source in drawn.sources]
    return record | ({"is_refusal": True} if draft.is_refused else {})


def _asked(recipe: Recipe, draft: Draft, drawn: Drawn) -> tuple[list[tuple[str, str]], list[int]]:
    """Questions and answers, and the number from 1 of the picture that each is about."""
    target = drawn.members[draft.first[0]].source
    if draft.is_refused:
        return [(ask(numbered(draft.num_images), target.turns[0][0]), refusal(draft.num_images))], []
    if draft.task.image_type == "pip":
        return [(ask(centre_phrase(draft.rng), question), answer) for question, answer in target.turns], []
    num_asking = recipe.num_asking[draft.num_images] if draft.task.image_type == "collage" else 1
    asks = [p for p, member in drawn.members.items() if p == draft.first[0] or not recipe.uncut[member.index]]
    turns, turn_targets = [], []
    for position in asks[:num_asking]:
        own = drawn.members[position].source.turns
        turns += [(ask(numbered(position), question), answer) for question, answer in own]
        turn_targets += [position + 1] * len(own)
    return turns, turn_targets


def _images(recipe: Recipe, task: Task, drawn: Drawn) -> list[str]:
    """Names of the pictures, which are in place; folders of a thousand files are fast everywhere."""
    if drawn.picture is None:
        return [_stored(recipe, drawn.members[position]) for position in range(len(drawn.members))]
    name = f"made/{task.image_type}/{task.index // 1000:04d}/{task.index:07d}.{recipe.picture_format}"
    return [recipe.folder.write(name, encode(drawn.picture, recipe.picture_format))]


def _stored(recipe: Recipe, member: Member) -> str:
    """Where a picture of a sequence is found; what other readers would see otherwise is copied as it is seen."""
    path = member.source.path
    if not recipe.copies_sequences:
        return path
    suffix, data = member.picture.file()
    if not member.picture.is_plain or recipe.sources.is_embedded(member.index):
        return recipe.folder.write(path + suffix, data)
    return recipe.folder.write(path, data, recipe.sources.files.file(path))
