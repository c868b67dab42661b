"""The attention function against transformers' eager attention, which computes every S x S map."""

import pytest
import torch

from llava.attention import (
    NAME,
    Plan,
    Probe,
    Tree,
    attention_ratio,
    install,
    layer_range,
    mean_masses,
    region_mass,
    use_plan,
)
from tests.conftest import tiny_model

IMAGE = 3  # any id below the vocabulary: these tests feed text only, regions are arbitrary columns


def text_batch(lengths, seed=0):
    """(ids, mask) of left-padded random text."""
    torch.manual_seed(seed)
    longest = max(lengths)
    ids = torch.randint(10, 300, (len(lengths), longest))
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):
        mask[row, : longest - length] = 0
    return ids, mask


def pair_of_models(processor, **text_config):
    """The same weights twice: with our function, and eager with all attention maps."""
    ours = tiny_model(processor, **text_config)
    eager = tiny_model(processor, **text_config)
    install(ours)
    eager.set_attn_implementation("eager")
    return ours, eager


@pytest.mark.parametrize("heads", [{}, {"num_key_value_heads": 2}], ids=["mha", "gqa"])
@pytest.mark.parametrize("lengths", [(23, 23), (23, 14)], ids=["even", "left-padded"])
def test_region_mass_equals_eager_attention(processor, heads, lengths):
    ours, eager = pair_of_models(processor, **heads)
    ids, mask = text_batch(lengths)
    regions = torch.rand(2, ids.shape[1], 3)
    plan = Plan(probe=Probe(regions, frozenset({1, 2})))
    masses = ours(input_ids=ids, attention_mask=mask, output_attentions=True, plan=plan).attentions
    maps = eager(input_ids=ids, attention_mask=mask, output_attentions=True).attentions
    assert len(masses) == 2
    for mass, layer in zip(masses, (1, 2), strict=True):
        expected = maps[layer][:, :, -1:] @ regions[:, None]
        torch.testing.assert_close(mass, expected, atol=2e-6, rtol=1e-5)


def test_region_mass_gradients_equal_those_through_explicit_probabilities():
    torch.manual_seed(0)
    query, key = torch.randn(1, 2, 5, 8, requires_grad=True), torch.randn(1, 2, 9, 8, requires_grad=True)
    regions, mask = torch.rand(1, 9, 2), torch.rand(1, 1, 5, 9) > 0.3
    mask[..., 0] = True
    wanted = torch.randn(1, 2, 5, 2)
    found = torch.autograd.grad((region_mass(query, key, regions, mask, 0.4) * wanted).sum(), (query, key))
    scores = (query @ key.transpose(-1, -2) * 0.4).masked_fill(~mask, -torch.inf)
    expected = torch.autograd.grad(((scores.softmax(-1) @ regions[:, None]) * wanted).sum(), (query, key))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("count", [7, 8, 9, 21], ids=str)
def test_more_regions_than_the_head_size_are_the_explicit_sum(count):
    """One call takes as many regions as a head is wide, 8 here."""
    torch.manual_seed(count)
    query, key = torch.randn(2, 2, 5, 8), torch.randn(2, 2, 9, 8)
    regions, mask = torch.rand(2, 9, count), torch.rand(2, 1, 5, 9) > 0.3
    mask[..., 0] = True
    found = region_mass(query, key, regions, mask, 0.4)
    weights = (query @ key.transpose(-1, -2) * 0.4).masked_fill(~mask, -torch.inf).softmax(-1)
    explicit = sum(weights[..., key, None] * regions[:, None, None, key] for key in range(9))
    assert found.shape == (2, 2, 5, count)
    torch.testing.assert_close(found, explicit, atol=1e-6, rtol=1e-5)


def test_region_mass_passes_gradcheck():
    torch.manual_seed(0)
    query = torch.randn(1, 2, 3, 4, requires_grad=True, dtype=torch.float32)
    key = torch.randn(1, 2, 6, 4, requires_grad=True, dtype=torch.float32)
    regions = torch.rand(1, 6, 2)
    assert torch.autograd.gradcheck(
        lambda q, k: region_mass(q, k, regions, None, 0.5), (query, key), eps=1e-2, atol=2e-3, rtol=2e-2
    )


def test_mass_of_the_whole_row_is_one_and_regions_add_up(processor):
    ours, _ = pair_of_models(processor)
    ids, mask = text_batch((17, 11))
    split = torch.rand(2, 17)
    regions = torch.stack([torch.ones(2, 17), split, 1 - split], dim=-1)
    plan = Plan(probe=Probe(regions, frozenset({0})))
    (mass,) = ours(input_ids=ids, attention_mask=mask, output_attentions=True, plan=plan).attentions
    torch.testing.assert_close(mass[..., 0], torch.ones_like(mass[..., 0]))
    torch.testing.assert_close(mass[..., 1] + mass[..., 2], mass[..., 0])


