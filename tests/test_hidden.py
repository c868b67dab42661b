"""A target that is hidden: its pixels change nothing, and what is left is stock eager attention under a 4-D mask."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from llava import answering
from llava.attention import install
from llava.generation import batch_prompts, generate
from llava.measuring import measure
from tests.conftest import tiny_model
from tests.test_family_contract import each_family, own_inputs, tiny  # noqa: F401  a fixture
from tests.test_gen_chosen_rejected import contents, make, world  # noqa: F401  fixtures
from tests.test_generation import TOKENS, prompts_of
from tests.test_generation import batch_of as llava15_batch

GROUPS = ((((90, 60), (64, 130), (75, 75)), 1), (((75, 75), (60, 60)), 0))  # (sizes in px, target) of two prompts
STEPS = 4


def prompt_of(own, sizes, target, seed):
    """(ids, ImageTokens, positions, pixels, target weights); `seed` is that of the target's picture alone."""
    ids, images, positions, _, _ = own.prompt(sizes)
    rngs = [np.random.default_rng((number, seed if number == target else 0)) for number in range(len(sizes))]
    pictures = [rng.integers(0, 256, (h, w, 3), dtype=np.uint8) for rng, (w, h) in zip(rngs, sizes, strict=True)]
    weights = torch.cat([torch.full((len(i.areas),), float(n == target)) for n, i in enumerate(images)])
    return ids, images, positions, own.family.pixels([Image.fromarray(p) for p in pictures]), weights


def batch_of(own, seed=0):
    """Both prompts, the shorter one left-padded, nothing hidden yet."""
    ids, images, _, pixels, weights = zip(*(prompt_of(own, *group, seed) for group in GROUPS), strict=True)
    regions = [torch.stack([target, torch.ones_like(target)]) for target in weights]
    return batch_prompts(own.family, ids, images, regions, own.family.join(list(pixels)))


def answers(own, model, batch, beams=1):
    """(answers, raw scores of every step)."""
    scores = []
    found = generate(
        model, own.family, batch, [1, 2], max_new_tokens=STEPS, num_beams=beams,
        logits_processor=[lambda ids, row: scores.append(row.clone()) or row],
    )  # fmt: skip
    return found, torch.stack(scores)


@each_family
@pytest.mark.parametrize("beams", [1, 2])
def test_pixels_of_a_hidden_target_change_nothing(tiny, module, kind, beams):  # noqa: F811
    """In prefill and decoding, in a padded batch; the same pixels change the answer where nothing is hidden."""
    own = tiny(module, kind)
    model, batches = own.model(), [batch_of(own, seed) for seed in (0, 1)]
    hidden, shown = (
        [answers(own, model, batch.without_target() if hides else batch, beams) for batch in batches]
        for hides in (True, False)
    )
    (first, scores), (again, other) = hidden
    assert [a.tokens for a in first] == [a.tokens for a in again] and [a.ratio for a in first] == [0.0, 0.0]
    # Experts get a matrix of the tokens sent to them, hidden ones too, whose height decides on the rounding.
    torch.testing.assert_close(scores, other, rtol=0, atol=1e-6 if "moe" in kind else 0)
    assert (shown[0][1][0] - shown[1][1][0]).abs().amax(dim=-1).min() > 1e-3
    assert (scores[0] - shown[0][1][0]).abs().amax(dim=-1).min() > 1e-3


@each_family
def test_what_is_left_is_stock_eager_attention_under_a_mask(tiny, module, kind):  # noqa: F811
    """Scores of every step and masses of padded prompts, against each alone, its answer fed whole."""
    own = tiny(module, kind)
    found, scores = answers(own, own.model(), batch_of(own).without_target())
    stock = own.stock()
    for row, (group, answer) in enumerate(zip(GROUPS, found, strict=True)):
        ids, _, positions, pixels, weights = prompt_of(own, *group, 0)
        said = answer.tokens[:-1]
        inputs = own_inputs(own, [*ids, *said], pixels)
        regions = torch.zeros(len(ids) + len(said), 2)
        is_image = inputs["input_ids"][0] == own.family.image_id
        regions[is_image] = torch.stack([weights, torch.ones_like(weights)], dim=1)
        sees = torch.ones(len(regions), len(regions), dtype=torch.bool).tril() & (regions[:, 0] == 0)
        after = positions[..., -1:] + 1 + torch.arange(len(said))
        inputs["attention_mask"] = torch.zeros(sees.shape).masked_fill(~sees, -torch.inf)[None, None]
        inputs["position_ids"] = torch.cat([positions, after], dim=-1)
        if len(positions) > 1:
            inputs["position_ids"] = inputs["position_ids"][:, None]
        with torch.no_grad():
            out = stock(**inputs, output_attentions=True, use_cache=False)
        expected = out.logits[0, len(ids) - 1 :]
        assert (scores[: len(expected), row] - expected).abs().max() < 1e-5
        maps = torch.stack([out.attentions[layer][0, :, len(ids) - 1 :] for layer in (1, 2)])
        assert (answer.masses - (maps @ regions).mean(dim=(1, 2))).abs().max() < 2e-6


