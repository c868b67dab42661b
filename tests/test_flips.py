"""How often the order of the pictures decides: against a case worked out by hand, and what is refused."""

import json
from types import SimpleNamespace

import pytest

from inference.llava_hound_dpo.evaluate import evaluate
from inference.llava_hound_dpo.findings import markdown
from llava.order import in_other_orders
from llava.records import DataError, parse_question
from scripts.study import results
from tests.test_order import LABELS


def given(asked, text):
    """A line of an answers file, as run_inference writes it."""
    record = {"question_id": asked.id, "text": text, "answer": asked.answer, "image_type": "sequence"}
    return record | {"target": asked.target + 1, "num_images": len(asked.images), "prompt": asked.prompt} | asked.extra


@pytest.fixture
def scored(tmp_path):
    """A function from texts by question and order to the scores of a file."""
    raws = [
        {"id": f"q{n}", "image": ["a", "b", "c"], "prompt": f"{LABELS}In Image{n}, what colour?", "answer": "red"}
        for n in (1, 2, 3)
    ]
    raws.append({"id": "q4", "image": ["a", "b"], "prompt": "Image1:<image>\nImage2:<image>\nWhich image is red?",
                 "answer": "2", "target": 2})  # fmt: skip
    (tmp_path / "test.json").write_text(json.dumps(raws))
    questions = [parse_question(raw, f"test.json record {n}") for n, raw in enumerate(raws, 1)]
    every = questions + in_other_orders(questions, 3)

    def run(texts, change=lambda line: line, with_questions=True):
        lines = [change(given(own, texts[own.id])) for own in every if own.id in texts]
        (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return evaluate([tmp_path / "a.jsonl"], tmp_path / "test.json" if with_questions else None)[0]

    run.every = every
    return run


# q1 right in all three orders, q2 in one of three, q3 in none; q4, of two pictures, says "2" in both orders.
TEXTS = {"q1": "red", "q1#1": "Red.", "q1#2": "red", "q2": "red", "q2#1": "blue", "q2#2": "", "q3": "blue",
         "q3#1": "blue", "q3#2": "green", "q4": "2", "q4#1": "2"}  # fmt: skip


def test_flips_by_hand(scored):
    scores = scored(TEXTS)
    file = scores["answers"]["a"]
    found = file["order"]
    assert file["overall"]["questions"] == 4 and file["overall"]["right"] == 3  # those in the given order
    assert (found["questions"], found["always_right"], found["never_right"], found["missing"]) == (4, 1, 1, 0)
    assert found["flipped"]["mean"] == 0.5  # q2, and q4, whose "2" is Image1 when the two have changed places
    assert 0 <= found["flipped"]["low"] < 0.5 < found["flipped"]["high"] <= 1
    right = {"q1", "q1#1", "q1#2", "q2", "q4"}
    for place, own in found["by_position"].items():
        at = [question.id for question in scored.every if f"Image{question.target + 1}" == place]
        assert own["mean"] == pytest.approx(len(right & set(at)) / len(at))
    assert "| right in one and wrong in another | 0.50 [" in markdown(scores)


def test_without_other_orders_there_is_no_flip_rate(scored):
    scores = scored({name: text for name, text in TEXTS.items() if "#" not in name})
    assert scores["answers"]["a"]["order"] is None and "other orders" not in markdown(scores)


def test_orders_that_are_missing_are_counted_and_not_judged(scored):
    found = scored({name: text for name, text in TEXTS.items() if name not in ("q1", "q2#1", "q2#2")})
    order = found["answers"]["a"]["order"]
    assert (order["questions"], order["missing"]) == (3, 1) and order["flipped"]["mean"] == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"permutation": 3}, "`permutation` is of a sequence"),
        ({"permutation": {"of": "q1", "order": [1, 1, 2]}}, "`permutation` is of a sequence"),
        ({"permutation": {"of": "q1", "order": [1, 2]}}, "`permutation` is of a sequence"),
        ({"permutation": {"of": "q9", "order": [3, 1, 2]}}, "the question q9 is not in"),
        ({"permutation": {"of": "q4", "order": [3, 1, 2]}}, "cannot have its pictures in this order"),
        ({"answer": "blue"}, "`answer` is 'blue', but"),
        ({"target": 9, "num_images": 9}, "`permutation` is of a sequence"),
    ],
)
def test_an_answer_to_another_order_than_it_says_is_named(scored, change, said):
    with pytest.raises(DataError) as caught:
        scored(TEXTS, lambda line: line | (change if line["question_id"] == "q1#1" else {}))
    assert said in str(caught.value) and "(id q1#1)" in str(caught.value) and "\n" not in str(caught.value)


def test_other_orders_are_scored_with_the_test_set_only(scored):
    with pytest.raises(DataError, match=r"the question q1 is not in --questions, which other orders need"):
        scored(TEXTS, with_questions=False)


def test_a_question_that_adaptviz_was_tuned_on_is_scored_in_no_order(scored):
    found = scored(TEXTS, lambda line: line | ({"is_tuned_on": True} if line["question_id"] == "q1" else {}))
    assert found["tuned_on"] == ["q1"] and found["answers"]["a"]["order"]["questions"] == 3


def test_a_study_has_the_flip_rate_of_every_seed_and_its_scores_of_the_given_order(scored, tmp_path, monkeypatch):
    scored(TEXTS)
    monkeypatch.setattr(results, "finished", lambda output, name: True)
    for seed in (1, 2):
        (tmp_path / results.answer_name(SimpleNamespace(name="arm"), seed, "plain")).mkdir(parents=True)
        lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
        for line in lines:
            line["text"] = "red" if seed == 2 and line["question_id"] == "q2#1" else line["text"]
        path = tmp_path / results.answer_name(SimpleNamespace(name="arm"), seed, "plain") / "answers.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = SimpleNamespace(test=SimpleNamespace(file="{output}/test.json"))
    found = results.answered(config, tmp_path, SimpleNamespace(name="arm", seeds=(1, 2)), "plain")
    assert found.known.shape == (4, 2, 4) and results.numbers(found)["mean"]["values"] == (0.75, 0.75)
    assert results.numbers(found)["flipped"]["values"] == (0.5, 0.5)
