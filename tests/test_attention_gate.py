"""The attention term on pairs whose chosen answer the policy prefers: against stock transformers, and on its own."""

import json

import pytest
import torch
from torch.nn.functional import logsigmoid

from tests.test_answer_end import pairs, stock  # noqa: F401  two fixtures
from tests.test_packing import ROWS, separate
from tests.test_trainer import make_trainer, one_batch  # noqa: F401  a fixture
from train.llava_hound_dpo import trainer as trainer_module
from train.llava_hound_dpo.checkpoints import COMPLETE, latest_checkpoint
from train.llava_hound_dpo.trainer import METRICS

ALL, BETA, LAMBDA = range(3), 0.1, 2.0
GATED = ("--attention_gate", "preferred")
TERM = ("--attention_layers", "1-2", "--attention_weight", str(LAMBDA), "--attention_threshold", "1")
SFT = ("--dpo_alpha", "0", "--gamma", "1")


def by_hand(model, dataset, alpha, gamma, loss_type, rows):
    """(total, whether the term acts on it) of every pair, one plain forward an answer."""
    totals, acts = [], []

    def compared(logps):
        return logps.mean() if loss_type == "ipo" else logps.sum()

    for item in (dataset[index] for index in ALL):
        pair, pixels = item["pair"], item["pixels"]["pixel_values"]
        answers = (pair.chosen, *pair.rejected)
        logps, maps = zip(*(separate(model, pair.prompt, answer, pixels) for answer in answers), strict=True)
        with model.disable_adapter(), torch.no_grad():
            reference = [compared(separate(model, pair.prompt, answer, pixels)[0]) for answer in answers]
        policy = [compared(own) for own in logps]
        is_image = torch.tensor(pair.prompt) == model.config.image_token_id
        target = torch.zeros(len(pair.prompt)).masked_scatter(is_image, pair.target)
        seen = [m[:, ROWS[rows]] for m in maps[0]]
        ratios = [(m * target).sum(-1).mean() / (m * is_image).sum(-1).mean() for m in seen]
        acts.append(all(policy[0].item() > other.item() for other in policy[1:]))
        term = LAMBDA * torch.relu(1 - torch.stack(ratios).mean()) * acts[-1]
        z = torch.stack([policy[0] - a - (reference[0] - b) for a, b in zip(policy[1:], reference[1:], strict=True)])
        preference = (z - 1 / (2 * BETA)) ** 2 if loss_type == "ipo" else -logsigmoid(BETA * z)
        totals.append(alpha * (preference.mean() + term) + gamma * (term - logps[0].mean()))
    return torch.stack(totals), acts


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("alpha", "gamma", "loss_type", "rows"),
    [(1, 0.3, "sigmoid", "all"), (1, 0, "ipo", "first"), (0, 1, "sigmoid", "first")],
)
def test_loss_and_gradients_are_those_of_separate_forwards_masked_by_hand(
    make_trainer, stock, alpha, gamma, loss_type, rows  # noqa: F811
):
    recipe = ("--dpo_alpha", str(alpha), "--gamma", str(gamma), "--loss_type", loss_type, "--attention_rows", rows)
    trainer = make_trainer(*recipe, "--answer_end", "kept", *TERM, *GATED, seed_b=4)
    model, _ = stock(trainer)
    model.get_base_model().set_attn_implementation("eager")
    totals, acts = by_hand(model, trainer.train_dataset, alpha, gamma, loss_type, rows)
    assert acts == [False, loss_type == "ipo", True]  # the second by token only: its answers differ in length
    trainer.model.train()
    loss, metrics = trainer.compute_loss(trainer.model, one_batch(trainer, ALL), return_outputs=True)
    assert metrics[:, METRICS.index("attention/open")].tolist() == acts
    assert loss.item() == pytest.approx(totals.mean().item(), rel=2e-5)
    loss.backward()
    totals.mean().backward()
    ours, theirs = gradients(trainer.model), gradients(model)
    largest = max(gradient.abs().max().item() for gradient in theirs.values())
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], atol=1e-5 * largest, rtol=1e-3, msg=name)


def test_sft_packs_the_rejected_answers_for_the_gate_and_its_own_loss_stays(make_trainer, monkeypatch):  # noqa: F811
    found = []
    for gate in ((), GATED):
        trainer = make_trainer(*SFT, *TERM, *gate, seed_b=4)
        monkeypatch.setattr(trainer, "_reference", None)  # calling it would raise
        batch = one_batch(trainer, ALL)
        _, metrics = trainer.compute_loss(trainer.model.train(), batch, return_outputs=True)
        found.append((len(batch["row"].rejected), dict(zip(METRICS, metrics.T, strict=True))))
    (none, plain), (rejected, gated) = found
    assert (none, rejected) == (0, 5) and gated["losses/dpo"].isnan().all() and plain["attention/open"].isnan().all()
    for name in ("losses/sft", "logps/chosen", "attention/ratio"):
        torch.testing.assert_close(gated[name], plain[name], atol=2e-5, rtol=1e-5)
    masked = plain["losses/attention"] * gated["attention/open"]
    torch.testing.assert_close(gated["losses/attention"], masked, atol=2e-5, rtol=1e-5)
    assert 0 < masked.count_nonzero() < len(masked)


def test_a_gate_that_is_open_for_all_is_none(make_trainer, monkeypatch):  # noqa: F811
    monkeypatch.setattr(trainer_module, "prefers_chosen", lambda a, b, owner, n: torch.ones(n, dtype=torch.bool))
    found = []
    for gate in ((), GATED):
        trainer = make_trainer(*TERM, *gate, seed_b=4)
        loss = trainer.compute_loss(trainer.model.train(), one_batch(trainer, ALL))
        loss.backward()
        found.append((loss, gradients(trainer.model)))
    (loss, ours), (other, theirs) = found
    assert torch.equal(loss, other) and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("flag", ["attention_rows all first", "attention_gate none preferred"])
def test_a_checkpoint_from_before_the_flag_goes_on_without_it_only(make_trainer, tmp_path, flag):  # noqa: F811
    name, before, value = flag.split()
    plain, other = make_trainer(f"--{name}", before).identity, make_trainer(f"--{name}", value).identity
    assert name not in plain and other == plain | {name: value}
    (tmp_path / "checkpoint-5").mkdir()
    (tmp_path / "checkpoint-5" / COMPLETE).write_text(json.dumps(plain))
    assert latest_checkpoint(tmp_path, json.loads(json.dumps(plain)))
    with pytest.raises(ValueError, match=f"{name} .*{value} here"):
        latest_checkpoint(tmp_path, json.loads(json.dumps(other)))
