"""Heads that route: found, kept in a file, measured and scaled instead of all heads."""

import itertools
import json
import logging
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from llava.adaptviz import AdaptViz
from llava.attention import Plan, Probe, attention_ratio, install, mean_over_heads, mean_over_layers
from llava.checkpoints import open_checkpoint
from llava.generation import batch_prompts, generate
from llava.heads import Heads, RankedHead, Ranking, rank, select_heads, shares_of_parts
from llava.scaling import Scale
from llava.statistics import auc
from tests.conftest import tiny_model
from tests.test_generation import TOKENS, alone_with_eager, prompts_of
from train.llava_hound_dpo.arguments import ModelArguments
from train.llava_hound_dpo.model import make_trainable

SOME = Heads({1: (0, 3), 2: (1,)})


def ranking(*places, **changes):
    """A file's content that ranks (layer, head) places in the order given."""
    ranked = tuple(RankedHead(layer, head, 0.9 - 0.01 * n, 0.5) for n, (layer, head) in enumerate(places))
    found = Ranking("adapter", "base", "a", "b", "3 (c)", 3, 0.4, ranked)
    return replace(found, **changes)


# ---- finding


@pytest.mark.parametrize("values", [4, 1000], ids=["with ties", "hardly any ties"])
def test_auc_is_the_share_of_pairs_that_are_in_order(values):
    generator = torch.Generator().manual_seed(values)
    scores = torch.randint(values, (40,), generator=generator).tolist()
    labels = (torch.rand(40, generator=generator) < 0.3).tolist()
    positive = [s for s, is_positive in zip(scores, labels, strict=True) if is_positive]
    negative = [s for s, is_positive in zip(scores, labels, strict=True) if not is_positive]
    wins = [(p > n) + 0.5 * (p == n) for p, n in itertools.product(positive, negative)]
    assert auc(scores, labels) == pytest.approx(sum(wins) / len(wins), abs=1e-12)
    assert auc([-s for s in scores], labels) == pytest.approx(1 - sum(wins) / len(wins), abs=1e-12)


def test_auc_needs_both_classes():
    with pytest.raises(ValueError, match="2 positives and 0 negatives"):
        auc([0.1, 0.2], [True, True])


