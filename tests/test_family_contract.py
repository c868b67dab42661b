"""What every family must do alike, on tiny random checkpoints in their real layout, against stock transformers.

Stock means: its own positions, its pixels, eager attention, every answer and every prompt by itself.
"""

import random
from dataclasses import dataclass, replace
from functools import cache, cached_property
from importlib import import_module

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.quantizers.quantizers_utils import should_convert_module

from llava.attention import Plan, Probe, install, use_plan
from llava.checkpoints import open_checkpoint
from llava.families import FAMILIES, model_inputs
from llava.generation import batch_prompts, generate
from llava.scaling import Scale
from train.llava_hound_dpo.arguments import ModelArguments
from train.llava_hound_dpo.model import make_trainable, quantisation
from train.llava_hound_dpo.packing import EncodedPair, pack
from train.llava_hound_dpo.scoring import score

MODULES = ("qwen_vl", "llava_onevision", "llava_interleave", "internvl", "idefics3")
CASES = [(name, kind) for name in MODULES for kind in import_module(f"tests.tiny.{name}").KINDS]
LAYERS = frozenset({1, 2})
SIZES = ((90, 60), (64, 130), (75, 75))  # px


@dataclass(frozen=True)
class Tiny:
    """A tiny checkpoint, opened."""

    module: str
    folder: str

    @cached_property
    def checkpoint(self):
        return open_checkpoint(self.folder)

    @property
    def family(self):
        return self.checkpoint.family

    def model(self):
        return self.checkpoint.load().eval()

    def stock(self):
        """The same weights without anything of ours, with eager attention."""
        model = self.model()
        model.set_attn_implementation({"text_config": "eager"})
        return model

    def prompt(self, sizes, seed=0):
        """(token ids, ImageTokens, positions, pixels, text) of a prompt about noisy pictures."""
        family, rng = self.family, np.random.default_rng(seed)
        pictures = [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in sizes]
        text = "".join(f"Image{n + 1}:<image>\n" for n in range(len(sizes))) + "In Image1, what colour is the picture?"
        images = family.images(sizes)
        ids = family.expand(family.encode_prompt(text), images)
        return ids, images, family.positions(ids, images), family.pixels(pictures), text


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Makes every checkpoint once."""

    @cache
    def make(module, kind):
        folder = tmp_path_factory.mktemp(kind) / "checkpoint"
        import_module(f"tests.tiny.{module}").write(folder, kind)
        return Tiny(module, str(folder))

    return make


each_family = pytest.mark.parametrize(("module", "kind"), CASES, ids=[kind for _, kind in CASES])


def own_inputs(tiny, ids, pixels):
    """What stock transformers takes of one prompt, its answer included."""
    tensor = torch.tensor([ids])
    inputs = {"input_ids": tensor, "attention_mask": torch.ones_like(tensor), **stock_pixels(tiny, pixels)}
    if tiny.module == "qwen_vl":
        inputs["mm_token_type_ids"] = (tensor == tiny.family.image_id).int()
    return inputs


def stock_pixels(tiny, pixels):
    """Of what the family hands on, what transformers' own processor gives."""
    names = import_module(f"tests.tiny.{tiny.module}")
    return {name: value for name, value in pixels.items() if name not in getattr(names, "OURS", ())}


def separate(tiny, model, ids, pixels, answer, target):
    """(log-prob, masses (L, 2)) of one answer by stock transformers; target: weight of each image token."""
    inputs = own_inputs(tiny, [*ids, *answer], pixels)
    out = model(**inputs, output_attentions=True, use_cache=False)
    rows = slice(len(ids) - 1, len(ids) + len(answer) - 1)
    logps = out.logits[0, rows].log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).sum()
    regions = torch.zeros(inputs["input_ids"].shape[1], 2)
    regions[inputs["input_ids"][0] == tiny.family.image_id] = torch.stack([target, torch.ones_like(target)], dim=1)
    maps = torch.stack([out.attentions[layer][0] for layer in sorted(LAYERS)])
    return logps, (maps[:, :, rows] @ regions).mean(dim=(1, 2))


def pairs_of(tiny):
    """Two pairs, of two and of one picture, and their pixels."""
    pairs, pixels = [], []
    for number, sizes in enumerate((SIZES[:2], SIZES[2:])):
        ids, images, positions, own, text = tiny.prompt(sizes, number)
        target = torch.rand(sum(len(image.areas) for image in images), generator=torch.Generator().manual_seed(number))
        answers = [tiny.family.encode_answer(text, said) for said in ("red", "a green picture", "blue white")]
        pairs.append(EncodedPair(ids, answers[number], answers[number + 1 :], target, positions))
        pixels.append(own)
    return pairs, pixels


