"""Test sets: balance, targets of their own, nothing of the training set, archives of fixed bytes, the truth beside."""

import io
import json
import tarfile
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from data_gen.gen_instruction.rewriting import CENTRE_PHRASES
from data_gen.gen_instruction.test_set import SIZES, slots
from llava.asked import named_in
from llava.image import ImageStore
from llava.records import read_questions
from llava.regions import collage_box
from tests.single_images import colour, digest, generate, generate_test_set, lines, save_pictures, write

FORMATS = ("sequence", "collage", "pip")
QUESTIONS = ["What colour is it?", "Which number is it?"]


def pixmo(number, **changes):
    """A record as PixMo has them: questions and answers in lists."""
    answers = [f"Colour {number}.", f"Number {number}."]
    return {"image": f"pixmo/{number}.png", "question": QUESTIONS, "answer": answers} | changes


@pytest.fixture
def flags(tmp_path):
    save_pictures(tmp_path / "images", 90, "pixmo")
    return write(tmp_path, [pixmo(number) for number in range(90)])


def read(folder, image_type):
    path = folder / f"{image_type}_test_images.json"
    return read_questions(path), json.loads(path.read_text()), ImageStore(folder / f"test_images_{image_type}.tar")


@pytest.fixture
def made(monkeypatch, tmp_path, flags):
    more = ["--num_per_format", 20, "--picture_format", "png"]
    assert generate_test_set(monkeypatch, *flags, "--output", tmp_path / "out", *more) == 0
    return tmp_path / "out"


def test_readers_take_what_is_written(made):
    for image_type in FORMATS:
        questions, raws, store = read(made, image_type)
        assert len(questions) == 20 and len({question.id for question in questions}) == 20
        for question, raw in zip(questions, raws, strict=True):
            assert question.image_type == image_type and question.target == raw["target"] - 1
            for name in question.images:
                store.open(name)
            text = question.prompt.split("\n")[-1]
            if image_type == "pip":
                assert text.split(", ")[0] in CENTRE_PHRASES and raw["target"] == 1
            else:
                assert named_in(text) == {frozenset({raw["target"]})}
            assert text.split(", ")[1] in ("what colour is it?", "which number is it?")
    everything = [name for kind in FORMATS for raw in read(made, kind)[1] for name in raw["image"]]
    assert len(everything) == len(set(everything)), "every picture is a file of its own"


