"""Several images that a prompt asks about, or looks for: named by its words or by its record."""

import json

import pytest

from llava.records import parse_preference, parse_question, read_answers, read_instructions

THREE = {"image": ["a.jpg", "b.jpg", "c.jpg"]}
HALVES = {"image": ["a.jpg"], "grid": [2, 2]}
FITS = "Which image fits: there"


def question(where, **fields):
    """A question about a place of three pictures, or of what `fields` says."""
    record = {"id": "q", **THREE, "answer": "red", **fields}
    return record | {"prompt": "<image>" * len(record["image"]) + f"\n{where}, what colour is the car?"}


@pytest.mark.parametrize(
    ("record", "targets"),
    [
        (question("In Image1 and Image3"), (0, 2)),
        (question("In Image3 and Image1"), (0, 2)),
        (question("In image 1, Image 2, or IMAGE3"), (0, 1, 2)),
        (question("In Image1, Image2 & Image3"), (0, 1, 2)),
        (question("In Images 1 and 3"), (0, 2)),
        (question("In images 1, 2, and 3"), (0, 1, 2)),
        (question("In Image 1 and 3"), (0, 2)),
        (question("In image 1, 2 or 3"), (0, 1, 2)),
        (question("In Image1 and Image3, not in Image3 or Image1 alone"), (0, 2)),
        (question("In Image1, 2 of the cars are red: which"), (0,)),
        (question("In Image 1 and 2 other places"), (0,)),
        (question("There", targets=[3, 1]), (0, 2)),
        (question("There", targets=[3]), (2,)),
        (question("There", targets=[3], target=3), (2,)),
        (question("There", targets=None, target=3), (2,)),
        (question("In Image1 and Image3", targets=[1, 3], target=None), (0, 2)),
        (question("In Image1 and Image3", target=3), (2,)),
        (question("In Image1, Image2 and Image3", targets=[3, 2]), (1, 2)),
        (question("In Image1, not in Image2", targets=[1, 2]), (0, 1)),
        (question("In Image2", targets=[1, 3], points_elsewhere=True), (0, 2)),
        (question("In Image1 and Image4", **HALVES), (0, 3)),
        (question("There", targets=[2, 3], **HALVES), (1, 2)),
        (question(FITS, is_search=True, targets=[1, 3]), (0, 2)),
        (question(FITS, is_search=True, target=4, **HALVES), (3,)),
        (question("There", is_search=False, target=2), (1,)),
    ],
)
def test_words_and_fields_name_the_targets(record, targets):
    found = parse_question(record, "")
    assert found.image_type == ("collage" if "grid" in record else "sequence")
    assert found.targets == targets and found.target == (targets[0] if len(targets) == 1 else None)
    assert found.is_search == record.get("is_search", False) and "targets" not in found.extra


