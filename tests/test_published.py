"""Published data sets: read and checked, mixed, and to the datasets library and back."""

import io
import json
import zipfile

import pytest

from data_gen.mix.published import read_published
from llava.image import ImageStore
from llava.records import read_json
from tests.pair_sets import contents, picture, refused, run, two_files


@pytest.fixture
def inputs(tmp_path):
    return two_files(tmp_path)


# ---- published data sets


def test_what_was_written_is_read_back(inputs, tmp_path, capsys):
    run(*inputs, "--output", tmp_path / "set", "--zip", "--validation", 0.1)
    published = read_published(tmp_path / "set")
    assert {name: len(part) for name, part in published.parts.items()} == {"train": 54, "validation": 6}
    capsys.readouterr()
    run("read", "--published", tmp_path / "set")
    assert "train: 54 pairs (54 sequence)" in capsys.readouterr().out


@pytest.fixture
def public(tmp_path):
    """As the earlier project published its data: placeholders, no fields but the five, an archive without a top."""
    records = [
        {"id": "a", "image": ["coco/1.jpg", "coco/2.jpg"], "prompt": "Image1:<image-placeholder>\nImage2:"
         "<image-placeholder>\nIn Image2, what is it?", "chosen": "a dog", "rejected": "a cat", "gt": "a dog"},
        {"id": "b", "image": ["data/collage.jpg"], "prompt": "<image-placeholder>\nIn Image2, what is it?",
         "chosen": "a dog", "rejected": "a cat"},
        {"id": "c", "image": "data/pip.jpg", "prompt": "<image-placeholder>\nIn the centre, what is it?",
         "chosen": "a dog", "rejected": "a cat"},
    ]  # fmt: skip
    folder = tmp_path / "public"
    folder.mkdir()
    with zipfile.ZipFile(folder / "images.zip", "w") as archive:
        for number, name in enumerate(("coco/1.jpg", "coco/2.jpg", "data/collage.jpg", "data/pip.jpg")):
            buffer = io.BytesIO()
            picture(number, (936, 488) if "collage" in name else (64, 48)).save(buffer, "JPEG")
            archive.writestr(name, buffer.getvalue())

    def write(change=lambda records: None):
        change(records)
        (folder / "train.json").write_text(json.dumps(records))
        return folder

    return write


def test_a_public_data_set_is_read_and_mixed(public, tmp_path, capsys):
    folder = public()
    run("read", "--published", folder)
    assert "train: 3 pairs (1 collage, 1 pip, 1 sequence)" in capsys.readouterr().out
    run("--pairs", folder / "train.json", "--image_folder", folder / "images.zip", "--output", tmp_path / "set",
        "--validation", 0, "--zip")  # fmt: skip
    records = {record["id"]: record for record in read_json(tmp_path / "set/train.json")}
    assert records["a"]["prompt"] == "Image1:<image>\nImage2:<image>\nIn Image2, what is it?"
    assert [records[id]["image_type"] for id in "abc"] == ["sequence", "collage", "pip"]
    assert [records[id]["target"] for id in "abc"] == [2, 2, 1] and records["c"]["image"] == ["data/pip.jpg"]
    assert "3 pairs list no `sources`" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda r: r[0]["image"].pop(), "record 1 (id a): the prompt has 2 <image>"),
        (lambda r: r[1].update(image="data/no.jpg"), "record 2 (id b): data/no.jpg"),
        (lambda r: r[1].update(prompt="<image>\nIn Image3, what?"), "Image3 does not exist"),
        (lambda r: r[2].update(rejected="a dog"), "record 3 (id c): chosen and rejected are the same"),
    ],
)
def test_a_broken_published_data_set_is_named(public, capsys, change, said):
    assert said in refused(capsys, "read", "--published", public(change))


def test_a_leak_in_a_published_data_set_is_found(public, capsys):
    folder = public()
    records = read_json(folder / "train.json")
    (folder / "validation.json").write_text(json.dumps([{**records[0], "image": ["coco/2.jpg", "data/pip.jpg"]}]))
    assert "validation.json record 1 (id a): one of its pictures is also in a training pair" in refused(
        capsys, "read", "--published", folder
    )


# ---- the datasets library


