"""What is read from preference and question files, and how every bad record is named."""

import json
import re

import pytest

from llava.records import DataError, read_answers, read_json, read_preferences, read_questions, transcript

SEQUENCE = "Image1:<image>\nImage2:<image>\nImage3:<image>\nIn Image2, what colour is the car?"


def pair(**changes):
    """A good sequence record about the second of three pictures; a change of None removes the field."""
    record = {"id": "coco_41", "image": ["a.jpg", "b.jpg", "c.jpg"], "prompt": SEQUENCE, "chosen": "red"}
    record.update({"rejected": "blue"} | changes)
    return {name: value for name, value in record.items() if value is not None}


def one_image(prompt, **changes):
    return pair(image=["a.jpg"], prompt=f"<image>\n{prompt}", **changes)


def unnamed(target):
    """A sequence record whose prompt does not say which picture is meant."""
    return pair(prompt=SEQUENCE.replace("In Image2", "There"), target=target)


def turn(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


@pytest.fixture
def read(tmp_path):
    """Write records (or raw text or bytes) to train.json and read them as preferences."""

    def run(content):
        path = tmp_path / "train.json"
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return read_preferences(path)

    return run


def refusal(read, content) -> ValueError:
    with pytest.raises(ValueError) as caught:
        read(content)
    return caught.value


# ---- the containers


def test_array_and_jsonl_hold_the_same_records(tmp_path):
    records = [pair(id=f"r{n}") for n in range(3)]
    array, lines = tmp_path / "array.json", tmp_path / "lines.json"
    array.write_text("\n  " + json.dumps(records, indent=2), encoding="utf-8")
    lines.write_text("\n" + "\n\n".join(json.dumps(r) for r in records) + "\n", encoding="utf-8")
    assert [r.id for r in read_preferences(array)] == ["r0", "r1", "r2"]
    assert [(r.id, r.chosen) for r in read_preferences(lines)] == [(r.id, r.chosen) for r in read_preferences(array)]


@pytest.mark.parametrize("text", [json.dumps([pair()]), json.dumps(pair()) + "\n"], ids=["array", "jsonl"])
def test_a_byte_order_mark_is_ignored(read, text):
    assert read(b"\xef\xbb\xbf" + text.encode())[0].id == "coco_41"


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\u0085", "\x7f"])
def test_jsonl_lines_end_at_newlines_only(read, separator):
    """Unicode's other line ends may stand inside a JSON string as they are (RFC 8259, section 7)."""
    text = f"red{separator}car"
    assert read(json.dumps(pair(chosen=text), ensure_ascii=False) + "\n")[0].chosen == text


def test_windows_line_ends(read):
    assert [r.id for r in read(b"\r\n".join(json.dumps(pair(id=i)).encode() for i in "ab") + b"\r\n")] == ["a", "b"]


def test_broken_array_names_line_and_column(read):
    error = refusal(read, '[\n  {"id": "a",\n   "chosen": oops}\n]')
    assert "train.json" in str(error) and "line 3, column 14" in str(error)


def test_broken_jsonl_names_line_and_column(read):
    error = refusal(read, json.dumps(pair()) + '\n\n{"id": "a" "b"}\n')
    assert "train.json" in str(error) and "line 3, column 12" in str(error)


@pytest.mark.parametrize("text", ["", " \n\t\n"])
def test_empty_file(read, text):
    assert re.search(r"train\.json.*empty", str(refusal(read, text)))


def test_array_without_records(read):
    assert re.search(r"train\.json.*no record", str(refusal(read, [])))


def test_file_that_is_not_utf8(read):
    error = refusal(read, b'[{"id": "caf\xe9"}]')
    assert re.search(r"train\.json.*not UTF-8.*byte 12", str(error))


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.json"):
        read_preferences(tmp_path / "nowhere.json")
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path)


# ---- what a record means


def test_sequence_record(read):
    (record,) = read([pair()])
    assert (record.id, record.images, record.prompt) == ("coco_41", ("a.jpg", "b.jpg", "c.jpg"), SEQUENCE)
    assert (record.chosen, record.rejected, record.context) == ("red", ("blue",), ())
    assert (record.image_type, record.target) == ("sequence", 1)  # Image2, counted from 0
    assert record.target_box is None and record.grid is None and record.extra == {}


