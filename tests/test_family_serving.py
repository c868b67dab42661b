"""An export answers as its source in plain transformers and in `transformers serve`, of every family.

What needs no torchvision (files, templates) runs everywhere. Plain transformers' processors of most families need it:
where it is not installed the comparison is left out.
"""

import importlib.util
import json
import re
import sys
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import AutoTokenizer

from llava.checkpoints import open_checkpoint
from scripts import export, prove
from tests.conftest import preference
from tests.test_family_contract import each_family, tiny  # noqa: F401  a fixture
from tests.test_prove import NEEDS_SERVER, running_server
from train.llava_hound_dpo import run_dpo

NEEDS_TORCHVISION = pytest.mark.skipif(
    not importlib.util.find_spec("torchvision"), reason="plain transformers' processors need torchvision"
)
# Px of a noisy picture that needs no resampling (of Idefics3 the whole picture still does), so that pillow here and
# torchvision there make the same pixels: random models have near ties, which a step of 255 decides.
SIDES = {"qwen_vl": 224, "llava_onevision": 44, "llava_interleave": 44, "internvl": 56, "idefics3": 224}
NOISY, COLOURS = ("0.png", "1.png", "2.png", "3.png", "4.png"), ("red.png", "green.png", "navy.png", "orange.png")
ASKED = ("what colour is the picture?", "what shape is it?", "how many?", "is it red or green?", "what is shown?")
PROMPT = "Image1:<image>\nImage2: <image>\nIn Image2, what colour is the picture?"
# Prompts with a picture first, two in the middle, last, alone, side by side; and without any.
PROMPTS = ("<image>\nWhat?", PROMPT, "What is this? <image>", "<image>", "<image><image>Why?", "How are you?")
CONVERSATIONS = (
    *([("user", prompt)] for prompt in PROMPTS),
    [("system", "Be brief."), ("user", PROMPT)],
    [("user", PROMPT), ("assistant", "red"), ("user", "Sure?")],
    [("system", "Be brief."), ("user", "<image>\nWhat?"), ("assistant", "a cat"), ("user", "And here:<image>?")],
)
CAPPED = [("qwen_vl", "qwen2_5_vl"), ("internvl", "internvl_qwen3"), ("idefics3", "smolvlm"),
          ("llava_onevision", "llava_onevision")]  # fmt: skip


@pytest.fixture(scope="module")
def exported(tiny, tmp_path_factory):  # noqa: F811
    """Exports every checkpoint once, in float32: the folder."""

    @cache
    def make(module, kind):
        own, folder = tiny(module, kind).checkpoint, tmp_path_factory.mktemp("exported") / kind
        export.export(own, folder, "float32", "hf", export.drawn(own.family))
        return folder

    return make


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """20 prompts of all formats, whose noisy pictures are of the given sizes in px: the folder."""

    @cache
    def make(sizes, coloured=()):
        folder, rng = tmp_path_factory.mktemp("world"), np.random.default_rng(0)
        (folder / "images").mkdir()
        for name, (width, height) in zip(NOISY, sizes, strict=True):
            pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "images" / name)
        for name, size in zip(COLOURS, coloured, strict=False):
            Image.new("RGB", size, name.removesuffix(".png")).save(folder / "images" / name)
        pairs = [pair(number, NOISY, [*NOISY, *COLOURS[: len(coloured)]]) for number in range(20)]
        (folder / "train.json").write_text(json.dumps(pairs))
        asked = [{name: own[name] for name in own if name not in ("chosen", "rejected")} for own in pairs]
        (folder / "test.json").write_text(json.dumps([own | {"answer": "red"} for own in asked]))
        return folder

    return make


def exact(module):
    """Sizes of `world` at which nothing is resampled but pictures of one colour, which every filter keeps."""
    side = SIDES[module]
    return ((side, side),) * 5, ((2 * side, side), (side, 3 * side), (75, 61), (200, 140))


