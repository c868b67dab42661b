"""Pairs of several files as one data set: no picture in both parts, and the same bytes again."""

import json
import shutil
import zipfile

import numpy as np
import pytest

from data_gen.mix.merge import unique
from data_gen.mix.splitting import groups, split
from llava.image import ImageStore
from llava.records import read_json, read_preferences
from tests.pair_sets import contents, digest, pair, picture, refused, run, two_files


@pytest.fixture
def inputs(tmp_path):
    return two_files(tmp_path)


# ---- the split


def test_groups_are_connected_components():
    found = groups([frozenset("ab"), frozenset("c"), frozenset("bd"), frozenset("d"), frozenset("e")])
    assert sorted(map(sorted, found)) == [[0, 2, 3], [1], [4]]


@pytest.mark.parametrize("seed", range(5))
def test_no_picture_is_in_both_parts_and_no_pair_is_lost(seed):
    rng = np.random.default_rng(seed)
    pictures = [frozenset(f"{number // 10}-{n}" for n in rng.integers(0, 20, 3)) for number in range(200)]
    train, validation, dropped = split(pictures, 0.2, seed, "error")
    assert sorted(train + validation) == list(range(200)) and not dropped and 20 <= len(validation) <= 40
    assert not set().union(*(pictures[n] for n in train)) & set().union(*(pictures[n] for n in validation))


def test_one_large_group_is_refused_or_pairs_are_dropped():
    pictures = [frozenset([str(n), str(n + 1)]) for n in range(100)]
    with pytest.raises(ValueError, match=r"100 of them are connected.*--overlap drop"):
        split(pictures, 0.1, 0, "error")
    train, validation, dropped = split(pictures, 0.1, 0, "drop")
    assert len(validation) == 10 and sorted(train + validation + dropped) == list(range(100)) and dropped
    assert not set().union(*(pictures[n] for n in train)) & set().union(*(pictures[n] for n in validation))


def test_no_validation_and_too_little_of_it():
    pictures = [frozenset([str(n)]) for n in range(10)]
    assert sorted(split(pictures, 0, 0, "error")[0]) == list(range(10)) and split(pictures, 0, 0, "error")[1] == []
    with pytest.raises(ValueError, match="is 0"):
        split(pictures, 0.01, 0, "error")


# ---- the data set


def test_mix_of_two_files(inputs, tmp_path):
    output = tmp_path / "set"
    run(*inputs, "--output", output, "--validation", 0.2, "--zip", "--licence", "coco=CC BY 4.0")
    train, validation = (read_preferences(output / f"{name}.json") for name in ("train", "validation"))
    assert (len(train), len(validation)) == (48, 12)
    assert not contents(output, "train") & contents(output, "validation")
    ids = [record.id for record in (*train, *validation)]
    assert len(set(ids)) == 60 and {"pair_3", "pair_3_2"} <= set(ids)
    assert ids != sorted(ids) and all(record.extra["note"]["kept"] for record in train)
    store = ImageStore(output / "images.zip")
    for record in (*train, *validation):  # both inputs had a coco/own_3.png
        number = int(record.id.split("_")[1]) + 1000 * (record.id.count("_") == 2)
        assert store.open(record.images[0]).tobytes() == picture(number).tobytes()


def test_the_same_flags_write_the_same_bytes_and_another_seed_others(inputs, tmp_path):
    for name, more in (("a", ()), ("b", ()), ("c", ("--seed", 1))):
        run(*inputs, "--output", tmp_path / name, "--zip", "--validation", 0.1, *more)
    assert digest(tmp_path / "a") == digest(tmp_path / "b") != digest(tmp_path / "c")
    assert digest(tmp_path / "a")["train.json"] != digest(tmp_path / "c")["train.json"]


def test_the_archive_is_stored_ordered_and_timeless(inputs, tmp_path):
    run(*inputs, "--output", tmp_path / "set", "--zip", "--validation", 0)
    with zipfile.ZipFile(tmp_path / "set/images.zip") as archive:
        infos = archive.infolist()
    assert {info.compress_type for info in infos} == {zipfile.ZIP_STORED} and len(infos) == 80
    assert {(info.date_time, info.create_system) for info in infos} == {((1980, 1, 1, 0, 0, 0), 3)}
    names = [info.filename for info in infos]
    assert names == sorted(names) and all(name.startswith("images/coco/") for name in names)
    assert not (tmp_path / "set/validation.json").exists()


