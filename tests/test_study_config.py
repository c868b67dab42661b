"""What a study's file may hold: everything else is one line that names the entry, before anything runs."""

import pytest

from scripts.study.config import read_config
from scripts.study.units import plan
from tests.stub_study import calls, refused, small, study_in, words, write


@pytest.fixture
def folder(tmp_path):
    """A config with its data, and the stub that `words` runs it with."""
    return study_in(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"flags": {"attention_wieght": 1}}, "arms.new.flags: unknown flag --attention_wieght; did you mean"),
        ({"flags": {"gamma": "much"}}, "arms.new.flags: argument --gamma: invalid float value: 'much'"),
        ({"like": "nobody"}, "arms.new, an arm before: unknown 'nobody'"),
        ({"against": ["dop"]}, "arms.new.against: unknown 'dop'; did you mean 'dpo'"),
        ({"adaptviz": ["steer"]}, "arms.new.adaptviz: unknown 'steer'; did you mean 'steered'"),
        ({"lable": "x"}, "arms.new: unknown 'lable'; did you mean 'label'"),
        ({"seeds": [1, 1]}, "arms.new.seeds: [1, 1] must be a list of different whole numbers"),
        ({"data": {"file": "none.json"}}, "arms.new.data.file: none.json is not there"),
    ],
)  # fmt: skip
def test_a_wrong_arm_is_one_line_that_names_it(folder, capsys, change, message):
    config = small(folder)
    write(folder, {**config, "arms": {**config["arms"], "new": change}})
    assert message in refused(capsys, *words(folder)) and not calls(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": []}, "seeds: [] must be a list"),
        ({"arms": {"base": {"flags": {}}}}, "arms.base: unknown 'flags'"),
        ({"traning": {}}, "did you mean 'training'"),
        ({"adaptviz": {"steered": {"tune": {}}}}, "needs `validation`"),
        ({"prepare": {"train": ["x"]}}, "'train' names a folder"),
        ({"seeds": None}, "seeds: null must be a list"),
        ({"training": []}, "study.json: "),
    ],
)
def test_a_wrong_file_is_one_line_that_names_the_entry(folder, capsys, change, message):
    write(folder, {**small(folder), **change})
    line = refused(capsys, *words(folder))
    assert "study.json" in line and message in line


def test_what_is_missing_is_named(folder, capsys):
    config = small(folder)
    del config["test"]
    write(folder, config)
    assert "the entry 'test' is missing" in refused(capsys, *words(folder))
    (folder / "study.json").write_text("{")
    assert "broken JSON" in refused(capsys, *words(folder))
    (folder / "study.json").unlink()
    assert "no such file" in refused(capsys, *words(folder))


def test_only_and_quick_choose_arms(folder, capsys):
    config = small(folder)
    write(folder, {**config, "quick": {"only": ["dpo"], "seeds": [7], "training": {"max_steps": 1}}})
    path = folder / "study.json"
    assert set(read_config(path, only=["ours"]).arms) == {"base", "ours"}
    quick = read_config(path, ["quick"])
    assert (set(quick.arms), quick.arms["dpo"].seeds, quick.training) == ({"base", "dpo"}, (7,), {"max_steps": 1})
    assert "--only: unknown 'dop'; did you mean 'dpo'" in refused(capsys, *words(folder, "--only", "dop"))


def test_a_study_is_confirmed_with_the_seeds_that_it_names(folder, capsys):
    path, config = folder / "study.json", small(folder)
    assert "--confirm: the entry 'confirm' is missing" in refused(capsys, *words(folder, "--confirm"))
    confirm, quick = {"seeds": [8, 9], "training": {"max_steps": 7}}, {"only": ["dpo"], "seeds": [7]}
    write(folder, {**config, "confirm": confirm, "quick": quick})
    assert read_config(path).arms["ours"].seeds == (0, 1)
    found = read_config(path, ["confirm"], ["ours"])
    assert (set(found.arms), found.arms["ours"].seeds, found.training) == ({"base", "ours"}, (8, 9), {"max_steps": 7})
    both = read_config(path, ["confirm", "quick"])
    assert (set(both.arms), both.arms["dpo"].seeds, both.training) == ({"base", "dpo"}, (7,), {"max_steps": 7})


