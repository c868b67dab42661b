"""Questions of a test set: one turn each, a target picture that no other question has, the truth beside it."""

import io
import tarfile
from collections.abc import Container, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from data_gen.drops import Drop, Unusable
from data_gen.gen_instruction.companions import Member, members
from data_gen.gen_instruction.formats import Drawn, placeholders, put_together
from data_gen.gen_instruction.rewriting import CENTRE_PHRASES, ask, numbered
from data_gen.pictures import encode
from data_gen.sources import Source, Sources


class Tar:
    """An uncompressed archive whose bytes depend on names and contents only; in place when it is complete."""

    def __init__(self, path: Path):
        self._path, self._part = path, path.with_name(path.name + ".part")

    def __enter__(self) -> "Tar":
        self._file = tarfile.open(self._part, "w", format=tarfile.USTAR_FORMAT)
        return self

    def __exit__(self, kind, error, trace) -> None:
        self._file.close()
        if error is None:
            self._part.replace(self._path)
        else:
            self._part.unlink()

    def add(self, name: str, data: bytes) -> str:
        """Add a file; its name."""
        info = tarfile.TarInfo(name)  # of time 0 and nobody in particular
        info.size = len(data)
        self._file.addfile(info, io.BytesIO(data))
        return name


class Maker:
    """Makes questions from sources, each of which is asked about at most once; `drops` gets what cannot be used."""

    def __init__(
        self,
        sources: Sources,
        rng: np.random.Generator,
        forbidden: Container[bytes],
        drops: list[Drop],
        picture_format: str,
    ):
        self.sources, self.rng, self.drops = sources, rng, drops
        self._forbidden, self._picture_format = forbidden, picture_format
        self._targets: set[bytes] = set()
        # A bounding box is of the picture alone, and wrong in a collage.
        self._candidates = iter(rng.permutation(np.flatnonzero(~sources.has_box())))

    def next_question(self, name: str, image_type: str, size: int, target: int, tar: Tar) -> dict[str, Any] | None:
        """A question about picture `target` of `size`, its pictures in the archive; None if the sources are used up."""
        for index in map(int, self._candidates):
            found = members(self.sources, index, size, self.rng, self.drops, name, self._forbidden)
            try:
                return self._question(name, image_type, size, target, found, tar)
            except Unusable as error:
                source = self.sources[index]
                self.drops.append(Drop.of(error, source.id, source.where))
        return None

    def _question(
        self, name: str, image_type: str, size: int, target: int, found: Iterator[Member], tar: Tar
    ) -> dict[str, Any]:
        first = next(found)
        if first.fingerprint in self._targets:
            raise Unusable("repeated target", f"another question is about {first.source.path}", is_bad=False)
        drawn = put_together(image_type, target, size, chain([first], found))
        # Only now is it certain that there will be a question.
        self._targets.add(first.fingerprint)
        images = [tar.add(f"{image_type}/{name}{end}", data) for end, data in self._files(drawn)]
        question, answer = self._one_turn(first.source)
        is_pip = image_type == "pip"
        where = CENTRE_PHRASES[self.rng.integers(len(CENTRE_PHRASES))] if is_pip else numbered(target)
        others = [true_of(source, question) for source in drawn.sources if source is not first.source]
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
            return [(f".{self._picture_format}", encode(drawn.picture, self._picture_format))]
        files = [_file(drawn.members[position]) for position in range(len(drawn.members))]
        return [(f"_{number}{end}", data) for number, (end, data) in enumerate(files, 1)]

    def _one_turn(self, source: Source) -> tuple[str, str]:
        """The first turn of a conversation, whose later ones lean on it; else any."""
        return source.turns[0 if source.is_conversation else self.rng.integers(len(source.turns))]


def true_of(source: Source, question: str) -> str | None:
    """What a record answers to the same question, None if it is not asked there."""
    wanted = question.casefold()
    return next((answer for asked, answer in source.turns if asked.casefold() == wanted), None)


def _file(member: Member) -> tuple[str, bytes]:
    """Suffix and bytes of a picture of its own: as it came, or redrawn where readers would see it otherwise."""
    picture = member.picture
    return (picture.suffix, picture.data) if picture.is_plain else (".png", encode(picture.pixels, "png"))