def pair(number, many, alone):
    """Of five prompts three are sequences of one to three pictures, one is about a collage, one about pic-in-pic."""
    kind, asked = number % 5, ASKED[(number // 5 + number) % 5]
    count = kind + 1 if kind < 3 else 1
    target = 1 + number % count
    own = [many[(number + n) % len(many)] for n in range(count)]
    own = own if count > 1 else [alone[(number + number // 5) % len(alone)]]
    lines = "".join(f"Image{n + 1}:<image>\n" for n in range(count))
    found = preference(number, count, target, image=own, prompt=f"{lines}In Image{target}, {asked}")
    found |= {"image_type": "sequence"} if kind < 3 else {}
    found |= {"image_type": "collage", "grid": [2, 2], "prompt": f"<image>\nIn Image1, {asked}"} if kind == 3 else {}
    return found | ({"image_type": "pip", "prompt": f"<image>\nIn the centre, {asked}"} if kind == 4 else {})


@contextmanager
def command_line(*words):
    """`sys.argv` with these words."""
    argv, sys.argv = sys.argv, [*map(str, words)]
    try:
        yield
    finally:
        sys.argv = argv


def proved(folder, world, capsys, *more):
    """(exit code, output) of `scripts.prove`."""
    words = ["--questions", world / "test.json", "--image_folder", world / "images", "--max_new_tokens", 16]
    with command_line("prove", "--model", folder, *words, *more):
        code = prove.main()
    return code, capsys.readouterr().out


# ---- files and templates


@each_family
def test_an_export_has_the_files_of_its_source(tiny, exported, module, kind):  # noqa: F811
    own, folder = tiny(module, kind), exported(module, kind)
    names = {file.name for file in folder.iterdir()}
    there = {file.name for file in Path(own.folder).iterdir()}
    assert there <= names
    pictures, source = (read(place, "preprocessor_config.json") for place in (folder, own.folder))
    assert pictures["processor_class"] == source["processor_class"]
    assert pictures["image_processor_type"] == source["image_processor_type"]
    assert "Pil" not in pictures["image_processor_type"]  # a name that earlier transformers know
    for name in there & {"processor_config.json", "video_preprocessor_config.json"}:
        assert read(folder, name) == read(own.folder, name)
    stored = open_checkpoint(str(folder))
    assert stored.family.image_processor.to_dict() == own.family.image_processor.to_dict()
    stops = read(folder, "generation_config.json")["eos_token_id"]
    assert own.family.end_id in (stops if isinstance(stops, list) else [stops])


def read(folder, name):
    return json.loads((Path(folder) / name).read_text(encoding="utf-8"))


@each_family
@pytest.mark.parametrize("turns", CONVERSATIONS, ids=range(len(CONVERSATIONS)))
def test_the_exported_template_makes_the_prompts_of_training(tiny, exported, module, kind, turns):  # noqa: F811
    """Of messages in parts, as servers hand them on, and of those that are a text."""
    family, folder = tiny(module, kind).family, exported(module, kind)
    system = next((text for role, text in turns if role == "system"), None)
    said = [text for role, text in turns if role != "system"]
    expected = family.render([*zip(said[::2], [*said[1::2], None], strict=True)], system)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    pictures = range(sum(text.count("<image>") for text in said))
    parts = export.messages_of(turns, pictures, lambda _: {"type": "image"})
    texts = [{"role": role, "content": text.replace("<image>", family.placeholder)} for role, text in turns]
    for messages in (parts, texts):
        found = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert found == expected


# ---- plain transformers


@NEEDS_TORCHVISION
@each_family
def test_plain_transformers_answers_alike(exported, world, capsys, module, kind):
    """20 of 20 where nothing is resampled; of other pictures, 20 of 20 with the resampling of training."""
    folder = exported(module, kind)
    code, output = proved(folder, world(*exact(module)), capsys)
    assert code == 0 and f"{prove.PLAIN}: 20 of 20 answers are the same" in output
    assert difference(output) < 1e-5
    mixed = world(((90, 60), (64, 130), (75, 75), (333, 250), (140, 52)))
    code, output = proved(folder, mixed, capsys)
    same = int(re.search(rf"{prove.PLAIN}: (\d+) of 20", output)[1])
    assert same >= 10 and difference(output) < 2e-4 and code == (same < 20)
    if same < 20:
        own = output[output.index(prove.PILLOW) :]
        assert f"{prove.PILLOW}: 20 of 20 answers are the same" in own and difference(own) < 1e-6


def difference(output):
    return float(re.search(r"first token's probability: (\S+)", output)[1])


@NEEDS_TORCHVISION
@each_family
def test_an_export_is_compared_with_plain_transformers(tiny, world, tmp_path, capsys, module, kind):  # noqa: F811
    mixed = world(((90, 60), (64, 130), (75, 75), (333, 250), (140, 52)))
    words = ["--output", tmp_path / "whole", "--dtype", "float32", "--questions", mixed / "test.json"]
    with command_line(
        "export", "--model_name_or_path", tiny(module, kind).folder, *words, "--image_folder", mixed / "images"
    ):
        export.main()
    export._held.close()
    output = capsys.readouterr().out
    assert "plain transformers makes the same tokens of 20 prompts, the same pixels if it resamples by pillow" in output


@NEEDS_TORCHVISION
def test_an_export_whose_pictures_plain_transformers_cuts_otherwise_is_refused(tiny, exported, tmp_path, capsys):  # noqa: F811
    family, folder = tiny("internvl", "internvl_qwen3").family, tmp_path / "changed"
    folder.mkdir()
    for file in exported("internvl", "internvl_qwen3").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    pictures = folder / "preprocessor_config.json"
    for change, what in (({"max_patches": 1}, "tokens"), ({"image_mean": [0.5] * 3}, "pictures, by")):
        own = read(exported("internvl", "internvl_qwen3"), pictures.name) | change
        pictures.write_text(json.dumps(own))
        with pytest.raises(SystemExit):
            export.compare_inputs(family, folder, export.drawn(family))
        assert f"plain transformers makes other {what}" in capsys.readouterr().err


@pytest.mark.parametrize(("module", "kind"), CAPPED, ids=[kind for _, kind in CAPPED])
def test_an_adapter_trained_under_a_cap_keeps_it_when_exported(tiny, world, tmp_path, capsys, module, kind):  # noqa: F811
    own, mixed = tiny(module, kind), world(((90, 60), (64, 130), (75, 75), (333, 250), (140, 52)))
    most = getattr(import_module(f"tests.tiny.{module}"), "CAP", 40)
    words = ["--data_path", mixed / "train.json", "--image_folder", mixed / "images", "--output_dir", tmp_path / "out",
             "--max_image_tokens", most, "--per_device_train_batch_size", 4, "--max_steps", 1, "--lora_r", 4,
             "--learning_rate", "1e-2", "--use_cpu", "True", "--report_to", "none"]  # fmt: skip
    with command_line("run_dpo", "--model_name_or_path", own.folder, *words):
        run_dpo.main()
    run_dpo._held.close()
    checkpoint, folder = open_checkpoint(str(tmp_path / "out")), tmp_path / "whole"
    export.export(checkpoint, folder, "float32", "hf", export.drawn(checkpoint.family))
    family, size = open_checkpoint(str(folder)).family, (800, 600)
    assert family.image(size).ids.count(family.image_id) <= most < own.family.image(size).ids.count(own.family.image_id)
    if module == "llava_onevision":  # of which the model has a list of its own
        grids = read(folder, "preprocessor_config.json")["image_grid_pinpoints"]
        assert read(folder, "config.json")["image_grid_pinpoints"] == grids
        assert len(grids) < len(own.family.image_processor.image_grid_pinpoints)
    if not importlib.util.find_spec("torchvision"):
        return
    prompt = [("user", "<image>\nWhat?")]
    inputs = export.plain_inputs(export.plain_processor(folder), prompt, [Image.new("RGB", size, "navy")])
    assert (inputs["input_ids"] == family.image_id).sum() <= most
    code, output = proved(folder, mixed, capsys)
    assert code == 0 or f"{prove.PILLOW}: 20 of 20 answers are the same" in output


# ---- a server


@NEEDS_TORCHVISION
@NEEDS_SERVER
@pytest.mark.slow
@each_family
def test_a_server_answers_alike(exported, world, capsys, module, kind):
    folder = exported(module, kind)
    with running_server(folder) as url:
        code, output = proved(folder, world(*exact(module)), capsys, "--endpoint", url, "--endpoint_workers", 1)
    assert code == 0 and f"the server at {url}: 20 of 20 answers are the same" in output
