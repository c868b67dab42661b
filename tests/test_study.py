"""The study: its config, its plan, going on after a kill; a stub stands in for the launch scripts."""

import json
import multiprocessing
import shlex
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from scripts.miniature import make_data
from scripts.study.__main__ import main
from scripts.study.config import ROOT, parse_config, read_config
from scripts.study.running import FINISHED, LOG, Runner, UnitFailed, finished
from scripts.study.units import ANSWER, STEER, TRAIN, Unit, plan
from tests.stub_study import calls, refused, small, study_in, words, write
from train.llava_hound_dpo.arguments import parse

SHIPPED = ROOT / "scripts/miniature/study.json"
ENDS = ROOT / "scripts/miniature/ends.json"
PLACES = ROOT / "scripts/miniature/places.json"


@pytest.fixture
def folder(tmp_path):
    """A config with its data, and the stub that `words` runs it with."""
    return study_in(tmp_path)


# ---- the plan


@pytest.fixture(scope="module")
def shipped():
    return {unit.name: unit for unit in plan(read_config(SHIPPED), "digest")}


def test_every_unit_comes_after_its_inputs(shipped):
    seen = set()
    for unit in shipped.values():
        assert set(unit.inputs) <= seen, unit.name
        seen.add(unit.name)
    assert set(shipped["train/sft_heads/seed_0"].inputs) == {"world", "pairs", "heads"}
    assert set(shipped["answers/sft/seed_1/AdaptViz-tuned"].inputs) == {"world", "train/sft/seed_1",
                                                                        "tune/sft/AdaptViz-tuned"}  # fmt: skip


def test_what_no_arm_needs_is_not_prepared():
    names = {unit.name for unit in plan(read_config(SHIPPED, only=["sft"]), "digest")}
    assert {"world", "pairs"} <= names and not names & {"heads", "wrong_targets"}


def test_all_arms_have_the_same_steps_and_batch_and_flags_that_training_takes(shipped):
    trained = [unit.commands[0] for name, unit in shipped.items() if name.startswith("train/") and name.endswith("_0")]
    assert len(trained) == 15 and {own[0] for own in trained} == {TRAIN}
    settings = {(args.max_steps, args.per_device_train_batch_size) for own in trained for *_, args in [parse(own[1:])]}
    assert settings == {(200, 32)}


def test_the_ends_are_compared_five_ways_with_and_without_the_term():
    trained = [unit.commands[0] for unit in plan(read_config(ENDS), "digest") if unit.name.startswith("train/")]
    found = [(loss, args) for own in trained for _, _, loss, args in [parse(own[1:])]]
    ways = Counter((loss.answer_end, loss.gamma, args.learning_rate) for loss, args in found)
    plain = ("kept", 0, 1e-3)
    assert ways == dict.fromkeys([plain, ("left_out", 0, 1e-3), ("likelihood", 0, 1e-3), ("kept", 0.1, 1e-3),
                                  ("kept", 0, 5e-4)], 20)  # fmt: skip
    in_all = {(loss.dpo_alpha + loss.gamma) * loss.attention_weight for loss, _ in found}
    assert sorted(in_all) == pytest.approx([0, 0.9, 0.902]) and {args.seed for _, args in found} == set(range(10))
    assert {(loss.attention_layers, loss.attention_rows) for loss, _ in found} == {("middle", "all")}  # as it was run
    quick = [unit.name for unit in plan(read_config(ENDS, ["quick"]), "digest")]
    assert sum(name.startswith("train/") for name in quick) == 3 and "questions" in quick


def trained(name, is_quick=False):
    """The units of a shipped config, and of each arm's training the words, loss and other flags."""
    config = read_config(ROOT / f"scripts/miniature/{name}.json", ["quick"] if is_quick else [])
    units = {unit.name: unit for unit in plan(config, "digest")}
    words = {name.split("/")[1]: unit.commands[0] for name, unit in units.items() if name.startswith("train/")}
    calls = {name: parse(own[1:]) for name, own in words.items()}
    steps, batch = ({6}, 8) if is_quick else ({600, 1800} if name == "levels" else {200}, 32)
    found = {(args.max_steps, args.per_device_train_batch_size) for *_, args in calls.values()}
    assert found == {(number, batch) for number in steps}
    return units, calls