PIP, SINGLE, MULTI = ({"image_type": t, "image": ["a.jpg"]} for t in ("pip", "single", "multi"))
REFUSED = [
    (question("There", targets=2), "`targets` must be a list of different whole numbers from 1, not 2"),
    (question("There", targets=[]), "`targets` must be a list"),
    (question("There", targets=[2, 2]), "`targets` must be a list"),
    (question("There", targets=["2"]), "`targets` must be a list"),
    (question("There", targets=[True]), "`targets` must be a list"),
    (question("There", target=2, targets=[2, 3]), "`target` is 2, but `targets` are [2, 3]: give one"),
    (question("There", targets=[0, 1]), "Image0 does not exist"),
    (question("There", targets=[1, 4]), "Image4 does not exist: this record has Image1 to Image3"),
    (question("In Image1 and Image4"), "Image4 does not exist: this record has Image1 to Image3"),
    (question("There", targets=[1, 5], **HALVES), "Image5 does not exist: the collage has 2 x 2 cells"),
    (question("In Images 1 and 5", **HALVES), "Image5 does not exist: the collage has 2 x 2 cells"),
    (question("In Image2", targets=[1, 3]), "`targets` are [1, 3], but the prompt names Image2"),
    (question("In Image1 and Image2", targets=[1, 3]), "`targets` are [1, 3], but the prompt names Image1 and Image2"),
    (question("In Image1, Image2 and Image3, and not in Image2"), "names Image1, Image2 and Image3: which one"),
    (question("In Image1 and in Image2"), "names Image1 and Image2: which one is meant?"),
    (question("In Image1 and Image2", target_box=[0, 0, 9, 9], **HALVES), "`target_box` is for one target"),
    (question("There", targets=[1], **PIP), "`targets` is for a sequence or a collage, and this is a pip prompt"),
    (question("In Images 1 and 2", **PIP), "the prompt names Image1 and Image2, but a pip prompt has one image"),
    (question("There", targets=[1], **SINGLE), "`targets` is for a sequence or a collage, and this is a single prompt"),
    (question("There", targets=[1], **MULTI | THREE), "has `targets`: is it a sequence?"),
    (question("There", is_search=True, **MULTI | THREE), "has `is_search`: is it a sequence?"),
    (question(FITS, is_search=True, target=1, **PIP), "`is_search` is for a sequence or a collage"),
    (question(FITS, is_search=True, target=1, **SINGLE), "`is_search` is for a sequence or a collage"),
    (question(FITS, is_search=True), "`is_search` needs `targets`"),
    (question(FITS, is_search="yes", target=1), "`is_search` must be true or false, not \"yes\""),
    (question("In Image2", is_search=True, target=2), "a prompt that names no image, and this one names Image2"),
]


@pytest.mark.parametrize(("record", "reason"), REFUSED, ids=[reason for _, reason in REFUSED])
def test_what_is_refused(record, reason):
    with pytest.raises(ValueError) as caught:
        parse_question(record, "")
    assert reason in str(caught.value) and "\n" not in str(caught.value)


def test_a_search_does_not_look_at_what_earlier_turns_name():
    earlier = [("user", "<image><image><image>In Image2, what is it?"), ("assistant", "A car.")]
    context = [{"role": role, "content": text} for role, text in earlier]
    record = question("Which image fits", is_search=True, target=1, context=context)
    assert parse_question(record | {"prompt": "Which image shows a ring?"}, "").targets == (0,)


def test_a_pair_may_have_several_targets():
    record = question("In Image1 and Image3")
    record |= {"chosen": record.pop("answer"), "rejected": "blue"}
    assert parse_preference(record, "").targets == (0, 2)


@pytest.mark.parametrize(
    ("fields", "targets"),
    [
        ({"target": 2}, (1,)), ({}, (0,)), ({"target": None, "targets": [1, 3]}, (0, 2)), ({"targets": [3]}, (2,)),
        ({"target": 5, "image_type": "pip"}, (0,)), ({"target": 3, "image_type": "collage", "num_images": 1}, (2,)),
    ],
)  # fmt: skip
def test_answers_have_the_targets_of_their_questions(tmp_path, fields, targets):
    line = {"question_id": "q", "text": "red", "image_type": "sequence", "num_images": 3, "is_search": True}
    (tmp_path / "answers.jsonl").write_text(json.dumps(line | fields))
    (found,) = read_answers(tmp_path / "answers.jsonl")
    assert found.targets == targets and found.extra == {"is_search": True}


BAD = {"target": None}, {"targets": [1, 4]}, {"target": 0}, {"target": 1, "targets": [2]}


@pytest.mark.parametrize("fields", BAD)
def test_answers_to_what_there_is_not_are_refused(tmp_path, fields):
    line = {"question_id": "q", "text": "red", "image_type": "sequence", "num_images": 3}
    (tmp_path / "answers.jsonl").write_text(json.dumps(line | fields))
    with pytest.raises(ValueError, match=r"answers\.jsonl record 1 \(id q\): .*(Image|`target)"):
        read_answers(tmp_path / "answers.jsonl")


def test_a_refusal_has_no_targets(tmp_path):
    record = question("In Image4", is_refusal=True, target=None)
    (tmp_path / "instructions.jsonl").write_text(json.dumps(record))
    (found,) = read_instructions(tmp_path / "instructions.jsonl")
    assert (found.image_type, found.targets, found.target) == ("sequence", (), None)
