"""Pairs of TRL, LLaMA-Factory, ms-swift and RLAIF-V come in as the same records, and go out to the three trainers."""

import io
import json
import unicodedata

import numpy as np
import pytest
from datasets import Dataset
from PIL import Image

from llava.image import ImageStore
from llava.records import parse_preference, read_json, read_preferences
from tests.pair_sets import picture, refused, run
from tests.single_images import lines

QUESTION, CHOSEN, REJECTED = "What is it?", "a dog", "a cat"


def said(role, content):
    return {"role": role, "content": content}


def told(who, value):
    return {"from": who, "value": value}


def with_image(text):
    return [{"type": "image"}, {"type": "text", "text": text}]


def only_text(text):
    return [{"type": "text", "text": text}]


ONE = [said("user", f"<image>\n{QUESTION}")]
BOTH = {"chosen": CHOSEN, "rejected": REJECTED}
# One turn, as the projects document their rows; pictures are added below.
PLAIN = {
    "trl, texts": {"prompt": QUESTION, **BOTH},
    "trl, messages": {"prompt": ONE, "chosen": [said("assistant", CHOSEN)], "rejected": [said("assistant", REJECTED)]},
    "trl, prompt in the answers": {
        "chosen": [*ONE, said("assistant", CHOSEN)], "rejected": [*ONE, said("assistant", REJECTED)]},
    "trl, both": {
        "prompt": QUESTION, "chosen": [*ONE, said("assistant", CHOSEN)],
        "rejected": [*ONE, said("assistant", REJECTED)]},
    "llama-factory, sharegpt": {
        "conversations": [told("human", f"<image>\n{QUESTION}")], "chosen": told("gpt", CHOSEN),
        "rejected": told("gpt", REJECTED)},
    "llama-factory, openai": {
        "messages": ONE, "chosen": said("assistant", CHOSEN), "rejected": said("assistant", REJECTED)},
    "llama-factory, alpaca": {"instruction": "<image>", "input": QUESTION, **BOTH},
    "ms-swift": {"messages": [*ONE, said("assistant", CHOSEN)], "rejected_response": REJECTED},
    "ms-swift, message": {
        "messages": [*ONE, said("assistant", CHOSEN)], "rejected_response": [said("assistant", REJECTED)]},
    "ms-swift, messages": {
        "messages": [*ONE, said("assistant", CHOSEN)], "rejected_messages": [*ONE, said("assistant", REJECTED)]},
    "ms-swift, query": {"query": f"<image>\n{QUESTION}", "response": CHOSEN, "rejected_response": REJECTED},
    "ms-swift, turns": {
        "system": "", "conversation": [{"human": QUESTION, "assistant": CHOSEN}], "rejected_response": REJECTED},
    "ms-swift, alpaca": {"instruction": QUESTION, "input": "", "output": CHOSEN, "rejected_response": REJECTED},
    "rlaif-v": {"question": QUESTION, **BOTH},
}  # fmt: skip
PAIR = {"id": "7", "image": ["a.png"], "prompt": f"<image>\n{QUESTION}", **BOTH}

SYSTEM, FIRST, REPLY = "Be brief.", "What do you see?", "An animal."
TURNS = [said("system", SYSTEM), said("user", f"<image>\n{FIRST}"), said("assistant", REPLY), said("user", QUESTION)]
TOLD = [told("human", f"<image>\n{FIRST}"), told("gpt", REPLY), told("human", QUESTION)]
PARTS = [said("system", only_text(SYSTEM)), said("user", with_image(f"\n{FIRST}")),
         said("assistant", only_text(REPLY)), said("user", only_text(QUESTION))]  # fmt: skip
# A system message and an earlier turn, in which the picture is.
LONGER = {
    "trl": {"prompt": PARTS, "chosen": [said("assistant", only_text(CHOSEN))],
            "rejected": [said("assistant", only_text(REJECTED))]},
    "llama-factory, sharegpt": {"system": SYSTEM, "conversations": TOLD, "chosen": told("gpt", CHOSEN),
                                "rejected": told("gpt", REJECTED)},
    "llama-factory, alpaca": {"system": SYSTEM, "history": [[f"<image>\n{FIRST}", REPLY]], "instruction": QUESTION,
                              "input": "", **BOTH},
    "ms-swift": {"messages": [*TURNS, said("assistant", CHOSEN)], "rejected_response": REJECTED},
    "ms-swift, query": {"system": SYSTEM, "history": [[FIRST, REPLY]], "query": QUESTION, "response": CHOSEN,
                        "rejected_response": REJECTED},
}  # fmt: skip
PAIR_LONGER = {"id": "7", "image": ["a.png"], "context": TURNS[:-1], "prompt": QUESTION, **BOTH}


