"""Single pictures of the miniature world with questions, as LLaVA's data is: `python -m scripts.miniature.make_source`.

Writes OUTPUT/source.json and pictures under OUTPUT/images. Every record has one picture and a question about each of
its attributes, so that what is true of the other pictures of a prompt is known. Companions come from a record's own
folder: small folders make groups of prompts that share no picture. The same seed writes the same bytes.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from tqdm import tqdm

from scripts.miniature.draw import draw_single
from scripts.miniature.prompts import QUESTIONS
from scripts.miniature.world import SHARES, Scene, combinations


def main() -> None:
    """Writes the table and its pictures."""
    args = parse_args()
    rng = np.random.default_rng([args.seed, list(SHARES).index(args.split)])
    pool = combinations(args.split)
    records = []
    for number in tqdm(range(args.num_pictures), desc="source", unit="picture"):
        path = f"{args.split}_{number // args.group_size:03d}/{number:06d}.png"
        scene = Scene(*pool[rng.integers(len(pool))], seed=int(rng.integers(2**31)))
        (args.output / "images" / path).parent.mkdir(parents=True, exist_ok=True)
        draw_single(scene).save(args.output / "images" / path, compress_level=1)
        records.append({"id": f"{args.split}_{number:06d}", "image": path, "conversations": questions(scene, rng)})
    lines = ",\n".join(json.dumps(record) for record in records)
    (args.output / "source.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the data set")
    parser.add_argument("--split", choices=list(SHARES), default="train", help="which combinations are drawn")
    parser.add_argument("--num_pictures", type=int, default=600, help="pictures, each with its questions")
    parser.add_argument("--group_size", type=int, default=30, help="pictures of a folder")
    parser.add_argument("--seed", type=int, default=0, help="of the draw; the held-out combinations stay the same")
    return parser.parse_args()


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
