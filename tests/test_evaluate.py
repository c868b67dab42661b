"""Scores of small answers files against values worked out by hand, and every bad file named."""

import json
import re

import pytest

from inference.llava_hound_dpo import evaluate as command
from inference.llava_hound_dpo.evaluate import main
from inference.llava_hound_dpo.findings import markdown
from inference.llava_hound_dpo.report import report
from llava.records import DataError, read_answers

SEQUENCE = "Image1:<image>\nImage2:<image>\nIn Image{}, what colour is the car?"


def evaluate(*args, **kwargs):
    return command.evaluate(*args, **kwargs)[0]


def question(id, target=1, answer="red", others=("blue",), **more):
    """A question about one of two pictures."""
    prompt = SEQUENCE.format(target)
    record = {"id": id, "image": ["a.jpg", "b.jpg"], "prompt": prompt, "answer": answer, "others": list(others)}
    return record | more


def answered(asked, text, **more):
    """The line of an answers file for a question, as run_inference writes it."""
    carried = {name: asked[name] for name in ("prompt", "answer", "others", "choices") if name in asked}
    target = int(asked["prompt"].split("In Image")[1][0])
    facts = {"image_type": "sequence", "target": target, "num_images": len(asked["image"])}
    return {"question_id": asked["id"], "text": text, "attention_ratio": 0.5} | carried | facts | more


@pytest.fixture
def write(tmp_path):
    def run(name, records):
        path = tmp_path / name
        path.write_text(
            records if isinstance(records, str) else "".join(json.dumps(r) + "\n" for r in records), encoding="utf-8"
        )
        return path

    return run


QUESTIONS = [
    question("q1", 1),
    question("q2", 2),
    question("q3", 2, answer="green"),
    question("q4", 1),
    question("q5", 1, image=["a.jpg", "b.jpg", "c.jpg"], prompt="<image><image><image>In Image1, what?"),
    question("q6", 2),
]
ANSWERS = [
    answered(QUESTIONS[0], "Red.", attention_by_image=[0.8, 0.2]),  # right, looked right
    answered(QUESTIONS[1], "blue", attention_by_image=[0.7, 0.3]),  # wrong, true of Image1, looked wrong
    answered(QUESTIONS[2], "pink", attention_ratio=0.9, is_complete=False),  # wrong, looked right by ratio, cut off
    answered(QUESTIONS[3], ""),  # unparsed; an even share is not looked right
    answered(QUESTIONS[4], "a red", attention_by_image=[0.2, 0.4, 0.4]),  # right, looked wrong
]  # q6 is missing


def test_scores_by_hand(write):
    scores = evaluate([write("answers_base.jsonl", ANSWERS)], write("test.json", QUESTIONS))
    base = scores["answers"]["base"]
    overall = base["overall"]
    assert (overall["questions"], overall["accuracy"]) == (6, pytest.approx(2 / 6))
    assert [overall[name] for name in ("right", "wrong", "unparsed", "missing", "cut_off")] == [2, 2, 1, 1, 1]
    assert "| cut off | 1 |" in markdown(scores)
    assert overall["low"] < overall["accuracy"] < overall["high"]
    assert overall["attention_ratio"] == pytest.approx((4 * 0.5 + 0.9) / 5)
    assert list(base["by_format"]) == ["sequence"] and base["by_format"]["sequence"] == overall
    assert {n: (g["questions"], g["right"]) for n, g in base["by_num_images"].items()} == {"2": (5, 1), "3": (1, 1)}
    positions = {p: (g["questions"], g["right"]) for p, g in base["by_position"]["sequence"].items()}
    assert positions == {"Image1": (3, 2), "Image2": (3, 0)}
    assert base["scorers"] == {"exact": 6}


def test_confusion_by_hand(write):
    """Wrong: `blue` (true of the other image) and `pink` (of none). Dealt: `pink` to q2 0, `blue` to q3 1."""
    found = evaluate([write("a.jsonl", ANSWERS)], write("test.json", QUESTIONS))["answers"]["a"]["confusion"]
    assert found == {
        "questions": 6, "wrong": 2, "true_of_another": 1, "rate": pytest.approx(1 / 6), "of_wrong": 0.5, "chance": 0.5,
    }  # fmt: skip


def test_quadrants_by_hand(write):
    found = evaluate([write("a.jsonl", ANSWERS)], write("test.json", QUESTIONS))["answers"]["a"]["looked_answered"]
    assert list(found.values())[:4] == [1, 1, 1, 2]
    assert found["judged_by"] == {"argmax": 3, "ratio": 2, "unknown": 1}