def test_without_a_plan_and_with_a_probe_logits_are_those_of_sdpa_bit_for_bit(processor):
    ours, stock = tiny_model(processor), tiny_model(processor)
    install(ours)
    stock.set_attn_implementation("sdpa")
    ids, mask = text_batch((19, 12))
    expected = stock(input_ids=ids, attention_mask=mask).logits
    assert torch.equal(ours(input_ids=ids, attention_mask=mask).logits, expected)
    plan = Plan(probe=Probe(torch.rand(2, 19, 2), frozenset({0, 3})))
    probed = ours(input_ids=ids, attention_mask=mask, output_attentions=True, plan=plan).logits
    assert torch.equal(probed, expected)


def test_only_the_language_model_is_switched(model):
    assert model.config.text_config._attn_implementation == NAME
    assert model.config.vision_config._attn_implementation == "sdpa"


def test_use_plan_reaches_generate_and_is_gone_afterwards(model):
    ids, mask = text_batch((9,))
    plan = Plan(probe=Probe(torch.ones(1, 9, 1), frozenset({1})))
    with torch.no_grad(), use_plan(plan):
        out = model(input_ids=ids, attention_mask=mask, output_attentions=True)
    assert out.attentions[0].shape == (1, 4, 1, 1)
    with torch.no_grad():
        assert not model(input_ids=ids, attention_mask=mask, output_attentions=True).attentions


def test_use_plan_is_refused_while_gradients_are_on():
    with pytest.raises(RuntimeError, match="plan="), use_plan(Plan()):
        pass


def test_tokens_after_the_regions_weigh_nothing(model):
    """While decoding, generated keys lie behind the prompt's regions."""
    ids, mask = text_batch((12,))
    short, padded = torch.rand(1, 8, 2), torch.zeros(1, 12, 2)
    padded[:, :8] = short
    masses = [
        model(input_ids=ids, attention_mask=mask, output_attentions=True, plan=Plan(probe=Probe(r, frozenset({2}))))
        for r in (short, padded)
    ]
    torch.testing.assert_close(masses[0].attentions[0], masses[1].attentions[0], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("depth", "spec", "expected"),
    [
        (32, "auto", range(14, 23)),
        (40, "auto", range(18, 29)),  # 13B
        (4, "auto", [2]),
        (1, "auto", [0]),
        (32, "16", [16]),
        (32, "14-22", range(14, 23)),
        (8, "1,4-5", [1, 4, 5]),
    ],
)
def test_layer_range(depth, spec, expected):
    assert layer_range(depth, spec) == frozenset(expected)


@pytest.mark.parametrize("spec", ["32", "14-40", "a-b", "", "5-3"])
def test_layer_range_refuses(spec):
    with pytest.raises(ValueError, match="layers"):
        layer_range(32, spec)


def test_ratio_is_a_ratio_of_means_per_layer_by_hand():
    # two layers, one head, three rows: two of sample 0, one of sample 1
    target = torch.tensor([[0.1, 0.3, 0.2], [0.0, 0.4, 0.6]])
    images = torch.tensor([[0.5, 0.3, 0.4], [0.5, 0.5, 0.6]])
    masses = torch.stack([target, images], dim=-1)[:, None]
    found = attention_ratio(mean_masses(masses, torch.tensor([0, 0, 1]), 2))
    torch.testing.assert_close(found, torch.tensor([[0.4 / 0.8, 0.5], [0.4 / 1.0, 1.0]]))


def test_what_a_tree_adds_to_scores_is_its_mask_made_once():
    tree = Tree.of((2, 7), ((7, 10), (10, 12), (12, 13)))
    for like in (torch.zeros(1), torch.zeros(1, dtype=torch.bfloat16)):
        bias = tree.bias(like)
        assert bias.dtype == like.dtype and bias is tree.bias(like) and bias.stride() == (16, 1)
        assert torch.equal(bias == 0, tree.mask) and bias[~tree.mask].eq(-torch.inf).all()
    rows = tree.bias(torch.zeros(1), "all")
    assert torch.equal(rows[:3, :8] == 0, torch.ones(3, 8).tril(5).bool()) and rows[:3, 8:].eq(-torch.inf).all()
    assert torch.equal(rows[3:] == 0, tree.mask) and torch.equal(rows[:3, :8], tree.bias(torch.zeros(1), "first"))
    assert tree.map(lambda mask: mask)._biases is not tree._biases  # on another device it is another