@pytest.mark.parametrize(
    ("record", "image_type", "target"),
    [
        (pair(), "sequence", 1),
        (one_image("In Image4, what is it?"), "collage", 3),
        (one_image("In the centre of the picture, what is it?"), "pip", 0),
        (one_image("In the centre, what is it?"), "pip", 0),
        (one_image("In the subplot at the center, what is it?"), "pip", 0),
        (one_image("In the picture placed on top, what is it?"), "pip", 0),
        (one_image("What is it?", target_box=[1, 1, 2, 2]), "pip", 0),
        (one_image("What is it?"), "single", 0),
        (one_image("What is in the centre of the picture?"), "single", 0),
        (one_image("In the middle of the road, what is there?"), "single", 0),
        (one_image("Describe the picture, then say what is in the middle, please."), "single", 0),
        (one_image("What do you see in image2?"), "collage", 1),
        (one_image("In Image 3, what is it?"), "collage", 2),
        (one_image("IN IMAGE\u00a012: what is it?"), "collage", 11),
        (one_image("What is it?", grid=[2, 2], target=4), "collage", 3),
        (pair(prompt=SEQUENCE + " In Image2 it is small."), "sequence", 1),
        (pair(prompt=SEQUENCE + " In Image1 it is red.", target=1), "sequence", 0),
    ],
)
def test_format_and_target_follow_from_the_prompt(read, record, image_type, target):
    (found,) = read([record])
    assert (found.image_type, found.target, found.is_derived) == (image_type, target, True)


def test_own_fields_win_over_the_prompt(read):
    records = [
        pair(prompt="<image><image><image>What is it?", target=3),
        one_image("What is it?", image_type="pip"),
        one_image("What is it?", image_type="collage", target=2, grid=[1, 3]),
        one_image("What is it?", image_type="single"),
    ]
    found = [(r.image_type, r.target, r.grid) for r in read(records)]
    assert found == [("sequence", 2, None), ("pip", 0, None), ("collage", 1, (1, 3)), ("single", 0, None)]


def test_target_box_is_kept(read):
    assert read([one_image("What is it?", target_box=[96, 72, 544, 408.5])])[0].target_box == (96, 72, 544, 408.5)


def test_image_placeholder_of_the_published_data(read):
    (record,) = read([pair(prompt=SEQUENCE.replace("<image>", "<image-placeholder>"))])
    assert record.prompt == SEQUENCE


def test_one_image_may_be_a_string(read):
    assert read([one_image("What is it?") | {"image": "a.jpg"}])[0].images == ("a.jpg",)


def test_unknown_fields_are_kept(read):
    (record,) = read([pair(attention_ratio=0.25, gt="red", rejected_from={"noise": 500})])
    assert record.extra == {"attention_ratio": 0.25, "gt": "red", "rejected_from": {"noise": 500}}


def test_answers_lose_their_outer_blanks(read):
    (record,) = read([pair(chosen=" red\n", rejected="\tblue ")])
    assert (record.chosen, record.rejected) == ("red", ("blue",))


def test_questions(tmp_path):
    path = tmp_path / "test.jsonl"
    question = {"id": 7, "image": "a.jpg", "prompt": "<image>\nIn Image2, what is it?", "answer": " red "}
    path.write_text(json.dumps(question | {"choices": ["red", "blue"]}) + "\n", encoding="utf-8")
    (found,) = read_questions(path)
    assert (found.id, found.answer, found.image_type, found.target) == ("7", "red", "collage", 1)
    assert found.extra == {"choices": ["red", "blue"]}
    path.write_text(json.dumps({**question, "answer": ""}), encoding="utf-8")
    with pytest.raises(DataError, match=r"test\.jsonl record 1 \(id 7\): `answer` is empty"):
        read_questions(path)


def multi(**changes):
    """Two pictures and a question about both."""
    record = {"id": "m", "image": ["a.jpg", "b.jpg"], "prompt": "<image><image>\nWhat differs?", "answer": "colour"}
    return record | {"image_type": "multi"} | changes


