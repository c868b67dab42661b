"""Losses by hand and against TRL."""

import math

import pytest
import torch

from train.llava_hound_dpo.losses import (
    PREFERENCE_LOSSES,
    LossSettings,
    hinge_attention,
    log_attention,
    logits_margin,
    prefers_chosen,
    total_loss,
)


def tensor(*values):
    return torch.tensor(values, dtype=torch.float32)


@pytest.mark.parametrize(
    ("z", "beta", "expected"), [(0.0, 0.1, math.log(2)), (10.0, 0.1, 0.31326), (-3.0, 0.5, 1.70141)]
)
def test_sigmoid_loss_by_hand(z, beta, expected):
    assert PREFERENCE_LOSSES["sigmoid"](tensor(z), beta, 0.0).item() == pytest.approx(expected, abs=1e-4)


def test_other_losses_by_hand():
    z = tensor(2.0, -4.0)
    assert PREFERENCE_LOSSES["hinge"](z, 0.5, 0.0).tolist() == [0.0, 3.0]
    assert PREFERENCE_LOSSES["ipo"](z, 0.25, 0.0).tolist() == [0.0, 36.0]
    smoothed = PREFERENCE_LOSSES["sigmoid"](z, 1.0, 0.1)
    for value, x in zip(smoothed.tolist(), z.tolist(), strict=True):
        assert value == pytest.approx(0.9 * math.log1p(math.exp(-x)) + 0.1 * math.log1p(math.exp(x)), abs=1e-5)
    robust = PREFERENCE_LOSSES["robust"](z, 1.0, 0.1)
    for value, x in zip(robust.tolist(), z.tolist(), strict=True):
        expected = (0.9 * math.log1p(math.exp(-x)) - 0.1 * math.log1p(math.exp(x))) / 0.8
        assert value == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(("ratio", "expected"), [(0.5, 0.25), (0.8, 0.0), (0.2, 0.55)])
def test_attention_hinge_golden_values(ratio, expected):
    assert hinge_attention(tensor(ratio), 0.75).item() == pytest.approx(expected, abs=1e-6)


def test_attention_log():
    assert log_attention(tensor(0.5), 0.75).item() == pytest.approx(math.log(2), abs=1e-6)
    assert math.isfinite(log_attention(tensor(0.0), 0.75).item())


@pytest.mark.parametrize("variant", ["hinge", "log"])
def test_total_falls_when_target_mass_rises(variant):
    settings = LossSettings(dpo_alpha=1.0, gamma=0.0, attention_loss=variant, answer_end="kept")
    ratio = tensor(0.4).requires_grad_()
    loss, _ = total_loss(settings, tensor(-3.0), tensor(2.0), ratio, tensor(0.0))
    loss.backward()
    assert ratio.grad.item() < 0


def test_total_is_the_formula_of_the_design():
    chosen, tokens, ratio, z = tensor(-3.0, -8.0), tensor(2.0, 4.0), tensor(0.5, 0.9), tensor(1.0, -2.0)
    dpo = [math.log1p(math.exp(-0.1)), math.log1p(math.exp(0.2))]
    sft, attention = [1.5, 2.0], [0.25, 0.0]
    for alpha, gamma in [(1.0, 0.0), (0.0, 1.0), (0.5, 2.0)]:
        settings = LossSettings(dpo_alpha=alpha, gamma=gamma, answer_end="kept")
        found, parts = total_loss(settings, chosen, tokens, ratio, z if alpha else None)
        expected = [alpha * (d + 0.9 * a) + gamma * (s + 0.9 * a) for d, s, a in zip(dpo, sft, attention, strict=True)]
        assert found.item() == pytest.approx(sum(expected) / 2, abs=1e-5)
        assert ("dpo" in parts) == (alpha > 0)


def test_the_gate_opens_where_the_chosen_answer_beats_every_rejected_one():
    owner = torch.tensor([0, 0, 1, 1, 2, 3])
    chosen, rejected = tensor(-2, -2, -2, -2, -1, -3), tensor(-3, -4, -3, -1, -1, -5)
    assert prefers_chosen(chosen.requires_grad_(), rejected, owner, 4).tolist() == [True, False, False, True]


@pytest.mark.parametrize("variant", ["hinge", "log"])
def test_a_closed_gate_takes_the_term_alone_and_the_mean_stays_over_all_pairs(variant):
    chosen, tokens, z = tensor(-3.0, -8.0), tensor(2.0, 4.0), tensor(1.0, -2.0)
    settings = LossSettings(dpo_alpha=0.5, gamma=2.0, attention_loss=variant, answer_end="kept")

    def loss(*is_open):
        ratio = tensor(0.5, 0.25).requires_grad_()
        gate = torch.tensor(is_open) if is_open else None
        total, parts = total_loss(settings, chosen, tokens, ratio, z, is_open=gate)
        total.backward()
        return total.item(), parts["attention"].tolist(), ratio.grad.tolist()

    everywhere, terms, pulls = loss()
    assert loss(True, True) == (everywhere, terms, pulls)
    total, found, pulled = loss(True, False)
    assert found == [terms[0], 0] and pulled == [pulls[0], 0] and pulls[1] < 0
    assert total == pytest.approx(everywhere - 2.5 * 0.9 * terms[1] / 2, abs=1e-6)


def test_weight_zero_is_plain_dpo():
    settings = LossSettings(dpo_alpha=1.0, gamma=0.0, attention_weight=0.0, answer_end="kept")
    loss, _ = total_loss(settings, tensor(-3.0), tensor(2.0), tensor(0.1), tensor(0.0))
    assert loss.item() == pytest.approx(math.log(2), abs=1e-6)


def test_mean_over_pairs_does_not_depend_on_how_a_batch_is_split():
    torch.manual_seed(0)
    parts = [-5 * torch.rand(8), torch.randint(1, 9, (8,)).float(), torch.rand(8), torch.randn(8)]
    settings = LossSettings(dpo_alpha=0.7, gamma=0.3, answer_end="kept")
    whole, _ = total_loss(settings, *parts)
    halves = [total_loss(settings, *(p[s] for p in parts))[0] for s in (slice(0, 4), slice(4, 8))]
    torch.testing.assert_close(whole, (halves[0] + halves[1]) / 2)


def test_margin():
    assert logits_margin(tensor(-1.0), tensor(-5.0), tensor(-2.0), tensor(-3.0)).item() == 3.0
