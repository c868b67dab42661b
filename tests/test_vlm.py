"""Asking from Python: the numbers are those of the commands, whatever the way the pictures come."""

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from inference.llava_hound_dpo import run_inference
from inference_optimization.llava_hound_dpo import run_adaptive
from llava import open_model
from llava.adaptviz import AdaptViz, Bands
from llava.settings import ModelSettings
from scripts.miniature.make_data import question, save_pictures
from scripts.miniature.prompts import sample_prompt
from tests.conftest import BASE, picture
from tests.test_family_contract import each_family, tiny  # noqa: F401  a fixture

TYPES = ("sequence", "collage", "pip", "single")
MEASURED = ("attention_ratio", "attention_ratio_by_layer", "attention_by_image", "confidence", "perplexity", "scale")


@pytest.fixture(scope="module")
def vlm():
    return open_model(BASE, batch_size=4)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(folder, prompts of the miniature's world, their records), which are on disk as the commands read them."""
    folder, rng = tmp_path_factory.mktemp("world"), np.random.default_rng(5)
    prompts = [sample_prompt(rng, "test", image_type) for image_type in TYPES * 3]
    records = []
    for number, prompt in enumerate(prompts):
        names = save_pictures(prompt.pictures(), folder / "images", "test", f"{number}")
        records.append({"id": f"q{number}", "image": names, **question(prompt, rng)})
    (folder / "test.json").write_text(json.dumps(records))
    return folder, prompts, records


def command(main, world, output, *more):
    """The answers file of a command over the world's questions."""
    words = ["--model_name_or_path", BASE, "--data_path", world[0] / "test.json", "--image_folder", world[0] / "images"]
    words += ["--output", output, "--max_new_tokens", "6", "--num_workers", "0", "--batch_size", "4", *more]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["command", *map(str, words)])
        main()
    return [json.loads(line) for line in output.read_text().splitlines()]


def given(records):
    """The fields of records that say what is asked about, as `ask` takes them."""
    return {name: [r.get(name) for r in records] for name in ("image_type", "target", "target_box", "grid")}


@pytest.mark.parametrize(
    ("main", "flags", "steer"),
    [
        (run_inference.main, [], None),
        (run_adaptive.main, [], "target"),
        (run_adaptive.main, ["--scope", "balance", "--alpha", "3", "--rule", "add"],
         AdaptViz("balance", "add", bands=Bands.fixed(3.0))),
    ],
    ids=["plain", "default", "chosen"],
)  # fmt: skip
def test_replies_are_the_lines_of_the_command(vlm, world, tmp_path, main, flags, steer):
    lines = command(main, world, tmp_path / "a.jsonl", "--attention_maps", "12", *flags)
    _, prompts, records = world
    replies = vlm.ask(
        [p.pictures() for p in prompts], [r["prompt"] for r in records], steer=steer, max_new_tokens=6, **given(records)
    )
    assert steer is None or any(line["scale"] != 1 for line in lines)
    for line, reply in zip(lines, replies, strict=True):
        assert reply.text == line["text"] and reply.target == line["target"]
        assert reply.is_complete == line["is_complete"]
        for name in MEASURED:
            assert reply.record[name] == pytest.approx(line[name], abs=1e-6), name
        assert reply.ratio == reply.record["attention_ratio"] and reply.maps == line["attention_map"]


def test_an_answer_that_is_given_is_measured_as_when_it_was_generated(vlm, world):
    _, prompts, records = world
    asked = [p.pictures() for p in prompts], [r["prompt"] for r in records]
    replies = vlm.ask(*asked, max_new_tokens=12, **given(records))
    assert all(reply.is_complete for reply in replies)
    looked = vlm.look(*asked, [reply.text for reply in replies], **given(records))
    for own, other in zip(replies, looked, strict=True):
        for name in MEASURED:
            assert other.record[name] == pytest.approx(own.record[name], abs=1e-5), name


def test_several_answers_of_one_prompt_are_each_as_alone(vlm, world):
    pictures, prompt = world[1][0].pictures(), world[2][0]["prompt"]
    together = vlm.look(pictures, prompt, ["red", "a green square", "no"])
    for text, one in zip(("red", "a green square", "no"), together, strict=True):
        alone = vlm.look(pictures, prompt, text)
        assert one.text == alone.text == text
        assert one.ratio == pytest.approx(alone.ratio, abs=1e-6)
        assert one.perplexity == pytest.approx(alone.perplexity, rel=1e-5)