def test_a_question_about_all_images_has_no_target(tmp_path):
    path = tmp_path / "test.json"
    path.write_text(json.dumps([multi()]))
    (found,) = read_questions(path)
    assert (found.image_type, found.target, found.images) == ("multi", None, ("a.jpg", "b.jpg"))


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (multi(target=1), "has `target`: is it a sequence?"),
        (multi(image="a.jpg", prompt="<image>What?"), "its image_type is `single`"),
        ({name: value for name, value in multi().items() if name != "image_type"}, "which image is meant?"),
    ],
)
def test_a_question_about_all_images_says_so_and_names_none(tmp_path, record, reason):
    path = tmp_path / "test.json"
    path.write_text(json.dumps([record]))
    with pytest.raises(DataError, match=re.escape(reason)):
        read_questions(path)


@pytest.mark.parametrize("target", [None, 1])
def test_an_answer_about_all_images_has_no_target(tmp_path, target):
    answer = {"question_id": "m", "text": "colour", "answer": "colour", "image_type": "multi", "num_images": 2}
    path = tmp_path / "answers.jsonl"
    path.write_text(json.dumps(answer | {"target": target, "attention_by_image": [0.5, 0.5]}))
    assert read_answers(path)[0].targets == ()


def test_several_rejected_answers(read):
    assert read([pair(rejected=["blue", " green\n", "grey"])])[0].rejected == ("blue", "green", "grey")
    assert read([pair(rejected=["blue"])])[0].rejected == ("blue",)


def test_earlier_turns_come_before_the_prompt(read):
    """Their pictures come first, and what they name is meant until the prompt names another."""
    earlier = turn("Image1:<image>\nImage2:<image-placeholder>\nIn Image2, what is it?", "A car.")
    system = {"role": "system", "content": "Be brief."}
    same = pair(image=["a.jpg", "b.jpg"], prompt="Which colour?", context=[system, *earlier])
    other = pair(image=["a.jpg", "b.jpg"], prompt="And in Image1?", context=earlier)
    found, another = read([same, other])
    assert found.context == (
        ("system", "Be brief."), ("user", "Image1:<image>\nImage2:<image>\nIn Image2, what is it?"),
        ("assistant", "A car."),
    )  # fmt: skip
    assert (found.image_type, found.target, found.prompt, found.extra) == ("sequence", 1, "Which colour?", {})
    assert (another.image_type, another.target) == ("sequence", 0)


def test_a_transcript_has_all_that_was_said():
    assert transcript((), "Why?") == "Why?"
    said = (("system", "Be brief."), ("user", "<image>Red?"), ("assistant", "Yes."))
    assert transcript(said, "Why?") == "system: Be brief.\n\nuser: <image>Red?\n\nassistant: Yes.\n\nuser: Why?"


# ---- what is refused

