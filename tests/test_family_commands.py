"""Every family through the commands that users know, on tiny checkpoints in their real layout."""

import json
import math
import sys
from importlib import import_module

import numpy as np
import pytest
import torch
from PIL import Image

from data_gen.gen_chosen_rejected import __main__ as gen_chosen_rejected
from inference.llava_hound_dpo import evaluate, run_inference
from inference_optimization.llava_hound_dpo import run_adaptive, tune
from llava.checkpoints import open_checkpoint
from scripts import discover_heads, doctor, draw_attention, export
from tests.conftest import preference
from tests.test_family_contract import CASES, Tiny, separate, tiny  # noqa: F401  a fixture
from train.llava_hound_dpo import run_dpo

AGAIN = ("internvl_qwen2", "internvl_llama", "llava_onevision_converted")  # the same class
ONE_EACH = list({name: (name, kind) for name, kind in CASES if kind not in AGAIN}.values())
one_of_each = pytest.mark.parametrize(("module", "kind"), ONE_EACH, ids=[kind for _, kind in ONE_EACH])
KINDS = [case for case in CASES if case[1] not in AGAIN]
each_kind = pytest.mark.parametrize(("module", "kind"), KINDS, ids=[kind for _, kind in KINDS])
SIZES = ((90, 60), (64, 130), (75, 75), (200, 120), (60, 60))  # px


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Pairs, questions and instructions of all formats about noisy pictures of five sizes."""
    folder, rng = tmp_path_factory.mktemp("world"), np.random.default_rng(0)
    (folder / "images").mkdir()
    for number, (width, height) in enumerate(SIZES):
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"images/{number}.png")
    one = "<image>\nIn Image2, what colour is the picture?"
    pairs = [
        preference(0, 2, image=["0.png", "1.png"]),
        preference(1, 3, image=["2.png", "3.png", "4.png"]),
        preference(2, 1, image=["3.png"], prompt=one, chosen="a green one"),
        preference(3, 1, image=["3.png"], prompt="<image>\nIn the centre, what is it?", chosen="blue"),
    ]
    pairs[0]["rejected"] = [pairs[0]["rejected"], "white"]
    pairs[2] |= {"image_type": "collage", "grid": [2, 2], "target": 2}
    pairs[3] |= {"image_type": "pip", "target": 1}
    asked = [{name: pair[name] for name in pair if name not in ("chosen", "rejected")} for pair in pairs]
    questions = [own | {"answer": pair["chosen"]} for own, pair in zip(asked, pairs, strict=True)]
    for name, records in (("train", pairs), ("test", questions)):
        (folder / f"{name}.json").write_text(json.dumps(records))
    return folder


def call(monkeypatch, module, *words):
    """The exit code of a command in this process."""
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, words)])
    try:
        return module.main() or 0
    except SystemExit as ended:
        return ended.code or 0
    finally:
        run_dpo._held.close()  # as the end of the process would


def training(own, world, output, *more):
    return [
        "--model_name_or_path", own.folder, "--data_path", world / "train.json", "--image_folder", world / "images",
        "--output_dir", output, "--per_device_train_batch_size", 4, "--max_steps", 2, "--logging_steps", 1, "--lora_r",
        4, "--learning_rate", "1e-3", "--gradient_checkpointing", "True", "--use_cpu", "True", "--report_to", "none",
        "--disable_tqdm", "True", *more,
    ]  # fmt: skip


def asking(model, world, output):
    files = ["--data_path", world / "test.json", "--image_folder", world / "images", "--output", output]
    return ["--model_name_or_path", model, *files, "--max_new_tokens", 4, "--num_workers", 0, "--batch_size", 2]


def history(output):
    state = json.loads((output / "trainer_state.json").read_text())
    return [log for log in state["log_history"] if "losses/dpo" in log]


@each_kind
def test_a_training_starts_at_ln_2_and_at_the_log_probs_of_stock_transformers(
    tiny, world, tmp_path, monkeypatch, module, kind  # noqa: F811
):  # fmt: skip
    """With the projector trained and SFT beside DPO; what is saved answers as it did."""
    own, output = tiny(module, kind), tmp_path / "out"
    flags = training(own, world, output, "--gamma", "0.5", "--freeze_mm_mlp_adapter", "False")
    assert call(monkeypatch, run_dpo, *flags) == 0
    first, last = history(output)
    assert first["losses/dpo"] == pytest.approx(math.log(2), abs=1e-5)
    chosen, rejected = expected_logps(own, world)
    assert first["logps/chosen"] == pytest.approx(chosen, abs=2e-5)
    assert first["logps/rejected"] == pytest.approx(rejected, abs=2e-5)
    assert last["losses/total"] < first["losses/total"]
    trained = open_checkpoint(str(output))
    before, after = dict(own.model().named_parameters()), trained.load()
    projector = own.family.projector_modules(own.checkpoint.config)
    for name in projector:
        saved = [p for n, p in after.named_parameters() if f"{name}.modules_to_save" in n]
        assert saved and any(not torch.equal(p, q) for p, q in zip(saved, part(before, name), strict=True)), name
    assert call(monkeypatch, run_inference, *asking(output, world, tmp_path / "answers.jsonl")) == 0
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == 4 and all(0 <= answer["attention_ratio"] <= 1 for answer in answers)
    assert [len(answer["attention_by_image"]) for answer in answers] == [2, 3, 4, 2]
    assert all(sum(answer["attention_by_image"]) == pytest.approx(1, abs=0.02) for answer in answers[:2])


def part(parameters, name):
    return [p for n, p in parameters.items() if f"{name}." in n]


def expected_logps(own, world):
    """Mean log-probs of the chosen and of the rejected answers by stock transformers, rejected ones a mean a pair."""
    stock, family, chosen, rejected = own.stock(), own.family, [], []
    for record in json.loads((world / "train.json").read_text()):
        pictures = [Image.open(world / "images" / name) for name in record["image"]]
        images = family.images([picture.size for picture in pictures])
        ids, pixels = family.expand(family.encode_prompt(record["prompt"]), images), family.pixels(pictures)
        target = torch.ones(sum(len(image.areas) for image in images))
        others = record["rejected"] if isinstance(record["rejected"], list) else [record["rejected"]]
        with torch.no_grad():
            found = [
                separate(own, stock, ids, pixels, family.encode_answer(record["prompt"], answer), target)[0].item()
                for answer in (record["chosen"], *others)
            ]
        chosen.append(found[0])
        rejected.append(sum(found[1:]) / len(others))
    return sum(chosen) / len(chosen), sum(rejected) / len(rejected)


@one_of_each
def test_full_fine_tuning_with_its_reference_cached_and_resumed(tiny, world, tmp_path, monkeypatch, module, kind):  # noqa: F811
    own, output = tiny(module, kind), tmp_path / "out"
    flags = training(own, world, output, "--lora_enable", "False", "--save_steps", "1", "--save_total_limit", "1")
    assert call(monkeypatch, run_dpo, *flags) == 0
    logs = history(output)
    assert logs[0]["losses/dpo"] == pytest.approx(math.log(2), abs=1e-5) and (output / "reference").is_dir()
    checkpoint = open_checkpoint(str(output))
    frozen = {name for name, _ in own.model().named_parameters() if own.family.part_of(name) in own.family.parts()[:2]}
    before, after = own.model().state_dict(), checkpoint.load().state_dict()
    assert all(torch.equal(before[name], after[name]) for name in frozen)
    assert not torch.equal(before["lm_head.weight"], after["lm_head.weight"])
    assert checkpoint.family.render([("<image>\nwhat?", None)]) == own.family.render([("<image>\nwhat?", None)])
    assert call(monkeypatch, run_dpo, *flags) == 0  # finished: nothing to do


@one_of_each
def test_the_tools_run(tiny, world, tmp_path, monkeypatch, capsys, module, kind):  # noqa: F811
    """Plan, doctor, heads, AdaptViz and its tuner, maps, own answers as rejected ones, export."""
    own = tiny(module, kind)
    assert call(monkeypatch, run_dpo, *training(own, world, tmp_path / "plan", "--dry_run", "True")) == 0
    printed = capsys.readouterr().out
    assert "plan (no weights are loaded)" in printed and "TFLOP a pair" in printed
    checked = ["--data_path", world / "train.json", "--image_folder", world / "images"]
    assert call(monkeypatch, doctor, "--model_name_or_path", own.folder, *checked) == 0
    printed = capsys.readouterr().out
    assert "no problem found" in printed and printed.count("target boxes fall on the right image tokens") == 1
    heads = tmp_path / "heads.json"
    words = ["--model_name_or_path", own.folder, *checked, "--max_new_tokens", 3, "--num_workers", 0]
    assert call(monkeypatch, discover_heads, *words, "--output", heads) == 0
    flags = [*asking(own.folder, world, tmp_path / "steered.jsonl"), "--attention_heads", heads, "--top_heads", 3]
    assert call(monkeypatch, run_adaptive, *flags, "--alpha", "1.5") == 0
    scales = {json.loads(line)["scale"] for line in (tmp_path / "steered.jsonl").read_text().splitlines()}
    assert scales == {1.5}
    assert call(monkeypatch, evaluate, "--answers", tmp_path / "steered.jsonl", "--output", tmp_path / "scores") == 0
    tuning = [*asking(own.folder, world, tmp_path / "tuned")[:-2], "--batch_size", 2]
    assert call(monkeypatch, tune, *tuning) == 0
    maps = ["--model_name_or_path", own.folder, "--data_path", world / "test.json", "--image_folder", world / "images"]
    assert call(monkeypatch, draw_attention, *maps, "--output", tmp_path / "maps", "--max_new_tokens", 3) == 0
    assert len(list((tmp_path / "maps").glob("*.png"))) == 4
    assert call(monkeypatch, export, "--model_name_or_path", own.folder, "--output", tmp_path / "whole", "--dtype",
                "float32", "--questions", world / "test.json", "--image_folder", world / "images") == 0  # fmt: skip
    same = open_checkpoint(str(tmp_path / "whole"))
    before, after = own.model().state_dict(), same.load().state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@one_of_each
def test_a_cap_is_kept_in_what_is_trained_and_is_part_of_every_identity(
    tiny, world, tmp_path, monkeypatch, capsys, module, kind  # noqa: F811
):  # fmt: skip
    own, size = tiny(module, kind), (800, 600)
    if own.family.fixed:
        with pytest.raises(ValueError, match=r"--max_image_tokens 5: .* 25"):
            open_checkpoint(own.folder, max_image_tokens=5).family  # noqa: B018
        return
    free = own.family.num_image_tokens(size)
    most = getattr(import_module(f"tests.tiny.{module}"), "CAP", 40)
    capped = open_checkpoint(own.folder, max_image_tokens=most).family
    assert capped.image(size).ids.count(capped.image_id) <= most < free
    flags = training(own, world, tmp_path / "out", "--max_image_tokens", most, "--max_steps", 1)
    assert call(monkeypatch, run_dpo, *flags) == 0
    trained = open_checkpoint(str(tmp_path / "out")).family
    assert trained.num_image_tokens(size) == capped.num_image_tokens(size)  # without the flag
    assert call(monkeypatch, run_dpo, *flags[:-4], "--max_steps", 1) == 2
    assert "max_image_tokens" in capsys.readouterr().err
    answers = asking(tmp_path / "out", world, tmp_path / "answers.jsonl")
    assert call(monkeypatch, run_inference, *answers) == 0
    assert call(monkeypatch, run_inference, *answers, "--max_image_tokens", most) == 2
    assert "max_image_tokens" in capsys.readouterr().err


@pytest.mark.parametrize("tokens", ["0", "-3", "many"])
def test_a_cap_that_is_none_is_refused(tiny, world, tmp_path, monkeypatch, capsys, tokens):  # noqa: F811
    own = tiny(*ONE_EACH[0])
    flags = training(own, world, tmp_path / "out", "--max_image_tokens", tokens)
    assert call(monkeypatch, run_dpo, *flags) == 2 and "max_image_tokens" in capsys.readouterr().err


def test_own_answers_become_rejected_ones(tiny, world, tmp_path, monkeypatch):  # noqa: F811
    """Data generation asks a model of any family."""
    own: Tiny = tiny(*ONE_EACH[0])
    instructions = []
    for record in json.loads((world / "test.json").read_text()):
        turns = [{"from": "human", "value": record["prompt"]}, {"from": "gpt", "value": record["answer"]}]
        kept = {name: record[name] for name in ("id", "image", "image_type", "grid", "target") if name in record}
        instructions.append(kept | {"conversations": turns})
    (tmp_path / "instructions.json").write_text(json.dumps(instructions))
    words = ["--model_name_or_path", own.folder, "--instructions", tmp_path / "instructions.json", "--image_folder",
             world / "images", "--output", tmp_path / "pairs", "--max_new_tokens", 4, "--num_workers", 0]  # fmt: skip
    assert call(monkeypatch, gen_chosen_rejected, *words) == 0
    assert (tmp_path / "pairs/answers.jsonl").read_text().count("\n") == 4