NAN, INFINITY = float("nan"), float("inf")  # which Python's json writes and reads


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "holds list where a JSON object is due"),
        ("null", "holds NoneType where a JSON object is due"),
        ("", "broken JSON"),
        ("{}", "the entry 'base' is missing"),
        ("[" * 200_000, "nested too deeply"),
        ('{"a":' * 200_000, "nested too deeply"),
        ('{"arms": {"dpo": {}, "dpo": {}}}', "the name 'dpo' stands twice in one object"),
        ('{"base": "\\ud800"}', "half a character"),
    ],
)
def test_a_file_that_is_no_study_is_one_line(folder, capsys, text, message):
    (folder / "study.json").write_text(text)
    line = refused(capsys, *words(folder))
    assert "study.json" in line and message in line and len(line) < 600


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("arms.new", None, "arms.new: null must be an object"),
        ("arms.new", [], "arms.new: [] must be an object"),
        ("arms.new", "dpo", "arms.new: \"dpo\" must be an object"),
        ("arms", None, "arms: null must be an object"),
        ("arms", ["dpo"], "arms: [\"dpo\"] must be an object"),
        ("arms.new", {"flags": None}, "arms.new.flags: null must be an object"),
        ("arms.new", {"flags": {"beta": None}}, "arms.new.flags.beta: null must be a text, a finite number"),
        ("arms.new", {"flags": {"beta": {}}}, "arms.new.flags.beta: {} must be a text, a finite number"),
        ("arms.new", {"flags": {"beta": [[1]]}}, "arms.new.flags.beta: [[1]] must be a text"),
        ("arms.new", {"flags": {"beta": NAN}}, "arms.new.flags.beta: NaN must be a text, a finite number"),
        ("arms.new", {"flags": {"beta": -INFINITY}}, "arms.new.flags.beta: -Infinity must be"),
        ("arms.new", {"flags": {"beta": "nan"}}, "arms.new.flags: --beta nan: must be above 0"),
        ("arms.new", {"flags": {"beta": 0}}, "arms.new.flags: --beta 0.0: must be above 0"),
        ("arms.new", {"flags": {"gamma": -1}}, "arms.new.flags: --gamma -1.0: must be at least 0"),
        ("arms.new", {"flags": {"lora_r": 0}}, "arms.new.flags: --lora_r 0"),
        ("arms.new", {"flags": {"lora_r": 1.5}}, "arms.new.flags: argument --lora_r"),
        ("arms.new", {"flags": {"max_steps": -7}}, "arms.new.flags: --max_steps -7: must be at least -1"),
        ("arms.new", {"flags": {"learning_rate": "inf"}}, "arms.new.flags: --learning_rate inf"),
        ("arms.new", {"flags": {"seed": 3}}, "arms.new.flags: --seed is for the study to set"),
        ("arms.new", {"flags": {"output-dir": "x"}}, "arms.new.flags: --output-dir is for the study to set"),
        ("arms.new", {"flags": {"output_dir=x": []}}, "arms.new.flags: --output_dir=x is for the study to set"),
        ("arms.new", {"like": ["dpo"]}, "arms.new.like: [\"dpo\"] must be a text"),
        ("arms.new", {"like": "new"}, "arms.new, an arm before: unknown 'new'"),
        ("arms.new", {"like": "dpo"}, "arms.new: trains as arms.dpo, with the same data, seeds and flags"),
        ("arms.new", {"like": "ours", "label": "Other"}, "arms.new: trains as arms.ours"),
        ("arms.new", {"against": "dpo"}, "arms.new.against: \"dpo\" must be a list"),
        ("arms.new", {"against": [3]}, "arms.new.against[0]: 3 must be a text"),
        ("arms.new", {"against": ["sft"]}, "arms.new.against: unknown 'sft'"),
        ("arms.new", {"against": ["new"]}, "arms.new.against: unknown 'new'"),
        ("arms.new", {"adaptviz": None}, "arms.new.adaptviz: null must be a list"),
        ("arms.new", {"seeds": [-1]}, "arms.new.seeds: [-1] must be a list of different whole numbers from 0"),
        ("arms.new", {"seeds": [2**32]}, "from 0 up to 2^32"),
        ("arms.new", {"seeds": [True]}, "arms.new.seeds: [true] must be a list"),
        ("arms.new", {"seeds": [0.5]}, "arms.new.seeds: [0.5] must be a list"),
        ("arms.new", {"seeds": 3}, "arms.new.seeds: 3 must be a list"),
        ("arms.new", {"data": "pairs.json"}, "arms.new.data: \"pairs.json\" must be an object"),
        ("arms.new", {"data": {"file": "x" * 5000}}, "File name too long"),
        ("arms...", {}, "'..' names a folder"),
        ("arms.a/b", {}, "'a/b' names a folder"),
        ("arms." + "a" * 300, {}, "names a folder"),
        ("base", 3, "base: 3 must be a text"),
        ("base", " ", "base: \" \" must be a text"),
        ("base", "no/such/model", "no/such/model"),
        ("test", {"file": "pyproject.toml"}, "test: the entry 'images' is missing"),
        ("training", {"max_stepz": 1}, "unknown flag --max_stepz; did you mean --max_steps?"),
        ("answering", {"max_tokens": 4}, "`answering`: unknown flag --max_tokens; did you mean --max_new_tokens?"),
        ("answering", {"max_new_tokens": 0}, "`answering`: --max_new_tokens 0: must be at least 1"),
        ("answering", {"temperature": "nan"}, "`answering`: --temperature nan"),
        ("answering", {"data_path": "x"}, "`answering`: --data_path is for the study to set"),
        ("adaptviz", {"plain": {}}, "'plain' names a folder"),
        ("adaptviz", {"steered": {"scope": "some"}}, "adaptviz.steered: argument --scope: invalid choice: 'some'"),
        ("adaptviz", {"steered": {"tune": {"share": 2}}}, "needs `validation`"),
        ("prepare", {"a": "echo"}, "prepare.a: \"echo\" must be a list"),
        ("prepare", {"a": ["echo 'b"]}, "prepare.a[0]: \"echo 'b\" must be a command"),
        ("prepare", {"a": [""]}, "prepare.a[0]: \"\" must be a command"),
        ("data", {"file": "{output}/made/a.json", "images": "{output}/made"}, "needs {output}/made/, which no"),
        ("prepare", {"a": ["cat {output}/b/c"], "b": ["echo"]}, "a needs {output}/b/, which no entry of `prepare`"),
        ("quick", None, "quick: null must be an object"),
        ("quick", {"only": "dpo"}, "quick.only: \"dpo\" must be a list"),
    ],
)  # fmt: skip
def test_an_entry_that_cannot_be_meant_is_one_line_that_names_it(folder, capsys, place, value, message):
    config = small(folder)
    outer, _, inner = place.partition(".")
    config[outer] = {**config[outer], inner: value} if inner else value
    if place == "prepare" and "b" in value:
        config["data"] = {"file": "{output}/a/a.json", "images": "{output}/a/images"}
    write(folder, config)
    line = refused(capsys, *words(folder))
    assert message in line and not calls(folder) and not (folder / "out").exists()


