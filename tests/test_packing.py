"""A packed row against separate forwards of every answer: logits, log-probs, masses, losses, gradients."""

import pytest
import torch

from llava.attention import Plan, Tree, install
from tests.conftest import SIDE, encoded, tiny_model
from train.llava_hound_dpo.losses import LossSettings, logits_margin, total_loss
from train.llava_hound_dpo.packing import EncodedPair, pack
from train.llava_hound_dpo.scoring import score

TOKENS_PER_IMAGE = 36
LAYERS = frozenset({1, 2})


def make_pair(model, num_images, chosen, rejected, seed):
    """An encoded pair of random text around `num_images` images, with its pixels."""
    generator = torch.Generator().manual_seed(seed)

    def words(count):
        return torch.randint(10, 300, (count,), generator=generator).tolist()

    image = [model.config.image_token_id] * TOKENS_PER_IMAGE
    prompt = [1, *words(5), *(token for _ in range(num_images) for token in [*image, *words(2)]), *words(4)]
    target = torch.rand(num_images * TOKENS_PER_IMAGE, generator=generator)
    pixels = torch.randn(num_images, 3, SIDE, SIDE, generator=generator)
    return EncodedPair(prompt, words(chosen), [words(rejected)], target), pixels


def pairs_of(model, seed=0):
    """Three pairs of different shape, one-token answers among them, and all their pixels."""
    made = [make_pair(model, *shape, seed + n) for n, shape in enumerate([(2, 4, 6), (1, 1, 3), (3, 5, 1)])]
    return [pair for pair, _ in made], torch.cat([pixels for _, pixels in made]), [pixels for _, pixels in made]


def eager_twin(model, processor, **text_config):
    twin = tiny_model(processor, **text_config)
    twin.load_state_dict(model.state_dict())
    twin.set_attn_implementation("eager")
    return twin


def separate(eager, prompt, answer, pixels):
    """(log-probs (T,), attention maps at the rows that predict the answer) of one plain unpacked forward."""
    ids = torch.tensor([[*prompt, *answer]])
    out = eager(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels, output_attentions=True)
    rows = slice(len(prompt) - 1, len(prompt) + len(answer) - 1)
    logps = out.logits[0, rows].log_softmax(-1).gather(-1, torch.tensor(answer)[:, None])[:, 0]
    return logps, [out.attentions[layer][0, :, rows, : len(prompt)] for layer in sorted(LAYERS)]


ROWS = {"all": slice(None), "first": slice(1)}  # of those that predict the chosen answer
EACH_ROWS = pytest.mark.parametrize("rows", ROWS)


def separate_scores(eager, pairs, pixels, rows="all"):
    """(chosen, rejected, ratio-ready masses (L, N, 2)) from two forwards a pair, one pair at a time."""
    chosen, rejected, masses = [], [], []
    for pair, own in zip(pairs, pixels, strict=True):
        logps, maps = separate(eager, pair.prompt, pair.chosen, own)
        chosen.append(logps.sum())
        rejected.append(separate(eager, pair.prompt, pair.rejected[0], own)[0].sum())
        is_image = torch.tensor(pair.prompt) == eager.config.image_token_id
        target = torch.zeros(len(pair.prompt)).masked_scatter(is_image, pair.target)
        maps = [m[:, ROWS[rows]] for m in maps]
        masses.append(
            torch.stack([torch.stack([(m * target).sum(-1).mean(), (m * is_image).sum(-1).mean()]) for m in maps])
        )
    return torch.stack(chosen), torch.stack(rejected), torch.stack(masses, dim=1)


