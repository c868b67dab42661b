"""Single pictures of the miniature world with questions, as LLaVA's data is: `python -m scripts.miniature.make_source`.

Writes OUTPUT/source.json and pictures under OUTPUT/images. Every record has one picture and a question about each of
its attributes, so that what is true of the other pictures of a prompt is known. Companions come from a record's own
folder: small folders make groups of prompts that share no picture. The same seed writes the same bytes.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llava.command_line import check_numbers, flag, parse
from llava.runtime import Progress, user_errors, write_records
from scripts.miniature.draw import draw_single
from scripts.miniature.prompts import QUESTIONS, sample_scene
from scripts.miniature.world import SHARES, Scene


@dataclass(frozen=True)
class SourceFlags:
    """The command line."""

    _argument_group_name = "source"
    output: Path = flag("folder of the data set")
    split: str = flag("which combinations are drawn", "train", choices=list(SHARES))
    num_pictures: int = flag("pictures, each with its questions", 600)
    group_size: int = flag("pictures of a folder", 30)
    seed: int = flag("of the draw; the held-out combinations stay the same", 0)

    def __post_init__(self):
        check_numbers(self, num_pictures=(1, 10_000_000), group_size=(1, None), seed=(0, None))


def main() -> None:
    """Writes the table and its pictures."""
    with user_errors():
        (flags,) = parse([SourceFlags], __doc__)
    rng = np.random.default_rng([flags.seed, list(SHARES).index(flags.split)])
    records = []
    for number in Progress(range(flags.num_pictures), desc="source", unit="picture"):
        path = f"{flags.split}_{number // flags.group_size:03d}/{number:06d}.png"
        scene = sample_scene(rng, flags.split)
        (flags.output / "images" / path).parent.mkdir(parents=True, exist_ok=True)
        draw_single(scene).save(flags.output / "images" / path, compress_level=1)
        records.append({"id": f"{flags.split}_{number:06d}", "image": path, "conversations": questions(scene, rng)})
    write_records(flags.output / "source.json", records)


def questions(scene: Scene, rng: np.random.Generator) -> list[dict[str, str]]:
    """A question about each attribute, in random order, and the answers."""
    turns = []
    for attribute in rng.permutation(list(QUESTIONS)):
        turns.append({"from": "human", "value": QUESTIONS[attribute]})
        turns.append({"from": "gpt", "value": getattr(scene, attribute)})
    turns[0]["value"] = f"<image>\n{turns[0]['value']}"
    return turns


if __name__ == "__main__":
    main()