BAD = {
    "missing field": (pair(chosen=None), "`chosen` is missing"),
    "no image": (pair(image=None), "`image` is missing"),
    "fewer placeholders": (pair(image=["a.jpg"] * 4), "3 <image> but the record lists 4 images"),
    "more placeholders": (pair(image=["a.jpg"] * 2), "3 <image> but the record lists 2 images"),
    "no placeholder": (one_image("In Image1, what?") | {"prompt": "In Image1, what?"}, "0 <image>"),
    "Image0": (pair(prompt=SEQUENCE.replace("In Image2", "In Image0")), "Image0 does not exist"),
    "Image4 of 3": (pair(prompt=SEQUENCE.replace("In Image2", "In Image4")), "Image4 does not exist"),
    "target 0": (unnamed(0), "Image0 does not exist"),
    "target 4 of 3": (unnamed(4), "Image4 does not exist"),
    "target is text": (unnamed("2"), "`target` must be a whole number"),
    "target is a list": (pair(target=[2]), "`target` must be a whole number"),
    "target is true": (pair(target=True), "`target` must be a whole number"),
    "target beside another name": (pair(target=1), "`target` is 1, but the prompt names Image2"),
    "two names": (pair(prompt=SEQUENCE + " Not in image 3."), "names Image2 and Image3: which one is meant?"),
    "another name, said without true": (pair(target=1, points_elsewhere="yes"), "but the prompt names Image2"),
    "neither of two names": (pair(prompt=SEQUENCE + " And in Image3?", target=1), "names Image2 and Image3"),
    "a cell of a pic-in-pic": (one_image("In Image4, what?", image_type="pip"), "names Image4, but a pip prompt"),
    "a cell of a single picture": (one_image("In Image2, what?", image_type="single"), "but a single prompt"),
    "no rejected": (pair(rejected=[]), "`rejected` is empty"),
    "rejected twice": (pair(rejected=["blue", " blue"]), "list of different texts"),
    "chosen among the rejected": (pair(rejected=["blue", "red"]), "same text"),
    "rejected holds a number": (pair(rejected=["blue", 3]), "list of texts"),
    "context is text": (pair(context="hello"), "`context` must be a list"),
    "context without roles": (pair(context=[{"content": "hello"}]), "user and assistant in turns"),
    "context ends in a question": (pair(context=[{"role": "user", "content": "hello"}]), "in turns"),
    "context with two system texts": (pair(context=[{"role": "system", "content": "a"}] * 2), "in turns"),
    "context with an empty message": (pair(context=turn(" ", "b")), "empty message"),
    "context with parts": (pair(context=[{"role": "user", "content": [{"type": "text"}]}]), "`context` must be"),
    "context with a picture too many": (pair(context=turn("<image>hello", "b")), "4 <image> but the record lists 3"),
    "context answers with a picture": (pair(context=turn("hello", "<image>")), "<image>"),
    "cell outside grid": (one_image("In Image7, what?", grid=[2, 3]), "Image7 does not exist"),
    "empty chosen": (pair(chosen=""), "`chosen` is empty"),
    "blank rejected": (pair(rejected=" \n"), "`rejected` is empty"),
    "chosen is rejected": (pair(rejected="red "), "same text"),
    "chosen is a number": (pair(chosen=3), "`chosen` must be text"),
    "prompt is a list": (pair(prompt=["<image>"]), "`prompt` must be text"),
    "image is a number": (pair(image=3), "`image` must be"),
    "image is empty": (pair(image=[]), "`image` must be"),
    "image holds a number": (pair(image=["a.jpg", 2, "c.jpg"]), "`image` must be"),
    "unknown format": (pair(image_type="mosaic"), "mosaic"),
    "collage of several": (pair(image_type="collage"), "lists 3"),
    "several without reference": (pair(prompt=SEQUENCE.replace("In Image2", "There")), "In Image<k>"),
    "sequence without target": (
        pair(prompt=SEQUENCE.replace("In Image2", "There"), image_type="sequence"),
        "which image",
    ),
    "no referred image": (pair(prompt=SEQUENCE.replace("In Image2", "There"), image_type="multi"), "test sets only"),
    "box without width": (one_image("What?", target_box=[5, 5, 5, 9]), "no area"),
    "box upside down": (one_image("What?", target_box=[5, 9, 8, 5]), "no area"),
    "box off the corner": (one_image("What?", target_box=[-1, 0, 8, 5]), "target_box"),
    "box of three": (one_image("What?", target_box=[1, 2, 3]), "target_box"),
    "box of text": (one_image("What?", target_box=["0", "0", "1", "1"]), "target_box"),
    "grid of one": (one_image("In Image1, what?", grid=[2]), "`grid`"),
    "grid of zero": (one_image("In Image1, what?", grid=[0, 2]), "`grid`"),
    "stop string": (pair(chosen="red</s>"), "</s>"),
    "image in answer": (pair(rejected="<image>"), "<image>"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_record_is_named(read, name):
    """File, 1-based number and id, and what is wrong; as record 3 after two good ones."""
    record, reason = BAD[name]
    error = refusal(read, [pair(id="a"), pair(id="b"), record])
    assert re.search(r"train\.json record 3 \(id coco_41\): ", str(error)) and reason in str(error), str(error)
    assert "\n" not in str(error)


@pytest.mark.parametrize("raw", ["text", 3, None, [1]])
def test_an_item_that_is_no_object(read, raw):
    assert re.search(r"train\.json record 2: .*object", str(refusal(read, [pair(), raw])))


def test_several_bad_records_are_counted_and_listed(read):
    error = refusal(read, [pair(id="a", chosen=""), pair(id="b"), pair(id="c", image=3), pair(id="d", grid=3)])
    assert "record 1 (id a)" in str(error) and "2 more" in str(error)
    assert [re.search(r"record (\d) \(id (\w)\)", p).groups() for p in error.problems] == [
        ("1", "a"),
        ("3", "c"),
        ("4", "d"),
    ]


def test_one_bad_record_counts_no_others(read):
    assert "more" not in str(refusal(read, [pair(), pair(chosen="")]))