@each_family
def test_a_packed_row_equals_separate_forwards(tiny, module, kind):
    """Log-probs to 1e-5, masses to 1e-6, all gradients of the language model to 3e-5; gradient checkpointing on."""
    own = tiny(module, kind)
    model, stock, family = own.model(), own.stock(), own.family
    pairs, pixels = pairs_of(own)
    row = pack(pairs, family.image_id)
    weights = [p for name, p in model.named_parameters() if family.part_of(name) in (family.language, "lm_head")]
    theirs = [dict(stock.named_parameters())[name] for name, _ in model.named_parameters()]
    for parameter in [*model.parameters(), *theirs]:
        parameter.requires_grad_(False)
    for parameter in weights:
        parameter.requires_grad_(True)
    model.train()
    model.activation_checkpointing_enable()
    with torch.no_grad():
        features = family.encode(model, family.join(pixels))
    found = score(model, row, features, LAYERS)
    (found.chosen.sum() - found.rejected.sum() + 10 * found.masses[..., 0].sum()).backward()
    total, expected = 0, {"chosen": [], "rejected": [], "masses": []}
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    for name in names:
        dict(stock.named_parameters())[name].requires_grad_(True)
    for pair, one in zip(pairs, pixels, strict=True):
        chosen, masses = separate(own, stock, pair.prompt, one, pair.chosen, pair.target)
        rejected = [separate(own, stock, pair.prompt, one, answer, pair.target)[0] for answer in pair.rejected]
        total = total + chosen - sum(rejected) + 10 * masses[:, 0].sum()
        for name, value in (("chosen", [chosen]), ("rejected", rejected), ("masses", [masses])):
            expected[name] += value
    total.backward()
    assert (found.chosen - torch.stack(expected["chosen"])).abs().max() < 1e-5
    assert (found.rejected - torch.stack(expected["rejected"])).abs().max() < 1e-5
    assert (found.masses - torch.stack(expected["masses"], dim=1)).abs().max() < 1e-6
    ours, other = dict(model.named_parameters()), dict(stock.named_parameters())
    compared = 0
    for name in names:
        if other[name].grad is None:  # an expert that no token was sent to
            assert ours[name].grad is None or not ours[name].grad.any()
            continue
        compared += 1
        assert (ours[name].grad - other[name].grad).abs().max() < 3e-5 * max(1, other[name].grad.abs().max())
    assert compared > 30


@each_family
def test_controls_that_must_fail(tiny, module, kind):
    """A rejected answer that goes on where the chosen one ends, and positions of one axis where there are three."""
    own = tiny(module, kind)
    model, family = own.model(), own.family
    pairs, pixels = pairs_of(own)
    row, joined = pack(pairs, family.image_id), family.join(pixels)
    with torch.no_grad():
        right = score(model, row, family.encode(model, joined)).rejected
        running = torch.arange(row.input_ids.shape[1]).expand(*row.positions.shape)
        wrong = [score(model, replace(row, positions=running), family.encode(model, joined)).rejected]
        if len(row.positions) == 3:
            flat = pack([replace(pair, positions=None) for pair in pairs], family.image_id)
            flat = replace(flat, positions=flat.positions.expand(3, -1, -1))
            wrong.append(score(model, flat, family.encode(model, joined)).rejected)
    apart = [(found - right).abs().max().item() for found in wrong]
    assert min(apart) > 1e-3, apart  # equal is within 1e-5


def batch_of(own, groups, **more):
    """A left-padded batch of prompts, the target their first image."""
    prompts, images, pixels, regions = [], [], [], []
    for number, sizes in enumerate(groups):
        ids, tokens, _, one, _ = own.prompt(sizes, number)
        target = torch.cat([torch.full((len(image.areas),), float(not n)) for n, image in enumerate(tokens)])
        prompts.append(ids)
        images.append(tokens)
        pixels.append(one)
        regions.append(torch.stack([target, torch.ones_like(target)]))
    return batch_prompts(own.family, prompts, images, regions, own.family.join(pixels), [(0,)] * 3, **more)


def boost(confidence, batch):
    """AdaptViz at one factor, on the target of the last prompt row."""
    factor = torch.full((len(batch.input_ids),), 1.7)
    return Scale.of_last_row(factor, batch.regions[..., 0], batch.regions[..., 1] > 0)