def test_a_folder_holds_the_same_pictures_as_the_archive(inputs, tmp_path):
    run(*inputs, "--output", tmp_path / "zip", "--zip", "--validation", 0.1)
    run(*inputs, "--output", tmp_path / "folder", "--validation", 0.1)
    assert (tmp_path / "zip/train.json").read_bytes() == (tmp_path / "folder/train.json").read_bytes()
    assert contents(tmp_path / "zip", "train") == contents(tmp_path / "folder", "train")


def test_one_picture_under_two_names_is_one_picture(tmp_path):
    """As a copy, re-encoded, and as the source of a collage: all pairs with it are in one part."""
    images, originals = tmp_path / "images", tmp_path / "originals"
    images.mkdir()
    originals.mkdir()
    records = []
    for number in range(40):
        picture(number).save(images / f"own_{number}.png")
        records.append(pair(number, [f"own_{number}.png", f"own_{number}.png"]))
    same = ["copy.png", "other.png", "again.bmp"]
    for name in same:
        picture(500).save(images / name)
    shutil.copy(images / "copy.png", images / "other.png")
    records += [pair(100 + n, [name, f"own_{n}.png"]) for n, name in enumerate(same)]
    picture(500).save(originals / "original.png")
    picture(600).save(images / "collage.png")
    records.append(pair(200, ["collage.png"], ["original.png", "x.png"], image_type="collage", grid=[1, 2],
                        prompt="<image>\nIn Image1, what is it?"))  # fmt: skip
    (tmp_path / "pairs.json").write_text(json.dumps(records))
    parts = set()
    for seed in range(8):
        output = tmp_path / f"set_{seed}"
        folders = ("--image_folder", images, "--source_images", originals, "--output", output)
        run("--pairs", tmp_path / "pairs.json", *folders, "--seed", seed, "--validation", 0.4)
        where = {
            record["id"]: name for name in ("train", "validation") for record in read_json(output / f"{name}.json")
        }
        connected = {where[f"pair_{number}"] for number in (100, 101, 102, 200, 0, 1, 2)}
        assert len(connected) == 1
        parts |= connected
    assert parts == {"train", "validation"}
    stored = {path.name for path in (tmp_path / "set_0/images").iterdir()}
    assert "copy.png" in stored and "other.png" not in stored  # the same bytes are stored once


def test_exact_copies_of_a_pair_are_dropped_and_counted(inputs, tmp_path):
    twice = [*inputs[:2], inputs[1], inputs[2], "--image_folder", inputs[4], inputs[4], inputs[5]]
    run(*twice, "--output", tmp_path / "set", "--validation", 0)
    card = json.loads((tmp_path / "set/data_card.json").read_text())
    assert card["pairs"] == {"train": 60} and card["dropped"] == {"duplicate": 30}


def test_names_are_made_unique():
    taken = set()
    assert [unique("a", taken) for _ in range(3)] + [unique("a_2", taken)] == ["a", "a_2", "a_3", "a_2_2"]


def test_the_data_card_says_what_is_there(inputs, tmp_path):
    output = tmp_path / "set"
    run(*inputs, "--output", output, "--validation", 0.1, "--licence", "coco=CC BY 4.0", "--title", "Ours")
    card, text = json.loads((output / "data_card.json").read_text()), (output / "data_card.md").read_text()
    assert card["by_format"] == {"train": {"sequence 2": 54}, "validation": {"sequence 2": 6}}
    assert card["by_target"] == {"sequence 2": {"1": 60}} and card["by_rejected_from"] == {"clean": 60}
    assert card["licences"] == {"coco": "CC BY 4.0"} and card["without_sources"] == 0
    assert [selection["counts"]["dropped"] for selection in card["selection"]] == [{"right": 12}] * 2
    assert text.startswith("# Ours\n") and "| coco | 60 | CC BY 4.0 |" in text and "| right | 12 |" in text
    assert "Answers of where/a-model." in text and str(tmp_path) not in text + json.dumps(card)


