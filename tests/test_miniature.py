"""The miniature world: the same bytes for the same seed, exact boxes, held-out combinations, and the shipped base."""

import hashlib
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from llava.checkpoints import open_checkpoint
from llava.families.qwen_vl import QwenVL
from llava.records import parse_preference, read_preferences, read_questions
from scripts import figures
from scripts.miniature import make_data, make_source, qwen, train_base, wrong_targets
from scripts.miniature.lessons import conversation_batch, encode, patch_batch
from scripts.miniature.prompts import sample_prompt
from scripts.miniature.world import ATTRIBUTES, combinations
from tests.conftest import preference
from tests.tiny.common import template

ROOT = Path(__file__).parent.parent
BASE = ROOT / "scripts/miniature/base"


def words_of(folder, seed=0):
    return ["make_data", "--output", str(folder), "--num_train", "30", "--num_test", "30", "--seed", str(seed)]


def make(folder, monkeypatch, seed=0):
    monkeypatch.setattr(sys, "argv", words_of(folder, seed))
    make_data.main()
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Made by a process of its own, so that nothing of it can depend on this one."""
    folder = tmp_path_factory.mktemp("world")
    command = [sys.executable, "-m", "scripts.miniature.make_data", *words_of(folder)[1:]]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return folder


def digest(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_the_same_seed_writes_the_same_bytes_and_another_seed_others(world, tmp_path, monkeypatch):
    assert digest(make(tmp_path / "again", monkeypatch)) == digest(world)
    assert digest(make(tmp_path / "other", monkeypatch, seed=1))["train.json"] != digest(world)["train.json"]


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


def record(image_type, **more):
    return {"image_type": image_type, "prompt": "p", "chosen": "red", "rejected": "blue", "target": 2, **more}


@pytest.mark.parametrize(
    "before",
    [
        record("sequence", image=["a", "b", "c"], target_box=[0, 0, 72, 72]),
        record("collage", image=["a"], target_box=[36, 0, 72, 36], grid=[2, 2]),
        record("pip", image=["a"], target=1, target_box=[11, 11, 61, 61]),
    ],
)
def test_a_wrong_target_is_another_region_and_nothing_else_changes(before):
    rng = np.random.default_rng(0)
    for _ in range(20):
        after = wrong_targets.with_another_target(before, "a record", rng)
        assert {name for name in before if before[name] != after[name]} <= {"target", "target_box"}
        assert after != before
        if before["image_type"] != "sequence":
            boxes = [(record["target_box"][0::2], record["target_box"][1::2]) for record in (before, after)]
            (x0, y0), (x1, y1) = boxes
            assert x0[1] <= x1[0] or x1[1] <= x0[0] or y0[1] <= y1[0] or y1[1] <= y0[0]


@pytest.mark.parametrize("number", [3, 4, 5])
def test_wrong_targets_of_several_are_as_many_others_as_there_are(number):
    before = record("sequence", image=["a"] * number, target=None, targets=[1, 3])
    seen = set()
    for seed in range(20):
        after = wrong_targets.with_another_target(before, "", np.random.default_rng(seed))
        seen.add(parse_preference(after | {"prompt": "<image>" * number}, "").targets)
    others = [place for place in range(number) if place not in (0, 2)]
    assert seen == set(itertools.combinations(others, min(2, number - 2)))
    every = record("sequence", image=["a"] * 2, target=None, targets=[1, 2])
    assert wrong_targets.with_another_target(every, "", np.random.default_rng(0)) == every


def test_pairs_with_wrong_targets_are_still_read(world, tmp_path, monkeypatch):
    words = ["--pairs", str(world / "train.json"), "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["wrong_targets", *words])
    wrong_targets.main()
    before, after = (read_preferences(path) for path in (world / "train.json", tmp_path / "pairs.json"))
    assert [pair.chosen for pair in after] == [pair.chosen for pair in before]
    assert all((a.target, a.target_box) != (b.target, b.target_box) for a, b in zip(after, before, strict=True))


@pytest.mark.parametrize("command", [make_data, make_source, train_base, wrong_targets])
def test_a_wrong_flag_is_one_line(command, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["command", "--output", str(tmp_path), "--sed", "1"])
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: unknown flag --sed; did you mean --seed?\n"


BAD = ("nan", "inf", "-1", "1.5", "")


@pytest.mark.parametrize(
    ("command", "words", "message"),
    [
        *((make_data, ["--num_test", bad], "--num_test") for bad in BAD),
        *((make_data, ["--seed", bad], "--seed") for bad in BAD),
        (make_data, ["--num_train", "100000000000000"], "at most 10000000"),
        (make_data, ["--num_train", "0", "--num_test", "0"], "all 0: there is nothing to write"),
        *((make_source, ["--num_pictures", bad], "--num_pictures") for bad in (*BAD, "0", "1000000000000")),
        *((make_source, ["--group_size", bad], "--group_size") for bad in (*BAD, "0")),
        *((make_source, ["--seed", bad], "--seed") for bad in BAD),
        *((train_base, ["--num_test", bad], "--num_test") for bad in (*BAD, "0")),
        *((train_base, ["--seed", bad], "--seed") for bad in (*BAD, "9" * 30)),
        *((wrong_targets, ["--seed", bad], "--seed") for bad in BAD),
        (wrong_targets, ["--pairs", "none.json"], "none.json: no such file"),
        (figures, ["--output", __file__], "test_miniature.py"),
        (figures, ["--demo", "no/demo"], "no/demo/data/test.json: no such file"),
    ],
)
def test_values_that_cannot_be_meant_are_one_line(command, words, message, tmp_path, monkeypatch, capsys):
    own = ["--pairs", str(tmp_path / "pairs.json")] if command is wrong_targets else []
    (tmp_path / "pairs.json").write_text("[]")
    monkeypatch.setattr(sys, "argv", ["command", "--output", str(tmp_path / "out"), *own, *words])
    with pytest.raises(SystemExit) as ended:
        command.main()
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.count("\n") == 1 and message in error and "Traceback" not in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_type": None}, "not a pair about several images with image_type"),
        ({"image": ["a.png"], "prompt": "<image>\nIn the centre, what?", "image_type": "pip"}, "with target_box"),
        ({"image_type": "sequence"}, "images with target"),
        ({"image": ["a.png"], "prompt": "<image>\nWhat?", "image_type": "sequence", "target": 1}, "no other image"),
    ],
)
def test_a_pair_without_another_image_is_one_line(changes, message, tmp_path, monkeypatch, capsys):
    pair = preference(0) | changes
    record = {name: value for name, value in pair.items() if value is not None}
    (tmp_path / "pairs.json").write_text(json.dumps([record]))
    words = ["--pairs", str(tmp_path / "pairs.json"), "--output", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["wrong_targets", *words])
    with pytest.raises(SystemExit) as ended:
        wrong_targets.main()
    error = capsys.readouterr().err
    assert ended.value.code == 2 and "pairs.json record 1" in error and message in error, error


class TestShippedBase:
    def test_it_is_small_half_precision_and_complete(self):
        from safetensors import safe_open

        assert sum(path.stat().st_size for path in BASE.iterdir()) < 6e6
        with safe_open(BASE / "model.safetensors", "pt") as file:
            assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.float16}
        checkpoint = open_checkpoint(str(BASE))
        checkpoint.load()
        assert checkpoint.family.tokenizer.convert_tokens_to_ids("<image>") > 0

    def test_it_scores_what_its_file_says_and_routes_partly(self):
        """Fewer prompts than the file's, so within three standard errors of both."""
        said = json.loads((BASE / "base_scores.json").read_text())
        checkpoint = open_checkpoint(str(BASE))
        found = train_base.score_base(checkpoint.load().eval(), checkpoint.family, 60)
        for name, scores in found.items():
            share = said[name]["accuracy"] / 100
            error = (max(share * (1 - share), 0.02) * (1 / 60 + 1 / said[name]["num_prompts"])) ** 0.5
            assert abs(scores["accuracy"] / 100 - share) < 3.5 * error, (name, scores["accuracy"], said[name])
        assert said["single"]["accuracy"] >= 85
        assert said["sequence_5"]["accuracy"] > 30  # picking an image at random gives about 1/5


