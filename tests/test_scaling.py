"""Scaled attention against AdaptVis written down naively: eager attention, scores multiplied before the mask, two
generations from scratch, one prompt at a time."""

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface, LogitsProcessor
from transformers.masking_utils import eager_mask

from llava.attention import install
from llava.generation import batch_prompts, generate
from llava.scaling import RULES, Scale, scale_scores
from tests.conftest import SIDE, tiny_model

TOKENS, STEPS = 36, 6
KV_HEADS = {"mha": 4, "gqa": 2}


class Naive:
    """transformers' eager attention, the scores of some keys changed in every layer and head.

    Prefill: the last row of a square attention matrix. With `every_step` also the one row of each decoding step.
    """

    def __init__(self):
        self.alpha, self.share, self.rule, self.every_step, self.keeps_mass = 1.0, None, "multiply", False, False
        AttentionInterface.register("naive", self)
        AttentionMaskInterface.register("naive", eager_mask)

    def __call__(self, module, query, key, value, attention_mask, scaling=None, **kwargs):
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        scores = query @ key.transpose(2, 3) * scaling
        if query.shape[2] == key.shape[2] or self.every_step:
            row = scores[0, :, -1]
            before = row.clone()
            for column, share in enumerate(self.share):
                if share > 0:
                    alpha = 1 + (self.alpha - 1) * share
                    own = row[:, column]
                    row[:, column] = own * alpha if self.rule == "multiply" else own + (alpha - 1) * own.abs()
            if self.keeps_mass:
                images = [column for column, image in enumerate(self.images) if image]
                total = lambda r: r[:, images].exp().sum(-1, keepdim=True)  # noqa: E731
                row[:, images] += (total(before) / total(row)).log()
        if attention_mask is not None:
            scores = scores + attention_mask[:, :, :, : key.shape[2]]
        return (scores.softmax(-1) @ value).transpose(1, 2), None


class Recorder(LogitsProcessor):
    """Keeps the scores of every step."""

    def __init__(self):
        self.scores = []

    def __call__(self, input_ids, scores):
        self.scores.append(scores.clone())
        return scores


def prompts_of(model, seed=0):
    """(ids, weight of every image token, pixels) of three prompts of different length, and text between the images."""
    generator = torch.Generator().manual_seed(seed)
    image, made = [model.config.image_token_id] * TOKENS, []
    for count in (1, 3, 2):
        words = torch.randint(10, 300, (4 + count,), generator=generator).tolist()
        prompt = [1, *words, *(token for n in range(count) for token in [*image, 20 + n]), *words[:3]]
        target = torch.zeros(count, TOKENS)
        target[-1] = torch.rand(TOKENS, generator=generator).round(decimals=1)  # patches that a border cuts
        made.append((prompt, target.flatten(), torch.randn(count, 3, SIDE, SIDE, generator=generator)))
    return made


def batch_of(family, prompts):
    regions = [torch.stack([target, torch.ones_like(target)]) for _, target, _ in prompts]
    pixels = {"pixel_values": torch.cat([pixels for _, _, pixels in prompts])}
    return batch_prompts(family, [p for p, _, _ in prompts], [()] * len(prompts), regions, pixels)


def steering(factors, region=0, **settings):
    """Scales every sample by its own factor, whatever the confidence."""

    def steer(confidence, batch):
        weights, images = batch.regions[..., region], batch.regions[..., 1] > 0
        return Scale.of_last_row(torch.tensor(factors), weights, images, **settings)

    return steer


@pytest.fixture(params=KV_HEADS)
def models(request, processor):
    heads = {"num_key_value_heads": KV_HEADS[request.param]}
    ours, other = tiny_model(processor, **heads), tiny_model(processor, **heads)
    install(ours)
    naive = Naive()
    other.set_attn_implementation({"text_config": "naive"})
    return ours, other, naive


def naive_answer(model, naive, prompt, target, pixels, region, **settings):
    """(tokens, scores of every step) of one prompt, from scratch."""
    ids = torch.tensor([prompt])
    is_image = ids[0] == model.config.image_token_id
    naive.images = is_image.tolist()
    naive.share = torch.zeros(len(prompt)).masked_scatter(is_image, target).tolist() if region == 0 else naive.images
    for name, value in settings.items():
        setattr(naive, name, value)
    recorder = Recorder()
    with torch.no_grad():
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels, do_sample=False,
            max_new_tokens=STEPS, logits_processor=[recorder],
        )  # fmt: skip
    return out[0, len(prompt) :].tolist(), recorder.scores


