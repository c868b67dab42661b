"""Questions of a test set: one turn each, a target picture that no other question has, the truth beside it."""

import io
import tarfile
from collections.abc import Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from data_gen.drops import Drop, Unusable
from data_gen.gen_instruction.companions import Member, any_companions, members
from data_gen.gen_instruction.formats import Drawn, put_together
from data_gen.gen_instruction.rewriting import ask, centre_phrase, numbered
from data_gen.pictures import encode
from data_gen.sources import Sources
from llava.asked import placeholders


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


@dataclass
class Maker:
    """Makes questions from sources, each of which is asked about at most once; `drops` gets what cannot be used."""

    sources: Sources
    rng: np.random.Generator
    forbidden: Container[bytes]
    drops: list[Drop]
    picture_format: str

    def __post_init__(self):
        self._targets: set[bytes] = set()
        # A bounding box is of the picture alone, and wrong in a collage.
        self._candidates = iter(self.rng.permutation(np.flatnonzero(~self.sources.has_box)))

    def next_question(
        self, name: str, image_type: str, size: int, target: int, tar: tarfile.TarFile
    ) -> dict[str, Any] | None:
        """A question about picture `target` of `size`, its pictures in the archive; None if the sources are used up."""
        for index in map(int, self._candidates):
            pools = [any_companions(self.sources, index, size, self.rng)]
            found = members(self.sources, index, pools, self.drops, name, self.forbidden)
            try:
                return self._question(name, image_type, size, target, found, tar)
            except Unusable as error:
                self.drops.append(Drop.of(error, self.sources[index]))
        return None

    def _question(
        self, name: str, image_type: str, size: int, target: int, found: Iterator[Member], tar: tarfile.TarFile
    ) -> dict[str, Any]:
        first = next(found)
        if first.fingerprint in self._targets:
            raise Unusable("repeated target", f"another question is about {first.source.path}", is_bad=False)
        drawn = put_together(image_type, [target], size, chain([first], found))
        # Only now is it certain that there will be a question.
        self._targets.add(first.fingerprint)
        images = [_add(tar, f"{image_type}/{name}{end}", data) for end, data in self._files(drawn)]
        turns = first.source.turns  # of a conversation the first: later ones lean on it
        question, answer = turns[0 if first.source.is_conversation else self.rng.integers(len(turns))]
        where = centre_phrase(self.rng) if image_type == "pip" else numbered(target)
        others = [source.answer_to(question) for source in drawn.sources if source is not first.source]
        others = [other for other in others if other not in (None, answer)]
        return {
            "id": name,
            "image": images,
            "prompt": placeholders(image_type, size) + ask(where, question),
            "answer": answer,
            **({"others": others} if others else {}),
            "image_type": image_type,
            "target": target + 1,
            **drawn.fields,
            "sources": [{"id": source.id, "path": source.path} for source in drawn.sources],
        }

    def _files(self, drawn: Drawn) -> list[tuple[str, bytes]]:
        """Endings and bytes of the pictures to store."""
        if drawn.picture is not None:
            return [(f".{self.picture_format}", encode(drawn.picture, self.picture_format))]
        files = [drawn.members[position].picture.file() for position in range(len(drawn.members))]
        return [(f"_{number}{end}", data) for number, (end, data) in enumerate(files, 1)]