def test_a_tuned_pass_is_checked_as_the_tuner_checks_it(folder, capsys):
    config = small(folder)
    config["validation"], config["adaptviz"] = config["test"], {"steered": {"tune": {"share": 2}}}
    write(folder, config)
    assert "adaptviz.steered.tune: --share 2.0" in refused(capsys, *words(folder))


def test_a_pass_is_not_tuned_on_the_questions_that_score_it(folder, capsys):
    config = small(folder)
    write(folder, {**config, "validation": config["test"], "adaptviz": {"steered": {"tune": {}}}})
    assert "the same questions" in refused(capsys, *words(folder))


def test_an_arm_without_flags_trains_with_those_of_all(folder):
    config = small(folder)
    write(folder, {**config, "arms": {"all": {}}})
    units = {unit.name: unit for unit in plan(read_config(folder / "study.json"), "digest")}
    (call,) = units["train/all/seed_1"].commands
    assert call[-4:] == ("--max_steps", "2", "--seed", "1")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--jobs", "0"], "--jobs 0: must be at least 1"),
        (["--jobs", "-1"], "--jobs -1: must be at least 1"),
        (["--jobs", "nan"], "invalid int value: 'nan'"),
        (["--jobs", "1e9"], "invalid int value: '1e9'"),
        (["--jobs", "100000000"], "--jobs 100000000: must be at least 1 and at most 1000"),
        (["--launcher", "no-such-program"], "no-such-program"),
        (["--launcher", "bash '"], "No closing quotation"),
    ],
)
def test_flags_that_cannot_be_meant_are_one_line(folder, capsys, flags, message):
    assert message in refused(capsys, *words(folder), *flags)


def test_an_output_that_is_a_file_is_one_line(folder, capsys):
    (folder / "out").write_text("")
    assert str(folder / "out") in refused(capsys, *words(folder))
