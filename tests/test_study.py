"""The study: its plan, going on after a kill, and its statistics against numbers made by hand."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import inference_optimization.llava_hound_dpo.tune as tune
from inference_optimization.llava_hound_dpo.run_adaptive import add_adaptviz_arguments
from llava.answering import add_arguments
from llava.records import DataError, read_preferences
from scripts.miniature.study import pairs, running, statistics
from scripts.miniature.study.__main__ import CONFIG, chosen
from scripts.miniature.study.config import parse_config, read_config
from scripts.miniature.study.running import BEGUN, FINISHED, Runner, UnitFailed, is_finished, lock, refuse_others
from scripts.miniature.study.steered import make_pairs
from scripts.miniature.study.units import Unit, all_units, plan
from scripts.miniature.world import ATTRIBUTES
from train.llava_hound_dpo.arguments import parse

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def config():
    return read_config(ROOT / CONFIG)


@pytest.fixture(scope="module")
def units(config):
    rates = {config.root(arm).name: 5e-4 for arm in config.arms.values() if arm.pairs}
    return {unit.name: unit for unit in plan(config, rates, "base")}


# ---- statistics


def test_t_quantiles_are_those_of_the_tables():
    found = [statistics.t_quantile(degrees) for degrees in (1, 2, 4, 9, 30)]
    assert found == pytest.approx([12.7062, 4.3027, 2.7764, 2.2622, 2.0423], abs=2e-4)


def test_the_interval_over_seeds_is_students():
    found = statistics.seed_interval([1.0, 2.0, 3.0])  # standard deviation 1
    assert (found.mean, found.low, found.high) == pytest.approx((2, 2 - 4.3027 / 3**0.5, 2 + 4.3027 / 3**0.5), abs=1e-4)
    assert statistics.seed_interval([0.5]) == statistics.Interval(0.5, None, None)


def test_every_format_weighs_the_same():
    scores = np.array([[1, 1, 1, 0.0, 0], [1, 0, 0, 1, 1]])
    formats = np.array(["sequence"] * 3 + ["pip"] * 2)
    assert statistics.mean_of_groups(scores, formats) == pytest.approx([0.5, (1 / 3 + 1) / 2])


def test_resampled_questions_have_the_binomial_error():
    scores, formats = np.repeat([[0.0, 1.0]], 50, axis=1).reshape(1, 100), np.array(["sequence"] * 100)
    (draws,) = statistics.resampled([scores], formats, 4000)
    assert draws.mean() == pytest.approx(0.5, abs=0.005) and draws.std() == pytest.approx(0.05, abs=0.003)


def test_resampled_seeds_have_the_error_of_the_seeds():
    """All questions of a seed alike: only seeds are uncertain, by std / sqrt(S) with the divisor S."""
    scores = np.array([[0.0] * 10, [1.0] * 10])
    (draws,) = statistics.resampled([scores], np.array(["pip"] * 10), 4000)
    assert set(np.round(draws, 6)) == {0.0, 0.5, 1.0} and draws.std() == pytest.approx(0.5 / 2**0.5, abs=0.02)


def test_comparisons_are_paired_by_question():
    rng = np.random.default_rng(0)
    first = (rng.random((3, 200)) < 0.5).astype(float)
    second = first.copy()
    second[:, :20] = 1.0  # gains on the same questions in every seed
    found = statistics.compare(first, second, np.array(["collage"] * 200), 2000)
    gain = (second - first).mean()
    assert found.over_seeds.mean == pytest.approx(gain)
    assert 0 < found.low < gain < found.high < gain + 0.05 and found.p < 0.01
    assert found.relative.mean == pytest.approx(second.mean() / first.mean() - 1)
    same = statistics.compare(first, first, np.array(["collage"] * 200), 500)
    assert (same.low, same.high, same.p) == (0, 0, 1)


# ---- the plan


def test_every_unit_comes_after_its_inputs(units):
    seen = set()
    for unit in units.values():
        assert set(unit.inputs) <= seen, unit.name
        seen.add(unit.name)


def test_all_arms_have_the_same_steps_batch_and_grid(config, units):
    trained = [parse(unit.commands[0][2:]) for unit in units.values() if unit.kind == "train"][::9]
    assert {(args.max_steps, args.per_device_train_batch_size) for *_, args in trained} == {
        (config.steps, config.batch)
    }
    for name in {config.root(arm).name for arm in config.arms.values() if arm.pairs}:
        assert {f"validate/{name}/{rate:g}" for rate in config.learning_rates} <= set(units)


def test_a_varied_arm_trains_at_the_rate_of_its_origin_with_its_flags(config, units):
    origin, varied = (units[f"train/{name}/0.0005/seed_0"].commands[0] for name in ("dpo_attention", "dpo_tau_90"))
    differing = {(a, b) for a, b in zip(origin, varied, strict=True) if a != b}
    assert differing == {("0.75", "0.9")}


def test_no_test_question_is_answered_before_the_rate_is_chosen(config):
    names = {unit.name for unit in plan(config, {}, "base")}
    assert {name for name in names if name.startswith("test/")} == {"test/base/seed_0"}
    assert len(all_units(config, dict.fromkeys(config.arms), "base")) > len(names)
    validating = [unit for unit in plan(config, {}, "base") if unit.kind in ("validate", "tune", "heads")]
    assert validating and not any(
        "data/test.json" in word for u in validating for words in u.commands for word in words
    )


def test_what_is_confirmed_differs_from_what_was_tested_in_seeds_and_questions_only(units):
    confirming = [name for name in units if name.startswith("confirm/")]
    assert len(confirming) == 51  # the base, and five arms of ten seeds
    for name in confirming:
        known = name.replace("confirm", "test").replace(name.split("_")[-1], "0")
        asked, tested = (units[own].commands[0] for own in (name, known))
        data = {(f"{{output}}/data/{own}", f"{{output}}/fresh/{own}") for own in ("test.json", "images")}
        others = {(a, b.replace(name.split("/")[-1], "seed_0")) for a, b in zip(tested, asked, strict=True) if a != b}
        assert {pair for pair in others if pair[0] != pair[1]} == data


@pytest.mark.parametrize(
    ("confirm", "message"),
    [
        ({"seeds": [4, 5], "data_seed": 1, "num_test": 8}, r"the study itself uses \[0"),
        ({"seeds": [5], "data_seed": 0, "num_test": 8}, r"the study itself uses \[0"),
        ({"seeds": [5], "num_test": 8}, "data_seed"),
        (None, "there is no entry `confirm`"),
    ],
)
def test_what_is_confirmed_uses_nothing_that_was_seen(config, confirm, message):
    with pytest.raises((KeyError, ValueError), match=message):
        parse_config({**config.raw, "confirm": confirm})


def test_what_is_upstream_changes_the_identity_of_what_is_below(config, units):
    raw = {**config.raw, "data": {**config.raw["data"], "num_single": 8}}
    changed = {unit.name: unit for unit in plan(parse_config(raw), dict.fromkeys(config.arms, 5e-4), "base")}
    assert changed["test/dpo/seed_0"].commands == units["test/dpo/seed_0"].commands
    assert changed["test/dpo/seed_0"].identity != units["test/dpo/seed_0"].identity


def test_only_keeps_what_the_arm_needs(config):
    few = plan(chosen(config, ["dpo_tau_90"]), {"dpo_attention": 5e-4}, "base")
    models = {unit.name.split("/")[1] for unit in few if unit.kind in ("train", "test")}
    assert models == {"base", "dpo_attention", "dpo_tau_90"}
    assert not any(unit.name.startswith("test/dpo_attention/") for unit in few)
    with pytest.raises(ValueError, match="no such arm or group"):
        chosen(config, ["dop"])


def test_answering_flags_exist(units):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    add_adaptviz_arguments(parser)
    known = {option for action in parser._actions for option in action.option_strings}
    commands = [words for unit in units.values() for words in unit.commands]
    for words in commands:
        if words[1].endswith(("run_inference", "run_adaptive")):
            assert {word for word in words[2:] if word.startswith("--")} <= known


def test_tuning_flags_exist(units, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["tune", *units["tune/base"].commands[0][2:]])
    assert tune.parse_args().share == 0.8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"flags": {"attention_wieght": 1}}, "did you mean 'attention_weight'"),
        ({"like": "nobody"}, "no arm before it"),
        ({"pairs": "nothing"}, "is none of other_image"),
        ({"lable": "x"}, "did you mean 'label'"),
    ],
)
def test_a_wrong_arm_is_named(config, change, message):
    arms = {**config.raw["arms"], "new": {"pairs": "other_image", **change}}
    with pytest.raises(ValueError, match=message) as error:
        parse_config({**config.raw, "arms": arms})
    assert "arms.new" in str(error.value)


def test_an_arm_whose_flag_does_not_exist_is_left_out_with_its_reason_if_optional(config):
    arm = {"pairs": "other_image", "flags": {"attention_colour": "red"}, "optional": True}
    found = parse_config({**config.raw, "arms": {**config.raw["arms"], "new": arm}})
    assert "new" not in found.arms and "--attention_colour" in found.left_out["new"]


def test_the_shipped_config_leaves_out_at_most_what_is_optional(config):
    assert all(config.raw["arms"][name]["optional"] for name in config.left_out)


# ---- pairs


def record(image_type, **more):
    return {"image_type": image_type, "prompt": "p", "chosen": "red", "rejected": "blue", "target": 2, **more}


def test_a_steered_pair_prefers_the_steered_answer_and_never_looks_at_the_true_one():
    asked = {"id": "a", "prompt": "p", "answer": "red", "others": ["blue", "green"], "image_type": "sequence"}
    records = [asked, asked | {"id": "b"}, asked | {"id": "c", "others": ["red"]}]
    plain = {"a": "blue", "b": "green", "c": "red"}
    steered = {"a": "red", "b": "green", "c": "red"}
    found, counts = make_pairs(records, plain, steered, np.random.default_rng(0))
    assert [(pair["chosen"], pair["rejected"]) for pair in found[:2]] == [("red", "blue"), ("green", "blue")]
    assert found[2]["chosen"] == "red" and found[2]["rejected"] in set(ATTRIBUTES["colour"]) - {"red"}
    assert not any({"answer", "others"} & set(pair) for pair in found)
    assert counts == {"pairs": 3, "changed": 1, "chosen_true": 2, "rejected_true": 0}
    with pytest.raises(DataError, match="b: no answer"):
        make_pairs(records, plain, {"a": "red"}, np.random.default_rng(0))


@pytest.mark.parametrize(
    "before",
    [
        record("sequence", image=["a", "b", "c"], target_box=[0, 0, 72, 72]),
        record("collage", image=["a"], target_box=[36, 0, 72, 36], grid=[2, 2]),
        record("pip", image=["a"], target=1, target_box=[11, 11, 61, 61]),
    ],
)
def test_a_shuffled_target_is_another_region_and_nothing_else_changes(before):
    rng = np.random.default_rng(0)
    for _ in range(20):
        after = pairs.with_another_target(before, rng)
        assert {name for name in before if before[name] != after[name]} <= {"target", "target_box"}
        assert after != before
        if before["image_type"] != "sequence":
            boxes = [(record["target_box"][0::2], record["target_box"][1::2]) for record in (before, after)]
            (x0, y0), (x1, y1) = boxes
            assert x0[1] <= x1[0] or x1[1] <= x0[0] or y0[1] <= y1[0] or y1[1] <= y0[0]


def test_pairs_are_cut_joined_and_still_read(tmp_path, monkeypatch):
    make = [sys.executable, "-m", "scripts.miniature.make_data", "--output", str(tmp_path), "--num_train", "9"]
    sizes = ["--num_test", "4", "--num_single", "3", "--rejected", "random"]
    subprocess.run([*make, *sizes], cwd=ROOT, check=True, capture_output=True)
    words = ["--pairs", tmp_path / "train.json", "--num_pairs", 6, "--single", tmp_path / "single.json"]
    words += ["--num_single", 2, "--shuffle_targets", "--output", tmp_path / "set"]
    monkeypatch.setattr(sys, "argv", ["pairs", *map(str, words)])
    pairs.main()
    found = read_preferences(tmp_path / "set/train.json")
    assert [p.image_type for p in found] == ["sequence", "collage", "pip"] * 2 + ["single"] * 2
    monkeypatch.setattr(sys, "argv", ["pairs", *map(str, [*words, "--num_pairs", 10])])
    with pytest.raises(SystemExit):
        pairs.main()


# ---- running


def python(code):
    return ("-c", code)


def unit(name, code, inputs=(), identity="1"):
    return Unit(name, "pairs", (python(code),), inputs, {"commands": [["-c", code]], "inputs": {}, "base": identity})


COUNT = "open(r'{own}/count', 'a').write('x')"


@pytest.fixture
def runner(tmp_path):
    def start(units, jobs=1):
        with lock(tmp_path) as held:
            Runner(tmp_path, jobs, units, {}, held).run(units)

    return start


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_failed_study_goes_on_where_it_was(runner, tmp_path, jobs):
    gate = tmp_path / "gate"
    needs_gate = f"import pathlib, sys; pathlib.Path(r'{gate}').exists() or sys.exit('no gate')"
    units = [unit("a", COUNT), unit("b/c", needs_gate, ("a",)), unit("d", COUNT, ("b/c",))]
    with pytest.raises(UnitFailed, match="no gate"):
        runner(units, jobs)
    assert is_finished(tmp_path, "a") and not is_finished(tmp_path, "b/c") and not (tmp_path / "d").exists()
    gate.touch()
    runner(units, jobs)
    runner(units, jobs)
    assert [(tmp_path / name / "count").read_text() for name in "ad"] == ["x", "x"]
    assert json.loads((tmp_path / "d" / FINISHED).read_text())["seconds"] >= 0


def test_a_unit_of_another_configuration_is_refused(runner, tmp_path):
    runner([unit("a", COUNT)])
    refuse_others(tmp_path, [unit("a", COUNT)])
    with pytest.raises(ValueError, match=r"another configuration.*the base's weights differ.*another --output"):
        refuse_others(tmp_path, [unit("a", COUNT, identity="2")])
    with pytest.raises(ValueError, match=r"-c: .* there, 1 here"):
        refuse_others(tmp_path, [unit("a", "1")])


def test_a_folder_has_one_study_at_a_time(tmp_path):
    with lock(tmp_path), pytest.raises(ValueError, match="is at work there"):
        lock(tmp_path)
    lock(tmp_path).close()


def test_the_budget_counts_measured_time_before_assumed(runner, tmp_path):
    units = [unit("a", COUNT), unit("b", COUNT)]
    assert running.budget(tmp_path, units, {"pairs": 90}).endswith("= 3 min on one core; 0 finished, 3 min left")
    runner(units[:1])
    (tmp_path / "a" / FINISHED).write_text(json.dumps({"seconds": 3600, "git_commit": "x"}))
    assert running.budget(tmp_path, units, {"pairs": 90}).endswith(
        "= 2 h 00 min on one core; 1 finished, 1 h 00 min left"
    )


# ---- the real thing


@pytest.mark.slow
def test_a_quick_study_killed_and_started_again(tmp_path):
    """Killed hard while it trains; the same command goes on, and dead knobs leave the adapter's bytes alone."""
    command = [sys.executable, "-m", "scripts.miniature.study", "--quick", "--output", str(tmp_path)]
    job = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob(f"train/*/*/*/{BEGUN}")):
        assert job.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    os.kill(job.pid, signal.SIGKILL)
    job.wait()
    while not _is_free(tmp_path):  # the training that it had started ends by itself
        assert time.monotonic() < deadline
        time.sleep(0.5)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["finished"]["finished"] == results["finished"]["units"]
    assert [own["is_same"] for own in results["sanity"]] == [True]
    assert [(own["first"][0], own["second"][0], len(own["seeds"])) for own in results["confirmed"]] == [
        ("base", "dpo", 1)
    ]  # fmt: skip
    assert results["arms"]["base"]["ways"].keys() == {"plain", "adaptviz", "adaptviz_tuned"}
    assert all(len(results["arms"][name]["seeds"]) == 2 for name in ("dpo", "dpo_attention"))
    full = subprocess.run([w for w in command if w != "--quick"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert full.returncode == 2 and "was made with another configuration" in full.stderr


def _is_free(folder):
    try:
        lock(folder).close()
    except ValueError:
        return False
    return True