@pytest.mark.parametrize("name", ["rows", "rows.parquet"])
def test_there_and_back_loses_nothing(inputs, tmp_path, name):
    run(*inputs, "--output", tmp_path / "set", "--zip", "--validation", 0.1)
    before = read_json(tmp_path / "set/train.json")
    before[0] |= {
        "target_box": [0, 0, 8, 8],
        "others": ["x"],
        "prompt": "Image1:<image>\nImage2:<image>\nIn Image1, é?",
    }
    before[1]["target_box"] = [0.5, 0, 8, 8]
    (tmp_path / "set/train.json").write_text(json.dumps(before))
    run("export", "--data_path", tmp_path / "set/train.json", "--image_folder", tmp_path / "set/images.zip",
        "--output", tmp_path / name)  # fmt: skip
    run("import", "--path", tmp_path / name, "--output", tmp_path / "back")
    after = read_json(tmp_path / "back/train.json")
    assert after == before
    assert contents(tmp_path / "back", "train") == contents(tmp_path / "set", "train")


def test_exported_rows_are_what_preference_trainers_read(inputs, tmp_path):
    from datasets import load_from_disk

    run("export", "--data_path", inputs[1], "--image_folder", inputs[4], "--output", tmp_path / "rows")
    row = load_from_disk(str(tmp_path / "rows"))[2]
    assert [image.size for image in row["images"]] == [(16, 12)] * 2
    assert row["prompt"] == [{"role": "user", "content": [
        {"type": "text", "text": "Image1:"}, {"type": "image", "text": None}, {"type": "text", "text": "\nImage2:"},
        {"type": "image", "text": None}, {"type": "text", "text": "\nIn Image1, what is it?"},
    ]}]  # fmt: skip
    assert row["chosen"] == [{"role": "assistant", "content": [{"type": "text", "text": "thing 2"}]}]
    assert (row["image_type"], row["target"], row["attention_ratio"]) == ("sequence", 1, 0.25)


def foreign(tmp_path, **columns):
    """A data set that was made elsewhere."""
    from datasets import Dataset, Features, Image, List

    data = Dataset.from_dict(columns)
    if "images" in columns:
        features = Features(data.features | {"images": List(Image())})
        data = Dataset.from_dict(columns, features=features)
    data.save_to_disk(str(tmp_path / "foreign"))
    return tmp_path / "foreign"


def test_rows_made_elsewhere_are_imported(tmp_path):
    """Plain strings, no names, the prompt in front of each answer, another project's column."""
    said = [{"role": "user", "content": "In the centre, what is it?"}]
    path = foreign(
        tmp_path,
        images=[[picture(1)], [picture(2)]],
        chosen=[[*said, {"role": "assistant", "content": "a dog"}]] * 2,
        rejected=[[*said, {"role": "assistant", "content": "a cat"}]] * 2,
        score=[0.5, 0.75],
    )
    run("import", "--path", path, "--output", tmp_path / "back")
    first, second = read_json(tmp_path / "back/train.json")
    assert first["prompt"] == "<image>\nIn the centre, what is it?" and (first["chosen"], first["score"]) == (
        "a dog",
        0.5,
    )
    assert ImageStore(tmp_path / "back/images").open(second["image"][0]).tobytes() == picture(2).tobytes()


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"prompt": ["<image> what?"], "chosen": ["a"]}, "no `rejected`"),
        ({"prompt": ["<image> what?"], "chosen": ["a"], "rejected": ["a"], "images": [[picture(1)]]}, "the same text"),
        ({"prompt": ["what?"], "chosen": ["a"], "rejected": ["b"]}, "no picture"),
        (
            {"prompt": [[{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]], "chosen": ["a"],
             "rejected": ["b"], "images": [[picture(1)]]},
            "must end with one of the user",
        ),
    ],
    ids=["no rejected", "same", "no picture", "no question"],
)  # fmt: skip
def test_rows_that_are_no_pairs_are_named(tmp_path, capsys, columns, said):
    error = refused(capsys, "import", "--path", foreign(tmp_path, **columns), "--output", tmp_path / "back")
    assert said in error and "row 1" in error and not (tmp_path / "back/train.json").exists()


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (("read", "--published", "nowhere"), "train.json and one of"),
        (("export", "--data_path", "no.json", "--image_folder", ".", "--output", "x"), "no.json: no such file"),
        (("import", "--path", "nowhere", "--output", "x"), "nowhere: no such file"),
        (("import", "--path", __file__, "--output", "x"), "neither JSON nor JSONL"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_other_commands_that_cannot_be_done(capsys, monkeypatch, tmp_path, command, said):
    monkeypatch.chdir(tmp_path)
    assert said in refused(capsys, *command)