def test_levels_are_compared_on_as_many_pairs():
    units, calls = trained("levels")
    assert sum(name.startswith("train/") for name in units) == 10 + 10 + 2
    made = {name: set(units[name].commands[0]) for name in ("named", "levels", "threefold", "questions")}
    assert made["levels"] - made["named"] == {"--levels", "1", "2", "3"} and "4800" in made["named"] & made["levels"]
    assert made["threefold"] - made["levels"] == {"14400"}
    assert made["questions"] > {"--levels", "1", "2", "3", "--seed"} and "--seed" not in made["levels"]
    for name, (_, data, loss, args) in calls.items():
        assert (loss.dpo_alpha, loss.gamma, loss.attention_weight) == (0, 1, 0)
        assert (loss.attention_layers, loss.attention_rows) == ("auto", "first")
        made_by = {"sft": "named_pairs", "sft_levels": "levels_pairs", "sft_levels_threefold": "threefold_pairs"}[name]
        assert data.data_path.endswith(f"/{made_by}/pairs.json")
        assert args.max_steps == (1800 if "threefold" in name else 600)
    assert len(trained("levels", is_quick=True)[1]) == 3


def test_orders_are_compared_before_and_after_training():
    units, calls = trained("order")
    assert {name: data.permute_images for name, (_, data, *_) in calls.items()} == {
        "sft": False, "sft_permuted": True, "dpo": False, "dpo_permuted": True,
    }  # fmt: skip
    answers = [unit.commands[0] for name, unit in units.items() if name.startswith("answers/")]
    assert len(answers) == 21 and all(own[own.index("--permutations") + 1] == "3" for own in answers)
    assert len(trained("order", is_quick=True)[1]) == 2


def test_blind_answers_are_compared_on_the_same_questions():
    units, calls = trained("hidden")
    assert units["other_pairs"].inputs == ("world", "hidden_pairs") and "--same_as" in units["other_pairs"].commands[0]
    paths = {name: data.data_path for name, (_, data, *_) in calls.items()}
    assert {name for name, path in paths.items() if "hidden_pairs" in path} == {"mixture_hidden", "dpo_hidden"}
    assert {(loss.gamma, loss.answer_end) for _, _, loss, _ in calls.values()} == {(0.5, "kept"), (0.1, "likelihood")}
    assert len(trained("hidden", is_quick=True)[1]) == 2


def test_places_are_chosen_on_questions_and_seeds_that_do_not_confirm_them():
    def trained(*variants):
        units = {unit.name: unit for unit in plan(read_config(PLACES, variants), "digest")}
        (asked,) = units["questions"].commands
        words = [unit.commands[0] for name, unit in units.items() if name.startswith("train/")]
        return asked[-1], [(loss, args) for own in words for _, _, loss, args in [parse(own[1:])]]

    asked, found = trained()
    ways = Counter((own.dpo_alpha, own.gamma, own.attention_weight, own.attention_layers, bool(own.attention_heads),
                    own.attention_rows, own.attention_gate) for own, _ in found)  # fmt: skip
    everywhere = [(1, 0, 0.9), (0, 1, 0.9), (1, 0.5, 0.6)]
    assert ways == dict.fromkeys([
        (1, 0, 0, "auto", False, "all", "none"), (0, 1, 0, "auto", False, "all", "none"),
        (1, 0.5, 0, "auto", False, "all", "none"), *((*own, "all", False, "all", "none") for own in everywhere),
        (1, 0, 0.9, "middle", False, "all", "none"), (1, 0, 0.9, "auto", True, "all", "none"),
        *((*own, "all", False, "first", "none") for own in everywhere[:2]),
        *((*own, "all", False, "all", "preferred") for own in (everywhere[0], everywhere[2])),
    ], 2)  # fmt: skip
    ends = {(loss.answer_end, loss.answer_end_weight) for loss, _ in found if loss.dpo_alpha}
    assert ends == {("likelihood", 0.1)} and {args.seed for _, args in found} == {0, 1} and asked == "3"
    again, confirmed = trained("confirm")
    assert (again, {args.seed for _, args in confirmed}) == ("4", set(range(10, 20)))
    placed = Counter((loss.dpo_alpha, loss.attention_weight, loss.attention_layers, loss.attention_rows)
                     for loss, _ in confirmed)  # fmt: skip
    chosen = [(alpha, 0.9, layers, rows) for alpha in (0, 1)
              for layers, rows in (("middle", "all"), ("all", "all"), ("all", "first"))]  # fmt: skip
    assert placed == dict.fromkeys([(0, 0, "auto", "all"), *chosen], 10)
    new = {str(loss) for loss, _ in confirmed} - {str(loss) for loss, _ in found}
    assert len(new) == 1, "but for SFT on the middle layer, a control, only what was chosen from is confirmed"
    assert len(trained("quick")[1]) == 4