def test_pictures_and_answers_belong_together(made):
    for image_type in FORMATS:
        for question, raw in zip(*read(made, image_type)[:2], strict=True):
            store = ImageStore(made / f"test_images_{image_type}.tar")
            word = "Colour" if "colour" in question.prompt else "Number"
            numbers = [int(source["path"].split("/")[1][:-4]) for source in raw["sources"]]
            assert question.answer == f"{word} {numbers[question.target]}."
            assert raw["others"] == [f"{word} {n}." for place, n in enumerate(numbers) if place != question.target]
            if image_type == "sequence":
                assert [store.open(name).getpixel((0, 0)) for name in question.images] == list(map(colour, numbers))
                continue
            (x0, y0, x1, y1), pixels = raw["target_box"], np.asarray(store.open(question.images[0]))
            centre = pixels[(y0 + y1) // 2, (x0 + x1) // 2]
            assert tuple(centre) == colour(numbers[question.target])
            if image_type == "collage":
                assert collage_box(pixels.shape[1::-1], question.target, question.grid)[:2] == (x0, y0)


def test_numbers_and_positions_are_balanced(made):
    for image_type in ("sequence", "collage"):
        raws = read(made, image_type)[1]
        found = Counter((len(raw["sources"]), raw["target"]) for raw in raws)
        sizes = Counter(len(raw["sources"]) for raw in raws)
        assert set(sizes) == set(SIZES[image_type]) and max(sizes.values()) - min(sizes.values()) <= 1
        for size in sizes:
            positions = [found[size, place] for place in range(1, size + 1)]
            assert max(positions) - min(positions) <= 1


@pytest.mark.parametrize("count", [1, 7, 500, 501])
def test_slots_are_exactly_balanced(count):
    for image_type, sizes in SIZES.items():
        found = slots(sizes, count, np.random.default_rng(1))
        assert len(found) == count
        per_size = Counter(size for size, _ in found)
        assert max(per_size.values()) - min(per_size[size] for size in sizes) <= 1
        for size in sizes if image_type != "pip" else ():
            positions = [found.count((size, target)) for target in range(size)]
            assert max(positions) - min(positions) <= 1
        assert image_type != "pip" or {target for _, target in found} == {0}


def test_no_two_questions_have_one_target(made):
    targets = [raw["sources"][raw["target"] - 1]["path"] for kind in FORMATS for raw in read(made, kind)[1]]
    assert len(targets) == len(set(targets)) == 60


def test_a_copy_of_a_target_is_no_other_target(monkeypatch, tmp_path):
    save_pictures(tmp_path / "images", 20, "pixmo")
    for number in range(20):
        Image.open(tmp_path / f"images/pixmo/{number}.png").save(tmp_path / f"images/pixmo/{number}.bmp")
    rows = [pixmo(number) for number in range(20)]
    rows += [pixmo(number, image=f"pixmo/{number}.bmp") for number in range(20)]
    out = tmp_path / "out"
    assert generate_test_set(monkeypatch, *write(tmp_path, rows), "--output", out, "--num_per_format", 6) == 0
    targets = [raw["sources"][raw["target"] - 1]["path"][:-4] for kind in FORMATS for raw in read(out, kind)[1]]
    assert len(set(targets)) == 18
    assert {drop["reason"] for drop in lines(out / "dropped.jsonl")} <= {"repeated target"}


def test_the_same_bytes_again_and_others_for_another_seed(monkeypatch, tmp_path, flags, made):
    more = ["--num_per_format", 20, "--picture_format", "png", "--num_workers", 1]
    assert generate_test_set(monkeypatch, *flags, "--output", tmp_path / "again", *more) == 0
    assert digest(tmp_path / "again") == digest(made)
    assert generate_test_set(monkeypatch, *flags, "--output", tmp_path / "seed", *more, "--seed", 1) == 0
    assert digest(tmp_path / "seed") != digest(made)
    with tarfile.open(made / "test_images_sequence.tar", "r:") as tar:
        assert all((member.mtime, member.uid, member.uname) == (0, 0, "") for member in tar)


@pytest.mark.parametrize("stored", ["zip of copies", "sources of collages"])
def test_nothing_of_the_training_set_is_used(monkeypatch, tmp_path, flags, stored):
    """Told by content: the training set has the pictures under other names, or only inside collages."""
    out, trained = tmp_path / "out", range(0, 90, 2)
    if stored == "zip of copies":
        for number in trained:
            path = tmp_path / f"train/{number}.bmp"
            path.parent.mkdir(exist_ok=True)
            Image.open(tmp_path / f"images/pixmo/{number}.png").save(path)
        records = [{"id": number, "image": [f"{number}.bmp"]} for number in trained]
        records.append({"id": "gone", "image": "gone.png"})
        (tmp_path / "train.json").write_text(json.dumps(records))
        training = [tmp_path / "train.json", "--exclude_images", tmp_path / "train"]
    else:
        rows = write(tmp_path, [pixmo(number) for number in trained], "trained.json")
        assert generate(monkeypatch, "--format", "pip", *rows, "--output", tmp_path / "made") == 0
        training = [tmp_path / "made/instructions.jsonl", "--exclude_images", tmp_path / "made/images"]
    more = ["--output", out, "--num_per_format", 10, "--exclude_training", *training]
    assert generate_test_set(monkeypatch, *flags, *more) == 0
    used = {source["path"] for kind in FORMATS for raw in read(out, kind)[1] for source in raw["sources"]}
    assert used and not used & {f"pixmo/{number}.png" for number in trained}
    reasons = Counter(drop["reason"] for drop in lines(out / "dropped.jsonl"))
    assert set(reasons) == {"excluded picture"}


def test_the_first_turn_of_a_conversation_is_asked(monkeypatch, tmp_path):
    save_pictures(tmp_path / "images", 30, "coco")
    rows = [
        {"id": n, "image": f"coco/{n}.png", "conversations": [
            {"from": "human", "value": "Who?\n<image>"}, {"from": "gpt", "value": "He."},
            {"from": "human", "value": "And then?"}, {"from": "gpt", "value": "She."}]}
        for n in range(30)
    ]  # fmt: skip
    out = tmp_path / "out"
    assert generate_test_set(monkeypatch, *write(tmp_path, rows), "--output", out, "--num_per_format", 8) == 0
    for kind in FORMATS:
        for question, raw in zip(*read(out, kind)[:2], strict=True):
            assert question.prompt.endswith(", who?") and question.answer == "He."
            assert "others" not in raw, "an answer that is the target's own confuses nobody"


@pytest.mark.parametrize("maker", ["instructions", "test set"])
def test_pictures_are_seen_alike_in_every_format(monkeypatch, tmp_path, maker):
    """A 16-bit picture would be read as white, a rotated one as lying on its side."""
    save_pictures(tmp_path / "images", 30, "pixmo")
    for number in range(1, 30):
        rotated = Image.Exif()
        rotated[0x0112] = 8  # to be turned anticlockwise: the right edge comes to the top
        picture = Image.new("RGB", (40 + 2 * number, 20), colour(number))
        picture.paste("white", (20 + number, 0, 40 + 2 * number, 20))
        picture.save(tmp_path / f"images/pixmo/{number}.png", exif=rotated)
    deep = np.full((40, 20), 32768, dtype=np.uint16)
    deep[:20] = 65535
    Image.fromarray(deep).save(tmp_path / "images/pixmo/0.png")
    rows, out = write(tmp_path, [pixmo(number) for number in range(30)]), tmp_path / "out"
    more = ["--picture_format", "png", "--output", out]
    if maker == "test set":
        assert generate_test_set(monkeypatch, *rows, *more, "--num_per_format", 9) == 0
        found = [(raw, read(out, kind)[2]) for kind in FORMATS for raw in read(out, kind)[1]]
    else:
        assert generate(monkeypatch, "--format", "mix", *rows, *more) == 0
        found = [(raw, ImageStore(out / "images")) for raw in lines(out / "instructions.jsonl")]
    assert {raw["image_type"] for raw, _ in found} == set(FORMATS)
    for raw, store in found:
        number = int(raw["sources"][raw["target"] - 1]["path"].split("/")[1][:-4])
        if raw["image_type"] == "sequence":
            path, box = raw["image"][raw["target"] - 1], None
            stored = Image.open(io.BytesIO(store.read(path)))
            assert stored.mode == "RGB" and not stored.getexif(), "no reader need turn or scale it"
        else:
            path, box = raw["image"][0], raw["target_box"]
        seen = store.open(path).crop(box) if box else store.open(path)
        width, height = seen.size
        assert height > 1.9 * width, "upright"
        paint = colour(number) if number else (128, 128, 128)
        assert seen.getpixel((width // 2, height // 8)) == (255, 255, 255)
        assert seen.getpixel((width // 2, height * 7 // 8)) == paint


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--num_per_format", 40], "only, as every question needs a target of its own"),
        (["--exclude_training", "x.json"], "belong together"),
        (["--exclude_training", "x.json", "--exclude_images", "nowhere"], "no such image folder"),
        (["--num_per_format", 0], "at least 1"),
    ],
)
def test_bad_flags_end_in_one_line(monkeypatch, tmp_path, capsys, flags, more, expected):
    assert generate_test_set(monkeypatch, *flags, "--output", tmp_path / "out", *more) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(errors) == 1 and expected in errors[0]
    assert not list((tmp_path / "out").glob("*.part"))


@pytest.mark.parametrize("bad", [["text"], [{"id": 1}], [{"id": 1, "image": "a.png", "sources": ["a.png"]}]])
def test_a_training_set_without_pictures_is_refused(monkeypatch, tmp_path, capsys, flags, bad):
    (tmp_path / "train.json").write_text(json.dumps(bad))
    more = ["--exclude_training", tmp_path / "train.json", "--exclude_images", tmp_path / "images"]
    assert generate_test_set(monkeypatch, *flags, "--output", tmp_path / "out", *more) == 2
    assert "train.json record 1" in capsys.readouterr().err


def test_bad_pictures_are_listed(monkeypatch, tmp_path, flags):
    for number in range(5):
        (tmp_path / f"images/pixmo/{number}.png").write_bytes(b"no picture")
    assert generate_test_set(monkeypatch, *flags, "--output", tmp_path / "out", "--num_per_format", 20) == 1
    drops = lines(tmp_path / "out/dropped.jsonl")
    assert {drop["id"] for drop in drops} <= {f"source_{number}" for number in range(1, 6)} and drops
    assert {drop["reason"] for drop in drops} == {"not a picture"}


def test_collages_are_jpg_unless_asked_otherwise(monkeypatch, tmp_path, flags):
    assert generate_test_set(monkeypatch, *flags, "--output", tmp_path / "out", "--num_per_format", 2) == 0
    with tarfile.open(tmp_path / "out/test_images_collage.tar", "r:") as tar:
        picture = Image.open(io.BytesIO(tar.extractfile(tar.getmembers()[0]).read()))
        assert picture.format == "JPEG"
