"""Answers measured as branches of one row, against generation and against eager attention, one answer at a time."""

import pytest
import torch
from transformers import SuppressTokensLogitsProcessor

from llava.generation import batch_prompts, generate
from llava.heads import Heads
from llava.measuring import measure
from tests.conftest import tiny_model
from tests.test_family_contract import SIZES, each_family, tiny  # noqa: F401  a fixture
from tests.test_generation import batch_of, prompts_of

HEADS = {"all heads": None, "some heads": Heads({1: (0, 3), 2: (1,)}).selected(4)}
TOLERANCE = {"atol": 1e-6, "rtol": 1e-5}


@pytest.fixture
def one(model):
    """(prompt, weights of its image tokens, pixels) of two pictures."""
    return prompts_of(model)[2]


def given(family):
    """Answers of another: several lengths, one of the end token alone, one cut off, one twice."""
    end = family.end_id
    return [[50, 60, 70, end], [end], [90, 91, 92, 93, 94, 95, 96], [80, end], [50, 60, 70, end]]


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("layers", [[1, 2], []], ids=["probed", "not probed"])
def test_a_greedy_answer_measures_as_it_was_generated(model, family, one, heads, layers):
    """Beside other answers, first and last in the row."""
    heads = heads if layers else None
    batch = batch_of(family, [one], is_mapped=[bool(layers)])
    (wanted,) = generate(model, family, batch, layers, heads=heads, max_new_tokens=6)
    first, *_, last = measure(model, family, batch, [wanted.tokens, *given(family), wanted.tokens], layers, heads)
    for found in (first, last):
        assert (found.text, found.tokens, found.is_complete) == (wanted.text, wanted.tokens, wanted.is_complete)
        assert (found.factor, found.by_head) == (1.0, None)
        assert found.confidence == pytest.approx(wanted.confidence, abs=1e-6)
        assert found.perplexity == pytest.approx(wanted.perplexity, rel=1e-6)
        assert (found.ratio, found.shares) == pytest.approx((wanted.ratio, wanted.shares), abs=1e-6)
        torch.testing.assert_close(found.masses, wanted.masses, **TOLERANCE)
        torch.testing.assert_close(found.by_token, wanted.by_token, **TOLERANCE)


def test_every_branch_equals_eager_attention_on_its_answer_alone(model, processor, family, one):
    prompt, target, pixels = one
    eager = tiny_model(processor)
    eager.set_attn_implementation("eager")
    is_image = torch.tensor(prompt) == family.image_id
    answers = given(family)
    measured = measure(model, family, batch_of(family, [one], is_mapped=[True]), answers, [1, 2])
    for answer, found in zip(answers, measured, strict=True):
        ids = torch.tensor([prompt + answer[:-1]])
        with torch.no_grad():
            out = eager(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels, output_attentions=True)
        rows = torch.stack([out.attentions[n][0, :, len(prompt) - 1 :, : len(prompt)] for n in (1, 2)])
        each = rows.mean(dim=(1, 2))[:, is_image]
        torch.testing.assert_close(found.masses, torch.stack([each @ target, each.sum(1)], dim=1), **TOLERANCE)
        torch.testing.assert_close(found.by_token, each.mean(dim=0), **TOLERANCE)
        logs = out.logits[0, len(prompt) - 1 :].log_softmax(-1)
        own = logs[torch.arange(len(answer)), torch.tensor(answer)]
        assert found.perplexity == pytest.approx((-own.mean()).exp().item(), rel=1e-5)
        assert found.confidence == pytest.approx(logs[0].max().exp().item(), rel=1e-5)
        assert found.is_complete == (answer[-1] == family.end_id)


@each_family
def test_every_family_measures_as_it_generates(tiny, module, kind):  # noqa: F811
    """Also where positions have three axes, and a picture several tiles."""
    family, model = tiny(module, kind).family, tiny(module, kind).model()
    ids, images, _, pixels, _ = tiny(module, kind).prompt(SIZES[:2])
    target = torch.rand(ids.count(family.image_id))
    batch = batch_prompts(family, [ids], [images], [torch.stack([target, torch.ones_like(target)])], pixels)
    trained = [SuppressTokensLogitsProcessor([family.image_id])]  # random weights may say a picture's placeholder
    (wanted,) = generate(model, family, batch, [1, 2], max_new_tokens=5, logits_processor=trained)
    other = family.encode_answer("Image1:<image>\nwhat?", "red")
    for found in measure(model, family, batch, [wanted.tokens, other, wanted.tokens], [1, 2])[::2]:
        torch.testing.assert_close(found.masses, wanted.masses, **TOLERANCE)
        assert found.confidence == pytest.approx(wanted.confidence, abs=1e-6)