def test_an_arm_like_another_differs_in_its_own_flags_only(shipped):
    one, other = (shipped[f"train/{name}/seed_0"].commands[0] for name in ("dpo", "dpo_attention"))
    assert {(a, b) for a, b in zip(one, other, strict=True) if a != b} == {("0", "0.9")}


def test_nothing_is_tuned_or_ranked_on_test_questions(shipped):
    for name, unit in shipped.items():
        if name.startswith("tune/") or name == "heads":
            assert not any("test.json" in word for own in unit.commands for word in own)
            assert any("validation_questions.json" in word for own in unit.commands for word in own)


def test_what_is_upstream_changes_the_identity_of_what_is_below(shipped):
    raw = json.loads(SHIPPED.read_text())
    del raw["quick"]
    raw["prepare"]["pairs"] = [raw["prepare"]["pairs"][0].replace("--seed 0", "--seed 1")]
    changed = {unit.name: unit for unit in plan(parse_config(raw), "digest")}
    name = "answers/dpo/seed_0/plain"
    assert changed[name].commands == shipped[name].commands and changed[name].identity != shipped[name].identity


def test_folders_are_filled_in_and_paths_of_the_repository_found(shipped, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (call,) = shipped["train/dpo/seed_3"].words(tmp_path / "out")
    flags = dict(zip(call[1::2], call[2::2], strict=True))
    assert call[0] == str(ROOT / TRAIN) and flags["--model_name_or_path"] == str(ROOT / "scripts/miniature/base")
    assert flags["--output_dir"] == str(tmp_path / "out/train/dpo/seed_3/adapter") and flags["--seed"] == "3"
    assert flags["--data_path"] == str(tmp_path / "out/pairs/pairs.json")


def test_scripts_are_there(shipped):
    assert all((ROOT / own[0]).is_file() for unit in shipped.values() for own in unit.commands)


# ---- running


def test_a_whole_study_is_run_once_and_reported(folder):
    main(words(folder, "--jobs", "2"))
    train, answer, steer = (Path(path).name for path in (TRAIN, ANSWER, STEER))
    assert sorted(calls(folder)) == sorted([train] * 4 + [answer] * 5 + [steer])
    main(words(folder))
    assert len(calls(folder)) == 10
    results = json.loads((folder / "out/results.json").read_text())
    values = {(arm["arm"], arm["way"]): arm["numbers"]["mean"]["values"] for arm in results["arms"]}
    assert values == {("base", "plain"): [0.0], ("base", "steered"): [1.0], ("dpo", "plain"): [1.0, 1.0],
                      ("ours", "plain"): [1.0, 1.0]}  # fmt: skip
    assert results["progress"] == "10 of 10 units finished"
    assert not list((folder / "out").rglob("checkpoint-1"))


def test_a_pass_is_tuned_with_the_first_seed_and_takes_the_settings(folder):
    config = small(folder)
    tuned = {"steered": {"tune": {"share": 0.5}}}
    arms = {"dpo": {"flags": {"dpo_alpha": 1}, "adaptviz": ["steered"]}}
    write(folder, {**config, "adaptviz": tuned, "validation": config["data"], "arms": arms})
    units = {unit.name: unit for unit in plan(read_config(folder / "study.json"), "digest")}
    (call,) = units["tune/dpo/steered"].commands
    assert "{output}/train/dpo/seed_0/adapter" in call and call[-2:] == ("--share", "0.5")
    assert units["answers/dpo/seed_1/steered"].commands[0][-2:] == ("--config", "{output}/tune/dpo/steered/tuned.json")


def test_a_failed_study_says_why_and_goes_on_where_it_was(folder, capsys):
    (folder / "broken").touch()
    line = refused(capsys, *words(folder))
    assert "train/dpo/seed_0: train_dpo_multi_hpc_a100.sh ended with 1: error: no such model" in line
    assert (
        line.endswith("Start the same command again to go on.") and str(folder / "out/train/dpo/seed_0" / LOG) in line
    )
    done = len(calls(folder))
    (folder / "broken").unlink()
    main(words(folder))
    assert len(calls(folder)) == done + 8  # all but the base's two


def test_killed_hard_it_keeps_others_out_until_its_child_ends_and_goes_on(folder, capsys, monkeypatch):
    """The child of a killed study holds its lock."""
    monkeypatch.setattr("llava.run_folder.PATIENCE_S", 0.5)
    (folder / "slow").touch()
    job = multiprocessing.get_context("fork").Process(target=main, args=(words(folder),))
    job.start()
    deadline = time.monotonic() + 120
    while not (folder / "out/train/dpo/seed_0/adapter").is_dir():
        assert job.is_alive() and time.monotonic() < deadline
        time.sleep(0.05)
    job.kill()
    job.join()
    assert "another process is writing there" in refused(capsys, *words(folder))
    (folder / "slow").unlink()
    main(words(folder))
    counts = {name: calls(folder).count(Path(name).name) for name in (TRAIN, ANSWER, STEER)}
    assert counts == {TRAIN: 5, ANSWER: 5, STEER: 1}  # the training that was killed, twice


def test_another_configuration_is_refused_in_words(folder, capsys):
    main(words(folder, "--only", "dpo"))
    write(folder, {**small(folder), "training": {"max_steps": 3}})
    line = refused(capsys, *words(folder))
    assert "train/dpo/seed_0 is of another run (max_steps 2 there, 3 here)" in line and "another --output" in line


def test_report_only_needs_answers(folder, capsys):
    assert "no test answers are finished yet" in refused(capsys, *words(folder, "--report_only"))
    assert not calls(folder)


def test_units_of_other_code_are_named(folder, capsys, monkeypatch):
    monkeypatch.setattr("scripts.study.running.git_commit", lambda: "abc")
    main(words(folder, "--only", "dpo"))
    monkeypatch.setattr("scripts.study.__main__.git_commit", lambda: "def")
    main(words(folder, "--only", "dpo"))
    assert "finished units are of other code (abc)" in capsys.readouterr().out


def test_a_unit_waits_for_its_inputs_with_several_jobs(tmp_path):
    script = tmp_path / "s.sh"
    script.write_text('echo "$1" >>"$2"')
    order = tmp_path / "order"
    units = [Unit(name, ((str(script), name, str(order)),), {}, inputs)
             for name, inputs in (("a", ()), ("b/c", ("a",)), ("d", ("b/c",)))]  # fmt: skip
    Runner(tmp_path, 2).run(units)
    assert order.read_text().split() == ["a", "b/c", "d"] and finished(tmp_path, "d")["seconds"] >= 0
    (tmp_path / "d" / FINISHED).unlink()
    script.write_text("exit 3")
    with pytest.raises(UnitFailed, match=r"s\.sh ended with 3"):
        Runner(tmp_path, 2).run(units)


def test_the_real_scripts_answer_for_the_base(tmp_path, monkeypatch):
    """Data from a prepared command, then plain answers through the real launch script."""
    made = str(tmp_path / "made")
    monkeypatch.setattr(sys, "argv", ["make_data", "--output", made, "--num_train", "0", "--num_test", "4"])
    make_data.main()
    copy = f"cp -r {shlex.quote(made)}/. {{own}}"
    data = {"file": "{output}/world/test.json", "images": "{output}/world/images"}
    config = {
        "base": "scripts/miniature/base", "data": data, "test": data, "prepare": {"world": [copy]}, "seeds": [0],
        "arms": {}, "training": {}, "answering": {"max_new_tokens": 4, "num_workers": 0, "attention_maps": 0},
    }  # fmt: skip
    write(tmp_path, config)
    main(["--config", str(tmp_path / "study.json"), "--output", str(tmp_path / "out")])
    (arm,) = json.loads((tmp_path / "out/results.json").read_text())["arms"]
    assert arm["label"] == "base" and 0 <= arm["numbers"]["ratio"]["mean"] <= 1
    assert set(arm["numbers"]) > {"format/sequence", "format/collage", "format/pip", "format/single"}
