"""Batched answers against one prompt at a time with eager attention."""

from types import SimpleNamespace

import pytest
import torch

from llava.attention import install
from llava.generation import Watch, batch_prompts, generate
from tests.conftest import SIDE, tiny_model

TOKENS = 36


def prompts_of(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    image = [model.config.image_token_id] * TOKENS
    made = []
    for count in (1, 3, 2):
        words = torch.randint(10, 300, (4 + count,), generator=generator).tolist()
        prompt = [1, *words, *(token for n in range(count) for token in [*image, 20 + n]), *words[:3]]
        pixels = torch.randn(count, 3, SIDE, SIDE, generator=generator)
        made.append((prompt, torch.rand(count * TOKENS, generator=generator), pixels))
    return made


def regions(target):
    return torch.stack([target, torch.ones_like(target)])


def batch_of(family, prompts, **more):
    pixels = {"pixel_values": torch.cat([x for _, _, x in prompts])}
    ids, measured = [p for p, _, _ in prompts], [regions(t) for _, t, _ in prompts]
    return batch_prompts(family, ids, [()] * len(prompts), measured, pixels, **more)


def alone_with_eager(model, prompt, target, pixels, steps, end, forced=None):
    """(tokens, first-token confidence, ratio per layer 1 and 2), by a plain loop that feeds everything again.

    Greedy, or along the `forced` tokens.
    """
    tokens, rows, confidence = [], [], None
    is_image = torch.tensor(prompt) == model.config.image_token_id
    weights = torch.zeros(len(prompt)).masked_scatter(is_image, target)
    for _ in range(steps):
        ids = torch.tensor([[*prompt, *tokens]])
        out = model(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels, output_attentions=True)
        probabilities = out.logits[0, -1].softmax(-1)
        confidence = confidence or probabilities.max().item()
        last = torch.stack([out.attentions[layer][0, :, -1, : len(prompt)] for layer in (1, 2)])
        rows.append(torch.stack([(last * weights).sum(-1).mean(-1), (last * is_image).sum(-1).mean(-1)], dim=-1))
        tokens.append(forced[len(tokens)] if forced else probabilities.argmax().item())
        if tokens[-1] == end:
            break
    means = torch.stack(rows).mean(0)
    return tokens, confidence, means[:, 0] / means[:, 1]


def test_left_padded_batch_equals_single_prompts_with_eager_attention(processor, family):
    ours, eager = tiny_model(processor), tiny_model(processor)
    install(ours)
    eager.set_attn_implementation("eager")
    prompts = prompts_of(ours)
    end = family.tokenizer.eos_token_id
    batch = batch_of(family, prompts)
    answers = generate(ours, family, batch, [1, 2], max_new_tokens=6)
    for answer, (prompt, target, pixels) in zip(answers, prompts, strict=True):
        with torch.no_grad():
            tokens, confidence, ratio = alone_with_eager(eager, prompt, target, pixels, 6, end)
        assert answer.text == family.tokenizer.decode(tokens, skip_special_tokens=True).strip()
        assert answer.tokens == tokens
        assert abs(answer.confidence - confidence) < 1e-5
        torch.testing.assert_close(torch.tensor(answer.ratio_by_layer), ratio, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("beams", [1, 4])
def test_attention_of_a_beam_is_that_of_the_tokens_it_returns(processor, family, beams):
    """Beams are reordered on the way: the attention must be that of the path that won."""
    ours, eager = tiny_model(processor), tiny_model(processor)
    install(ours)
    eager.set_attn_implementation("eager")
    prompts, end = prompts_of(ours, seed=2), family.tokenizer.eos_token_id
    batch = batch_of(family, prompts)
    answers = generate(ours, family, batch, [1, 2], max_new_tokens=6, num_beams=beams)
    for answer, (prompt, target, pixels) in zip(answers, prompts, strict=True):
        with torch.no_grad():
            _, confidence, ratio = alone_with_eager(eager, prompt, target, pixels, 6, end, answer.tokens)
        assert abs(answer.confidence - confidence) < 1e-5
        torch.testing.assert_close(torch.tensor(answer.ratio_by_layer), ratio, atol=1e-5, rtol=1e-4)
    greedy = generate(ours, family, batch, [1, 2], max_new_tokens=6)
    assert ([a.tokens for a in answers] != [a.tokens for a in greedy]) == (beams > 1)


def test_without_a_probe_the_answers_are_the_same(model, family):
    batch = batch_of(family, prompts_of(model))
    probed, plain = (generate(model, family, batch, layers, max_new_tokens=6) for layers in ([1, 2], []))
    assert [(a.tokens, a.confidence) for a in probed] == [(a.tokens, a.confidence) for a in plain]
    assert plain[0].ratio is plain[0].ratio_by_layer is plain[0].shares is None


def test_shares_are_those_of_the_parts(model, family):
    """Parts of a prompt whose target is its second part; prompts with fewer parts have fewer shares."""
    prompts = prompts_of(model)
    parts = [torch.eye(len(target) // TOKENS).repeat_interleave(TOKENS, 1) for _, target, _ in prompts]
    measured = [torch.cat([part[-1:], torch.ones_like(part[:1]), part]) for part in parts]
    pixels = {"pixel_values": torch.cat([x for _, _, x in prompts])}
    batch = batch_prompts(family, [p for p, _, _ in prompts], [()] * len(prompts), measured, pixels)
    answers = generate(model, family, batch, [1, 2], max_new_tokens=3)
    for answer, part in zip(answers, parts, strict=True):
        assert len(answer.shares) == len(part)
        assert sum(answer.shares) == pytest.approx(1, abs=1e-5) and answer.shares[-1] == pytest.approx(answer.ratio)


def test_an_answer_ends_at_its_end_token_while_others_go_on(processor, family):
    """A model made to answer with the end token at once has answers of one token, empty text."""
    model = tiny_model(processor)
    install(model)
    prompt, target, pixels = prompts_of(model)[0]
    end = family.tokenizer.eos_token_id
    batch = batch_of(family, [(prompt, target, pixels)])
    (answer,) = generate(model, family, batch, [2], max_new_tokens=5)
    assert len(answer.tokens) > 1

    def always_end(ids, logits):
        return torch.full_like(logits, -1e9).index_fill(1, torch.tensor([end]), 0.0)

    (ended,) = generate(model, family, batch, [2], max_new_tokens=5, logits_processor=[always_end])
    assert (ended.tokens, ended.text) == ([end], "")
    assert ended.confidence == answer.confidence


@pytest.mark.parametrize(("steps", "expected"), [([0.5, 0.5], 2.0), ([0.9, 0.9], 1 / 0.9), ([1.0], 1.0)])
def test_perplexity_by_hand(steps, expected):
    """Of each answer's own tokens, by the largest probability of every step."""
    watch = Watch(None, SimpleNamespace(input_ids=torch.zeros(2, 1)), None, None, beams=1)
    for largest in [*steps, 0.3]:  # a longer answer beside it goes on
        rest = (1 - largest) / 4
        scores = torch.tensor([[largest, rest, rest, rest, rest], [0.6, 0.1, 0.1, 0.1, 0.1]]).clamp(min=1e-30).log()
        assert torch.equal(watch(None, scores + 7), scores + 7)
    own, other = watch.perplexities(torch.tensor([len(steps), len(steps) + 1]))
    assert own == pytest.approx(expected, rel=1e-6) and other == pytest.approx(1 / 0.6, rel=1e-6)
