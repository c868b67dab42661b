"""Tiny sources in every public format become test sets; what cannot is named."""

import base64
import io

import numpy as np
import PIL.Image
import pytest
from datasets import Dataset, DatasetDict, Features, Image, List, Value

from inference.llava_hound_dpo.interchange_formats import letter_of, listed_options, region_of
from llava.image import ImageStore
from llava.records import read_questions, texts
from llava.scorers import parse_choice, true_choice
from tests.conftest import picture
from tests.interchange_sets import (
    BLINK,
    CLOSING,
    INTERLEAVE,
    LMMS_EVAL,
    MANTIS,
    MIRB,
    MUIR,
    NLVR2,
    QBENCH,
    Importer,
    call,
    coded,
    png,
    stored,
    table,
    write_table,
)


@pytest.fixture
def imported(tmp_path):
    return Importer(tmp_path)


# ---- what each data set becomes

EXPECTED = {
    "blink": (BLINK, {
        "id": "val_Art_Style_1", "prompt": "<image>\n<image>\n<image>\n" + BLINK["prompt"] + "\n" + CLOSING,
        "answer": "B", "choices": ["the second image", "the third image"], "image_type": "multi",
        "category": "Art_Style",
    }),
    "mantis_eval": (MANTIS, {
        "id": "mantis_1", "prompt": f"<image><image> Are both red?\n(A) Yes\n(B) No\n{CLOSING}", "answer": "B",
        "choices": ["Yes", "No"], "image_type": "multi", "image": ["000001_1.png", "000001_2.jpg"],
    }),
    "muirbench": (MUIR, {
        "prompt": f"Which follows <image>?\n(A) <image>\n(B) <image>\n(C) None of the choices provided\n{CLOSING}",
        "answer": "A", "choices": ["<image>", "<image>", "None of the choices provided"], "image_type": "multi",
        "image": ["000001_1.png", "000001_2.png", "000001_3.png"],
    }),
    "qbench2": (QBENCH, {
        "id": "3", "answer": "A", "choices": ["The first", "The second"],
        "prompt": f"<image>\n<image>\nWhich image is sharper?\n(A) The first\n(B) The second\n{CLOSING}",
    }),
    "mirb": (MIRB, {
        "id": "5", "prompt": "Answer with a single number.\nHow many cars in <image> and <image>?", "answer": "3",
        "image_type": "multi",
    }),
    "nlvr2": (NLVR2, {
        "id": "dev-1-0-0", "answer": "B", "choices": ["True", "False"],
        "prompt": "<image>\n<image>\nHere is a statement about the images. Is it true or false?\nBoth are red.\n"
        f"(A) True\n(B) False\n{CLOSING}",
    }),
}  # fmt: skip


@pytest.mark.parametrize("name", EXPECTED)
def test_data_sets_of_the_hub(imported, name):
    row, expected = EXPECTED[name]
    code, (record,) = imported(name, [row])
    assert code == 0
    assert {key: record[key] for key in expected} == expected
    (question,) = read_questions(imported.output / "test.json")
    store = ImageStore(imported.output / "images")
    assert [store.size(image) for image in question.images] == [(8, 6)] * len(question.images)
    assert (question.image_type, question.target) == ("multi", None)


def test_pictures_keep_their_bytes_and_other_columns_stay(imported):
    imported("blink", [BLINK])
    (record,) = read_questions(imported.output / "test.json")
    files = [(imported.output / "images" / name).read_bytes() for name in record.images]
    assert files == [png("red"), png("green"), png("blue")]
    assert record.extra["source_fields"] == {k: v for k, v in BLINK.items() if not k.startswith("image_")}
    assert [record.extra[name] for name in ("source", "source_index", "source_row")] == ["blink", BLINK["idx"], 0]


def test_a_rare_picture_format_becomes_png(imported):
    _, (record,) = imported("qbench2", [QBENCH | {"image1": stored("red", kind="TIFF")}])
    assert record["image"] == ["000001_1.png", "000001_2.png"]
    assert (imported.output / "images/000001_1.png").read_bytes().startswith(b"\x89PNG")


