"""The miniature world: the same bytes for the same seed, exact boxes, held-out combinations, and the shipped base."""

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from llava.checkpoints import load_model, load_processor
from llava.records import read_preferences, read_questions
from scripts.miniature.prompts import sample_prompt
from scripts.miniature.scores import score_base
from scripts.miniature.world import ATTRIBUTES, combinations

ROOT = Path(__file__).parent.parent
BASE = ROOT / "scripts/miniature/base"


def make(folder, seed=0):
    command = [sys.executable, "-m", "scripts.miniature.make_data", "--output", str(folder), "--num_train", "30"]
    subprocess.run([*command, "--num_test", "30", "--seed", str(seed)], cwd=ROOT, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make(tmp_path_factory.mktemp("world"))


def digest(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_the_same_seed_writes_the_same_bytes_and_another_seed_others(world, tmp_path):
    assert digest(make(tmp_path / "again")) == digest(world)
    assert digest(make(tmp_path / "other", seed=1))["train.json"] != digest(world)["train.json"]


def test_records_are_what_the_readers_take(world):
    pairs = read_preferences(world / "train.json")
    questions = read_questions(world / "test.json")
    assert {record.image_type for record in pairs} == {"sequence", "collage", "pip"}
    assert {question.image_type for question in questions} == {"sequence", "collage", "pip", "single"}
    for raw in json.loads((world / "train.json").read_text()):
        assert raw["rejected_from"] == "other_image"
        assert bool(re.search(r"In Image(\d+)", raw["prompt"])) == (raw["image_type"] != "pip")


def test_splits_share_no_combination_and_cover_the_world():
    parts = [set(combinations(split)) for split in ("train", "validation", "test")]
    assert not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])
    assert len(set.union(*parts)) == np.prod([len(values) for values in ATTRIBUTES.values()])


@pytest.mark.parametrize("image_type", ["collage", "pip"])
def test_the_target_box_is_where_the_target_is_drawn(image_type):
    """Redraw with another target scene: every pixel that changes lies inside the box, and the box is filled."""
    from dataclasses import replace

    rng = np.random.default_rng(0)
    for _ in range(5):
        prompt = sample_prompt(rng, "train", image_type)
        other = sample_prompt(rng, "train", image_type).scenes[0]
        scenes = tuple(other if i == prompt.target else scene for i, scene in enumerate(prompt.scenes))
        before, after = (np.asarray(p.pictures()[0]).astype(int) for p in (prompt, replace(prompt, scenes=scenes)))
        changed = np.abs(before - after).max(-1) > 60  # above the pixel noise (4 of 255), which is drawn over all
        x0, y0, x1, y1 = prompt.target_box
        outside = changed.copy()
        outside[y0:y1, x0:x1] = False
        assert changed.any() and not outside.any()


def test_a_distractor_differs_from_the_target_on_what_is_asked():
    rng = np.random.default_rng(0)
    for image_type in ("sequence", "collage", "pip"):
        for _ in range(50):
            prompt = sample_prompt(rng, "train", image_type)
            assert prompt.answer not in prompt.others


class TestShippedBase:
    def test_it_is_small_half_precision_and_complete(self):
        from safetensors import safe_open

        assert sum(path.stat().st_size for path in BASE.iterdir()) < 6e6
        with safe_open(BASE / "model.safetensors", "pt") as file:
            assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.float16}
        load_model(str(BASE))
        assert load_processor(str(BASE)).tokenizer.convert_tokens_to_ids("<image>") > 0

    def test_it_scores_what_its_file_says_and_routes_partly(self):
        """Fewer prompts than the file's, so within three standard errors of both."""
        said = json.loads((BASE / "base_scores.json").read_text())
        found = score_base(load_model(str(BASE)).eval(), load_processor(str(BASE)), 60)
        for name, scores in found.items():
            share = said[name]["accuracy"] / 100
            error = (max(share * (1 - share), 0.02) * (1 / 60 + 1 / said[name]["num_prompts"])) ** 0.5
            assert abs(scores["accuracy"] / 100 - share) < 3.5 * error, (name, scores["accuracy"], said[name])
        assert said["single"]["accuracy"] >= 85
        assert said["sequence_5"]["accuracy"] > 30  # picking an image at random gives about 1/5


def test_the_doctor_passes_on_the_demo_data(world, monkeypatch, capsys):
    from scripts import doctor

    words = ["--model_name_or_path", BASE, "--data_path", world / "train.json", "--image_folder", world / "images"]
    monkeypatch.setattr(sys, "argv", ["doctor", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        doctor.main()
    assert ended.value.code == 0, capsys.readouterr().out


def test_pictures_are_rgb_of_the_model_size(world):
    picture = Image.open(next((world / "images").rglob("*.png")))
    assert (picture.mode, picture.size) == ("RGB", (72, 72))
