"""The step and answers on a GPU that is none: the CPU's numbers, nothing of two devices, few waits (scripts.bench)."""

import pytest
import torch
import torch.nn.functional as F

from scripts.bench import common, fake_gpu
from scripts.bench.posing import GPU, MixedDevices, OnGpu, Posing, pose, posed
from scripts.bench.steps import build_trainer
from train.llava_hound_dpo.trainer import AttentionAwareDPOTrainer

WAITING = {
    "item": (lambda x: x.sum().item(), 1),
    "truth": (lambda x: bool(x.any()), 1),
    "format": (lambda x: f"{x.sum()}", 1),
    "list": (lambda x: x.tolist(), 1),
    "cpu": (lambda x: x.cpu(), 1),
    "mask": (lambda x: x[x > 0], 1),
    "mask, backward": (lambda x: x.float().requires_grad_()[x > 0].sum().backward(), 2),
    "written by mask": (lambda x: x.clone().index_put_((x > 0,), x[0]), 1),
    "nonzero": (lambda x: x.nonzero(), 1),
    "selected": (lambda x: x.masked_select(x > 0), 1),
    "bincount": (lambda x: x.bincount(), 2),
    "unique": (lambda x: x.unique(), 1),
    "equal": (lambda x: torch.equal(x, x), 1),
    "repeated": (lambda x: x.repeat_interleave(x), 1),
}
AT_ONCE = {
    "repeated to a known size": lambda x: x.repeat_interleave(x, output_size=3),
    "by places": lambda x: x[x],
    "counted": lambda x: torch.zeros(3, device=x.device).index_add(0, x, torch.ones_like(x).float()),
    "where": lambda x: torch.where(x > 0, x, 0) + torch.tensor(2),
    "made there": lambda x: torch.arange(3, device=x.device) + x,
    "filled": lambda x: torch.zeros(4, device="cuda").masked_fill(F.pad(x, (0, 1)) > 0, 1.0),
}


def on_gpu():
    return posed(torch.tensor([0, 1, 2]))


@pytest.mark.parametrize("name", WAITING)
def test_what_waits_is_noted_where_it_stands(name):
    run, due = WAITING[name]
    with Posing() as noted:
        run(on_gpu())
    assert noted.syncs.total() == due
    assert all(line.startswith("tests/test_fake_gpu.py:") or line == "backward" for line in noted.syncs)


@pytest.mark.parametrize("name", AT_ONCE)
def test_what_does_not_wait_is_not_noted(name):
    with Posing() as noted:
        found = AT_ONCE[name](on_gpu())
    assert found.device == GPU and not noted.syncs and not noted.copies and noted.operations


def test_devices_are_not_mixed():
    with Posing():
        for mixed in (lambda x: x + torch.ones(3), lambda x: torch.cat([torch.ones(1), x])):
            with pytest.raises(MixedDevices, match="test_fake_gpu"):
                mixed(on_gpu())


def test_only_pinned_copies_that_are_not_waited_for_do_not_block():
    large = torch.zeros(20_000)
    with Posing() as noted:
        large.pin_memory().to("cuda", non_blocking=True)
        assert not noted.copies
        assert isinstance(large.to("cuda", non_blocking=True), OnGpu)
        large.pin_memory().to(GPU)
        torch.tensor([1.0], device="cuda")
    assert noted.copies.total() == 3 and not noted.syncs


def test_weights_without_values_answer_what_they_are_asked():
    with torch.device("meta"):
        layer = torch.nn.Linear(3, 4)
    with Posing() as noted:
        out = pose(layer)(on_gpu()[None].float())
        assert out.shape == (1, 4) and out.device == GPU
        assert bool(out.isfinite().all()) and out.argmax(dim=-1).tolist() == [0] and out.sum().item() == 1
        out.sum().backward()
    assert layer.weight.grad.shape == (4, 3) and noted.syncs.total() == 3


@pytest.fixture(scope="module", params=["llava", "qwen"])
def both(request, tmp_path_factory):
    """(of a family, its pairs, a trainer on the CPU, the same on the GPU that is none)."""
    folder, family = tmp_path_factory.mktemp(request.param), common.FAMILIES[request.param]("tiny")
    pairs = common.build_pairs(folder / "data", common.Shape(2, 6, 5), family)
    trainers = [
        build_trainer(fake_gpu.build_policy(family, "tiny"), pairs, folder / kind.__name__, kind)
        for kind in (AttentionAwareDPOTrainer, fake_gpu.FakeTrainer)
    ]
    trainers[0].current_gradient_accumulation_steps = 1
    return family, pairs, *trainers


@pytest.mark.parametrize("cached", [False, True])
def test_a_micro_batch_is_the_cpu_s_and_waits_five_times_at_most(both, cached):
    _, pairs, here, there = both
    here.reference = there.reference = fake_gpu.KnownReference() if cached else None
    batch = here.data_collator(fake_gpu.step_of(pairs))
    here.model.zero_grad()
    expected = here.training_step(here.model, batch)
    noted, loss = fake_gpu.micro_batch(there, batch)
    assert noted.syncs.total() <= (3 if cached else 5), noted.syncs
    assert not noted.copies
    with Posing():
        assert torch.equal(loss.cpu(), expected) and torch.equal(there._sums.cpu()[1], here._sums[1])
        for (name, ours), theirs in zip(there.model.named_parameters(), here.model.parameters(), strict=True):
            assert (ours.grad is None) == (theirs.grad is None), name
            assert ours.grad is None or torch.equal(ours.grad.cpu(), theirs.grad), name


@pytest.mark.parametrize("steer", [None, fake_gpu.boost])
def test_answers_are_the_cpu_s(both, steer):
    family, pairs, here, there = both
    (_, expected), (_, found) = (
        fake_gpu.answers(trainer.model, family, pairs, steer, new_tokens=2) for trainer in (here, there)
    )
    for one, other in zip(found, expected, strict=True):
        assert one.tokens == other.tokens and one.factor == other.factor == (1.5 if steer else 1.0)
        assert torch.equal(one.masses, other.masses)


def test_without_values_the_same_code_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(fake_gpu, "SMALL", ())
    found = dict(fake_gpu.run_all(tmp_path, "llava", "tiny", 1, 2))
    assert [noted.syncs.total() for noted in found.values()][:2] == [5, 3]
    assert len(found) == 4 and not any("scoring.py" in line for noted in found.values() for line in noted.syncs)