def png(number=1):
    file = io.BytesIO()
    picture(number).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def imported(tmp_path):
    """Writes rows to a file by its suffix, imports it: (exit code, records)."""
    (tmp_path / "a.png").write_bytes(png())

    def write_and_import(rows, name="pairs.json", *flags):
        path, output = tmp_path / name, tmp_path / "back"
        if path.suffix == ".parquet":
            Dataset.from_list(rows).to_parquet(path)
        elif path.suffix == ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        else:
            path.write_text(json.dumps(rows))
        code = run("import", "--path", path, "--output", output, *flags)
        return code, read_json(output / "train.json")

    return write_and_import


@pytest.mark.parametrize("file", ["pairs.json", "pairs.jsonl", "pairs.parquet"])
@pytest.mark.parametrize("form", PLAIN)
def test_every_form_gives_the_same_pair(imported, tmp_path, form, file):
    own = {"image": {"bytes": png(), "path": "a.png"}} if file.endswith("parquet") else {"images": ["a.png"]}
    code, (record,) = imported([PLAIN[form] | own | {"idx": "7", "score": 0.5}], file)
    assert code == 0 and record == PAIR | {"idx": "7", "score": 0.5}
    (pair,) = read_preferences(tmp_path / "back/train.json")
    assert (pair.image_type, pair.target, pair.rejected) == ("single", 0, (REJECTED,))
    assert (tmp_path / "back/images/a.png").read_bytes() == png()


@pytest.mark.parametrize("form", LONGER)
def test_earlier_turns_become_the_context(imported, form):
    code, (record,) = imported([LONGER[form] | {"images": "a.png", "id": 7}])
    assert code == 0 and record == PAIR_LONGER
    assert parse_preference(record, "").context[1] == ("user", f"<image>\n{FIRST}")


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": QUESTION, "chosen": CHOSEN, "rejected": [REJECTED, "a cow"]},
        {"messages": [*ONE, said("assistant", CHOSEN)], "rejected_response": [REJECTED, "a cow"]},
        {"messages": ONE, "chosen": said("assistant", CHOSEN),
         "rejected": [said("assistant", REJECTED), said("assistant", "a cow")]},
        {"instruction": QUESTION, "chosen": CHOSEN, "rejected": [REJECTED, "a cow"]},
    ],
)  # fmt: skip
def test_several_rejected_answers_stay_together(imported, row):
    _, (record,) = imported([row | {"image": "a.png"}])
    assert record["rejected"] == [REJECTED, "a cow"] and record["id"] == "row_1"
    assert parse_preference(record, "").rejected == (REJECTED, "a cow")


def test_pictures_inside_the_parts_and_several_of_them(imported, tmp_path):
    (tmp_path / "b.png").write_bytes(png(2))
    content = [
        {"type": "text", "text": "Image1:"}, {"type": "image", "image": "a.png"},
        {"type": "image_url", "image_url": {"url": "b.png"}}, {"type": "text", "text": "In image 2, what?"},
    ]  # fmt: skip
    _, (record,) = imported([{"prompt": [said("user", content)], **BOTH}])
    assert (record["image"], record["prompt"]) == (["a.png", "b.png"], "Image1:<image><image>In image 2, what?")
    assert parse_preference(record, "").target == 1


# ---- what cannot be kept