@pytest.mark.parametrize("every_step", [False, True], ids=["prefill", "every step"])
@pytest.mark.parametrize("region", [0, 1], ids=["target", "all images"])
@pytest.mark.parametrize("rule", RULES)
def test_batch_with_own_factors_equals_naive_prompts_alone(models, family, rule, region, every_step):
    ours, other, naive = models
    prompts, factors = prompts_of(ours), (0.5, 2.0, 1.0)
    recorder = Recorder()
    steer = steering(factors, region, rule=rule, every_step=every_step)
    batch = batch_of(family, prompts)
    answers = generate(ours, family, batch, [1], steer, max_new_tokens=STEPS, logits_processor=[recorder])
    for row, (answer, factor, (prompt, target, pixels)) in enumerate(zip(answers, factors, prompts, strict=True)):
        settings = {"alpha": factor, "rule": rule, "every_step": every_step, "keeps_mass": False}
        tokens, scores = naive_answer(other, naive, prompt, target, pixels, region, **settings)
        assert answer.tokens == tokens and answer.factor == factor
        for step, wanted in enumerate(scores):
            torch.testing.assert_close(recorder.scores[step][row], wanted[0], atol=1e-5, rtol=1e-4)


def test_balance_equals_naive(models, family):
    ours, other, naive = models
    prompts, factors, recorder = prompts_of(ours), (3.0, 0.5, 1.7), Recorder()
    batch = batch_of(family, prompts)
    steer = steering(factors, keeps_mass=True)
    generate(ours, family, batch, [1], steer, max_new_tokens=STEPS, logits_processor=[recorder])
    for row, (factor, (prompt, target, pixels)) in enumerate(zip(factors, prompts, strict=True)):
        settings = {"alpha": factor, "rule": "multiply", "every_step": False, "keeps_mass": True}
        _, scores = naive_answer(other, naive, prompt, target, pixels, 0, **settings)
        for step, wanted in enumerate(scores):
            torch.testing.assert_close(recorder.scores[step][row], wanted[0], atol=1e-5, rtol=1e-4)


def test_the_comparison_can_fail(models, family):
    """Another factor, or the text between the images scaled as well, is far outside the tolerance."""
    ours, other, naive = models
    prompts = prompts_of(ours)
    prompt, _, pixels = prompts[1]
    first = {}
    for name, alpha, share in (("right", 2.0, None), ("factor", 1.8, None), ("text", 2.0, "between")):
        naive.alpha, naive.rule, naive.every_step, naive.keeps_mass = alpha, "multiply", False, False
        is_image = [token == other.config.image_token_id for token in prompt]
        naive.images, naive.share = is_image, is_image
        if share:
            last = len(prompt) - 1 - is_image[::-1].index(True)
            naive.share = [is_image.index(True) <= column <= last for column in range(len(prompt))]
        with torch.no_grad():
            ids = torch.tensor([prompt])
            first[name] = other(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels).logits[0, -1]
    assert (first["factor"] - first["right"]).abs().max() > 1e-3
    assert (first["text"] - first["right"]).abs().max() > 1e-3


def test_factors_of_one_are_plain_inference_bit_for_bit(models, family):
    """Also for the one sample of a batch whose neighbours are scaled."""
    model, prompts = models[0], prompts_of(models[0])
    batch, recorders = batch_of(family, prompts), [Recorder() for _ in range(3)]
    plain, ones, mixed = (
        generate(model, family, batch, [1, 2], steer, max_new_tokens=STEPS, logits_processor=[recorder])
        for steer, recorder in zip((None, steering((1.0, 1.0, 1.0)), steering((2.0, 1.0, 0.5))), recorders, strict=True)
    )
    for a, b in zip(plain, ones, strict=True):
        assert a.tokens == b.tokens and a.confidence == b.confidence and torch.equal(a.masses, b.masses)
    assert all(torch.equal(a, b) for a, b in zip(recorders[0].scores, recorders[1].scores, strict=True))
    assert mixed[1].tokens == plain[1].tokens and torch.equal(mixed[1].masses, plain[1].masses)
    assert all(torch.equal(a[1], b[1]) for a, b in zip(recorders[0].scores, recorders[2].scores, strict=True))
    assert not torch.equal(recorders[0].scores[0][0], recorders[2].scores[0][0])


