"""Imported, answered, scored and written for the public harnesses, against files written by hand."""

import csv
import json

import pytest

from inference.llava_hound_dpo import evaluate as command
from llava.records import read_questions
from tests.interchange_sets import NLVR2, Importer, call, table


@pytest.fixture
def imported(tmp_path):
    return Importer(tmp_path)


def answer_all(imported, tmp_path, texts):
    """An answers file as inference writes it."""
    questions = read_questions(imported.output / "test.json")
    lines = [
        {
            "question_id": q.id, "text": text, "attention_ratio": None, "attention_by_image": [0.5, 0.5],
            "prompt": q.prompt, "answer": q.answer, "image_type": q.image_type, "target": None,
            "num_images": len(q.images), "choices": q.extra["choices"],
        }
        for q, text in zip(questions, texts, strict=True)
    ]  # fmt: skip
    path = tmp_path / "answers.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def export(imported, tmp_path, answers, to, file, *flags):
    arguments = ["--to", to, "--answers", answers, "--questions", imported.output / "test.json"]
    code = call("export", *arguments, "--output", tmp_path / file, *flags)
    return code, tmp_path / file


def test_there_and_back_by_vlmevalkit(imported, tmp_path):
    """Columns as in the table that came in, pictures left out, `prediction` last; scores by the rules beside ours."""
    rows = [table(), table(index="1", answer="B", split='a "b"\tc'), table(index="2", answer="Z")]
    imported("vlmevalkit", rows, "BLINK.tsv")
    answers = answer_all(imported, tmp_path, ["A", "the second\none"])
    code, path = export(imported, tmp_path, answers, "vlmevalkit", "m_BLINK.tsv")
    assert code == 0 and path.read_text() == (
        '"index"\t"hint"\t"question"\t"A"\t"B"\t"C"\t"D"\t"answer"\t"split"\t"prediction"\n'
        '"0"\t""\t"Which is red?"\t"the first"\t"the second"\t"None"\t""\t"A"\t"val"\t"A"\n'
        '"1"\t""\t"Which is red?"\t"the first"\t"the second"\t"None"\t""\t"B"\t"a ""b""\tc"\t"the second\none"\n'
    )
    original = ["--original", tmp_path / "source" / "BLINK.tsv"]
    code, path = export(imported, tmp_path, answers, "vlmevalkit", "m.tsv", *original)
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    assert code == 0 and "image" not in rows[0]
    found = [(row["index"], row["answer"], row["prediction"]) for row in rows]
    assert found == [("0", "A", "A"), ("1", "B", "the second\none"), ("2", "Z", "")]


def test_an_imported_set_is_scored(imported, tmp_path):
    """Grouped by format and number of images, not by position; where a model looked is unknown, without a target."""
    imported("nlvr2", [NLVR2 | {"identifier": f"dev-{n}-0-0"} for n in range(3)])
    answers = answer_all(imported, tmp_path, ["B", "(A)", "purple"])
    test = imported.output / "test.json"
    ours = command.evaluate([answers], test)[0]["answers"]["answers"]
    assert list(ours["by_format"]) == ["multi"] and list(ours["by_num_images"]) == ["2"]
    assert ours["by_position"] == {"sequence": {}, "collage": {}}
    assert ours["looked_answered"]["judged_by"] == {"argmax": 0, "ratio": 0, "unknown": 3}
    assert ours["overall"]["attention_ratio"] is None
    assert ours["overall"]["accuracy"] == pytest.approx(1 / 3) and ours["overall"]["unparsed"] == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["vlmevalkit", "a.xlsx"], "not .xlsx"),
        (["lmms_eval", "a.tsv"], "invalid choice: 'lmms_eval'"),
        (["vlmevalkit", "a.tsv", "--original", "x.tsv"], "x.tsv"),
    ],
)
def test_bad_flags_of_export(imported, tmp_path, capsys, flags, message):
    imported("nlvr2", [NLVR2])
    code, _ = export(imported, tmp_path, answer_all(imported, tmp_path, ["B"]), *flags)
    error = capsys.readouterr().err
    assert code == 2 and message in error and error.count("\n") == 1


def test_a_question_without_answer_is_not_left_out(imported, tmp_path, capsys):
    imported("nlvr2", [NLVR2, NLVR2 | {"identifier": "dev-2-0-0"}])
    answers = answer_all(imported, tmp_path, ["B", "B"])
    answers.write_text(answers.read_text().splitlines()[0] + "\n")
    code, path = export(imported, tmp_path, answers, "vlmevalkit", "a.tsv")
    assert code == 2 and not path.exists() and "record 2 (id dev-2-0-0): no answer in" in capsys.readouterr().err
