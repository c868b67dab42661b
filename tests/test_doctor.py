"""Twenty planted faults, each found by name, and a clean bill for clean input."""

import json
import shutil
import sys
import types

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from llava.checkpoints import open_checkpoint
from llava.families import ImageTokens
from scripts import doctor, selftest
from tests.conftest import preference


@pytest.fixture
def examine(capsys, monkeypatch):
    """Runs the doctor; gives (exit code, lines that say FAIL, everything printed)."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["doctor", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            doctor.main()
        printed = capsys.readouterr().out
        return ended.value.code, [line for line in printed.splitlines() if line.startswith("  FAIL")], printed

    return run


@pytest.fixture
def examine_data(examine, monkeypatch):
    """The same, without the checks that look at no data."""
    monkeypatch.setattr(selftest, "run", lambda family: [])
    monkeypatch.setattr(doctor, "packages_distributions", dict)
    return examine


@pytest.fixture
def clean(data):
    return [preference(n, num_images=2 + n % 3, target=1 + n % 2) for n in range(4)]


def test_clean_input_passes_with_counts(examine, data, clean, checkpoint):
    code, failures, printed = examine(
        "--model_name_or_path", checkpoint, "--data_path", data(clean), "--image_folder", data.images
    )
    assert (code, failures) == (0, []), printed
    assert "4 records, 0 of them bad" in printed and "'sequence': 4" in printed
    assert "region mass equals eager attention" in printed


def test_prompts_about_several_images_are_counted(examine_data, data, checkpoint):
    lines = "Image1:<image>\nImage2:<image>\n"
    records = [preference(0, prompt=f"{lines}In Image1 and Image2, what is it?"), preference(1)]
    search = {"prompt": f"{lines}Which image is red?", "is_search": True}
    records += [preference(2, **search, targets=[1, 2]), preference(3, **search, targets=[2])]
    words = ["--model_name_or_path", checkpoint, "--data_path", data(records), "--image_folder", data.images]
    code, failures, printed = examine_data(*words)
    assert (code, failures) == (0, []) and "about several images: 2; looking for what fits (`is_search`): 2" in printed


def test_a_test_set_is_examined_too(examine_data, data, clean, checkpoint):
    questions = [
        {**{k: v for k, v in record.items() if k not in ("chosen", "rejected")}, "answer": record["chosen"]}
        for record in clean
    ]
    questions[2]["image"][0] = "no.png"
    words = ["--model_name_or_path", checkpoint, "--data_path", data(questions), "--image_folder", data.images]
    code, failures, printed = examine_data(*words)
    assert code == 1 and len(failures) == 1 and "no.png: no such picture" in failures[0], printed
    assert "questions of a test set: {'sequence': 4}" in printed


def fault(**changes):
    return lambda record, images: record.update(changes)


def truncate(record, images):
    whole = (images / "blue.png").read_bytes()
    (images / "cut.png").write_bytes(whole[:-30])
    record["image"][0] = "cut.png"


def not_a_picture(record, images):
    (images / "text.png").write_text("hello")
    record["image"][0] = "text.png"


def one_image(record, images, **changes):
    Image.new("RGB", (448, 448)).save(images / "one.png")
    record.update({"image": ["one.png"], "prompt": "<image>\nIn Image2, what?", **changes})


RECORD_FAULTS = {
    "missing field": (lambda record, images: record.pop("rejected"), "`rejected` is missing"),
    "fewer placeholders than images": (fault(prompt="<image>\nIn Image1, what?"), "1 <image> but the record lists 3"),
    "picture missing": (lambda record, images: record["image"].__setitem__(1, "no.png"), "no.png: no such picture"),
    "picture truncated": (truncate, "cut.png: truncated or damaged"),
    "not a picture": (not_a_picture, "text.png: not a picture"),
    "image out of range": (fault(target=9), "`target` is 9, but the prompt names Image"),
    "empty chosen": (fault(chosen=" "), "`chosen` is empty"),
    "chosen equals rejected": (fault(chosen="red", rejected="red "), "nothing to prefer"),
    "stop string in the answer": (fault(chosen="red</s>"), "must not contain '</s>'"),
    "cell that does not exist": (one_image, "read as 1 x 1 cells"),
    "box outside the picture": (
        lambda record, images: one_image(record, images, target_box=[0, 0, 500, 400], grid=[1, 2]),
        "reaches outside the 448 x 448",
    ),
    "box without area": (fault(target_box=[5, 5, 5, 9]), "has no area"),
    "unknown format": (fault(image_type="video"), "'video' is none of"),
    "too long": (lambda record, images: record.update(chosen="word " * 600), "above --model_max_length 500"),
    "id used twice": (fault(id="pair_0"), "the id is used 2 times"),
}


@pytest.mark.parametrize("name", RECORD_FAULTS)
def test_a_bad_record_is_found_and_listed(examine_data, data, clean, checkpoint, tmp_path, name):
    plant, expected = RECORD_FAULTS[name]
    plant(clean[1], data.images)
    path = data(clean)
    words = ["--model_name_or_path", checkpoint, "--data_path", path, "--image_folder", data.images]
    code, failures, printed = examine_data(*words, "--model_max_length", 500, "--fix-list", tmp_path / "bad.json")
    assert code == 1, printed
    line = next(line for line in failures if "record 2" in line)
    assert expected in line and str(path) in line
    assert clean[1]["id"] in json.loads((tmp_path / "bad.json").read_text())
    assert "pair_2" not in (tmp_path / "bad.json").read_text()


def test_all_problems_are_listed_not_only_the_first(examine_data, data, clean, checkpoint):
    clean[0]["chosen"], clean[2]["image"][0] = "", "no.png"
    words = ["--data_path", data(clean), "--image_folder", data.images]
    _, failures, printed = examine_data("--model_name_or_path", checkpoint, *words)
    assert len(failures) == 2 and "4 records, 2 of them bad" in printed


NOT_CHECKED = {"pictures": "the pictures", "tokens": "tokens, lengths", "records": "the records"}


@pytest.mark.parametrize(
    ("has", "is_bad", "not_checked", "listed"),
    [
        ("model images", False, (), []),
        ("images", False, ("tokens",), None),
        ("images", True, ("tokens",), ["pair_1"]),
        ("model", False, ("pictures",), None),
        ("", True, ("pictures", "tokens"), ["pair_1"]),
        ("no-model images", False, ("tokens",), None),
        ("weightless images", True, (), ["pair_1"]),
        ("model no-images", False, ("pictures",), None),
        ("model images broken", False, ("records",), None),
    ],
)
def test_what_can_be_checked_is_and_a_fix_list_is_empty_only_after_all_of_it(
    examine_data, data, clean, checkpoint, tmp_path, has, is_bad, not_checked, listed
):
    shutil.copytree(checkpoint, tmp_path / "weightless", ignore=shutil.ignore_patterns("*.safetensors"))
    models = {"model": checkpoint, "no-model": tmp_path / "none", "weightless": tmp_path / "weightless"}
    folders = {"images": data.images, "no-images": tmp_path / "none"}
    if is_bad:
        clean[1]["chosen"] = ""
    path = data(clean)
    words = ["--data_path", path, "--fix_list", tmp_path / "bad.json"]
    for word in has.split():
        words += ["--model_name_or_path", models[word]] if word in models else []
        words += ["--image_folder", folders[word]] if word in folders else []
    if "broken" in has:
        path.write_text("[{]")
    code, failures, printed = examine_data(*words)
    skipped = [line for line in printed.splitlines() if "not checked: " in line]
    assert [any(f"not checked: {text}" in line for line in skipped) for text in NOT_CHECKED.values()] == [
        name in not_checked for name in NOT_CHECKED
    ]
    assert code == (1 if failures else 0) and bool(failures) == (is_bad or "no-" in has or "broken" in has)
    assert (json.loads((tmp_path / "bad.json").read_text()) if (tmp_path / "bad.json").exists() else None) == listed
    assert ("not all was checked" in printed) == bool(not_checked)


def test_a_name_with_a_colon_in_it_is_listed_too(examine_data, data, clean, checkpoint, tmp_path):
    clean[1].update(id="coco: 17: a", chosen="")
    words = ["--model_name_or_path", checkpoint, "--data_path", data(clean), "--image_folder", data.images]
    examine_data(*words, "--fix_list", tmp_path / "bad.json")
    assert json.loads((tmp_path / "bad.json").read_text()) == ["coco: 17: a"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--fix_list", "bad.json"], "--fix_list needs --data_path"),
        (["--fix_list", "/", "--data_path", "x.json"], "/ is a folder, where a file is to be written"),
        (["--model_max_length", "0"], "--model_max_length 0: must be at least 1"),
        (["--model_max_length", "-3"], "--model_max_length -3: must be at least 1"),
        (["--model_max_length", "nan"], "invalid int value: 'nan'"),
        (["--model_max_length", "inf"], "invalid int value: 'inf'"),
    ],
)
def test_flags_that_cannot_be_meant_are_one_line(monkeypatch, capsys, flags, message):
    monkeypatch.setattr(sys, "argv", ["doctor", *flags])
    with pytest.raises(SystemExit) as ended:
        doctor.main()
    error = capsys.readouterr().err
    assert ended.value.code == 2 and message in error and error.count("\n") == 1


def test_broken_json(examine_data, data, checkpoint, tmp_path):
    (tmp_path / "broken.json").write_text('[{"id": 1,}]')
    words = ["--data_path", tmp_path / "broken.json", "--image_folder", data.images]
    code, failures, _ = examine_data("--model_name_or_path", checkpoint, *words)
    assert code == 1 and "line 1, column 11" in failures[0]


@pytest.mark.parametrize("kind", ["missing", "mis-shaped"])
def test_a_bad_tensor(examine, checkpoint, tmp_path, kind):
    shutil.copytree(checkpoint, tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if "linear_1.weight" in name)
    tensors[name] = tensors[name][:-1].clone()
    if kind == "missing":
        del tensors[name]
    save_file(tensors, path, metadata={"format": "pt"})
    code, failures, _ = examine("--model_name_or_path", tmp_path / "model")
    assert code == 1 and kind in failures[0] and "linear_1.weight" in failures[0]


def test_a_tokenizer_of_another_model(examine, checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text())
    config["image_token_index"] = config["image_token_id"] = 5
    path.write_text(json.dumps(config))
    code, failures, _ = examine("--model_name_or_path", tmp_path / "model")
    assert code == 1 and "the tokenizer reads <image> as id" in failures[0]


def test_an_adapter_whose_base_is_gone(examine, tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/nowhere/base"}))
    code, failures, _ = examine("--model_name_or_path", tmp_path)
    assert code == 1 and "/nowhere/base" in failures[0]


def test_a_llava_package_from_elsewhere(examine, monkeypatch, tmp_path):
    foreign = types.ModuleType("llava")
    foreign.__file__ = str(tmp_path / "site-packages" / "llava" / "__init__.py")
    monkeypatch.setattr(doctor, "llava", foreign)
    monkeypatch.setattr(doctor, "packages_distributions", lambda: {"llava": ["haotian-llava"]})
    code, failures, _ = examine()
    assert code == 1 and len(failures) == 2
    assert "not this repository" in failures[0] and "pip uninstall haotian-llava" in failures[1]


@pytest.mark.parametrize("name", ["train", "inference", "inference_optimization", "data_gen"])
def test_any_of_our_names_may_be_taken(examine, monkeypatch, tmp_path, name):
    foreign = types.ModuleType(name)
    foreign.__file__ = str(tmp_path / f"site-packages/{name}/__init__.py")
    monkeypatch.setattr(doctor, name, foreign)
    code, failures, _ = examine()
    assert code == 1 and f"`import {name}` gives {foreign.__file__}, not this repository" in failures[0]


def test_scripts_is_a_common_name(examine, monkeypatch):
    monkeypatch.setattr(doctor, "packages_distributions", lambda: {"scripts": ["stranger", doctor.OURS]})
    code, failures, _ = examine()
    assert code == 1 and len(failures) == 1 and "pip uninstall stranger" in failures[0]


class TestSelfTestNotices:
    """The self-test must fail when the term is broken, or it tells nothing."""

    def problems(self, checkpoint):
        return [name for name, problem in selftest.run(open_checkpoint(checkpoint).family) if problem]

    def test_a_wrong_mass(self, checkpoint, monkeypatch):
        import llava.attention

        right = llava.attention.region_mass
        monkeypatch.setattr(llava.attention, "region_mass", lambda *a: right(*a) * 1.01)
        assert any("eager" in name for name in self.problems(checkpoint))

    def test_shifted_boxes(self, checkpoint, monkeypatch):
        right = ImageTokens.weights
        monkeypatch.setattr(ImageTokens, "weights", lambda self, box: right(self, box).roll(3))
        assert any("boxes" in name for name in self.problems(checkpoint))

    def test_a_wrong_sign(self, checkpoint, monkeypatch):
        right = selftest.share
        monkeypatch.setattr(
            selftest, "share", lambda scores: 1 - right(scores) if scores.masses.requires_grad else right(scores)
        )
        assert any("raises" in name for name in self.problems(checkpoint))