SWIFT = PLAIN["ms-swift"] | {"images": ["a.png"]}
LEFT_OUT = {
    "tools": (SWIFT | {"tools": "[{}]"}, "tools", False),
    "a tool's turn": (SWIFT | {"messages": [*ONE, said("tool", "x"), said("assistant", "y")]}, "tools", False),
    "calls": (SWIFT | {"messages": [*ONE, said("assistant", "x") | {"tool_calls": [1]}]}, "tools", False),
    "video": (SWIFT | {"videos": ["a.mp4"]}, "video or audio", False),
    "audio part": (
        {"prompt": [said("user", [{"type": "audio"}])], **BOTH, "images": ["a.png"]}, "video or audio", False),
    "grounding": (SWIFT | {"objects": {"ref": ["x"]}}, "grounding", False),
    "kto of swift": ({"messages": SWIFT["messages"], "label": False, "images": ["a.png"]}, "no pair", False),
    "kto of llama-factory": ({"instruction": "x", "output": "y", "kto_tag": True}, "no pair", False),
    "picture in an answer": (SWIFT | {"rejected_response": "<image>"}, "picture in an answer", False),
    "other pictures": (SWIFT | {"rejected_images": ["b.png"]}, "other pictures", False),
    "no picture": (PLAIN["trl, texts"], "no picture", False),
    "several turns as an answer": (
        PLAIN["llama-factory, sharegpt"] | {"chosen": [*TOLD, told("gpt", "x")], "images": ["a.png"]}, "no pair", True),
    "two prompts": (
        PLAIN["trl, prompt in the answers"] | {"rejected": [said("user", "x"), said("assistant", "y")]},
        "no pair", True),
    "one answer": ({"messages": ONE, "images": ["a.png"]}, "no pair", True),
    "no question": (
        {"messages": [said("assistant", "x")], "rejected_response": "y", "image": "a.png"}, "no pair", True),
    "same": (SWIFT | {"rejected_response": CHOSEN}, "no pair", True),
    "two pictures for one <image>": (SWIFT | {"images": ["a.png", "a.png"]}, "no pair", True),
    "missing": (SWIFT | {"images": ["b.png"]}, "missing picture", True),
    "damaged": (SWIFT | {"images": ["pairs.json"]}, "not a picture", True),
    "outside": (SWIFT | {"images": ["../a.png"]}, "path outside the image folder", True),
    "outside, other system": (SWIFT | {"images": ["..\\a.png"]}, "path outside the image folder", True),
    "absolute": (SWIFT | {"images": ["/etc/passwd"]}, "path outside the image folder", True),
    "address": (SWIFT | {"images": ["https://example.org/a.png"]}, "no pair", True),
    "no object": (["x"], "no pair", True),
}  # fmt: skip


@pytest.mark.parametrize("kind", LEFT_OUT)
def test_what_no_pair_can_hold_is_counted_and_listed(imported, tmp_path, kind):
    row, reason, is_bad = LEFT_OUT[kind]
    code, records = imported([row, SWIFT])
    assert code == int(is_bad) and len(records) == 1 and records[0]["id"] == "row_2"
    (line,) = lines(tmp_path / "back/dropped.jsonl")
    assert (line["reason"], line["is_bad"]) == (reason, is_bad) and line["where"].endswith("pairs.json row 1")
    counts = json.loads((tmp_path / "back/run.json").read_text())["counts"]
    assert (counts["rows"], counts["pairs"], counts["dropped"]) == (2, 1, {reason: 1})


def test_a_file_without_any_pair_is_refused(imported, tmp_path, capsys):
    (tmp_path / "kto.json").write_text(json.dumps([LEFT_OUT["kto of swift"][0]]))
    said = refused(capsys, "import", "--path", tmp_path / "kto.json", "--output", tmp_path / "back")
    assert "none of 1 rows is a pair" in said and "kto.json row 1: no pair: an answer with a `label`" in said


# ---- pictures and their names


def test_empty_system_messages_say_nothing_and_a_path_may_stand_beside(imported):
    """As some exports of these projects have them; and RLAIF-V's rows without the picture itself."""
    rows = [
        SWIFT | {"messages": [said("system", ""), *ONE, said("assistant", CHOSEN)]},
        {"question": QUESTION, **BOTH, "image": None, "image_path": "./a.png"},
    ]
    _, records = imported(rows)
    assert [record["image"] for record in records] == [["a.png"], ["a.png"]]
    assert not any("context" in record for record in records) and records[1]["image_path"] == "./a.png"