def test_a_rare_picture_is_stored_as_it_is_seen(imported):
    """16 bits a pixel are not clipped to white, as pillow's own conversion would."""
    file = io.BytesIO()
    PIL.Image.fromarray(np.full((6, 8), 0x8000, dtype=np.uint16)).save(file, "TIFF")
    imported("qbench2", [QBENCH | {"image1": {"bytes": file.getvalue(), "path": None}}])
    assert ImageStore(imported.output / "images").open("000001_1.png").getpixel((3, 3)) == (128, 128, 128)


def test_interleave_bench_as_json(imported, tmp_path):
    (tmp_path / "source" / "Split1").mkdir(parents=True)
    for name, colour in (("a", "red"), ("b", "blue")):
        (tmp_path / "source" / "Split1" / f"{name}.png").write_bytes(png(colour))
    code, (record,) = imported("llava_interleave", [INTERLEAVE], "in_domain.json")
    assert (code, record["answer"], record["choices"]) == (0, "A", ["the first", "the second"])
    assert record["prompt"] == INTERLEAVE["conversations"][0]["value"]
    assert (imported.output / "images" / record["image"][1]).read_bytes() == png("blue")


def test_interleave_bench_as_columns(imported):
    row = {"sample_id": "s", "question": "What differs?", "answer": "The car.", "question_type": "open-ended"}
    _, (record,) = imported("llava_interleave", [row | {"image_0": stored("red"), "image_1": stored("blue")}])
    assert (record["prompt"], record["answer"]) == ("<image>\n<image>\nWhat differs?", "The car.")
    assert "choices" not in record


def test_numbered_placeholders_order_the_pictures(imported, tmp_path):
    """And one image that the prompt names as ours do is a target."""
    (tmp_path / "source").mkdir()
    for name, colour in (("a", "red"), ("b", "blue")):
        (tmp_path / "source" / f"{name}.png").write_bytes(png(colour))
    _, (record,) = imported("lmms_eval", [LMMS_EVAL], "set.json")
    assert record["prompt"] == "In Image2, what is it? <image> <image>"
    assert record["image"] == ["000001_2.png", "000001_1.png"]
    assert (record["image_type"], record["target"]) == ("sequence", 2)


def test_nlvr2_names_its_pictures_by_the_sentence(imported, tmp_path):
    row = {name: NLVR2[name] for name in ("identifier", "sentence", "label")}
    (tmp_path / "pictures").mkdir()
    for n, colour in enumerate(("red", "blue")):
        (tmp_path / "pictures" / f"dev-1-0-img{n}.png").write_bytes(png(colour))
    code, (record,) = imported("nlvr2", [row], "dev.json", "--image_folder", str(tmp_path / "pictures"))
    assert (code, record["answer"], len(record["image"])) == (0, "B", 2)


def test_tables_of_vlmevalkit(imported):
    """A list of pictures, one picture, and a reference to another row's; `None` is an option, an empty cell is not."""
    rows = [table(), table(index="1", image=coded("red"), hint="Look."), table(index="2", image="1")]
    code, (first, second, third) = imported("vlmevalkit", rows, "BLINK.tsv")
    assert code == 0 and first["choices"] == ["the first", "the second", "None"]
    assert first["prompt"].startswith("<image>\n<image>\nWhich is red?\n(A) the first\n(B) the second\n(C) None\n")
    assert second["prompt"].startswith("<image>\nLook.\nWhich is red?\n")
    assert [record["image_type"] for record in (first, second, third)] == ["multi", "single", "single"]
    files = [(imported.output / "images" / record["image"][0]).read_bytes() for record in (second, third)]
    assert files[0] == files[1] == base64.b64decode(coded("red"))


def test_an_absent_option_keeps_the_letters_of_the_others(imported):
    code, (record,) = imported("vlmevalkit", [table(B="", C="the third", D="none", answer="D")], "BLINK.tsv")
    assert code == 0 and record["choices"] == ["the first", None, "the third", "none"] and record["answer"] == "D"
    assert "\n(A) the first\n(C) the third\n(D) none\n" in record["prompt"]
    (question,) = read_questions(imported.output / "test.json")
    choices = texts(question.extra, "choices")
    assert [parse_choice(text, 4, choices) for text in ("A", "B", "(C)", "D. none")] == [0, None, 2, 3]
    assert true_choice("D", choices) == 3
    with pytest.raises(ValueError, match="not one of"):
        true_choice("B", choices)


