"""The README's way from single-image data to a data set, as printed: each command at its own defaults."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llava.records import read_json
from tests import forks
from tests.conftest import BASE

ROOT = Path(__file__).parent.parent
COLOURS = "red green blue yellow black white orange purple".split()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with 200 single pictures of two subsets and a question about each; the same picture once in both."""
    folder, rng = tmp_path_factory.mktemp("chain"), np.random.default_rng(0)
    records = []
    for number in range(200):
        name = f"{('coco', 'gqa')[number % 2]}/{number:03d}.png"
        (folder / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        if number != 1:
            pixels = rng.integers(0, 255, (24, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / name)
        turns = [("human", "<image>\nWhat colour is the car?"), ("gpt", f"It is {COLOURS[number % 8]} {number}.")]
        turns = [{"from": who, "value": text} for who, text in turns]
        records.append({"id": f"s{number}", "image": name, "conversations": turns})
    (folder / "source.json").write_text(json.dumps(records))
    return folder


def run(folder, *words, **knobs):
    """A command, which must end with 0."""
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", **knobs}
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_chain_of_the_readme_ends_in_a_data_set_with_held_out_pairs(place):
    run(place, "bash", str(ROOT / "data_gen/gen_instruction/gen_instruction.sh"),
        SOURCE="source.json", IMAGES="images", OUTPUT="output/instructions")  # fmt: skip
    run(place, "bash", str(ROOT / "data_gen/gen_chosen_rejected/gen_chosen_rejected.sh"), "--rejected", "other_image",
        "--source", "source.json", MODEL=str(BASE), OUTPUT="output/pairs")  # fmt: skip
    mix = ["python", "-m", "data_gen.mix", "--pairs", "output/pairs/pairs.json"]
    code, said, errors = forks.run(
        [*mix, "--image_folder", "output/instructions/images", "--output", "data", "--zip"], cwd=place
    )
    assert code == 0, errors
    last = said.strip().splitlines()[-1]
    train, validation = (read_json(place / f"data/{name}.json") for name in ("train", "validation"))
    pairs = read_json(place / "output/pairs/pairs.json")
    assert f"{len(train)} train, {len(validation)} validation" in last
    assert len(train) + len(validation) == len(pairs) > 50  # nothing is lost
    assert 0.025 <= len(validation) / len(pairs) <= 0.1  # at least half and at most twice the share of 0.05
    used = [{source["path"] for record in part for source in record["sources"]} for part in (train, validation)]
    assert used[0] and used[1] and not used[0] & used[1]
    assert not all({"coco/000.png", "gqa/001.png"} & own for own in used)  # the same picture, under two names