class TestTrainingTheBase:
    """The recipe itself, with few steps."""

    @pytest.fixture
    def recipe(self, monkeypatch):
        for name, recipe in train_base.RECIPES.items():
            batch = dict.fromkeys(("single", "sequence", "collage", "pip"), 2)
            small = {
                "vision": recipe["vision"] | {"steps": 3, "batch": 2},
                "reading": {"steps": 2, "batch": 2, "rate": 1e-3},
                "routing": recipe["routing"] | {"steps": 5, "batch": batch, "prompts": 2},
            }
            monkeypatch.setitem(train_base.RECIPES, name, small)

    def run(self, folder, monkeypatch, family="llava"):
        words = ["--output", str(folder), "--num_test", "4", "--family", family]
        monkeypatch.setattr(sys, "argv", ["train_base", *words])
        train_base.main()
        return (folder / "model.safetensors").read_bytes(), json.loads((folder / "base_scores.json").read_text())

    @pytest.mark.parametrize("family", ["llava", "qwen"])
    def test_the_same_seed_makes_the_same_bytes(self, family, recipe, monkeypatch, tmp_path):
        model, said = self.run(tmp_path, monkeypatch, family)
        assert said["steps"] == {"vision": 3, "reading": 2, "routing": 5}
        assert self.run(tmp_path, monkeypatch, family) == (model, said)

    def test_a_qwen_opens_as_any_checkpoint(self, recipe, monkeypatch, tmp_path):
        """What was written gives the same text, tokens and pixels as what was trained."""
        self.run(tmp_path, monkeypatch, "qwen")
        checkpoint = open_checkpoint(str(tmp_path))
        assert isinstance(checkpoint.family, QwenVL)
        model, family = qwen.build(0)
        assert model.state_dict().keys() == checkpoint.load().state_dict().keys()
        turns = [("<image>\nWhat is the colour?", "red"), ("And the shape?", None)]
        assert checkpoint.family.render(turns) == family.render(turns)
        assert checkpoint.family.encode_prompt("Ünïcode\n<image> 12") == family.encode_prompt("Ünïcode\n<image> 12")
        picture = Image.new("RGB", (50, 90), "red")
        read, own = (one.pixels([picture])["pixel_values"] for one in (checkpoint.family, family))
        assert torch.equal(read, own)

    @pytest.mark.parametrize("maker", train_base.MAKERS.values(), ids=train_base.MAKERS)
    def test_a_batch_is_the_text_of_inference_with_one_token_an_answer(self, maker):
        _, family = maker.build(0)
        batch = conversation_batch(np.random.default_rng(0), family, "sequence", 3, 2, 4)
        assert family.num_image_tokens((72, 72)) == 36 and batch.is_image.sum() == 2 * 3 * 36
        first = sample_prompt(np.random.default_rng(0), "train", "sequence", 3)
        prompt = family.expand(family.encode_prompt(first.text), family.images([(72, 72)] * 3))
        row = batch.input_ids[0].tolist()
        assert row[: len(prompt)] == prompt
        assert batch.answers[0].nonzero()[:2].flatten().tolist() == [len(prompt), len(prompt) + 1]
        answers = batch.input_ids[batch.answers].view(-1, 2)
        assert (answers[:, 1] == family.end_id).all() and len(answers) == 2 * 4
        words = [family.tokenizer.decode(token).strip() for token in answers[:, 0]]
        assert {*words} <= {word for values in ATTRIBUTES.values() for word in values} and words[0] == first.answer

    @pytest.mark.parametrize("maker", train_base.MAKERS.values(), ids=train_base.MAKERS)
    def test_patches_are_labelled_with_what_is_drawn_under_them(self, maker):
        """Of a collage each quarter has one scene; places run row by row."""
        model, family = maker.build(0)
        pixels, values, places = patch_batch(np.random.default_rng(0), family, "train", ["single", "collage"])
        assert torch.equal(places, torch.arange(36).repeat(2))
        single, collage = values.view(2, 6, 6, -1)
        assert (single == single[0, 0]).all()
        prompts = np.random.default_rng(0)
        _, prompt = (sample_prompt(prompts, "train", kind) for kind in ("single", "collage"))
        for number, scene in enumerate(prompt.scenes):
            row, column = divmod(number, 2)
            quarter = collage[3 * row : 3 * row + 3, 3 * column : 3 * column + 3].reshape(9, -1)
            assert (quarter == torch.tensor([v.index(getattr(scene, n)) for n, v in ATTRIBUTES.items()])).all()
        features = maker.features(model, pixels)
        assert features.flatten(0, -2).shape == (72, maker.FEATURES_WIDTH)

    def test_qwens_positions_are_the_familys(self):
        """transformers counts them from the batch as the family does for inference, pictures of any size."""
        model, family = qwen.build(0)
        pictures = [Image.new("RGB", size) for size in ((72, 72), (100, 60))]
        batch = encode(family, [[("<image> <image>\nWhat?", "red")], [("<image>", "blue")]], [pictures, pictures[1:]])
        found, _ = model.model.get_rope_index(
            batch.input_ids, batch.inputs["mm_token_type_ids"], batch.pixels["image_grid_thw"]
        )
        images = family.images([picture.size for picture in pictures])
        row = batch.input_ids[0].tolist()
        assert torch.equal(found[:, 0], family.positions(row, images))

    def test_qwens_template_is_the_published_one_for_what_it_says(self):
        _, family = qwen.build(0)
        picture = {"type": "image"}
        parts = [{"type": "text", "text": "Image1:"}, picture, {"type": "text", "text": "\nWhat?"}]
        for chat in ([("user", parts)], [("system", "Be brief."), ("user", "Hi"), ("assistant", "x"), ("user", parts)]):
            said = [{"role": role, "content": content} for role, content in chat]
            settings = {"tokenize": False, "add_generation_prompt": True}
            own = family.tokenizer.apply_chat_template(said, **settings)
            published = template("qwen2_5_vl")
            assert own == family.tokenizer.apply_chat_template(said, **settings, chat_template=published)

    def test_the_naming_lesson_reads_numbers_where_they_are(self):
        """States that spell the numbers out cost nothing; states of a wrong picture do."""
        family = open_checkpoint(str(BASE)).family
        batch = conversation_batch(np.random.default_rng(0), family, "sequence", 3, 2, 4)
        states = torch.zeros(*batch.input_ids.shape, 3)
        states[batch.owners >= 0] = torch.eye(3)[batch.owners[batch.owners >= 0]]
        rows = batch.before.nonzero()[::2]
        states[rows[:, 0], rows[:, 1]] = torch.eye(3)[batch.targets.flatten()]
        head = torch.nn.Linear(3, 3)
        with torch.no_grad():
            head.weight.copy_(20 * torch.eye(3))
        assert train_base.naming_loss(head, states, batch) < 1e-6
        states[rows[:, 0], rows[:, 1]] = states[rows[:, 0], rows[:, 1]].roll(1, dims=-1)
        assert train_base.naming_loss(head, states, batch) > 10


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