# ---- containers

FEATURES = Features({
    "id": Value("string"), "question_type": Value("string"), "question": Value("string"),
    "options": List(Value("string")), "answer": Value("string"), "images": List(Image()),
})  # fmt: skip


@pytest.mark.parametrize("kind", ["folder", "dictionary", "parquet folder"])
def test_containers_of_datasets_hold_the_same(imported, tmp_path, kind):
    """`save_to_disk` of a set and of splits, and shards of parquet: rows are numbered through."""
    rows = [MANTIS | {"id": f"m{n}", "images": [picture("red"), picture("blue")]} for n in range(3)]
    data, source = Dataset.from_list(rows, features=FEATURES), tmp_path / "source"
    if kind == "parquet folder":
        for n, part in enumerate((data.select([0, 1]), data.select([2]))):
            (source / "data").mkdir(parents=True, exist_ok=True)
            part.to_parquet(source / "data" / f"test-0000{n}-of-00002.parquet")
    else:
        (data if kind == "folder" else DatasetDict(test=data, train=data)).save_to_disk(source)
    flags = [] if kind == "folder" else ["--split", "test"]
    code, records = imported("mantis_eval", None, ".", *flags)
    assert code == 0
    assert [(r["id"], r["source_row"]) for r in records] == [("m0", 0), ("m1", 1), ("m2", 2)]


def test_several_splits_must_be_chosen_from(imported, tmp_path, capsys):
    for name in ("Art_Style/val", "Art_Style/test", "Counting/val"):
        path = tmp_path / "source" / f"{name}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        Dataset.from_list([BLINK]).to_parquet(path)
    assert imported("blink", None, ".")[0] == 2
    assert "choose one with --split (found Art_Style/test, Art_Style/val, Counting/val)" in capsys.readouterr().err
    assert imported("blink", None, ".", "--split", "nope")[0] == 2
    assert len(imported("blink", None, ".", "--split", "Art_Style/val")[1]) == 1
    records = imported("blink", None, ".", "--split", "val")[1]
    assert [record["id"] for record in records] == ["val_Art_Style_1", "val_Art_Style_1#2"]


def test_the_same_import_twice_writes_the_same_bytes(imported):
    def files():
        imported("blink", [BLINK, BLINK | {"idx": "another"}])
        return {path.name: path.read_bytes() for path in imported.output.rglob("*") if path.is_file()}

    first = files()
    assert files() == first and {"test.json", "run.json", "000001_1.png"} <= set(first)


# ---- what cannot be converted

BROKEN = png("red", size=(64, 64))[:80]
BAD = {
    "truncated": (MANTIS | {"images": [stored("red"), {"bytes": BROKEN, "path": None}]}, "picture 2: truncated"),
    "no picture": (MANTIS | {"images": [{"bytes": b"text", "path": None}] * 2}, "picture 1: not a picture"),
    "no such file": (MANTIS | {"images": [{"bytes": None, "path": "x.png"}] * 2}, "no picture x.png"),
    "no pictures": (MANTIS | {"images": []}, "no picture: the columns images"),
    "answer letter": (MANTIS | {"answer": "C"}, "the answer 'C' is neither a letter from A to B nor the text"),
    "hidden answer": (MANTIS | {"answer": "hidden"}, "the answer 'hidden' is neither"),
    "empty answer": (MANTIS | {"answer": ""}, "`answer` is empty"),
    "placeholders": (MANTIS | {"question": "<image> Red?"}, "1 image placeholders for 2 pictures"),
    "numbers": (MANTIS | {"question": "<image 1> <image 3> Red?"}, "placeholders (numbers 1, 3) for 2 pictures"),
    "half numbered": (MANTIS | {"question": "<image 1> <image> Red?"}, "some have none"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_record_is_one_line_and_the_others_are_there(imported, name, caplog):
    row, reason = BAD[name]
    code, records = imported("mantis_eval", [MANTIS | {"id": "a"}, row | {"id": "b"}, MANTIS | {"id": "c"}])
    assert code == 1 and [record["id"] for record in records] == ["a", "c"]
    (problem,) = imported.problems
    assert "test-00000-of-00001.parquet record 2 (id b): " in problem and reason in problem and "\n" not in problem


def test_a_missing_column_names_those_that_are_there(imported, capsys):
    code, _ = imported("mantis_eval", [{key: MANTIS[key] for key in MANTIS if key != "answer"}])
    assert code == 2  # none of all
    error = capsys.readouterr().err
    assert "none of 1 records" in error and "the column `answer` is missing; the record has id, question_type" in error


def test_strict_stops_at_the_first(imported, capsys):
    code, _ = imported("mantis_eval", [MANTIS, MANTIS | {"id": "b", "answer": "Z"}], "a.parquet", "--strict")
    assert code == 2 and "a.parquet record 2 (id b): the answer 'Z'" in capsys.readouterr().err
    assert not (imported.output / "test.json").exists()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"answer": "D"}, "the answer 'D'"),
        ({"image": "not base64!" * 9}, "nor base64"),
        ({"image": "9"}, "no picture 9"),
    ],
)
def test_bad_rows_of_a_table(imported, change, reason):
    code, records = imported("vlmevalkit", [table(), table(index="1") | change], "a.tsv")
    assert (code, len(records)) == (1, 1) and reason in imported.problems[0]


