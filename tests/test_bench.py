"""The training benchmark: what it compares computes the same, and its command runs."""

from functools import partial

import pytest
import torch

from llava.families.llava15 import Llava15
from scripts.bench import common, generation, measuring, training
from scripts.bench.common import Shape, add_lora, build_pairs
from scripts.bench.steps import NAMES, build_steps, difference, lacks_trl
from tests.conftest import tiny_model

SHAPE = Shape(images=2, chosen=7, rejected=4, count=3)


@pytest.fixture(scope="module")
def steps(processor, tmp_path_factory):
    """Every way of the benchmark on the miniature, with the same three pairs. A step changes no weight."""
    folder, build = tmp_path_factory.mktemp("steps"), partial(tiny_model, processor)
    family = Llava15(build().config, processor.tokenizer, processor.image_processor)
    pairs = build_pairs(folder / "data", SHAPE, family)
    return build_steps(NAMES, add_lora(build(), family, rank=4), build, pairs, folder)


def test_all_compute_the_same_loss_and_gradients(steps):
    losses, gradients = {}, {}
    for name, step in steps.items():
        losses[name], gradients[name] = step().item(), step.gradients()
    assert losses["eager"] == pytest.approx(losses["ours"], rel=1e-5)
    assert losses["trl"] == pytest.approx(losses["plain"], rel=1e-5)
    assert difference(gradients["ours"], gradients["eager"]) < 1e-4
    assert difference(gradients["plain"], gradients["trl"]) < 1e-4
    # The two kinds do differ, so that the above says something of the attention term as well.
    assert losses["ours"] > losses["plain"] + 0.01
    assert difference(gradients["ours"], gradients["plain"]) > 0.01
    assert all(len(own) == 2 * 7 * 4 for own in gradients.values())  # A and B of 7 layers of 4 blocks


@pytest.mark.parametrize(("name", "peer"), [("ours", "eager"), ("plain", "trl")])
def test_qwen_computes_the_same_as_its_peers(name, peer, tmp_path):
    """Its peers make their own positions, on three axes; with those of text alone they would differ."""
    family = common.build_qwen("tiny")
    if peer == "trl" and lacks_trl(family):
        pytest.skip("TRL takes Qwen2.5-VL's own processor, which needs torchvision")
    build = partial(common.build_base, family)
    pairs = build_pairs(tmp_path / "data", Shape(images=2, chosen=7, rejected=4, count=1), family)
    assert pairs.pairs[0].image_tokens == 2 * 144
    policy = add_lora(build(), family, rank=4)
    ours, theirs = build_steps((name, peer), policy, build, pairs, tmp_path).values()
    # One after the other: the steps may be of one policy, whose gradients are those of the last.
    (loss, own), (their_loss, others) = [(step().item(), step.gradients()) for step in (ours, theirs)]
    assert their_loss == pytest.approx(loss, rel=1e-5)
    assert len(own) == 2 * 7 * 4 and difference(own, others) < 1e-4
    if peer == "eager":
        del theirs.batch["mm_token_type_ids"]
        theirs()
        assert difference(own, theirs.gradients()) > 0.01


def test_a_step_does_not_add_to_the_one_before(steps):
    first, again = [(steps["ours"]().item(), steps["ours"].gradients()) for _ in range(2)]
    assert first[0] == again[0] and difference(first[1], again[1]) == 0


def test_all_are_checkpointed(steps):
    """A block's forward runs again in the backward pass: three times with the reference's."""
    for name, step in steps.items():
        calls = []
        block = step.policy.get_base_model().model.language_model.layers[0].mlp
        handle = block.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        step()
        handle.remove()
        assert len(calls) == 3, name


def test_gradients_of_other_weights_are_not_compared():
    with pytest.raises(ValueError, match="different weights"):
        difference({"a": torch.ones(1)}, {"b": torch.ones(1)})


@pytest.mark.parametrize("publish", [False, True])
def test_only_what_is_published_changes_a_tracked_file(tmp_path, monkeypatch, publish):
    """Smaller than small, from any folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common, "PUBLISHED", tmp_path / "tracked/RESULTS.md")
    monkeypatch.setattr(training, "compare", lambda own, shape, names, folder: ["-"] * 8)
    monkeypatch.setattr("sys.argv", ["training", "--images", "1", *["--publish"] * publish])
    for _ in range(2):
        training.main()
    (written,) = tmp_path.rglob("*.md")
    assert written.relative_to(tmp_path).parts[0] == ("tracked" if publish else "output")
    assert written.read_text().count("\n## ") == 2


@pytest.mark.parametrize("family", list(common.FAMILIES))
def test_the_command_writes_its_table(family, tmp_path, monkeypatch):
    """Smaller than small."""
    monkeypatch.chdir(tmp_path)
    flags = f"--family {family} --size tiny --repeats 1 --images 1"
    monkeypatch.setattr("sys.argv", ["training", *flags.split()])
    training.main()
    text = common.RESULTS.read_text()
    assert text.count("\n## ") == 1 and "out of memory" not in text
    assert f"`python -m scripts.bench.training {flags}`" in text
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| 1")]
    assert [len(row) for row in rows] == [9, 9] and [row.count("-") for row in rows] == [0, 4]
    lacking = 3 if lacks_trl(common.FAMILIES[family]("tiny")) else 0
    assert text.count("needs torchvision") == lacking


def test_ways_to_answer_are_compared(tmp_path, monkeypatch):
    """Smaller than small; all ways must give the same tokens, but for the scaled one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(generation, "boost", lambda *_: None)
    flags = "--family llava --size tiny --prompts 2 --images 1 --new_tokens 3 --repeats 1"
    monkeypatch.setattr("sys.argv", ["generation", *flags.split()])
    generation.main()
    text = common.RESULTS.read_text()
    assert f"`python -m scripts.bench.generation {flags}`" in text
    assert text.count("2 of 2") == len(generation.PAIRS)


def test_measuring_is_compared_with_generating(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = "--family qwen --size tiny --prompts 2 --images 1 --new_tokens 3 --repeats 1"
    monkeypatch.setattr("sys.argv", ["measuring", *flags.split()])
    measuring.main()
    text = common.RESULTS.read_text()
    assert f"`python -m scripts.bench.measuring {flags}`" in text
    assert float(text.split("largest difference of ratio and confidence | ")[1].split()[0]) < 1e-5


@pytest.mark.parametrize("flag", ["--repeats", "--images"])
@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "1.5", "100000000000"])
def test_numbers_that_cannot_be_meant_are_one_line(flag, value, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["training", flag, value])
    with pytest.raises(SystemExit) as ended:
        training.main()
    error = capsys.readouterr().err
    assert ended.value.code == 2 and flag in error and value in error and error.count("\n") == 1