def test_several_targets_are_written_out_and_counted(tmp_path):
    """Those that the words name, those that a field picks of them, and those of a prompt that looks for them."""
    words = "<image>\n<image>\n<image>\nIn Image3 and Image1, what is it?"
    search = {"target": None, "targets": [2, 3], "is_search": True}
    changes = {"prompt": words, "target": None}, {"prompt": words}, search
    changes[2]["prompt"] = "<image>\n<image>\n<image>\nWhich images show it?"
    (tmp_path / "images").mkdir()
    records = [pair(n, [f"{n}_{place}.png" for place in range(3)], **own) for n, own in enumerate(changes)]
    for number, name in enumerate(name for record in records for name in record["image"]):
        picture(number).save(tmp_path / "images" / name)
    (tmp_path / "pairs.json").write_text(json.dumps(records))
    run("--pairs", tmp_path / "pairs.json", "--image_folder", tmp_path / "images", "--output", tmp_path / "set",
        "--validation", 0)  # fmt: skip
    found = {record["id"]: record for record in read_json(tmp_path / "set/train.json")}
    targets = [(found[f"pair_{n}"]["target"], found[f"pair_{n}"].get("targets")) for n in range(3)]
    assert targets == [(None, [1, 3]), (1, None), (None, [2, 3])] and found["pair_2"]["is_search"] is True
    by_id = {record.id: record.targets for record in read_preferences(tmp_path / "set/train.json")}
    assert by_id == {"pair_0": (0, 2), "pair_1": (0,), "pair_2": (1, 2)}
    card = json.loads((tmp_path / "set/data_card.json").read_text())
    assert card["by_target"] == {"sequence 3": {"1": 1, "1 and 3": 1, "2 and 3": 1}}


def test_a_killed_run_is_done_again_and_a_finished_one_is_not(inputs, tmp_path, monkeypatch, capsys):
    output, flags = tmp_path / "set", ("--zip", "--validation", 0.1)
    run(*inputs, "--output", tmp_path / "whole", *flags)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        writestr, count = zipfile.ZipFile.writestr, iter(range(100))

        def stopped_at_20(*args):
            if next(count) == 20:
                raise KeyboardInterrupt
            writestr(*args)

        patch.setattr(zipfile.ZipFile, "writestr", stopped_at_20)
        run(*inputs, "--output", output, *flags)
    assert not (output / "images.zip").exists() and not (output / "train.json").exists()
    run(*inputs, "--output", output, *flags)
    assert digest(output) == digest(tmp_path / "whole")
    capsys.readouterr()
    run(*inputs, "--output", output, *flags)
    assert "nothing to do" in capsys.readouterr().out
    said = refused(capsys, *inputs, "--output", output, *flags, "--seed", 3)
    assert "is of another run (seed 0 there, 3 here)" in said


# ---- bad input


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--validation", 1), "--validation"),
        (("--validation", 0.001), "none, or nothing to train on"),
        (("--licence", "coco"), "SUBSET=TEXT"),
        (("--licence", "vg=MIT", "--validation", 0), "no such subset; there are coco"),
        (("--image_folder", "a", "b", "c"), "3 folders of pictures for 2 files"),
        (("--image_folder", "nowhere"), "nowhere: no such image folder"),
        (("--pairs", "nowhere.json"), "nowhere.json: no such file"),
    ],
    ids=str,
)
def test_flags_that_make_no_sense(inputs, tmp_path, capsys, more, said):
    assert said in refused(capsys, *inputs, "--output", tmp_path / "set", *more)


def test_missing_and_damaged_pictures_are_named_with_their_record(inputs, tmp_path, capsys):
    (tmp_path / "first/images/coco/own_3.png").unlink()
    assert "record 4 (id pair_3): missing picture" in refused(capsys, *inputs, "--output", tmp_path / "set")
    (tmp_path / "first/images/coco/own_3.png").write_bytes(b"no picture")
    assert "record 4 (id pair_3): not a picture" in refused(capsys, *inputs, "--output", tmp_path / "set")
    assert not (tmp_path / "set").exists()