def test_equal_attention_is_not_looked_right(write):
    lines = [answered(question("t"), "red", attention_by_image=[0.5, 0.5], attention_ratio=0.9)]
    found = evaluate([write("a.jsonl", lines)])["answers"]["a"]["looked_answered"]
    assert (found["looked_wrong_answered_right"], found["judged_by"]["argmax"]) == (1, 1)


def several(id, text, targets, **more):
    """A line of an answer to a question about some of three images."""
    own = {"target": targets[0]} if len(targets) == 1 else {"target": None, "targets": targets}
    line = {"question_id": id, "text": text, "answer": "x", "image_type": "sequence", "num_images": 3} | own
    return line | {"attention_ratio": 0.7} | more


def test_attention_on_several_targets_by_hand(write):
    """Looked right: the outer two have the two largest shares, or more than 2/3 of the attention."""
    shares = ([0.4, 0.2, 0.4], [0.5, 0.1, 0.4], [0.5, 0.3, 0.2], [0.4, 0.3, 0.3])  # the last is a tie with another
    lines = [several(f"s{n}", "x", [1, 3], attention_by_image=own) for n, own in enumerate(shares)]
    lines += [several("r0", "y", [1, 3]), several("r1", "y", [1, 3], attention_ratio=0.6)]
    lines += [several("all", "y", [1, 2, 3], attention_by_image=[0.2, 0.4, 0.4], attention_ratio=1.0)]
    search = {"is_search": True, "attention_by_image": [0.2, 0.5, 0.3], "attention_ratio": 0.5}
    lines += [several("search", "x", [2], **search)]
    found = evaluate([write("a.jsonl", lines)])["answers"]["a"]
    looked = found["looked_answered"]
    assert list(looked.values())[:4] == [3, 1, 2, 1]  # looked right: answered right, wrong; looked wrong: the same
    assert looked["judged_by"] == {"argmax": 5, "ratio": 2, "unknown": 1}
    assert {place: own["questions"] for place, own in found["by_position"]["sequence"].items()} == {"Image2": 1}
    assert found["overall"]["attention_ratio"] == pytest.approx((5 * 0.7 + 0.6 + 0.5) / 7)  # not of all images
    assert found["overall"]["chance"] is None and found["by_position"]["sequence"]["Image2"]["chance"] == 1 / 3
    # Of two targets .7 .7 .7 .7 (right) against .7 .6: four ties and four wins; the search has none to stand against.
    assert found["ratio_auc"]["overall"]["auc"] == pytest.approx((4 * 0.5 + 4) / 8)


@pytest.mark.parametrize("targets", [[1], [1, 2], [2, 3], [1, 2, 3]])
def test_an_answer_about_another_set_is_refused(write, targets):
    prompt = "<image><image><image>\nIn Image1 and Image3, what?"
    asked = {"id": "q", "image": ["a.jpg", "b.jpg", "c.jpg"], "prompt": prompt, "answer": "x"}
    evaluate([write("a.jsonl", [several("q", "x", [1, 3])])], write("test.json", [asked]))
    said = targets if len(targets) > 1 else 1
    with pytest.raises(DataError, match=re.escape(f"`target` is {said}, but") + r".*test\.json.*\[1, 3\]"):
        evaluate([write("b.jsonl", [several("q", "x", targets)])], write("test.json", [asked]))


def test_how_well_the_ratio_tells_right_from_wrong_by_hand(write):
    """Within two images right .9 over wrong .4, within three right .1 over .05: 1. Over all: 3 of 4. Layers differ."""
    sequences = [(2, "x", [0.2, 0.9]), (2, "y", [0.3, 0.4]), (3, "x", [0.3, 0.1]), (3, "", [0.3, 0.05])]
    lines = [
        {"text": text, "num_images": count, "attention_ratio": by_layer[1], "attention_ratio_by_layer": by_layer}
        for count, text, by_layer in sequences
    ]
    lines += [
        {"text": "x", "num_images": 1, "attention_ratio": 0.5, "image_type": "pip"},
        {"text": "y", "num_images": 1, "attention_ratio": 1.0, "image_type": "single"},
        {"text": "y", "num_images": 2},  # without a ratio
    ]
    same = {"answer": "x", "image_type": "sequence", "target": 1}
    lines = [same | {"question_id": str(number)} | line for number, line in enumerate(lines)]
    scores = evaluate([write("a.jsonl", lines)])
    found = scores["answers"]["a"]["ratio_auc"]
    assert list(found) == ["overall", "sequence", "pip"]
    assert found["sequence"] == {"right": 2, "other": 2, "auc": 1.0, "by_layer": [0.25, 1.0]}
    assert found["pip"] == {"right": 1, "other": 0, "auc": None, "by_layer": []}
    assert found["overall"] == {"right": 3, "other": 2, "auc": 1.0, "by_layer": []}
    table = markdown(scores)
    assert "| ratio tells right from wrong, AUC, sequence | 1.000 |" in table
    assert "| ratio tells right from wrong, AUC, pip | - |" in table


