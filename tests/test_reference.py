"""Reference log-probs from disk: the same loss as on the fly, resumable, and refused with the reason."""

import json
import math
import shutil
from dataclasses import replace

import pytest
import torch

from llava.checkpoints import open_checkpoint
from llava.image import ImageStore
from llava.records import DataError
from llava.run_folder import differences
from tests.test_trainer import fill_lora_b, make_trainer, one_batch, pairs  # noqa: F401  fixtures
from train.llava_hound_dpo.reference import HEADER, LAYOUT_VERSION, ReferenceCache, describe_reference
from train.llava_hound_dpo.scoring import Scores
from train.llava_hound_dpo.trainer import METRICS

FULL = ("--lora_enable", "False")


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def filled(trainer):
    """The trainer with its cache filled as before the first step."""
    dataset = trainer.train_dataset
    trainer.fill_reference(dataset, trainer.reference.missing(dataset.pairs))
    return trainer


def part(folder):
    """The one file of log-probs of a folder."""
    (file,) = folder.glob("part-*.jsonl")
    return file


# ---- the numbers


@pytest.mark.parametrize("more", [(), ("--freeze_mm_mlp_adapter", "False")], ids=["lora", "lora and projector"])
def test_loss_and_gradients_are_those_of_the_reference_on_the_fly(make_trainer, cache, more):  # noqa: F811
    """Nine pairs in one row; the cache was filled in rows of two, with an adapter that is not zero."""

    def step(*flags):
        trainer = make_trainer("--gamma", "0.5", *more, *flags, seed_b=1)
        if trainer.reference is not None:
            filled(trainer)
        trainer.model.train()
        loss, metrics = trainer.compute_loss(trainer.model, one_batch(trainer), return_outputs=True)
        loss.backward()
        gradients = {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}
        return loss, metrics, gradients

    loss, metrics, gradients = step()
    cached, cached_metrics, cached_gradients = step("--reference_cache", str(cache))
    assert abs(metrics[:, METRICS.index("rewards/margins")]).min() > 1e-3  # policy and reference do differ
    assert cached.item() == pytest.approx(loss.item(), abs=1e-5)
    torch.testing.assert_close(cached_metrics, metrics, atol=1e-4, rtol=0, equal_nan=True)
    assert gradients.keys() == cached_gradients.keys() and gradients
    for name, gradient in gradients.items():
        torch.testing.assert_close(cached_gradients[name], gradient, atol=1e-5, rtol=1e-4, msg=name)


def test_from_rows_of_the_same_pairs_it_is_the_same_to_the_last_bit(make_trainer, cache):  # noqa: F811
    trainer = make_trainer("--reference_cache", str(cache), "--per_device_eval_batch_size", "9", seed_b=1)
    filled(trainer)
    batch = one_batch(trainer)
    stored = trainer._reference(trainer.model, batch, trainer._encode(batch["pixels"]), trainer.train_dataset)
    trainer.reference = None
    on_the_fly = trainer._reference(trainer.model, batch, trainer._encode(batch["pixels"]), None)
    assert torch.equal(stored.chosen, on_the_fly.chosen) and torch.equal(stored.rejected, on_the_fly.rejected)


def test_a_training_step_uses_the_cache_and_no_second_forward(make_trainer, cache, monkeypatch):  # noqa: F811
    import train.llava_hound_dpo.trainer as module

    trainer = filled(make_trainer("--reference_cache", str(cache), seed_b=1))
    calls, score = [], module.score
    monkeypatch.setattr(module, "score", lambda *a, **k: calls.append(1) or score(*a, **k))
    trainer.compute_loss(trainer.model, one_batch(trainer))
    trainer.reference = None
    trainer.compute_loss(trainer.model, one_batch(trainer))
    assert len(calls) == 1 + 2


def test_training_fills_it_first_also_for_evaluation_and_the_next_run_reads_it(make_trainer, cache, monkeypatch):  # noqa: F811
    flags = ("--reference_cache", str(cache), "--eval_split", "0.2", "--save_strategy", "no", "--max_steps", "2")
    trainer = make_trainer(*flags, "--attention_weight", "0", "--learning_rate", "1e-2")
    trainer.train()
    assert trainer.state.log_history[0]["losses/dpo"] == pytest.approx(math.log(2), abs=1e-5)
    assert math.isfinite(trainer.evaluate()["eval_losses/dpo"])
    again = make_trainer(*flags, "--beta", "0.5")  # another arm of a sweep
    assert again.reference.status(again.train_dataset.pairs) == f"7 of 7 pairs in {cache}"
    monkeypatch.setattr(again.reference, "append", None)  # calling it would raise
    again.train()


