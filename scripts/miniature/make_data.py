"""Data sets of the miniature world: `python -m scripts.miniature.make_data --output DIR --seed 0`.

Writes preference pairs (train.json, validation.json), test questions (test.json: the three multi-image formats and
plain single images) and their pictures under DIR/images. The same seed writes the
same bytes. A rejected answer is true of another image of its prompt: the confusion that the project treats.
On demand also training questions without pairs (instructions.json, for data_gen), pairs about single images
(single.json) and validation questions (validation_questions.json).
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from llava.runtime import ArgumentParser
from scripts.miniature.prompts import MULTI_IMAGE_TYPES, Prompt, sample_prompt

OTHER_IMAGE, RANDOM = "other_image", "random"
EVERY_TYPE = (*MULTI_IMAGE_TYPES, "single")
ON_DEMAND = ("instructions", "single", "validation_questions")


def main() -> None:
    """Writes the miniature's."""
    write(parser_of(__doc__).parse_args(), sample_prompt)


def write(args: argparse.Namespace, sample: Callable[[np.random.Generator, str, str], Prompt]) -> None:
    """The files of one data set; the seed of each is its own, so that one more changes no other.

    `sample` draws a prompt of a split and format.
    """
    num_validation = args.num_test if args.num_validation is None else args.num_validation
    files = [
        ("train", "train", args.num_train, MULTI_IMAGE_TYPES, args.rejected),
        ("validation", "validation", num_validation, MULTI_IMAGE_TYPES, OTHER_IMAGE),
        ("test", "test", args.num_test, EVERY_TYPE, None),
        ("instructions", "train", args.num_instructions, MULTI_IMAGE_TYPES, None),
        ("single", "train", args.num_single, ("single",), RANDOM),
        ("validation_questions", "validation", args.num_validation_questions, EVERY_TYPE, None),
    ]
    for number, (name, split, size, image_types, rejected) in enumerate(files):
        if not size and name in ON_DEMAND:
            continue
        rng = np.random.default_rng([args.seed, number])
        records = []
        for index in tqdm(range(size), desc=name, unit="record"):
            prompt = sample(rng, split, image_types[index % len(image_types)])
            record_id = f"{name}_{index:06d}"
            images = save_pictures(prompt.pictures(), args.output / "images", name, record_id)
            fields = preference(prompt, rejected, rng) if rejected else question(prompt)
            records.append({"id": record_id, "image": images} | fields)
        lines = ",\n".join(json.dumps(record) for record in records)
        (args.output / f"{name}.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def parser_of(description: str) -> argparse.ArgumentParser:
    """The command line of every world's data."""
    parser = ArgumentParser(description=description, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the data set")
    parser.add_argument("--num_train", type=int, default=1800, help="preference pairs for training")
    parser.add_argument("--num_validation", type=int, help="held-out preference pairs (default: num_test)")
    parser.add_argument("--num_test", type=int, default=800, help="test questions, a quarter a format")
    parser.add_argument("--num_instructions", type=int, default=0, help="training questions for data_gen")
    parser.add_argument("--num_single", type=int, default=0, help="training pairs about a single image")
    parser.add_argument("--num_validation_questions", type=int, default=0, help="as test questions, other combinations")
    parser.add_argument(
        "--rejected",
        choices=[OTHER_IMAGE, RANDOM],
        default=OTHER_IMAGE,
        help="of train.json: true of another image, or any other value of the attribute",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the draw; what is held out stays the same")
    return parser


def preference(prompt: Prompt, rejected_from: str, rng: np.random.Generator) -> dict:
    """The fields of a preference pair; the rejected answer is that of another image, or any wrong one, at random."""
    rejected = str(rng.choice(prompt.others if rejected_from == OTHER_IMAGE else prompt.wrong))
    pair = {"prompt": prompt.text, "chosen": prompt.answer, "rejected": rejected}
    return pair | where(prompt) | {"rejected_from": rejected_from}


def question(prompt: Prompt) -> dict:
    """The fields of a test question; `others` holds the answers that are true of the other images."""
    return {"prompt": prompt.text, "answer": prompt.answer, "others": prompt.others} | where(prompt)


def where(prompt: Prompt) -> dict:
    """The fields that say what the prompt refers to."""
    if prompt.image_type == "single":
        return {"image_type": "single"}
    fields = {"image_type": prompt.image_type, "target": prompt.target + 1, "target_box": prompt.target_box}
    return fields | ({"grid": list(prompt.grid)} if prompt.image_type == "collage" else {})


def save_pictures(pictures: list[Image.Image], folder: Path, name: str, record_id: str) -> list[str]:
    """Paths of the saved pictures, relative to `folder`."""
    (folder / name).mkdir(parents=True, exist_ok=True)
    paths = [f"{name}/{record_id}_{number}.png" for number in range(1, len(pictures) + 1)]
    for path, picture in zip(paths, pictures, strict=True):
        picture.save(folder / path, compress_level=1)
    return paths


if __name__ == "__main__":
    main()