@EACH_ROWS
@pytest.mark.parametrize("heads", [{}, {"num_key_value_heads": 2}], ids=["mha", "gqa"])
def test_packed_row_equals_two_forwards_of_every_pair(processor, heads, rows):
    model = tiny_model(processor, **heads)
    install(model)
    eager = eager_twin(model, processor, **heads)
    pairs, pixels, own_pixels = pairs_of(model)
    row = pack(pairs, model.config.image_token_id)
    found = score(model, row, encoded(model, pixels), layers=LAYERS, rows=rows)
    chosen, rejected, masses = separate_scores(eager, pairs, own_pixels, rows)
    torch.testing.assert_close(found.chosen, chosen, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(found.rejected, rejected, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(found.masses, masses, atol=2e-6, rtol=1e-5)
    assert row.answer_tokens[row.chosen].tolist() == [4, 1, 5]
    assert row.answer_tokens[row.rejected].tolist() == [6, 3, 1]


def some_loss(chosen, rejected, masses):
    """Depends on everything that training reads off a row."""
    ratio = (masses[..., 0] / masses[..., 1]).mean(0)
    return (-torch.nn.functional.logsigmoid(0.1 * (chosen - rejected)) + 0.9 * torch.relu(0.75 - ratio)).mean()


@EACH_ROWS
@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_gradients_equal_those_of_separate_forwards(processor, model, checkpointing, rows):
    eager = eager_twin(model, processor)
    pairs, pixels, own_pixels = pairs_of(model)
    if checkpointing:
        model.activation_checkpointing_enable()
        model.train()
    row = pack(pairs, model.config.image_token_id)
    found = score(model, row, encoded(model, pixels), layers=LAYERS, rows=rows)
    some_loss(found.chosen, found.rejected, found.masses).backward()
    some_loss(*separate_scores(eager, pairs, own_pixels, rows)).backward()
    largest = 0.0
    for (name, ours), theirs in zip(model.named_parameters(), eager.parameters(), strict=True):
        if theirs.grad is None:
            assert ours.grad is None, name
            continue
        torch.testing.assert_close(ours.grad, theirs.grad, atol=3e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
        largest = max(largest, theirs.grad.abs().max().item())
    assert largest > 0.01


def test_features_serve_twice(model):
    """transformers changes what it is given: policy and reference read the same features all the same."""
    pairs, pixels, _ = pairs_of(model)
    row, features = pack(pairs, model.config.image_token_id), encoded(model, pixels)
    a, b = (score(model, row, features, layers=LAYERS) for _ in range(2))
    assert torch.equal(a.chosen, b.chosen) and torch.equal(a.masses, b.masses)


def test_several_rejected_answers_are_the_mean_of_separate_pairs(model):
    """1/m Σ_j ℓ(z_j): loss, its parts and gradients of two pairs, one with three rejected answers."""
    torch.manual_seed(0)
    (first, one), (second, two) = make_pair(model, 2, 5, 6, 0), make_pair(model, 1, 3, 4, 1)
    others = [[*torch.randint(20, 90, (length,)).tolist(), 2] for length in (2, 7)]
    pairs = [EncodedPair(first.prompt, first.chosen, [*first.rejected, *others], first.target), second]
    alone = [EncodedPair(p.prompt, p.chosen, [r], p.target) for p in pairs for r in p.rejected]
    settings = LossSettings(dpo_alpha=1.0, gamma=0.5, answer_end="kept")

    def loss_of(rows, own, reference):
        row = pack(rows, model.config.image_token_id)
        found = score(model, row, encoded(model, own), layers=LAYERS)
        ratio = (found.masses[..., 0] / found.masses[..., 1]).mean(dim=0)
        z = logits_margin(found.chosen[row.rejected_owner], found.rejected, *reference)
        tokens = row.answer_tokens[row.chosen].float()
        return total_loss(settings, found.chosen, tokens, ratio, z, row.rejected_owner)[1]["total"]

    reference = torch.tensor([-9.0, -9.0, -9.0, -7.0]), torch.tensor([-11.0, -8.0, -10.0, -7.5])
    together = loss_of(pairs, torch.cat([one, two]), reference)
    apart = loss_of(alone, torch.cat([one, one, one, two]), reference)
    apart = torch.stack([apart[:3].mean(), apart[3]])
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=1e-5)
    weights = [p for p in model.parameters() if p.requires_grad]
    ours, theirs = (torch.autograd.grad(loss.mean(), weights, allow_unused=True) for loss in (together, apart))
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, atol=3e-5, rtol=1e-4)


def test_without_rejected_answers_the_chosen_ones_do_not_change(model):
    pairs, pixels, _ = pairs_of(model)
    alone = [EncodedPair(p.prompt, p.chosen, [], p.target) for p in pairs]
    both = score(model, pack(pairs, model.config.image_token_id), encoded(model, pixels), layers=LAYERS)
    only = score(model, pack(alone, model.config.image_token_id), encoded(model, pixels), layers=LAYERS)
    assert only.rejected is None
    torch.testing.assert_close(only.chosen, both.chosen, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(only.masses, both.masses, atol=2e-6, rtol=1e-5)


class TestNegativeControls:
    """Each mistake that the layout avoids must be visible to these tests."""

    def rejected_error(self, processor, model, row):
        pairs, pixels, own = pairs_of(model)
        _, expected, _ = separate_scores(eager_twin(model, processor), pairs, own)
        return (score(model, row, encoded(model, pixels)).rejected - expected).abs().max().item()

    def row(self, model):
        return pack(pairs_of(model)[0], model.config.image_token_id)

    def test_the_right_row_passes(self, processor, model):
        assert self.rejected_error(processor, model, self.row(model)) < 1e-4

    def test_rejected_that_sees_chosen_fails(self, processor, model):
        from dataclasses import replace

        row = self.row(model)
        open_trees = tuple(
            Tree(t.prompt, t.branches, torch.ones_like(t.mask).tril(t.mask.shape[1] - t.mask.shape[0]))
            for t in row.trees
        )
        assert self.rejected_error(processor, model, replace(row, trees=open_trees)) > 1e-2

    def test_positions_that_run_on_fail(self, processor, model):
        from dataclasses import replace

        row = self.row(model)
        running = torch.arange(row.input_ids.shape[1])[None]
        assert self.rejected_error(processor, model, replace(row, positions=running[None])) > 1e-2


def test_a_row_without_trees_is_not_taken_for_separate_documents(model):
    """Restarted positions alone must not change the mask: the reason for the explicit mask of ones."""
    ids = torch.randint(10, 300, (1, 12))
    positions = torch.tensor([[*range(6), *range(6)]])
    seen = model(
        input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=positions, plan=Plan(), use_cache=False
    )
    hidden = model(input_ids=ids, position_ids=positions, use_cache=False)
    assert (seen.logits - hidden.logits).abs().max() > 1e-2


def test_reentrant_checkpointing_is_refused_because_it_detaches_the_masses(model):
    pairs, pixels, _ = pairs_of(model)
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": True})
    model.train()
    with pytest.raises(RuntimeError, match="no gradient"):
        score(model, pack(pairs, model.config.image_token_id), encoded(model, pixels), layers=LAYERS)