@pytest.mark.parametrize("gate", ["none", "preferred"])
def test_sft_needs_none_and_says_so(make_trainer, cache, caplog, gate):  # noqa: F811
    flags = ("--dpo_alpha", "0", "--gamma", "1", "--attention_gate", gate)
    with caplog.at_level("INFO"):
        trainer = make_trainer(*flags, "--reference_cache", str(cache))
    assert trainer.reference is None and "is not used" in caplog.text


def test_full_fine_tuning_takes_its_reference_from_the_start(make_trainer, tmp_path):  # noqa: F811
    trainer = make_trainer(*FULL, "--attention_weight", "0", "--max_steps", "3", "--learning_rate", "1e-3")
    assert trainer.reference.folder == tmp_path / "out" / "reference"
    trainer.model.eval()
    adapter = make_trainer("--attention_weight", "0")
    batch = one_batch(adapter)
    expected = adapter._reference(adapter.model, batch, adapter._encode(batch["pixels"]), None)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "losses/dpo" in log]
    assert logs[0]["losses/dpo"] == pytest.approx(math.log(2), abs=1e-5)
    assert logs[-1]["losses/dpo"] < math.log(2) - 0.01
    found = trainer.reference.lookup(trainer.train_dataset.pairs)
    for name in ("chosen", "rejected", "chosen_end", "rejected_end"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), atol=1e-4, rtol=1e-5)


def test_full_fine_tuning_and_lora_share_one_cache(make_trainer, cache):  # noqa: F811
    filled(make_trainer("--reference_cache", str(cache), seed_b=1))
    full = make_trainer(*FULL, "--reference_cache", str(cache))
    assert full.reference.missing(full.train_dataset.pairs) == []


# ---- killed, changed, damaged


def test_a_killed_filling_goes_on_where_it_was(make_trainer, cache):  # noqa: F811
    """A kill leaves six whole lines and one that is cut short; they stay as they are, the others are added."""
    filled(make_trainer("--reference_cache", str(cache)))
    file = part(cache)
    whole = file.read_text().splitlines(keepends=True)
    file.write_text("".join(whole[:6]) + whole[6][:-20])
    again = make_trainer("--reference_cache", str(cache))
    assert again.reference.missing(again.train_dataset.pairs) == [6, 7, 8]
    filled(again)
    assert file.read_text() == "".join(whole[:6]) + whole[6][:-20]
    third = make_trainer("--reference_cache", str(cache))
    assert third.reference.missing(third.train_dataset.pairs) == []
    stored = third.reference.lookup(third.train_dataset.pairs).chosen.tolist()
    assert stored == pytest.approx([json.loads(line)["chosen"] for line in whole], abs=1e-5)


@pytest.mark.parametrize(
    "damage",
    [
        lambda line: line[:-20] + "\n",
        lambda line: line.replace('"chosen": ', '"chosen": "x", "was": '),
        lambda line: line.replace('"key"', '"kee"'),
        lambda line: "\n",
        lambda line: line.replace('"rejected": ', '"rejected": NaN, "was": '),
    ],
    ids=["cut", "not a number", "no key", "empty", "nan"],
)
def test_a_damaged_line_in_the_middle_is_one_clear_error(make_trainer, cache, damage):  # noqa: F811
    filled(make_trainer("--reference_cache", str(cache)))
    file = part(cache)
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join([*lines[:3], damage(lines[3]), *lines[4:]]))
    with pytest.raises(ValueError, match=r"part-0-.*jsonl line 4: a damaged entry; delete"):
        make_trainer("--reference_cache", str(cache))


def changed(flags, monkeypatch, tmp_path, what):
    """Flags of a run whose reference is another one, and what the refusal must name."""
    if what == "weights":
        config = tmp_path / "copy" / "generation_config.json"
        config.write_text(config.read_text() + "\n")
        return flags, "weights"
    if what == "precision":
        return (*flags, "--bf16", "True"), "computed in float32 there,"
    if what == "picture settings":
        return (*flags, "--image_aspect_ratio", "crop"), "image_aspect_ratio pad there, crop here"
    monkeypatch.setattr("train.llava_hound_dpo.reference.LAYOUT_VERSION", 99)
    return flags, f"row layout {LAYOUT_VERSION} there, 99 here"