def test_files_are_pictures_and_a_prompt_gets_its_images(vlm, world, tmp_path):
    """A path, a path as text, a turned JPEG and a grey picture; one prompt and a list of one."""
    _, prompts, records = world
    folder, number = world[0] / "images", TYPES.index("sequence")
    paths = [folder / name for name in records[number]["image"]]
    asked = records[number]["prompt"].rpartition("\n")[2]
    assert "<image>" not in asked
    (whole,) = vlm.ask([prompts[number].pictures()], [records[number]["prompt"]], max_new_tokens=4)
    one = vlm.ask([str(paths[0]), *paths[1:]], asked, max_new_tokens=4)
    assert one.question.prompt == records[number]["prompt"]
    assert (one.text, one.target) == (whole.text, whole.target)
    assert one.ratio == pytest.approx(whole.ratio, abs=1e-6)
    turned = Image.new("RGB", (40, 20), "red")
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif)
    seen = vlm.ask([tmp_path / "turned.jpg"], "What is it?", max_new_tokens=2).pictures[0]
    assert seen.size == (20, 40) and seen.mode == "RGB"
    assert vlm.ask(Image.new("L", (30, 30), 7), "What is it?", max_new_tokens=2).target == 1


def test_pictures_of_an_earlier_turn_stand_there(vlm):
    before = [
        {"role": "user", "content": "Image1:<image>\nImage2:<image>\nWhat is it?"},
        {"role": "assistant", "content": "two pictures"},
    ]
    reply = vlm.ask(
        [picture("red"), picture("blue")], "In Image2, what is the colour?", context=before, max_new_tokens=2
    )
    assert reply.target == 2 and "<image>" not in reply.question.prompt and len(reply.shares) == 2


def test_several_pictures_of_which_none_is_named_have_shares_and_no_ratio(vlm):
    reply = vlm.ask([picture("red"), picture("blue")], "What differs?", max_new_tokens=2)
    assert reply.ratio is None and reply.target is None and sum(reply.shares) == pytest.approx(1)
    named = vlm.ask([picture("red"), picture("blue")], "What is the colour?", target=2, max_new_tokens=2)
    assert named.target == 2 and named.ratio == pytest.approx(named.shares[1])


def test_a_heat_map_is_brightest_where_the_attention_was(vlm, world):
    """Of a uniform grey prompt the colour of the map is all that there is to see."""
    grey = [picture("grey"), picture("grey")]
    reply = vlm.ask(grey, "In Image1, what is the colour?", steer=AdaptViz(bands=Bands.fixed(8.0)), max_new_tokens=3)
    sheet = np.asarray(reply.heatmap(72).convert("L"), dtype=float)
    tiles = [sheet[30:, :72], sheet[30:, -72:]]
    brighter = int(np.argmax([tile[10:-10, 10:-10].mean() for tile in tiles]))
    assert brighter == int(np.argmax(reply.shares)) == 0
    assert vlm.ask(grey, "What is it?", attention_layers="none", max_new_tokens=2).maps is None


def test_sampling_is_by_the_seed_and_leaves_the_stream_of_the_caller_alone(vlm):
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    ask = [[picture("red")], "What is the colour?"]
    first, again = (vlm.ask(*ask, temperature=5.0, seed=11, max_new_tokens=6) for _ in range(2))
    assert first.generated.tokens == again.generated.tokens and first.perplexity is None
    assert torch.equal(torch.rand(2), expected)
    assert len({tuple(vlm.ask(*ask, temperature=5.0, seed=n, max_new_tokens=6).generated.tokens) for n in range(4)}) > 1


