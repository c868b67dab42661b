"""Data sets of the miniature world: `python -m scripts.miniature.make_data --output DIR --seed 0`.

Writes preference pairs (train.json), test questions (test.json: the three multi-image formats and plain single images)
and their pictures under DIR/images. The same seed writes the same bytes. A rejected answer is true of another image of
its prompt: the confusion that the project treats. On demand also held-out pairs (validation.json), training questions
without pairs (instructions.json, for data_gen) and validation questions (validation_questions.json).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from llava.asked import target_fields
from llava.command_line import check_numbers, flag, parse
from llava.runtime import Progress, user_errors, write_records
from scripts.miniature.draw import GRID
from scripts.miniature.prompts import (
    CATEGORIES,
    COMPARE,
    LEVELS,
    MULTI_IMAGE_TYPES,
    NAMED,
    NUMBERED,
    SEARCH,
    Prompt,
    sample_prompt,
)

EVERY_TYPE = (*MULTI_IMAGE_TYPES, "single")


@dataclass(frozen=True)
class DataFlags:
    """The command line."""

    _argument_group_name = "data"
    output: Path = flag("folder of the data set")
    num_train: int = flag("preference pairs for training", 1800)
    num_validation: int = flag("held-out preference pairs", 0)
    num_test: int = flag("test questions, a quarter a format", 800)
    num_instructions: int = flag("training questions for data_gen", 0)
    num_validation_questions: int = flag("as test questions, other combinations", 0)
    levels: list[int] = flag(
        "of questions, in equal parts: 1 names an image, 2 compares two, 3 asks which image it is (2, 3: sequences and "
        "collages)", [NAMED], choices=LEVELS,
    )  # fmt: skip
    seed: int = flag("of the draw; what is held out stays the same", 0)

    def __post_init__(self):
        sizes = [name for name in self.__dataclass_fields__ if name.startswith("num_")]
        check_numbers(self, seed=(0, None), **dict.fromkeys(sizes, (0, 10_000_000)))
        if not any(getattr(self, name) for name in sizes):
            raise ValueError(f"--{' --'.join(sizes)} are all 0: there is nothing to write")


def main() -> None:
    """Writes the files of one data set; the seed of each is its own, so that one more changes no other."""
    with user_errors():
        (flags,) = parse([DataFlags], __doc__)
    files = [
        ("train", 0, "train", flags.num_train, MULTI_IMAGE_TYPES, preference),
        ("validation", 1, "validation", flags.num_validation, MULTI_IMAGE_TYPES, preference),
        ("test", 2, "test", flags.num_test, EVERY_TYPE, question),
        ("instructions", 3, "train", flags.num_instructions, MULTI_IMAGE_TYPES, question),
        ("validation_questions", 5, "validation", flags.num_validation_questions, EVERY_TYPE, question),
    ]
    for name, number, split, size, image_types, fields_of in files:
        if not size:
            continue
        rng = np.random.default_rng([flags.seed, number])
        records = []
        for index in Progress(range(size), desc=name, unit="record"):
            prompt = drawn(rng, split, image_types, flags.levels, index)
            record_id = f"{name}_{index:06d}"
            images = save_pictures(prompt.pictures(), flags.output / "images", name, record_id)
            category = {} if flags.levels == [NAMED] else {"category": CATEGORIES[prompt.level]}
            records.append({"id": record_id, "image": images} | fields_of(prompt, rng) | category)
        write_records(flags.output / f"{name}.json", records)


def drawn(
    rng: np.random.Generator, split: str, image_types: Sequence[str], levels: Sequence[int], index: int
) -> Prompt:
    """The prompt of an index: levels in turn, and in each the formats that it has in turn."""
    number, place = divmod(index, len(levels))
    formats = image_types if levels[place] == NAMED else NUMBERED
    return sample_prompt(rng, split, formats[number % len(formats)], level=levels[place])


def preference(prompt: Prompt, rng: np.random.Generator) -> dict:
    """The fields of a preference pair; the rejected answer is that of another image, or of others, at random.

    Where two are compared it is as often the two the other way round.
    """
    others, kind = prompt.others, "other_number" if prompt.level == SEARCH else "other_image"
    if prompt.level == COMPARE:
        is_swapped = len(others) == 1 or rng.random() < 0.5
        others, kind = (others[:1], "swapped") if is_swapped else (others[1:], "other_pair")
    pair = {"prompt": prompt.text, "chosen": prompt.answer, "rejected": str(rng.choice(others))}
    return pair | where(prompt) | {"rejected_from": kind}


def question(prompt: Prompt, _: np.random.Generator) -> dict:
    """The fields of a test question; `others` holds the answers that are true of the other images."""
    return {"prompt": prompt.text, "answer": prompt.answer, "others": prompt.others} | where(prompt)


def where(prompt: Prompt) -> dict:
    """The fields that say what the prompt refers to."""
    if prompt.image_type == "single":
        return {"image_type": "single"}
    fields = {"image_type": prompt.image_type, **target_fields(prompt.targets)}
    fields |= {} if prompt.target_box is None else {"target_box": prompt.target_box}
    fields |= {"is_search": True} if prompt.level == SEARCH else {}
    return fields | ({"grid": list(GRID)} if prompt.image_type == "collage" else {})


def save_pictures(pictures: list[Image.Image], folder: Path, name: str, record_id: str) -> list[str]:
    """Paths of the saved pictures, relative to `folder`."""
    (folder / name).mkdir(parents=True, exist_ok=True)
    paths = [f"{name}/{record_id}_{number}.png" for number in range(1, len(pictures) + 1)]
    for path, picture in zip(paths, pictures, strict=True):
        picture.save(folder / path, compress_level=1)
    return paths


if __name__ == "__main__":
    main()