@pytest.mark.parametrize("what", ["weights", "precision", "picture settings", "layout"])
@pytest.mark.parametrize("mode", [(), FULL], ids=["lora", "full"])
def test_a_cache_of_another_reference_is_refused_with_the_difference(
    make_trainer, checkpoint, cache, monkeypatch, tmp_path, what, mode  # noqa: F811
):  # fmt: skip
    model = shutil.copytree(checkpoint, tmp_path / "copy")
    flags = ("--reference_cache", str(cache), "--model_name_or_path", str(model), *mode)
    filled(make_trainer(*flags))
    make_trainer(*flags)
    flags, named = changed(flags, monkeypatch, tmp_path, what)
    with pytest.raises(ValueError, match="were made from something else") as caught:
        make_trainer(*flags)
    assert named in str(caught.value) and "\n" not in str(caught.value) and str(cache) in str(caught.value)
    assert str(caught.value).count("there,") == 1  # nothing else


def test_changed_processor_settings_are_named_one_by_one(checkpoint):
    def made_from(**changes):
        opened = open_checkpoint(checkpoint)
        vars(opened.family.image_processor).update(changes)
        return describe_reference(opened, "fp32")

    assert differences(made_from(), made_from()) == []
    (phrase,) = differences(made_from(), made_from(image_mean=[0, 0, 0]))
    assert phrase.startswith("picture settings: image_mean [0.48") and phrase.endswith("there, [0, 0, 0] here")


def test_a_cache_without_its_header_is_refused(make_trainer, cache):  # noqa: F811
    filled(make_trainer("--reference_cache", str(cache)))
    (cache / HEADER).unlink()
    with pytest.raises(ValueError, match="without a reference"):
        make_trainer("--reference_cache", str(cache))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("answer", "whose prompt or answers have changed since"),
        ("picture", "whose pictures have changed since"),
        ("id", "never computed"),
    ],
)
def test_a_hole_is_refused_where_it_cannot_be_filled(make_trainer, cache, pairs, change, reason):  # noqa: F811
    """Full fine-tuning that goes on from a checkpoint; the message names the pair and what differs."""
    filled(make_trainer(*FULL, "--reference_cache", str(cache)))
    records = json.loads(pairs.read_text())
    if change == "answer":
        records[4]["chosen"] = "light blue"
    elif change == "id":
        records[4] |= {"id": "new", "chosen": "light blue"}
    else:
        picture = pairs.parent / "images" / records[4]["image"][0]
        picture.write_bytes(picture.read_bytes() + b"\0")
    pairs.write_text(json.dumps(records))
    again = make_trainer(*FULL, "--reference_cache", str(cache))
    dataset = again.train_dataset
    assert again.reference.missing(dataset.pairs) == [4]
    assert again.reference.status(dataset.pairs).endswith(f"1 to compute (1 {reason})")
    again.state.global_step = 1
    with pytest.raises(DataError, match=r"record 5 \(id") as caught:
        again.callback_handler.on_train_begin(again.args, again.state, again.control)
    assert reason in str(caught.value)
    again.model.train()
    with pytest.raises(DataError, match="record 5"):
        again.compute_loss(again.model, one_batch(again))


def test_with_lora_a_hole_is_filled_also_when_a_run_goes_on(make_trainer, cache):  # noqa: F811
    """The adapter has moved by then; turned off it is the reference still."""
    trainer = filled(make_trainer("--reference_cache", str(cache)))
    expected = trainer.reference.lookup(trainer.train_dataset.pairs).chosen
    file = part(cache)
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:5]))
    again = make_trainer("--reference_cache", str(cache))
    fill_lora_b(again.model, 7)
    again.state.global_step = 1
    again.callback_handler.on_train_begin(again.args, again.state, again.control)
    found = again.reference.lookup(again.train_dataset.pairs).chosen
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["chosen", "rejected", "chosen_end", "rejected_end"])
def test_log_probs_that_are_not_finite_are_not_stored(make_trainer, cache, name):  # noqa: F811
    trainer, scores = make_trainer("--reference_cache", str(cache)), Scores(*torch.zeros(4, 2))
    with pytest.raises(FloatingPointError, match="record 2"):
        scores = replace(scores, **{name: torch.tensor([1.0, math.nan])})
        trainer.reference.append(trainer.train_dataset.pairs[:2], scores)
    assert not cache.exists()


def test_two_runs_may_fill_one_cache_at_the_same_time(make_trainer, cache):  # noqa: F811
    first, second = (make_trainer("--reference_cache", str(cache)) for _ in range(2))
    for trainer, indices in ((first, range(5)), (second, range(3, 9)), (first, range(5, 6))):
        trainer.fill_reference(trainer.train_dataset, list(indices))
    assert len(list(cache.glob("part-*.jsonl"))) == 2
    third = ReferenceCache(cache, first.reference.made_from, ImageStore(first.train_dataset.store.path))
    third.load()
    assert third.missing(first.train_dataset.pairs) == []