def test_pictures_are_found_by_absolute_paths_in_their_folder_and_in_archives(imported, tmp_path):
    import zipfile

    _, (record,) = imported([SWIFT | {"images": [str(tmp_path / "a.png")]}])
    assert record["image"] == ["a.png"]
    with zipfile.ZipFile(tmp_path / "pictures.zip", "w") as archive:
        archive.writestr("sub/b.png", png(2))
    (tmp_path / "back").rename(tmp_path / "first")
    _, (record,) = imported([SWIFT | {"images": ["sub/b.png"]}], "c.json", "--image_folder", tmp_path / "pictures.zip")
    assert record["image"] == ["sub/b.png"] and (tmp_path / "back/images/sub/b.png").read_bytes() == png(2)


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
def test_names_are_found_in_whatever_form_their_letters_are(imported, tmp_path, forms):
    named, there = (unicodedata.normalize(form, "é.png") for form in forms)
    (tmp_path / there).write_bytes(png(2))
    _, (record,) = imported([SWIFT | {"images": [named], "more": "text", "rejected_number": 1}])
    assert record["image"] == ["é.png"] and (record["more"], record["rejected_number"]) == ("text", 1)


def test_names_inside_tables_stay_in_the_folder_and_in_one_form(imported, tmp_path):
    """A path that leads out, one of another system, one without a suffix; one name composed and decomposed."""
    names = ["../../out.png", "a\\b.png", "bare", "é.png", unicodedata.normalize("NFD", "é.png"), None]
    rows = [{"question": QUESTION, **BOTH, "image": {"bytes": png(n), "path": name}} for n, name in enumerate(names)]
    _, records = imported(rows, "pairs.parquet")
    found = [record["image"][0] for record in records]
    assert found[:4] == ["out.png", "a/b.png", "bare.png", "é.png"] and found[5] == "row_6_1.png"
    assert found[4].startswith("é_") and len(set(found)) == 6
    for number, name in enumerate(found):
        assert (tmp_path / "back/images" / name).read_bytes() == png(number)
    assert not (tmp_path / "out.png").exists()


def test_shards_of_a_folder_are_put_together(tmp_path):
    for number in range(2):
        row = {"idx": str(number), "question": QUESTION, **BOTH, "image": {"bytes": png(number), "path": "x.png"}}
        Dataset.from_list([row]).to_parquet(tmp_path / f"set/RLAIF-V-Dataset_00{number}.parquet")
    (tmp_path / "set/._RLAIF-V-Dataset_000.parquet").write_bytes(b"of another system")
    assert not run("import", "--path", tmp_path / "set", "--output", tmp_path / "back")
    assert [record["id"] for record in read_json(tmp_path / "back/train.json")] == ["0", "1"]
    formats = json.loads((tmp_path / "back/run.json").read_text())["counts"]["formats"]
    assert formats == {"RLAIF-V": 2}


# ---- there and back

RECORDS = [
    PAIR | {"id": "one", "source": {"kept": [1, None]}},
    PAIR_LONGER | {"id": "longer", "rejected": [REJECTED, "a cow", "an owl"], "image_type": "single"},
    {"id": "boxed", "image": ["a.png"], "prompt": "<image>\nIn Image2, é?", **BOTH, "image_type": "collage",
     "target": 2, "grid": [1, 2], "target_box": [8, 0, 16, 12], "attention_ratio": 0.5},
    {"id": "two", "image": ["a.png", "sub/b.png"], "prompt": "<image>\n<image>\nIn Image2, what?", **BOTH},
    {"id": "two", "image": ["a.png", "sub/b.png"], "prompt": "<image>\n<image>\nIn Image2, what?", **BOTH,
     "rejected": "a cow"},
    {"id": "both", "image": ["a.png", "sub/b.png"], "prompt": "<image>\n<image>\nWhich show it?", **BOTH,
     "image_type": "sequence", "targets": [1, 2], "is_search": True},
]  # fmt: skip
OUTPUTS = {"trl": "out.parquet", "llama-factory": "out/pairs.json", "ms-swift": "out/pairs.jsonl"}


@pytest.fixture
def records(tmp_path):
    (tmp_path / "in/sub").mkdir(parents=True)
    (tmp_path / "in/a.png").write_bytes(png())
    (tmp_path / "in/sub/b.png").write_bytes(png(2))
    (tmp_path / "train.json").write_text(json.dumps(RECORDS))
    return ["export", "--data_path", tmp_path / "train.json", "--image_folder", tmp_path / "in"]