ONE = [picture("red")]
REFUSED = {
    "no such image": (([*ONE, *ONE], "In Image3, what is it?"), {}, "prompt 1: Image3 does not exist"),
    "counts": ((ONE, "<image><image> What?"), {}, "prompt 1: the prompt has 2 <image> but the record lists 1"),
    "empty": ((ONE, " "), {}, "prompt"),
    "no file": ((["nowhere.png"], "What?"), {}, "prompt 1, picture 1: nowhere.png: no such file"),
    "no picture": (([__file__], "What?"), {}, "not a picture that pillow can read"),
    "of another type": (([3], "What?"), {}, "prompt 1, picture 1: a picture is a PIL picture or a path, not int"),
    "none": (([], "What?"), {}, "prompt 1"),
    "fewer": (([ONE], ["What?", "Why?"]), {}, "pictures: 1 for 2 prompts"),
    "nobody": (([], []), {}, "prompt: 0 for 0 prompts"),
    "scope": ((ONE, "What?"), {"steer": "targets"}, "scope 'targets' is none of"),
    "no target": (([*ONE, *ONE], "What?"), {"steer": "target"}, "--scope all"),
    "setting": ((ONE, "What?"), {"max_new_tokens": 0}, "max_new_tokens"),
    "special token": ((ONE, "What </s>?"), {}, "special token"),
}


@pytest.mark.parametrize(("asked", "more", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_asked_is_said_in_a_line(vlm, asked, more, message):
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        vlm.ask(*asked, **more)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_settings_that_there_are_not_are_refused(vlm):
    with pytest.raises(ValueError, match="--dtype 'float': must be one of auto, float32"):
        open_model(BASE, dtype="float")
    assert ModelSettings(model_name_or_path="m", image_folder="", merge_adapter=True).merge_adapter == "True"
    with pytest.raises(TypeError, match="max_tokens"):
        vlm.ask(ONE, "What?", max_tokens=3)
    with pytest.raises(TypeError, match="dtypes"):
        open_model(BASE, dtypes="float32")


def test_the_tour_says_what_the_command_says(tmp_path, monkeypatch, capsys):
    for name, value in {"MODEL": BASE, "OUTPUT": str(tmp_path / "tour")}.items():
        monkeypatch.setenv(name, value)
    said = runpy.run_path(str(Path(__file__).parent.parent / "docs/tour.py"))
    rng = np.random.default_rng(0)
    prompts = [sample_prompt(rng, "test", "sequence", 3) for _ in range(8)]
    records = [
        {"id": f"q{n}", "image": save_pictures(p.pictures(), tmp_path / "images", "t", f"{n}"), **question(p, rng)}
        for n, p in enumerate(prompts)
    ]
    (tmp_path / "test.json").write_text(json.dumps(records))
    world = tmp_path, prompts, records
    plain = command(run_inference.main, world, tmp_path / "plain.jsonl")
    steered = command(run_adaptive.main, world, tmp_path / "steered.jsonl")
    assert said["reply"].ratio == pytest.approx(plain[0]["attention_ratio"], abs=1e-6)
    assert said["steered"].ratio == pytest.approx(steered[0]["attention_ratio"], abs=1e-6)
    assert [r.text for r in said["replies"]] == [line["text"] for line in plain]
    assert f"R {plain[0]['attention_ratio']:.3f}" in capsys.readouterr().out
    assert Image.open(tmp_path / "tour/plain.png").height > 200


@each_family
def test_every_family_is_asked_steered_and_looked_at(tiny, module, kind):  # noqa: F811
    """Pictures of two sizes. test_measuring compares what `look` measures in every family with eager attention."""
    own = open_model(tiny(module, kind).folder, dtype="float32")
    asked = [picture("red", (90, 60)), picture("blue", (64, 130))], "In Image2, what colour is the picture?"
    plain = own.ask(*asked, max_new_tokens=4)
    steered = own.ask(*asked, steer=AdaptViz(rule="add", bands=Bands.fixed(3.0)), max_new_tokens=4)
    assert plain.target == 2 and plain.ratio == pytest.approx(plain.shares[1]) and sum(plain.shares) == pytest.approx(1)
    assert plain.scale == 1 and steered.scale == 3 and steered.ratio != plain.ratio
    assert len(plain.maps) == 2 and plain.heatmap(60).height >= 60
    looked = own.look(*asked, ["red", "blue"])
    assert [one.text for one in looked] == ["red", "blue"]
    assert all(0 < one.ratio < 1 for one in looked)
    assert [one.confidence for one in looked] == pytest.approx([plain.confidence] * 2, abs=1e-5)  # of the same prompt
