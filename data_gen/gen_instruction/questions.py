"""Questions of a test set: one turn each, a target picture that no other question has, the truth beside it."""

import io
import tarfile
from collections.abc import Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import Any

import numpy as np

from data_gen.drops import Drop, Unusable
from data_gen.gen_instruction import levels
from data_gen.gen_instruction.companions import Member, members
from data_gen.gen_instruction.formats import Drawn, put_together
from data_gen.gen_instruction.levels import NAMED
from data_gen.gen_instruction.rewriting import Turn, ask, centre_phrase, numbered
from data_gen.pictures import encode
from data_gen.sources import Sources
from llava.asked import placeholders, target_fields


@contextmanager
def new_tar(path: Path) -> Iterator[tarfile.TarFile]:
    """An uncompressed archive whose bytes depend on names and contents only; in place when it is complete."""
    part = path.with_name(path.name + ".part")
    try:
        with tarfile.open(part, "w", format=tarfile.USTAR_FORMAT) as tar:
            yield tar
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> str:
    """Add a file; its name."""
    info = tarfile.TarInfo(name)  # of time 0 and nobody in particular
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))
    return name


@dataclass(frozen=True)
class Slot:
    """A question that is to be made."""

    name: str
    image_type: str
    size: int  # number of pictures
    first: list[int]  # positions of those asked about, the target first
    level: str


@dataclass
class Maker:
    """Makes questions from sources, each of which is asked about at most once; `drops` gets what cannot be used."""

    sources: Sources
    rng: np.random.Generator
    forbidden: Container[bytes]
    drops: list[Drop]
    picture_format: str
    level: str = NAMED  # or MIX

    def __post_init__(self):
        self._targets: set[bytes] = set()
        self._numbers = count()  # of the questions that have a level
        # A bounding box is of the picture alone, and wrong in a collage.
        self._candidates = iter(self.rng.permutation(np.flatnonzero(~self.sources.has_box)))

    def next_question(
        self, name: str, image_type: str, size: int, target: int, tar: tarfile.TarFile
    ) -> dict[str, Any] | None:
        """A question about picture `target` of `size`, its pictures in the archive; None if the sources are used up."""
        level = NAMED if image_type == "pip" else levels.level_of(self.level, next(self._numbers))
        slot = Slot(name, image_type, size, levels.first_of(level, target, size, self.rng), level)
        for index in map(int, self._candidates):
            turn = None if level == NAMED else levels.question_of(self.sources[index], self.rng)
            uncut = self.sources.has_box if image_type == "collage" else None
            pools = levels.pools(self.sources, index, turn, level, size, uncut, self.rng)
            found = members(self.sources, index, pools, self.drops, name, self.forbidden)
            try:
                return self._question(slot, turn, found, tar)
            except Unusable as error:
                self.drops.append(Drop.of(error, self.sources[index]))
        return None

    def _question(self, slot: Slot, turn: Turn | None, found: Iterator[Member], tar: tarfile.TarFile) -> dict[str, Any]:
        first = next(found)
        if first.fingerprint in self._targets:
            raise Unusable("repeated target", f"another question is about {first.source.path}", is_bad=False)
        drawn = put_together(slot.image_type, slot.first, slot.size, chain([first], found))
        # Only now is it certain that there will be a question.
        self._targets.add(first.fingerprint)
        images = [_add(tar, f"{slot.image_type}/{slot.name}{end}", data) for end, data in self._files(drawn)]
        asked = levels.asked(slot.level, slot.first, drawn.sources, turn) if turn else self._named(slot, drawn)
        return {
            "id": slot.name,
            "image": images,
            "prompt": placeholders(slot.image_type, slot.size) + asked.turn[0],
            "answer": asked.turn[1],
            **asked.fields,
            "image_type": slot.image_type,
            **target_fields(sorted(slot.first)),
            **drawn.fields,
            **({} if self.level == NAMED else {"category": slot.level}),
            "sources": [{"id": source.id, "path": source.path} for source in drawn.sources],
        }

    def _named(self, slot: Slot, drawn: Drawn) -> levels.Asked:
        """A question about one picture, and what is true of the others."""
        own = drawn.members[slot.first[0]].source
        question, answer = levels.question_of(own, self.rng)
        where = centre_phrase(self.rng) if slot.image_type == "pip" else numbered(slot.first[0])
        others = [source.answer_to(question) for source in drawn.sources if source is not own]
        others = [other for other in others if other not in (None, answer)]
        return levels.Asked((ask(where, question), answer), others)

    def _files(self, drawn: Drawn) -> list[tuple[str, bytes]]:
        """Endings and bytes of the pictures to store."""
        if drawn.picture is not None:
            return [(f".{self.picture_format}", encode(drawn.picture, self.picture_format))]
        files = [drawn.members[position].picture.file() for position in range(len(drawn.members))]
        return [(f"_{number}{end}", data) for number, (end, data) in enumerate(files, 1)]
