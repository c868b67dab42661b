"""What the study reports, from unit folders made by hand whose numbers are known."""

import json

import pytest

from inference.llava_hound_dpo.evaluate import evaluate
from scripts.miniature.study import publish
from scripts.miniature.study.__main__ import Study, main
from scripts.miniature.study.config import parse_config
from scripts.miniature.study.results import choose_rates, metrics
from scripts.miniature.study.running import FINISHED
from tests.test_report import Page

QUESTIONS = [
    {"id": f"q{number}", "image": ["a.png", "b.png"][: 2 if kind == "sequence" else 1], "image_type": kind,
     "prompt": "<image>" * (2 if kind == "sequence" else 1) + "In Image2, what?", "answer": "red", "others": others,
     **({} if kind == "single" else {"target": 2}), **({"grid": [1, 2]} if kind == "collage" else {})}
    for number, (kind, others) in enumerate(
        [("sequence", ["blue"])] * 4 + [("collage", ["blue"])] * 2 + [("single", [])] * 2)
]  # fmt: skip
HOSTILE = "<script>alert(1)</script>"
TINY = {
    "base": "scripts/miniature/base",
    "data": {"num_pairs": 1, "num_test": 8, "num_instructions": 1, "num_single": 0, "num_validation": 8, "seed": 0},
    "steps": 2, "batch": 1, "training": {}, "answering": {}, "tune": {}, "selection": {},
    "confirm": {"seeds": [7, 8], "data_seed": 1, "num_test": 8}, "heads": {},
    "learning_rates": [1e-3, 2e-3], "seeds": [0, 1], "ablation_seeds": [0], "seconds": {},
    "pair_sets": {"other_image": {"source": "other_image"}},
    "arms": {
        "base": {"seeds": [0]},
        "sft": {"label": HOSTILE, "pairs": "other_image", "confirm": True, "flags": {"dpo_alpha": 0, "gamma": 1}},
        "dpo": {"label": "DPO", "pairs": "other_image", "confirm": True, "flags": {"dpo_alpha": 1}},
        "dpo_tau": {"label": "DPO, τ", "group": "threshold", "like": "dpo"},
        "sft_same": {"label": "SFT again", "group": "sanity", "like": "sft", "same_as": "sft", "seeds": [0]},
    },
}  # fmt: skip
TEXTS = {"1": "red", "0": "blue", "e": "Red red red"}  # right, wrong, right but without an end
RIGHT = {  # of the eight questions
    "test/base/seed_0": "1100 10 11", "test/sft/seed_0": "1111 1e 11", "test/sft/seed_1": "1110 10 11",
    "test/dpo/seed_0": "1111 11 10", "test/dpo_tau/seed_0": "0000 00 00",
    "validate/sft/0.001": "1111 11 11", "validate/sft/0.002": "1111 11 00",  # single images do not count: equal
    "confirm/sft/seed_7": "1111 00 11", "confirm/sft/seed_8": "1111 11 11", "confirm/dpo/seed_7": "1100 00 11",
    "validate/dpo/0.001": "1000 00 11", "validate/dpo/0.002": "1100 00 11",
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Config and folder of a study whose units were written by hand, dpo's second seed not finished."""
    output = tmp_path_factory.mktemp("study")
    for folder in ("data", "fresh"):
        (output / folder).mkdir()
        (output / folder / "test.json").write_text(json.dumps(QUESTIONS))
    for name, right in RIGHT.items():
        write_answers(output / name, right.replace(" ", ""), output / "data/test.json")
    for name, margin in (("sft/0.001/seed_0", None), ("sft/0.001/seed_1", None), ("sft_same/0.001/seed_0", None),
                         ("dpo/0.002/seed_0", 0.5), ("dpo_tau/0.002/seed_0", 0.25)):  # fmt: skip
        write_training(output / "train" / name, margin)
    (output / "config.json").write_text(json.dumps(TINY))
    return output


def write_answers(folder, right, questions):
    folder.mkdir(parents=True)
    rows = [
        {"question_id": q["id"], "text": TEXTS[ok], "attention_ratio": 0.6,
         "num_images": 1 if q["image_type"] == "single" else 2,
         "attention_by_image": [1.0] if q["image_type"] == "single" else [0.4, 0.6],
         **{name: q[name] for name in ("answer", "image_type", "others", "target") if name in q}}
        for q, ok in zip(QUESTIONS, right, strict=True)
    ]  # fmt: skip
    (folder / "plain.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "scores.json").write_text(json.dumps(evaluate([folder / "plain.jsonl"], questions)))
    (folder / FINISHED).write_text('{"seconds": 1, "git_commit": "abc"}')


def write_training(folder, margin):
    (folder / "adapter").mkdir(parents=True)
    logs = [{"step": n, "loss": 1.0, "attention/ratio": 0.7, "losses/sft": 0.5} for n in (1, 2)]
    logs = [log | ({} if margin is None else {"rewards/margins": margin * log["step"]}) for log in logs]
    (folder / "adapter/trainer_state.json").write_text(json.dumps({"log_history": [*logs, {"step": 2}]}))
    (folder / "adapter/adapter_model.safetensors").write_bytes(b"weights")
    (folder / FINISHED).write_text('{"seconds": 1, "git_commit": "abc"}')


@pytest.fixture(scope="module")
def results(finished):
    Study(parse_config(TINY), finished, "base").report()
    return json.loads((finished / "results.json").read_text())


def test_the_learning_rate_is_the_best_on_validation_and_the_smaller_of_equals(finished):
    assert choose_rates(parse_config(TINY), finished) == {"sft": 1e-3, "dpo": 2e-3}


def test_a_rate_is_not_chosen_before_all_are_in(tmp_path, finished):
    (tmp_path / "validate/sft").mkdir(parents=True)
    (tmp_path / "validate/sft/0.001").symlink_to(finished / "validate/sft/0.001")
    assert choose_rates(parse_config(TINY), tmp_path) == {"sft": None, "dpo": None}


def test_numbers_of_an_arm_are_those_made_by_hand(results):
    sft = results["arms"]["sft"]["ways"]["plain"]
    assert sft["mean"]["values"] == [0.75, 0.625]  # (4/4 + 1/2) / 2 and (3/4 + 1/2) / 2
    half = 12.7062 * (0.125 / 2**0.5) / 2**0.5
    assert (sft["mean"]["low"], sft["mean"]["high"]) == pytest.approx((0.6875 - half, 0.6875 + half), abs=1e-4)
    assert sft["format/single"]["mean"] == 1 and sft["position/collage, Image2"]["mean"] == 0.5
    assert sft["images/2"]["values"] == pytest.approx([5 / 6, 4 / 6])
    assert sft["looked_right_answered_right"]["values"] == pytest.approx([5 / 6, 4 / 6])
    assert sft["confusion"]["values"] == [0, 1] and sft["ratio"]["mean"] == pytest.approx(0.6)
    assert sft["begins"]["values"] == [1.0, 0.625]  # one of the first seed's wrong answers only has no end
    assert "rewards/margins" not in results["arms"]["sft"]["training"]
    assert results["arms"]["dpo"]["training"]["rewards/margins"]["mean"] == 1.0  # of the last logged step


def test_an_unfinished_seed_is_left_out_and_said(results):
    assert results["arms"]["dpo"]["seeds"] == [0]
    assert results["finished"]["finished"] < results["finished"]["units"]


def test_comparisons_are_paired_and_relative_to_the_base(results):
    found = {(c["first"][0], c["second"][0]): c for c in results["comparisons"]}
    assert set(found) == {("base", "sft"), ("base", "dpo"), ("sft", "dpo"), ("base", "dpo_tau"), ("dpo", "dpo_tau")}
    base = found["base", "sft"]["mean"]
    assert base["over_seeds"]["mean"] == pytest.approx(0.6875 - 0.5)
    assert base["relative"]["mean"] == pytest.approx(0.375)
    assert found["sft", "dpo"]["seeds"] == [0]
    assert found["sft", "dpo"]["mean"]["over_seeds"]["mean"] == pytest.approx(0.25)
    assert found["sft", "dpo"]["mean"]["begins"]["mean"] == 0
    assert found["sft", "dpo"]["single"]["over_seeds"]["mean"] == pytest.approx(-0.5)
    assert found["dpo", "dpo_tau"]["mean"]["relative"]["mean"] == -1


def test_fresh_seeds_are_compared_apart_and_shown(results, finished):
    (found,) = results["confirmed"]  # the base was not asked, dpo's second seed is not there
    assert (found["first"], found["second"], found["seeds"]) == (["sft", "plain"], ["dpo", "plain"], [7])
    assert found["mean"]["over_seeds"]["mean"] == pytest.approx(0.25 - 0.5)  # (2/4 + 0/2) / 2 - (4/4 + 0/2) / 2
    row = f"| DPO - {HOSTILE} | 1 | -25.0 | ["
    assert row in (finished / "results.md").read_text().split("with fresh seeds")[1].split("##")[0]
    assert "nothing had been chosen (8 questions)" in publish.block(results)


def test_adapters_that_must_be_equal_are_compared(results):
    assert [(own["arm"], own["is_same"]) for own in results["sanity"]] == [("sft_same", True)]


def test_the_page_and_the_markdown_say_the_same_and_nothing_is_loaded(finished, results):
    text = (finished / "report.html").read_text()
    page = Page(text)
    assert HOSTILE not in text and HOSTILE in page.text
    assert page.images and all(image["src"].startswith("data:image/png;base64,") for image in page.images)
    assert not [link for link in page.links if not link.startswith("data:")]
    markdown = (finished / "results.md").read_text()
    assert f"| {HOSTILE} | 0.001 | 2 | 68.8 [-10.7, 148.2] | +37.5 [" in markdown
    for table in page.tables.values():
        for row in table[1:]:
            assert all(cell in markdown for cell in row)
    assert "1.00" in next(row for row in page.tables["table_1"] if row[0] == "DPO")[-1]
    assert (finished / "figures/accuracy.png").read_bytes()[:4] == b"\x89PNG"


def test_report_only_runs_nothing_and_says_what_is_missing(finished, tmp_path, capsys):
    words = ["--config", str(finished / "config.json"), "--report_only", "--output"]
    before = (finished / "results.md").read_text()
    main([*words, str(finished)])
    assert (finished / "results.md").read_text() == before
    with pytest.raises(SystemExit):
        main([*words, str(tmp_path)])
    assert "no test answers are finished yet" in capsys.readouterr().err


def test_units_of_other_code_are_named(finished, caplog, monkeypatch):
    found = Study(parse_config(TINY), finished, "base")
    monkeypatch.setattr("scripts.miniature.study.__main__.git_commit", lambda: "abc")
    with caplog.at_level("WARNING"):
        found.check()
        assert not caplog.records
        monkeypatch.setattr("scripts.miniature.study.__main__.git_commit", lambda: "def")
        found.check()
    assert "finished units are of other code (abc). Arms of several commits are paired" in caplog.text


def test_metrics_without_attention_are_absent_and_not_zero(finished):
    scores = json.loads((finished / "test/base/seed_0/scores.json").read_text())["answers"]["plain"]
    for group in (scores["overall"], *scores["by_format"].values()):
        group["attention_ratio"] = None
    assert metrics(scores)["ratio"] is None


def test_the_readme_gets_the_tables_between_its_marks_and_keeps_the_rest(finished, results):
    readme = f"before\n{publish.START}\nold\n{publish.END}\nafter\n"
    text = publish.with_block(readme, publish.block(results))
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert f"| {HOSTILE} | 68.8 [-10.7, 148.2] | +37.5 [" in text
    assert publish.with_block(text, publish.block(results)) == text
    with pytest.raises(ValueError, match="it must have the lines"):
        publish.with_block("no marks", "text")


@pytest.mark.parametrize(
    ("arm", "control"),
    [("sft_attention", "sft"), ("dpo_attention", "dpo"), ("mixture_attention", "mixture"), ("sft_shuffled", "sft"),
     ("dpo_shuffled", "dpo"), ("dpo_heads", "dpo"), ("attention_only", None), ("sft", None), ("base", None)],
)  # fmt: skip
def test_the_readme_sets_the_term_against_the_arm_without_it(arm, control):
    shipped = publish.ROOT / publish.FOLDER / "results.json"
    arms = parse_config(json.loads(shipped.read_text(encoding="utf-8"))["config"]).arms
    assert publish.without_the_term(arms, arm) == control


def test_the_readme_says_what_the_shipped_results_say():
    shipped = publish.ROOT / publish.FOLDER / "results.json"
    readme = (publish.ROOT / publish.README).read_text(encoding="utf-8")
    assert publish.with_block(readme, publish.block(json.loads(shipped.read_text(encoding="utf-8")))) == readme