def test_sampling_with_factors_of_one_draws_what_plain_sampling_draws(models, family):
    model = models[0]
    batch = batch_of(family, prompts_of(model))
    settings = {"do_sample": True, "temperature": 1.5, "top_p": 0.9, "top_k": 0, "max_new_tokens": 8}
    drawn = []
    for steer in (None, steering((1.0, 1.0, 1.0)), steering((9.0, 9.0, 9.0), region=1, every_step=True)):
        torch.manual_seed(5)
        drawn.append([a.tokens for a in generate(model, family, batch, [1], steer, **settings)])
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize("beams", [1, 3])
def test_the_measured_attention_is_the_scaled_one(models, family, beams):
    """Boosting the target raises its ratio, far beyond rounding, in every sample; lowering it lowers the ratio."""
    model, prompts = models[0], prompts_of(models[0])
    batch = batch_of(family, prompts)
    ratios = {}
    for factor in (0.3, 1.0, 3.0):
        steer = steering((factor,) * 3, rule="add")
        answers = generate(model, family, batch, [1], steer, max_new_tokens=1, num_beams=beams)
        ratios[factor] = [answer.ratio for answer in answers]
    for low, plain, high in zip(*ratios.values(), strict=True):
        assert low + 0.01 < plain < high - 0.01


def test_layers_can_be_chosen(models, family):
    """Scaling layer 1 alone changes what layer 1 sees and leaves layer 0 alone."""
    model = models[0]
    batch = batch_of(family, prompts_of(model))
    plain = generate(model, family, batch, [0, 1], max_new_tokens=1)
    steer = steering((3.0, 3.0, 3.0), layers=frozenset({1}))
    scaled = generate(model, family, batch, [0, 1], steer, max_new_tokens=1)
    for a, b in zip(plain, scaled, strict=True):
        torch.testing.assert_close(a.masses[0], b.masses[0], atol=1e-6, rtol=1e-5)
        assert not torch.allclose(a.masses[1], b.masses[1], atol=1e-3)


class TestScores:
    """Hand-made scores: keys are text, target, other image, text."""

    scores = torch.tensor([[[[1.0, -2.0, 3.0, 0.5]]]])

    def changed(self, factor, weights=(0.0, 1.0, 0.0, 0.0), **settings):
        images = torch.tensor([[False, True, True, False]])
        scale = Scale.of_last_row(torch.tensor([factor]), torch.tensor([weights]), images, **settings)
        return scale_scores(self.scores, scale)[0, 0, 0].tolist()

    def test_multiply_lowers_a_negative_score(self):
        assert self.changed(2.0) == [1.0, -4.0, 3.0, 0.5]

    def test_add_is_safe_with_signs(self):
        assert self.changed(2.0, rule="add") == [1.0, 0.0, 3.0, 0.5]
        assert self.changed(2.0, (0.0, 0.0, 1.0, 0.0), rule="add") == [1.0, -2.0, 6.0, 0.5]

    def test_half_a_patch_is_half_scaled(self):
        assert self.changed(2.0, (0.0, 0.5, 1.0, 0.0)) == [1.0, -3.0, 6.0, 0.5]

    def test_balance_keeps_the_mass_of_the_images_and_all_text(self):
        before, after = self.scores.softmax(-1)[0, 0, 0], torch.tensor(self.changed(2.0, rule="add", keeps_mass=True))
        after = after.softmax(-1)
        torch.testing.assert_close(after[[0, 3]], before[[0, 3]])
        assert after[1] > before[1] and after[2] < before[2]

    def test_masked_keys_stay_masked(self):
        scores = torch.tensor([[[[-torch.inf, -2.0, 3.0, 0.5]]]])
        scale = Scale.of_last_row(
            torch.tensor([0.0]), torch.tensor([[0.0, 1.0, 1.0, 0.0]]), torch.tensor([[False, True, True, False]])
        )
        assert scale_scores(scores, scale)[0, 0, 0].tolist() == [-torch.inf, 0.0, 0.0, 0.5]
