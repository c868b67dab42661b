"""Questions that say less, or ask more, than others: all are answered, and what is odd about them is in the answer."""

import json

from PIL import Image

from tests.test_inference import answer, world  # noqa: F401


def test_questions_without_a_right_answer_are_answered(answer, world, tmp_path):  # noqa: F811
    records = json.loads((world / "small.json").read_text())[:4]
    texts = [a["text"] for a in answer("with.jsonl", "--data_path", write(tmp_path / "with.json", records))]
    del records[0]["answer"]
    records[1]["answer"] = None
    answers = answer("without.jsonl", "--data_path", write(tmp_path / "without.json", records))
    assert [a["text"] for a in answers] == texts
    assert [a["answer"] for a in answers] == [None, None, records[2]["answer"], records[3]["answer"]]


def test_a_prompt_of_more_tokens_than_the_model_was_made_for_is_marked(answer, world, tmp_path, capsys):  # noqa: F811
    """2048 here: 36 a picture and one for the line break."""
    record = next(r for r in json.loads((world / "small.json").read_text()) if r["image_type"] == "sequence")
    name, asked = record["image"][0], record | {"prompt": "<image>\nIn Image1, what?", "image": [record["image"][0]]}
    long = {"id": "long", "image": [name] * 60, "prompt": "<image>\n" * 60 + "In Image1, what?"}
    records = [long | {"image_type": "sequence"}, asked | {"image_type": "single"}]
    answers = answer("long.jsonl", "--data_path", write(tmp_path / "long.json", records))
    assert [a["is_too_long"] for a in answers] == [True, False]
    said = capsys.readouterr().out
    assert "1 of 2 prompts may be too long" in said and "1 of them are beyond the 2048 tokens" in said
    assert json.loads((tmp_path / "long.run.json").read_text())["counts"]["too_long"] == 1


def test_the_grid_that_a_collage_is_read_with_is_in_its_answer(answer, tmp_path):  # noqa: F811
    """Two rows of three published cells (448 px, label strips of 40, 40 between), without a `grid`."""
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (3 * 448 + 2 * 40, 2 * 488), "navy").save(tmp_path / "pictures/c.png")
    record = {"id": "c", "image": "c.png", "prompt": "<image>\nIn Image5, what?", "answer": "blue"}
    flags = ("--data_path", write(tmp_path / "c.json", [record]), "--image_folder", tmp_path / "pictures")
    (given,) = answer("c.jsonl", *flags)
    assert (given["grid"], given["num_images"], len(given["attention_by_image"])) == ([2, 3], 6, 6)


def write(path, records):
    path.write_text(json.dumps(records))
    return path
