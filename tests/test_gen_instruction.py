"""Instructions end to end: texts, companions, rules, bad input, exit codes, the launch script."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
from PIL import Image

from data_gen.gen_instruction.rewriting import CENTRE_PHRASES, lower_first
from llava.asked import PIC_IN_PIC, TARGET, named_in
from llava.records import read_questions
from tests.single_images import colour, digest, generate, lines, record, save_pictures, turns, world, write

ROOT = Path(__file__).parent.parent


def made(folder):
    return lines(folder / "instructions.jsonl")


def human(item):
    return [turn["value"] for turn in item["conversations"] if turn["from"] == "human"]


# ---- texts


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("What is this?", "what is this?"),
        ("I see a dog. Which breed?", "I see a dog. Which breed?"),
        ("I'm lost. Where is this?", "I'm lost. Where is this?"),
        ("USA or UK?", "USA or UK?"),
        ("TV's brand?", "TV's brand?"),
        ("A dog?", "a dog?"),
        ("3 dogs?", "3 dogs?"),
        ('"Who" is it?', '"Who" is it?'),
        ("Éclair or cake?", "éclair or cake?"),
        ("", ""),
    ],
)
def test_first_letter(text, expected):
    assert lower_first(text) == expected


def test_centre_phrases_are_many_distinct_and_no_collage_words():
    assert 60 <= len(CENTRE_PHRASES) == len(set(CENTRE_PHRASES)) <= 100
    assert not any(TARGET.search(phrase) for phrase in CENTRE_PHRASES)
    assert all(PIC_IN_PIC.match(f"{phrase}, what is it?") for phrase in CENTRE_PHRASES)


def test_sequence_prompt_and_its_follow_up(monkeypatch, tmp_path):
    flags = world(tmp_path)
    assert generate(monkeypatch, "--format", "sequence", *flags, "--output", tmp_path / "out") == 0
    for item in made(tmp_path / "out"):
        k, n = item["target"], len(item["image"])
        head = "".join(f"Image{i}:<image>\n" for i in range(1, n + 1))
        number = item["sources"][k - 1]["id"].removeprefix("coco_")
        assert human(item) == [f"{head}In Image{k}, what colour is it, {number}?", f"In Image{k}, is it nice?"]
        assert [turn["value"] for turn in item["conversations"][1::2]] == [f"Colour {number}.", "Yes."]
        assert item["image"] == [source["path"] for source in item["sources"]]
    assert not (tmp_path / "out/images").exists(), "paths of the source folder are kept"


def test_every_turn_of_a_pic_in_pic_has_a_phrase(monkeypatch, tmp_path):
    assert generate(monkeypatch, "--format", "pip", *world(tmp_path), "--output", tmp_path / "out") == 0
    phrases = set()
    for item in made(tmp_path / "out"):
        first, second = human(item)
        assert first.startswith("<image>\n") and "<image>" not in second
        for text in (first.removeprefix("<image>\n"), second):
            phrase = text.split(", ")[0]
            assert phrase in CENTRE_PHRASES
            phrases.add(phrase)
        assert item["target"] == 1 and len(item["sources"]) == 2 and "grid" not in item
    assert len(phrases) > 20


def test_records_suit_the_reader_of_prompts(monkeypatch, tmp_path):
    assert generate(monkeypatch, "--format", "mix", *world(tmp_path), "--output", tmp_path / "out") == 0
    items = made(tmp_path / "out")
    for item in items:
        item["prompt"], item["answer"] = (turn["value"] for turn in item.pop("conversations")[:2])
    (tmp_path / "questions.json").write_text(json.dumps(items))
    for question, item in zip(read_questions(tmp_path / "questions.json"), items, strict=True):
        assert question.image_type == item["image_type"] and question.target == item["target"] - 1
        for name in question.images:
            Image.open(tmp_path / "out/images" / name).load()  # one folder for all formats of a mix
    assert {item["image_type"] for item in items} == {"sequence", "collage", "pip"}


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_pictures_out_of_an_archive(monkeypatch, tmp_path, kind):
    """Sequences of a mix get their own pictures, byte for byte."""
    flags = world(tmp_path)
    archive = shutil.make_archive(tmp_path / "pictures", kind, tmp_path / "images")
    assert generate(monkeypatch, "--format", "mix", *flags, "--output", tmp_path / "folder") == 0
    flags[3] = archive
    assert generate(monkeypatch, "--format", "mix", *flags, "--output", tmp_path / "archive") == 0
    assert digest(tmp_path / "archive") == digest(tmp_path / "folder")
    for item in made(tmp_path / "archive"):
        if item["image_type"] == "sequence":
            for name in item["image"]:
                assert (tmp_path / "archive/images" / name).read_bytes() == (tmp_path / "images" / name).read_bytes()


def test_embedded_pictures_of_sequences_become_files(monkeypatch, tmp_path):
    save_pictures(tmp_path / "images", 12)
    data = [(tmp_path / f"images/coco/{number}.png").read_bytes() for number in range(12)]
    rows = {"image": data, "question": ["What?"] * 12, "answer": ["This."] * 12}
    datasets.Dataset.from_dict(rows).save_to_disk(str(tmp_path / "table"))
    flags = ["--format", "sequence", "--source", tmp_path / "table", "--output", tmp_path / "out"]
    assert generate(monkeypatch, *flags, "--sequence_pictures", "keep") == 2
    assert generate(monkeypatch, *flags) == 0
    for item in made(tmp_path / "out"):
        stored = [(tmp_path / "out/images" / name).read_bytes() for name in item["image"]]
        assert stored == [data[int(source["path"].split("/")[1])] for source in item["sources"]]


def test_several_records_ask_in_a_mixed_collage(monkeypatch, tmp_path):
    flags = ["--sources_per_collage", "mixed", "--num_cells_weights", "6:1", "--num_records", 12]
    assert generate(monkeypatch, "--format", "collage", *flags, *world(tmp_path), "--output", tmp_path / "out") == 0
    for item in made(tmp_path / "out"):
        assert [{frozenset({target})} for target in item["turn_targets"]] == [named_in(text) for text in human(item)]
        assert len(human(item)) == 6 and len(set(item["turn_targets"])) == 3
        assert sum(text.count("<image>") for text in human(item)) == 1
        for k, text in zip(item["turn_targets"][::2], human(item)[::2], strict=True):
            assert text.endswith(f"it, {item['sources'][k - 1]['id'].removeprefix('coco_')}?")
        assert item["target"] == item["turn_targets"][0]


def test_refusals_name_what_is_not_there(monkeypatch, tmp_path):
    flags = ["--refusals", 0.5, *world(tmp_path, 40), "--num_workers", 1, "--shares", "sequence:1,collage:1"]
    assert generate(monkeypatch, "--format", "mix", *flags, "--output", tmp_path / "out") == 0
    refused = [item for item in made(tmp_path / "out") if item.get("is_refusal")]
    assert 10 <= len(refused) <= 30 and {item["image_type"] for item in refused} == {"sequence", "collage"}
    for item in refused:
        n = len(item["sources"])
        assert item["target"] is None and item.get("target_box") is None
        (question,), answer = human(item), item["conversations"][1]["value"]
        assert f"In Image{n + 1}, what" in question and f"Image{n + 1}" in answer and f"{n} images" in answer
    assert json.loads((tmp_path / "out/run.json").read_text())["counts"]["made"]["refusals"] == len(refused)


# ---- pictures of a prompt differ


def test_one_picture_under_several_names_is_used_once(monkeypatch, tmp_path):
    """Byte copies, and the same pixels in another file format."""
    save_pictures(tmp_path / "images", 3)
    records = [record(number) for number in range(3)]
    for number in range(3):
        data = (tmp_path / f"images/coco/{number}.png").read_bytes()
        (tmp_path / f"images/coco/copy{number}.png").write_bytes(data)
        Image.open(tmp_path / f"images/coco/{number}.png").save(tmp_path / f"images/coco/{number}.bmp")
        records += [
            record(10 + number, image=f"coco/copy{number}.png"),
            record(20 + number, image=f"coco/{number}.bmp"),
        ]
    flags = [*write(tmp_path, records), "--num_images_weights", "3:1", "--num_records", 40]
    assert generate(monkeypatch, "--format", "sequence", *flags, "--output", tmp_path / "out") == 0
    for item in made(tmp_path / "out"):
        assert {int(re.search(r"\d", name)[0]) for name in item["image"]} == {0, 1, 2}


def test_companions_are_of_the_same_subset(monkeypatch, tmp_path):
    for subset in ("coco", "gqa"):
        save_pictures(tmp_path / "images", 10, subset, seed=len(subset))
    records = [record(number, subset) for number in range(10) for subset in ("coco", "gqa")]
    out = tmp_path / "out"
    assert generate(monkeypatch, "--format", "mix", *write(tmp_path, records), "--output", out) == 0
    for item in made(out):
        assert len({source["path"].split("/")[0] for source in item["sources"]}) == 1


def test_too_few_different_pictures(monkeypatch, tmp_path):
    flags = ["--format", "sequence", "--num_images_weights", "4:1", *world(tmp_path, 3)]
    assert generate(monkeypatch, *flags, "--output", tmp_path / "out") == 1
    drops = lines(tmp_path / "out/dropped.jsonl")
    assert len(drops) == 3 and {drop["reason"] for drop in drops} == {"too few pictures"}
    assert {drop["id"] for drop in drops} == {"coco_0", "coco_1", "coco_2"} and not made(tmp_path / "out")


# ---- rules and bad input


def test_bounding_boxes_are_asked_about_in_sequences_only(monkeypatch, tmp_path):
    text = turns("<image>\nWhere?", "At [0.1, 0.2,0.3, 0.40].")
    for subset in ("coco", "gqa"):
        save_pictures(tmp_path / "images", 6, subset)
    records = [record(n, subset, conversations=text if n < 2 else record(n)["conversations"])
               for subset in ("coco", "gqa") for n in range(6)]  # fmt: skip
    flags = [*write(tmp_path, records), "--num_cells_weights", "2:1", "--num_images_weights", "2:1"]
    expected = {
        "sequence": {}, "collage": {"coco_0", "coco_1"}, "all": {"coco_0", "coco_1", "gqa_0", "gqa_1"}, "none": {},
        "excluded": {"coco_0", "coco_1", *(f"gqa_{n}" for n in range(6))},
    }  # fmt: skip
    more = {
        "sequence": [], "collage": [], "all": ["--bbox_filter", "all"], "none": ["--bbox_filter", "none"],
        "excluded": ["--exclude_subsets", "gqa"],
    }  # fmt: skip
    for name, dropped in expected.items():
        image_type = "sequence" if name == "sequence" else "collage"
        out = tmp_path / name
        assert generate(monkeypatch, "--format", image_type, *flags, *more[name], "--output", out) == 0, name
        drops = lines(out / "dropped.jsonl")
        assert {drop["id"] for drop in drops} == set(dropped) and not any(drop["is_bad"] for drop in drops)
        assert len(made(out)) + len(drops) == 12


BAD_PICTURES = {
    "missing picture": None,
    "empty file": b"",
    "not a picture": b"once upon a time",
    "damaged picture": "half",
    "huge picture": "huge",
}


def test_bad_pictures_are_listed_and_the_run_goes_on(monkeypatch, tmp_path):
    flags = world(tmp_path, 20)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100_000)
    records = [record(number) for number in range(20)]
    for number, content in enumerate(BAD_PICTURES.values(), 50):
        path = tmp_path / f"images/coco/{number}.png"
        if content == "half":
            Image.effect_noise((64, 64), 50).save(path)
            path.write_bytes(path.read_bytes()[:2000])
        elif content == "huge":
            Image.new("1", (400, 300)).save(path)
        elif content is not None:
            path.write_bytes(content)
        records.append(record(number))
    write(tmp_path, records)
    for image_type in ("sequence", "collage", "pip"):
        out = tmp_path / image_type
        code = generate(monkeypatch, "--format", image_type, *flags, "--output", out, "--num_workers", 1)
        drops = [drop for drop in lines(out / "dropped.jsonl") if "prompt" not in drop]
        assert code == 1 and len(made(out)) == 20
        assert {drop["id"]: drop["reason"] for drop in drops} == {
            f"coco_{number}": reason for number, reason in enumerate(BAD_PICTURES, 50)
        }
        assert all("source.json record 2" in drop["where"] for drop in drops)
        counts = json.loads((out / "run.json").read_text())["counts"]
        assert counts["dropped"] == dict.fromkeys(BAD_PICTURES, 1) and counts["read"] == 25
        passed = [drop for drop in lines(out / "dropped.jsonl") if "prompt" in drop]
        assert passed and sum(counts["companions_passed_over"].values()) == len(passed)


def test_strict_stops_at_the_first_bad_record(monkeypatch, tmp_path, capsys):
    flags = [*world(tmp_path, 6), "--format", "sequence", "--output", tmp_path / "out"]
    records = [record(number) for number in range(6)]
    write(tmp_path, [*records, record(7, conversations=[])])
    assert generate(monkeypatch, *flags, "--strict") == 2
    assert "record 7 (id coco_7): no question" in capsys.readouterr().err
    write(tmp_path, [*records, record(8)])
    assert generate(monkeypatch, *flags, "--strict") == 2, "the refused run left nothing that is in the way"
    assert "coco_8): missing picture" in capsys.readouterr().err.splitlines()[-1]
    assert generate(monkeypatch, *flags) == 1, "without --strict the same run goes on"


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--num_images_weights", "7:1"], "'7:1' is none of 2, 3, 4, 5"),
        (["--num_images_weights", "2:x"], "'2:x' is none of"),
        (["--num_images_weights", "2:0"], "positive"),
        (["--refusals", "2"], "--refusals 2.0: must be at least 0 and at most 1"),
        (["--seed", "-1"], "--seed -1: must be at least 0"),
        (["--num_records", "0"], "--num_records 0: must be at least 1"),
        (["--shares", "pip:1"], "for --format mix"),
        (["--exclude_subsets", "vg"], "no such subset; there are coco"),
        (["--image_folder", "nowhere"], "no such image folder"),
        (["--source", "nowhere.json"], "no such source file"),
        (["--format", "mix", "--shares", "sequenz:1"], "none of sequence, collage, pip"),
    ],
)
def test_bad_flags_end_in_one_line_and_leave_nothing(monkeypatch, tmp_path, capsys, flags, expected):
    usual = ["--format", "sequence", *world(tmp_path, 6), "--output", tmp_path / "out"]
    assert generate(monkeypatch, *usual, *flags) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1 and expected in errors[0]
    assert generate(monkeypatch, *usual) == 0


def test_the_launch_script_makes_a_mix_from_anywhere(tmp_path):
    world(tmp_path, 8)
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "SOURCE": str(tmp_path / "source.json"), "IMAGES": str(tmp_path / "images"), "OUTPUT": str(tmp_path / "out"),
    }  # fmt: skip
    script = ROOT / "data_gen/gen_instruction/gen_instruction.sh"
    command = ["bash", str(script), "--num_workers", "1", "--num_cells_weights", "2:1,4:1"]
    done = subprocess.run(command, cwd="/", env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(made(tmp_path / "out")) == 8 and "of 8 records (8 usable)" in done.stdout
    assert len(script.read_text().splitlines()) <= 40


def test_colours_of_these_tests_are_distinct():
    assert len({colour(number) for number in range(100)}) == 100