def batch_with_parts(model, family, targets, seed=0):
    """Prompts of 1, 3 and 2 images, in which the given parts are referred to."""
    prompts = prompts_of(model, seed)
    parts = [torch.eye(len(target) // TOKENS).repeat_interleave(TOKENS, 1) for _, target, _ in prompts]
    regions = [torch.cat([p[t : t + 1], torch.ones_like(p[:1]), p]) for p, t in zip(parts, targets, strict=True)]
    pixels = {"pixel_values": torch.cat([x for _, _, x in prompts])}
    return batch_prompts(family, [p for p, _, _ in prompts], [()] * len(prompts), regions, pixels)


@pytest.mark.parametrize("planted", [(0, 2), (1, 0), (3, 3)], ids=str)
def test_the_head_that_the_labels_come_from_is_found_first(model, family, planted):
    """Whatever part a head looks at most is called the target."""
    shares, layers = [], [0, 1, 3]
    for seed in range(8):
        batch = batch_with_parts(model, family, (0, 0, 0), seed)
        answers = generate(model, family, batch, layers, each_head=True, max_new_tokens=3)
        shares += [shares_of_parts(answer.by_head) for answer in answers[1:]]
    row, head = layers.index(planted[0]), planted[1]
    ranked = rank(shares, [(own[row, head].argmax().item(),) for own in shares], layers)
    assert (ranked[0].layer, ranked[0].head, ranked[0].accuracy) == (*planted, 1.0)
    assert len(ranked) == 12 and [one.auc for one in ranked] == sorted((one.auc for one in ranked), reverse=True)


def test_heads_that_pick_any_of_several_targets_by_hand():
    """Two prompts of three parts, about the outer two and about the second, as two heads see them."""
    first = torch.tensor([[[0.5, 0.1, 0.4], [0.3, 0.6, 0.1]]])  # head 0 looks at the outer two, head 1 beside them
    second = torch.tensor([[[0.2, 0.7, 0.1], [0.5, 0.3, 0.2]]])
    best, other = rank([first, second], [(0, 2), (1,)], [4])
    assert (best.layer, best.head, best.accuracy, best.auc) == (4, 0, 1.0, 1.0)  # .5 .4 .7 above .1 .2 .1
    # .3 .1 .3 against .6 .5 .2: above in 2 of 9 pairs
    assert (other.head, other.accuracy) == (1, 0.0) and other.auc == pytest.approx(2 / 9)


def test_masses_of_the_heads_are_those_that_the_mean_is_of(model, family):
    batch = batch_with_parts(model, family, (0, 1, 1))
    plain = generate(model, family, batch, [1, 2], max_new_tokens=4)
    each = generate(model, family, batch, [1, 2], each_head=True, max_new_tokens=4)
    for a, b in zip(plain, each, strict=True):
        assert torch.equal(a.masses, b.masses) and not len(a.by_head) and b.by_head.shape == (2, 4, a.masses.shape[1])
        torch.testing.assert_close(b.by_head.mean(dim=1), b.masses, atol=1e-6, rtol=1e-5)
        assert shares_of_parts(b.by_head).sum(dim=-1) == pytest.approx(1, abs=1e-5)


# ---- the value and the file


def test_round_trip(tmp_path):
    written = ranking((2, 1), (0, 3), (2, 0))
    written.write(tmp_path / "heads.json")
    assert Ranking.read(tmp_path / "heads.json") == written
    heads = written.top(3)
    assert heads == Heads({0: (3,), 2: (0, 1)}) and Heads.from_json(json.loads(json.dumps(heads.to_json()))) == heads
    assert (len(heads), str(heads), heads.layers) == (3, "0.3, 2.0, 2.1", {0, 2})
    assert heads.selected(4).tolist() == [[0, 0, 0, 1], [1, 1, 0, 0]]


def test_the_best_of_some_layers():
    found = ranking((2, 1), (0, 3), (2, 0), (1, 1))
    assert found.top(1) == Heads({2: (1,)})
    assert found.top(2, frozenset({0, 1})) == Heads({0: (3,), 1: (1,)})
    with pytest.raises(ValueError, match="--top_heads 3: the file ranks 2 heads in layers 0, 1"):
        found.top(3, frozenset({0, 1}))


@pytest.mark.parametrize("raw", [None, [], {}, {"a": [1]}, {"1": []}, {"1": [-1]}, {"1": [True]}, {"1": 2}], ids=str)
def test_heads_that_are_none(raw):
    with pytest.raises(ValueError, match="lists of whole numbers by layer"):
        Heads.from_json(raw)


class TestOrigin:
    """One line says what the heads were found on."""

    @pytest.fixture
    def said(self, checkpoint, tmp_path, caplog):
        def said(model=checkpoint, **changes):
            digest = open_checkpoint(checkpoint).digest
            own = {"weights": digest, "base_weights": digest, **changes}
            ranking((2, 1), (0, 3), model="theirs", base="their base", **own).write(tmp_path / "heads.json")
            with caplog.at_level(logging.INFO, "llava.heads"):
                select_heads(str(tmp_path / "heads.json"), 1, open_checkpoint(model))
            (record,) = [record for record in caplog.records if record.name == "llava.heads"]
            return record

        return said

    def test_this_checkpoint(self, said):
        record = said()
        assert record.levelname == "INFO" and "1 heads (layer.head) 2.1; found on this checkpoint" in record.message

    def test_an_adapter_on_the_same_base(self, said, checkpoint, tmp_path):
        opened = open_checkpoint(checkpoint)
        policy = make_trainable(opened.load(), opened.family, ModelArguments(checkpoint, lora_r=2))
        policy.save_pretrained(tmp_path / "adapter")
        record = said(str(tmp_path / "adapter"))
        assert record.levelname == "INFO" and f"found on theirs, of the same base as {tmp_path}" in record.message

    def test_another_base(self, said, checkpoint):
        record = said(base_weights="of another model")
        assert record.levelname == "WARNING" and "another base model, their base," in record.message
        assert checkpoint in record.message and "python -m scripts.discover_heads" in record.message


# ---- measuring


def test_a_layer_counts_by_its_selected_heads_by_hand():
    masses = torch.tensor([[0.1, 0.3], [0.5, 0.7]])[..., None, None].expand(2, 2, 1, 2)  # (L, H, T, R)
    selected = torch.tensor([[1.0, 1.0], [0.0, 1.0]])
    rows = mean_over_heads(masses, selected[..., None])
    torch.testing.assert_close(rows[:, 0, 0], torch.tensor([0.2, 0.7]))
    torch.testing.assert_close(mean_over_layers(rows[:, 0, 0], selected), torch.tensor((2 * 0.2 + 0.7) / 3))


def test_all_heads_of_the_layers_are_the_layers(model, family):
    batch = batch_with_parts(model, family, (0, 2, 0))
    plain = generate(model, family, batch, [1, 2], max_new_tokens=3)
    every = generate(model, family, batch, [1, 2], heads=torch.ones(2, 4), max_new_tokens=3)
    for a, b in zip(plain, every, strict=True):
        assert a.ratio == pytest.approx(b.ratio, abs=1e-6) and a.shares == pytest.approx(b.shares, abs=1e-6)


@pytest.mark.parametrize("beams", [1, 3])
def test_ratio_on_heads_equals_eager_attention_on_these_heads(processor, family, beams):
    ours, eager = tiny_model(processor), tiny_model(processor)
    install(ours)
    eager.set_attn_implementation("eager")
    prompts, end = prompts_of(ours), family.tokenizer.eos_token_id
    regions = [torch.stack([target, torch.ones_like(target)]) for _, target, _ in prompts]
    pixels = {"pixel_values": torch.cat([x for _, _, x in prompts])}
    batch = batch_prompts(family, [p for p, _, _ in prompts], [()] * len(prompts), regions, pixels)
    settings = {"heads": SOME.selected(4), "max_new_tokens": 5, "num_beams": beams}
    answers = generate(ours, family, batch, sorted(SOME.layers), **settings)
    for answer, (prompt, target, own) in zip(answers, prompts, strict=True):
        by_layer = {}
        for layer, heads in SOME.by_layer.items():
            only = OnlyHeads(eager, heads)
            with torch.no_grad():
                ratios = alone_with_eager(only, prompt, target, own, len(answer.tokens), end, answer.tokens)[2]
            by_layer[layer] = ratios[layer - 1]
        torch.testing.assert_close(torch.tensor(answer.ratio_by_layer), torch.stack([*by_layer.values()]))
        assert answer.ratio == pytest.approx(((2 * by_layer[1] + by_layer[2]) / 3).item(), abs=1e-5)


class OnlyHeads:
    """A model whose attention maps are those of some heads."""

    def __init__(self, model, heads):
        self.model, self.heads, self.config = model, list(heads), model.config

    def __call__(self, **inputs):
        out = self.model(**inputs)
        out.attentions = tuple(maps[:, self.heads] for maps in out.attentions)
        return out


# ---- scaling


@pytest.mark.parametrize("kv_heads", [4, 2], ids=["mha", "gqa"])
@pytest.mark.parametrize("keeps_mass", [False, True], ids=["multiply", "balance"])
def test_steering_one_head_changes_the_last_row_of_that_head_alone(processor, kv_heads, keeps_mass):
    model = tiny_model(processor, num_key_value_heads=kv_heads)
    install(model)
    prompt, target, pixels = prompts_of(model)[1]
    ids = torch.tensor([prompt])
    images = ids == model.config.image_token_id
    weights = torch.zeros(1, len(prompt)).masked_scatter(images, target)
    scale = Scale.of_last_row(torch.tensor([3.0]), weights, images, keeps_mass=keeps_mass, heads={1: (2,)})
    probe = Probe(torch.stack([weights, images.float()], dim=-1), frozenset({1}))
    found = []
    for plan in (Plan(probe=probe), Plan(probe=probe, scale=scale)):
        inputs = {}
        hooks = [
            layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args, n=n, own=inputs: own.update({n: args[0]}))
            for n, layer in enumerate(model.model.language_model.layers)
        ]
        with torch.no_grad():
            out = model(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels,
                        output_attentions=True, plan=plan)  # fmt: skip
        for hook in hooks:
            hook.remove()
        found.append((inputs, out.attentions[0][0, :, 0]))
    (plain, mass), (steered, steered_mass) = found
    assert torch.equal(plain[0], steered[0]) and not torch.equal(plain[2], steered[2])
    changed = (plain[1] != steered[1]).view(len(prompt), 4, -1).any(dim=-1)
    assert changed.nonzero().tolist() == [[len(prompt) - 1, 2]]
    assert (mass != steered_mass).any(dim=-1).tolist() == [False, False, True, False]
    assert attention_ratio(steered_mass)[2] > attention_ratio(mass)[2]


def job_of(num_layers, num_heads):
    """As much of a job as the check of its settings reads."""
    return SimpleNamespace(questions=[], checkpoint=SimpleNamespace(num_layers=num_layers, num_heads=num_heads))


def test_settings_of_adaptviz_keep_their_heads():
    settings = AdaptViz(heads=SOME)
    assert AdaptViz.from_dict(json.loads(json.dumps(settings.to_dict()))) == settings
    assert AdaptViz.from_dict(AdaptViz().to_dict()).heads is None
    with pytest.raises(ValueError, match="layer 2 head 1 does not exist"):
        settings.check(job_of(2, 4))
    with pytest.raises(ValueError, match="nothing is scaled"):
        replace(settings, layers=(0, 3)).check(job_of(4, 4))