def test_without_questions_only_what_is_answered_counts(write):
    overall = evaluate([write("a.jsonl", ANSWERS)])["answers"]["a"]["overall"]
    assert (overall["questions"], overall["missing"]) == (5, 0)


def test_two_files_are_compared_on_the_same_questions(write):
    """The second has q1, q2, q3 right, q5 wrong, and alone answers q6 (wrong): 3 of 6 against 2 of 6."""
    second = [answered(QUESTIONS[n], text) for n, text in ((0, "red"), (1, "red"), (2, "green"), (4, "no"), (5, "x"))]
    scores = evaluate([write("base.jsonl", ANSWERS), write("tuned.jsonl", second)])
    assert [scores["answers"][name]["overall"]["missing"] for name in ("base", "tuned")] == [1, 1]
    (found,) = scores["comparisons"]
    assert (found["first"], found["second"], found["questions"]) == ("base", "tuned", 6)
    assert found["difference"] == pytest.approx(1 / 6) and found["low"] <= 0 < found["high"]
    assert (found["only_first_right"], found["only_second_right"]) == (1, 2)
    assert found["mcnemar_p"] == 1.0


def test_questions_without_a_right_answer_are_not_scored(write):
    """Counted and named; where no question has one, there is nothing to score."""
    keyless = {name: value for name, value in QUESTIONS[1].items() if name != "answer"}
    asked = [QUESTIONS[0], keyless, QUESTIONS[3] | {"answer": None}]
    given = [answered(QUESTIONS[0], "red"), answered(keyless, "x"), answered(QUESTIONS[3], "y", answer=None)]
    scores = evaluate([write("a.jsonl", given)], write("test.json", asked))
    assert scores["without_answer"] == ["q2", "q4"] and scores["answers"]["a"]["overall"]["questions"] == 1
    assert "Left out of all scores: 2 questions, because nobody says what is right (q2, q4;" in markdown(scores)
    with pytest.raises(ValueError, match="no question has a right answer"):
        evaluate([write("a.jsonl", given[1:])])
    with pytest.raises(DataError, match="`answer` is empty"):
        evaluate([write("a.jsonl", given)], write("test.json", [QUESTIONS[0] | {"answer": " "}]))


def test_accuracy_by_part_of_the_test_set(write):
    """As the record calls it: `category`, or `subtask` or `sub_task` of its own."""
    parts = [{"category": "Art"}, {"sub_task": "Art"}, {"subtask": "Count"}, {}, {"category": 3}, {"category": "Count"}]
    asked = [question | part for question, part in zip(QUESTIONS, parts, strict=True)]
    found = evaluate([write("a.jsonl", ANSWERS)], write("test.json", asked))["answers"]["a"]["by_category"]
    assert {name: (own["questions"], own["accuracy"]) for name, own in found.items()} == {
        "Art": (2, 0.5), "Count": (2, 0.0)
    }  # fmt: skip
    alone = evaluate([write("a.jsonl", [a | part for a, part in zip(ANSWERS, parts, strict=False)])])
    assert alone["answers"]["a"]["by_category"]["Art"]["questions"] == 2
    assert "| Count | 2 | 0.0 [" in markdown(evaluate([write("a.jsonl", ANSWERS)], write("test.json", asked)))


def test_what_is_too_long_for_the_model_is_counted(write):
    scores, rows = command.evaluate([write("a.jsonl", [*ANSWERS[:3], answered(QUESTIONS[3], "red", is_too_long=True)])])
    assert scores["answers"]["a"]["overall"]["too_long"] == 1
    assert "| too long | 1 |" in markdown(scores)
    assert "Too long: prompt and answer have more tokens" in report(scores, rows)