def test_a_row_of_too_few_cells(imported, tmp_path):
    path = tmp_path / "source" / "a.tsv"
    path.parent.mkdir()
    write_table(path, [table()])
    path.write_text(path.read_text() + "1\tx\n")
    code, records = imported("vlmevalkit", None, "a.tsv")
    assert (code, len(records)) == (1, 1)
    assert imported.problems[0].endswith("a.tsv record 2: 2 fields under a header of 10")


@pytest.mark.parametrize(("file", "content"), [("a.parquet", b"PAR1 no"), ("a.json", b"[{"), ("a.txt", b"x")])
def test_unreadable_files_are_one_line(tmp_path, capsys, file, content):
    (tmp_path / file).write_bytes(content)
    assert call("import", "--from", "blink", "--source", tmp_path / file, "--output", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and file in error and error.count("\n") == 1


def test_a_conversation_of_several_questions(imported):
    code, _ = imported("llava_interleave", [INTERLEAVE | {"conversations": INTERLEAVE["conversations"] * 2}], "a.json")
    assert code == 2


# ---- pieces


@pytest.mark.parametrize(
    ("answer", "options", "expected"),
    [
        ("(B)", ["red", "blue"], "B"),
        ("b", ["red", "blue"], "B"),
        ("Blue.", ["red", "blue"], "B"),
        ("A", ["B", "A"], "B"),  # the letter A would be read back as the text of the second option
        ("A", ["red", "red"], "A"),
    ],
)
def test_answers(answer, options, expected):
    assert letter_of(answer, options) == expected


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("Which?\nA. red\nB. dark blue", ("red", "dark blue")),
        ("Which? (A) red, (B) blue", ("red", "blue")),
        ("Which?\nA: <image>\nB: <image>", ("<image>", "<image>")),
        ("Which?\nB. red\nC. blue", ()),
        ("What is it?", ()),
    ],
)
def test_listed_options(question, expected):
    assert listed_options(question) == expected


@pytest.mark.parametrize(
    ("prompt", "num_images", "expected"),
    [
        ("What?", 1, {"image_type": "single"}),
        ("What differs?", 2, {"image_type": "multi"}),
        ("Image1:<image>\nImage2:<image>\nIn Image2, what?", 2, {"image_type": "sequence", "target": 2}),
        ("In Image1, is the car of Image 2?", 2, {"image_type": "multi"}),
        ("In Image3, what?", 2, {"image_type": "multi"}),
        ("In Image1 and Image3, what?", 3, {"image_type": "sequence", "target": None, "targets": [1, 3]}),
        ("In images 1 and 3, what?", 4, {"image_type": "sequence", "target": None, "targets": [1, 3]}),
        ("In Image1 and Image2, what differs?", 2, {"image_type": "multi"}),
        ("In Image1 and Image2, as in Image3?", 4, {"image_type": "multi"}),
        ("In Image1 and Image5, what?", 4, {"image_type": "multi"}),
    ],
)
def test_region(prompt, num_images, expected):
    assert region_of(prompt, num_images) == expected