def test_llava_15_equals_eager_attention_and_sees_no_pixel(processor, family):
    """Of the first image; tokens that show a little of the target are hidden, those that show none are not."""
    ours, eager = tiny_model(processor), tiny_model(processor)
    install(ours)
    eager.set_attn_implementation("eager")
    prompts = [
        (ids, F.pad(torch.rand(TOKENS) * 1e-3 + 1e-4, (0, len(target) - TOKENS)), pixels)
        for ids, target, pixels in prompts_of(ours)
    ]
    batch = llava15_batch(family, prompts)
    hidden = batch.without_target()
    is_target = (batch.input_ids == family.image_id) & ((batch.input_ids == family.image_id).cumsum(dim=1) <= TOKENS)
    assert torch.equal(hidden.attention_mask == 0, (batch.attention_mask == 0) | is_target)
    scores = [[], []]
    for noted in scores:
        found = generate(
            ours, family, hidden, [1], max_new_tokens=5,
            logits_processor=[lambda ids, row, noted=noted: noted.append(row.clone()) or row],
        )  # fmt: skip
        hidden.pixels["pixel_values"][[0, 1, 4]] *= -2  # the first pictures of 1, 3 and 2
    assert torch.equal(torch.stack(scores[0]), torch.stack(scores[1]))
    for row, ((ids, _, pixels), answer) in enumerate(zip(prompts, found, strict=True)):
        whole = torch.tensor([[*ids, *answer.tokens[:-1]]])
        places = (whole[0] == family.image_id).nonzero()[:TOKENS, 0]
        sees = torch.ones(whole.shape[1], whole.shape[1], dtype=torch.bool).tril().index_fill(1, places, False)
        mask = torch.zeros(sees.shape).masked_fill(~sees, -torch.inf)[None, None]
        with torch.no_grad():
            expected = eager(input_ids=whole, attention_mask=mask, pixel_values=pixels).logits[0, len(ids) - 1 :]
        assert (torch.stack(scores[0])[: len(expected), row] - expected).abs().max() < 1e-5


def test_a_packed_row_refuses_what_is_hidden(model, family):
    batch = llava15_batch(family, prompts_of(model)[2:])
    with pytest.raises(AssertionError, match="hides nothing"):
        measure(model, family, batch.without_target(), [[50, family.end_id]], [1])


# ---- pairs


def test_hidden_targets_make_pairs(make, world, tmp_path, monkeypatch, capsys):  # noqa: F811
    """Interrupted and gone on with, the same files; no threshold decides, and everything is counted once."""
    flags, calls = ("--degrade", "hidden", "--batch_size", 4), []
    pairs = make("hidden", *flags, "--thresholds", '{"sequence": {"2": 0, "3": 0}}')
    assert "the target is a part of a picture" in capsys.readouterr().out

    def cut(*words, **settings):
        calls.append(words)
        if len(calls) > 7:
            raise KeyboardInterrupt
        return generate(*words, **settings)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(answering, "generate", cut)
        make("cut", *flags)
    assert list((tmp_path / "cut/answers.jsonl.parts").iterdir())
    assert not (tmp_path / "cut/answers.jsonl").exists()
    assert make("cut", *flags) == pairs and len(calls) == 8
    assert contents(tmp_path / "cut") == contents(tmp_path / "hidden")
    assert {pair["rejected_from"] for pair in pairs} == {"hidden"} and len(pairs) > 10
    assert {pair["image_type"] for pair in pairs} == {"sequence", "collage", "pip"}
    assert not any("attention_ratio" in pair or pair["chosen"] == pair["rejected"] for pair in pairs)
    counts = json.loads((tmp_path / "cut/run.json").read_text())["counts"]
    dropped = [json.loads(line) for line in (tmp_path / "cut/dropped.jsonl").read_text().splitlines()]
    assert len(pairs) + len(dropped) == counts["candidates"] == 90 and counts["dropped"]["right"] >= 1
    assert "on target" not in counts["dropped"]
    given = [json.loads(line) for line in (tmp_path / "cut/answers.jsonl").read_text().splitlines()]
    assert {line["attention_ratio"] for line in given} == {0.0}
    with pytest.raises(SystemExit):  # the answers of one are not those of the other
        make("cut", "--batch_size", 4)