def test_a_collage_whose_grid_was_read_off_its_size_has_its_chance(write):
    """The test set has no grid; the answers say what it was."""
    record = {"id": "c", "image": ["c.jpg"], "prompt": "<image>\nIn Image3, what?", "answer": "red"}
    given = {"question_id": "c", "text": "red", "answer": "red", "image_type": "collage", "target": 3, "num_images": 4}
    given |= {"grid": [2, 2], "attention_by_image": [0.1, 0.2, 0.4, 0.3], "attention_ratio": 0.4}
    found = evaluate([write("a.jsonl", [given])], write("test.json", [record]))["answers"]["a"]
    assert found["overall"]["chance"] == 0.25 and list(found["by_num_images"]) == ["4"]
    assert found["looked_answered"]["judged_by"]["argmax"] == 1


def test_order_of_the_lines_changes_nothing(write):
    questions = write("test.json", QUESTIONS)
    one, two = (evaluate([write("a.jsonl", lines)], questions) for lines in (ANSWERS, ANSWERS[::-1]))
    assert one == two


def test_choices_and_free_text_in_one_file(write):
    asked = question("m1", choices=["red", "blue"])
    free = question("m2")
    lines = [answered(asked, "The answer is (A)."), answered(free, "red")]
    assert evaluate([write("a.jsonl", lines)])["answers"]["a"]["scorers"] == {"choice": 1, "exact": 1}
    by_contains = evaluate([write("a.jsonl", lines)], scorer="contains")["answers"]["a"]["overall"]
    assert (by_contains["right"], by_contains["wrong"]) == (1, 1)


WENT = {
    "lmms_eval": "lmms-eval --model attention_aware (docs/harnesses.md)",
    "lmms_eval_blink": "lmms-eval --model attention_aware (docs/harnesses.md)",
    "vlmevalkit": "interchange export --to vlmevalkit",
}


@pytest.mark.parametrize(("scorer", "where"), WENT.items())
def test_a_scorer_of_another_harness_says_where_it_went(write, tmp_path, capsys, scorer, where):
    arguments = ["--answers", write("a.jsonl", ANSWERS), "--output", tmp_path / "out", "--scorer", scorer]
    with pytest.raises(SystemExit) as caught:
        main(list(map(str, arguments)))
    error = capsys.readouterr().err
    assert caught.value.code == 2 and error.count("\n") == 1
    assert where in error


@pytest.mark.parametrize("scorer", ["auto", "choice"])
def test_a_wrong_letter_can_be_true_of_another_image(write, scorer):
    lines = [answered(question(f"m{n}", choices=["red", "blue", "pink"]), text) for n, text in enumerate("BCA")]
    found = evaluate([write("a.jsonl", lines)], scorer=scorer)["answers"]["a"]["confusion"]
    assert (found["wrong"], found["true_of_another"], found["chance"]) == (2, 1, 0.5)


def test_other_formats(write):
    """A pic-in-pic has two regions, a single image none to choose from, a collage its grid's cells."""
    lines = [
        {"question_id": "p", "image_type": "pip", "num_images": 1, "attention_ratio": 0.6},
        {"question_id": "s", "image_type": "single", "num_images": 1, "attention_ratio": 1.0},
        {"question_id": "c", "image_type": "collage", "num_images": 4, "target": 3, "attention_ratio": 0.3},
        {"question_id": "d", "image_type": "collage", "num_images": 1, "target": 2, "attention_ratio": 0.9},
    ]
    base = evaluate([write("a.jsonl", [{"text": "x", "answer": "x"} | line for line in lines])])["answers"]["a"]
    assert base["looked_answered"]["looked_right_answered_right"] == 2
    assert base["looked_answered"]["judged_by"] == {"argmax": 0, "ratio": 2, "unknown": 2}
    assert list(base["by_format"]) == ["collage", "pip", "single"]
    assert list(base["by_num_images"]) == ["4", "unknown"]
    assert list(base["by_position"]["collage"]) == ["Image2", "Image3"]
    assert base["confusion"] is None


# ---- bad files


def test_other_fields_of_an_answer_are_kept(write):
    (answer,) = read_answers(write("a.jsonl", [ANSWERS[0] | {"confidence": 0.5, "scale": 1.0}]))
    assert answer.extra == {"confidence": 0.5, "scale": 1.0, "prompt": SEQUENCE.format(1)}


def refusal(*args, **kwargs):
    with pytest.raises(DataError) as caught:
        evaluate(*args, **kwargs)
    return caught.value.problems