@each_family
@pytest.mark.parametrize("beams", [1, 2])
def test_plain_answers_are_those_of_stock_transformers(tiny, module, kind, beams):
    """A left-padded batch of two and of one picture against each prompt alone, with its pixels and its positions."""
    own = tiny(module, kind)
    model, stock, groups = own.model(), own.stock(), (SIZES[:2], SIZES[2:])
    found = generate(model, own.family, batch_of(own, groups), [1, 2], max_new_tokens=6, num_beams=beams)
    for number, (sizes, answer) in enumerate(zip(groups, found, strict=True)):
        ids, _, _, pixels, _ = own.prompt(sizes, number)
        whole = stock.generate(
            **own_inputs(own, ids, pixels), max_new_tokens=6, do_sample=False, num_beams=beams, repetition_penalty=1.0,
            eos_token_id=own.family.end_id, pad_token_id=own.family.tokenizer.pad_token_id,
        )  # fmt: skip
        said = whole[0, len(ids) :].tolist()
        assert answer.tokens == said[: len(answer.tokens)] and len(answer.tokens) in (6, len(said))
        if beams == 1:
            with torch.no_grad():
                target = own_target(own, sizes)
                masses = separate(own, stock, ids, pixels, answer.tokens, target)[1]
            assert (answer.masses[:, :2] - masses).abs().max() < 2e-6


def own_target(own, sizes):
    """Weight 1 of the first image's tokens."""
    return torch.cat([torch.full((len(i.areas),), float(not n)) for n, i in enumerate(own.family.images(sizes))])