@pytest.mark.parametrize("to", OUTPUTS)
def test_export_and_import_give_the_same_records(records, tmp_path, to):
    run(*records, "--to", to, "--output", tmp_path / OUTPUTS[to].partition("/")[0])
    assert not run("import", "--path", tmp_path / OUTPUTS[to], "--output", tmp_path / "back")
    assert read_json(tmp_path / "back/train.json") == RECORDS
    for name in ("a.png", "sub/b.png"):
        assert (tmp_path / "back/images" / name).read_bytes() == (tmp_path / "in" / name).read_bytes()


def test_llama_factory_finds_what_its_description_names(records, tmp_path):
    run(*records, "--to", "llama-factory", "--output", tmp_path / "out")
    info = json.loads((tmp_path / "out/dataset_info.json").read_text())["pairs"]
    rows = Dataset.from_list(read_json(tmp_path / "out" / info["file_name"]))  # one type for every column
    assert info["formatting"] == "sharegpt" and info["ranking"] is True
    assert set(info["columns"].values()) <= set(rows.column_names) and len(rows) == 8
    assert rows[1]["system"] == SYSTEM and rows[1]["conversations"] == TOLD
    assert [row["rejected"]["value"] for row in rows][1:4] == [REJECTED, "a cow", "an owl"]
    for row in rows:
        text = "".join(turn["value"] for turn in row["conversations"])
        assert text.count("<image>") == len(row["images"]) and row["conversations"][-1]["from"] == "human"
        assert all((tmp_path / "out" / name).is_file() for name in row["images"])


def test_ms_swift_gets_messages_that_end_with_the_chosen_answer(records, tmp_path):
    run(*records, "--to", "ms-swift", "--output", tmp_path / "out")
    rows = lines(tmp_path / "out/pairs.jsonl")
    assert rows[1]["messages"] == [*TURNS, said("assistant", CHOSEN)]
    assert rows[2]["rejected_response"] == "a cow" and rows[0]["images"] == ["images/a.png"]


@pytest.mark.parametrize("to", OUTPUTS)
def test_other_trainers_see_pictures_as_they_are_seen_here(records, tmp_path, to):
    """Theirs do not turn a picture as its EXIF data say."""
    turned = Image.Exif()
    turned[0x0112] = 6
    picture(3).save(tmp_path / "in/a.png", exif=turned)
    wanted = ImageStore(tmp_path / "in").open("a.png")
    run(*records, "--to", to, "--output", tmp_path / OUTPUTS[to].partition("/")[0])
    run("import", "--path", tmp_path / OUTPUTS[to], "--output", tmp_path / "back")
    seen = Image.open(tmp_path / "back/images/a.png")
    assert not seen.getexif() and np.array_equal(np.asarray(seen), np.asarray(wanted))


@pytest.mark.parametrize("name", ["../out.png", "..\\out.png", "/etc/passwd"])
def test_a_record_does_not_export_what_lies_elsewhere(records, tmp_path, capsys, name):
    (tmp_path / "out.png").write_bytes(png())
    (tmp_path / "train.json").write_text(json.dumps([PAIR | {"image": [name]}]))
    assert "no " in refused(capsys, *records, "--to", "ms-swift", "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_damaged_picture_ends_an_export_and_leaves_nothing(records, tmp_path, capsys):
    (tmp_path / "in/sub/b.png").write_bytes(png(2)[:60])
    said = refused(capsys, *records, "--to", "llama-factory", "--output", tmp_path / "out")
    assert "record two: sub/b.png is truncated or damaged" in said and not (tmp_path / "out").exists()


def test_imported_pairs_can_be_mixed(records, tmp_path):
    run("--pairs", tmp_path / "train.json", "--image_folder", tmp_path / "in", "--output", tmp_path / "set",
        "--validation", 0)  # fmt: skip
    longer = read_json(tmp_path / "set/train.json")
    (longer,) = [record for record in longer if record["id"] == "longer"]
    assert longer == RECORDS[1] and len(read_preferences(tmp_path / "set/train.json")) == len(RECORDS)