def test_an_id_twice(write):
    problems = refusal([write("a.jsonl", [*ANSWERS, ANSWERS[1]])])
    assert len(problems) == 1 and "a.jsonl record 6 (id q2): q2 was there before" in problems[0]
    assert "test.json record 7 (id q1)" in refusal(
        [write("a.jsonl", ANSWERS)], write("test.json", [*QUESTIONS, QUESTIONS[0]])
    )[0]  # fmt: skip


def test_an_unknown_id(write):
    problems = refusal([write("a.jsonl", [*ANSWERS, answered(question("new"), "red")])], write("t.json", QUESTIONS))
    assert len(problems) == 1 and "a.jsonl record 6 (id new): the question new is not in" in problems[0]


def test_an_answer_to_another_version_of_the_test_set(write):
    changed = [QUESTIONS[0] | {"answer": "blue"}, *QUESTIONS[1:]]
    (problem,) = refusal([write("a.jsonl", ANSWERS)], write("test.json", changed))
    assert "a.jsonl record 1 (id q1): `answer` is 'red'" in problem and "test.json record 1" in problem


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": None}, "`text` must be text"),
        ({"answer": ""}, "`answer` is empty"),
        ({"image_type": "video"}, "image_type 'video' is none of"),
        ({"target": 0}, "Image0 does not exist"),
        ({"target": 3}, "Image3 does not exist"),
        ({"num_images": "2"}, "`num_images` must be a whole number from 1"),
        ({"attention_ratio": 1.5}, "`attention_ratio` must be between 0 and 1"),
        ({"attention_ratio": float("nan")}, "`attention_ratio` must be between 0 and 1"),
        ({"attention_by_image": [0.5]}, "1 shares for 2 images"),
        ({"choices": ["red", ""]}, "`choices` must be a list of texts"),
        ({"others": "blue"}, "`others` must be a list of texts"),
    ],
)
def test_bad_fields_are_named(write, change, message):
    with pytest.raises(DataError) as caught:
        read_answers(write("a.jsonl", [ANSWERS[1], ANSWERS[0] | change]))
    assert "a.jsonl record 2 (id q1): " in str(caught.value) and message in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "the file is empty"),
        (json.dumps(ANSWERS[0]) + '\n{"question_id": "q', "line 2"),
        ("[]", "no record"),
        ("[1]", "object"),
    ],
)
def test_bad_files_are_named(write, content, message):
    with pytest.raises(ValueError, match=message):
        read_answers(write("a.jsonl", content))


def test_a_true_answer_outside_the_choices_names_the_record(write):
    with pytest.raises(ValueError, match=r"a\.jsonl record 1 \(id m1\): multiple choice: the true answer 'red'"):
        evaluate([write("a.jsonl", [answered(question("m1", choices=["pink", "blue"]), "A")])])


# ---- the command


def test_the_command_writes_both_files(write, tmp_path):
    paths = [write("answers_base.jsonl", ANSWERS), write("answers_tuned.jsonl", ANSWERS[:3])]
    questions = write("test.json", QUESTIONS)
    main(["--answers", *map(str, paths), "--questions", str(questions), "--output", str(tmp_path / "new" / "out")])
    scores = json.loads((tmp_path / "new/out/scores.json").read_text())
    assert scores["answers"]["tuned"]["overall"]["missing"] == 3
    table = (tmp_path / "new/out/scores.md").read_text()
    assert "| all | 6 | 33.3 [" in table and "| Image2 | 3 |" in table
    assert (
        "| missing | 1 | 3 |" in table
        and "| where it looked is unknown | 1 | 3 |" in table
        and "| tuned - base, all | 6 | -16.7 [" in table
    )
    rows = [line for line in table.splitlines() if line.startswith("|")]
    assert all(line.endswith("|") for line in rows)


@pytest.mark.parametrize(
    "arguments",
    [["--answers", "none.jsonl"], ["--answers", "{a}", "{a}"], ["--answers", "{a}", "--questions", "{a}"]],
    ids=["no such file", "a file twice", "answers as questions"],
)
def test_bad_input_is_one_line_and_exit_code_2(write, tmp_path, capsys, arguments):
    path = str(write("a.jsonl", ANSWERS))
    with pytest.raises(SystemExit) as caught:
        main([*(word.format(a=path) for word in arguments), "--output", str(tmp_path / "out")])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_output_that_is_a_file(write, capsys):
    path = str(write("a.jsonl", ANSWERS))
    with pytest.raises(SystemExit):
        main(["--answers", path, "--output", path])
    assert "give a folder" in capsys.readouterr().err