@each_family
@pytest.mark.parametrize("beams", [1, 2])
def test_a_scaled_token_run_again_equals_a_second_prefill(tiny, module, kind, beams):
    """First scores to 1e-5 and the same tokens, left padding and beams included."""
    own = tiny(module, kind)
    model, groups = own.model(), (SIZES[:2], SIZES[2:])
    watched = []
    found = generate(
        model, own.family, batch_of(own, groups), [1], boost, max_new_tokens=5, num_beams=beams,
        logits_processor=[lambda ids, scores: watched.append(scores.clone()) or scores],
    )  # fmt: skip
    batch = batch_of(own, groups)
    with torch.no_grad(), use_plan(Plan(scale=boost(None, batch))):
        inputs = model_inputs(own.family.encode(model, batch.pixels), batch.positions)
        again = model.generate(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, **inputs, max_new_tokens=5,
            do_sample=False, num_beams=beams, repetition_penalty=1.0, eos_token_id=own.family.end_id,
            pad_token_id=own.family.tokenizer.pad_token_id, output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
    first = watched[0] if beams == 1 else watched[0] - watched[0].logsumexp(-1, keepdim=True)
    expected = again.logits[0] if beams == 1 else again.logits[0].log_softmax(-1)
    assert (first - expected).abs().max() < 1e-5
    for answer, row in zip(found, again.sequences, strict=True):
        said = row[batch.input_ids.shape[1] :].tolist()
        assert answer.tokens == said[: len(answer.tokens)] and answer.factor == pytest.approx(1.7)
    plain = generate(model, own.family, batch_of(own, groups), [1], max_new_tokens=1)
    one = generate(model, own.family, batch_of(own, groups), [1], boost, max_new_tokens=1)
    assert any(abs((a.masses - b.masses)[0, 0]) > 1e-4 for a, b in zip(plain, one, strict=True))


def box_in(rng, size):
    """A box (x0, y0, x1, y1) in a picture."""
    x, y = (rng.randint(0, side - 10) for side in size)
    return x, y, rng.randint(x + 5, size[0]), rng.randint(y + 5, size[1])


@torch.no_grad()
def seen(model, family, pictures):
    """Brightness of every image token of a prompt."""
    parts = family.encode(model, family.pixels(pictures)).pooler_output
    return torch.cat([part.reshape(-1, part.shape[-1])[:, 0] for part in parts])


@each_family
def test_painted_pictures_fall_on_the_tokens_that_see_them(tiny, module, kind):
    """40 prompts of 1 to 3 pictures: a token's weight is the brightness that the tower gets, to 1e-3 on average."""
    own, rng, errors, swapped = tiny(module, kind), random.Random(0), [], []
    model, family, names = own.model(), own.family, import_module(f"tests.tiny.{module}")
    names.show_light(model, family)
    for _ in range(40):
        sizes = [(rng.randint(30, 400), rng.randint(30, 400)) for _ in range(rng.randint(1, 3))]
        boxes = [box_in(rng, size) for size in sizes]
        black, white = ([Image.new("RGB", size, colour) for size in sizes] for colour in ("black", "white"))
        painted = [picture.copy() for picture in black]
        for picture, box in zip(painted, boxes, strict=True):
            picture.paste("white", box)
        nothing, all_of_it, light = (seen(model, family, pictures) for pictures in (black, white, painted))
        images = family.images(sizes)
        kept = all_of_it - nothing > 0  # newlines show nothing, nor does what pads
        weights, turned = (
            torch.cat([image.weights(area) for image, area in zip(images, areas, strict=True)])
            for areas in (boxes, [(y0, x0, y1, x1) for x0, y0, x1, y1 in boxes])
        )
        errors.append((weights - (light - nothing))[kept].abs())
        swapped.append((turned - (light - nothing))[kept].abs())
    assert torch.cat(errors).mean() < 1e-3
    assert torch.cat(swapped).mean() > 2e-2


@each_family
def test_names_parts_and_the_end_of_answers(tiny, module, kind):
    own = tiny(module, kind)
    family, model = own.family, own.model()
    counts = dict.fromkeys(family.parts(), 0)
    for name, _ in model.named_parameters():
        counts[family.part_of(name)] += 1
        assert not family.is_older_name(f"base_model.model.{name}")
    assert all(counts[part] for part in family.parts()), counts
    text = "Image1:<image>\nwhat?"
    prompt, answer = family.encode_prompt(text), family.encode_answer(text, "red")
    assert answer[-1] == family.end_id and family.tokenizer.decode(answer[:-1]).strip() == "red"
    assert prompt.count(family.image_id) == 1
    with pytest.raises(ValueError, match="special token"):
        family.encode_answer(text, f"red{family.end}")
    assert family.images([(64, 64)])[0].ids.count(family.image_id) == len(family.image((64, 64)).areas)


@each_family
def test_the_linear_layers_of_the_language_model_are_quantised_and_no_others(tiny, module, kind):
    """With `--bits`: neither the tower, nor the projector, nor the head."""
    own = tiny(module, kind)
    family, model = own.family, own.model()
    skipped = quantisation(4, type(family), torch.float32, "cpu")["quantization_config"].llm_int8_skip_modules
    linear = [name for name, part in model.named_modules() if isinstance(part, torch.nn.Linear)]
    converted = [name for name in linear if should_convert_module(name, skipped)]
    assert converted == [name for name in linear if family.part_of(name) == family.language] and len(converted) >= 16


@each_family
def test_lora_reaches_the_language_model_alone(tiny, module, kind):
    own = tiny(module, kind)
    family = own.family
    model = make_trainable(own.model(), type(family), ModelArguments("", lora_r=2, freeze_mm_mlp_adapter=False))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    lora = {name.split(".lora_")[0] for name in trained if "lora_" in name}
    assert len(lora) == own.checkpoint.num_layers * (4 if "moe" in kind else 7)
    assert all(family.part_of(name) == family.language for name in lora)
    others = {name for name in trained if "lora_" not in name}
    assert others and all(family.part_of(name) == family.projectors[0] for name in others)


@each_family
def test_a_raster_keeps_the_mass(tiny, module, kind):
    """Tiles and whole picture add up; nothing is lost between them."""
    family = tiny(module, kind).family
    for size in ((90, 60), (400, 120), (33, 350)):
        image = family.image(size)
        mass = torch.rand(len(image.areas), generator=torch.Generator().manual_seed(0))
        assert image.raster(mass).sum() == pytest.approx(mass.sum().item(), rel=1e-5)
        assert 0 <= image.weights((0, 0, *size)).min() and image.weights((0, 0, *size)).max() < 1 + 1e-6


def test_every_family_is_tried():
    files = {family.__module__.rpartition(".")[2] for family in FAMILIES}
    assert files == {*MODULES, "llava15"}  # LLaVA-1.5 has tests of its own all over


def test_the_attention_function_is_ours(tiny):
    model = tiny(*CASES[0]).model()
    install(model)
    with torch.no_grad(), use_plan(Plan(probe=Probe(torch.ones(1, 3, 2), LAYERS))):
        out = model(input_ids=torch.tensor([[5, 6, 7]]), output_attentions=True)
    assert len(out.attentions) == 2
