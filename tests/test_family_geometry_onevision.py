"""What tokens of LLaVA-OneVision and LLaVA-Interleave stand for, seen through the real processor and the real model.

The tower hands on each patch's brightness (`show_light`); all that puts tiles together is transformers' own.
"""

import random
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw
from transformers import AutoConfig, LlavaOnevisionProcessor, LlavaProcessor

from llava.attention import install
from llava.checkpoints import open_checkpoint
from llava.families import find_family, model_inputs
from llava.families.llava15 import Llava15
from llava.families.llava_interleave import LlavaInterleave
from llava.families.llava_onevision import InterpolatedTokens, LlavaOneVision
from tests.tiny import llava_interleave, llava_onevision

FAMILIES = {"llava_onevision": LlavaOneVision, "llava_onevision_converted": LlavaOneVision,
            "llava_interleave": LlavaInterleave}  # fmt: skip
ONEVISION, INTERLEAVE = "llava_onevision", "llava_interleave"
EXTREMES = [(600, 30), (30, 600), (30, 30), (600, 600), (44, 264), (264, 44)]
PROMPT = "Image1:<image>\nImage2:<image>\nImage3:<image>\nIn Image2, what colour is the picture?"


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    made = {}
    for module in (llava_onevision, llava_interleave):
        for kind in module.KINDS:
            made[kind] = tmp_path_factory.mktemp(kind)
            module.write(made[kind], kind)
    return made


@pytest.fixture(params=[ONEVISION, INTERLEAVE])
def kind(request) -> str:
    return request.param


def prompts(number: int) -> list[list[tuple[int, int]]]:
    """Sizes of the pictures of prompts of one to three."""
    rng = random.Random(0)
    found = [[(rng.randint(30, 600), rng.randint(30, 600)) for _ in range(1 + n % 3)] for n in range(number)]
    for own, extreme in zip(found, EXTREMES * 2, strict=False):
        own[-1] = extreme
    return found


def box_in(size: tuple[int, int], rng: random.Random) -> tuple[int, int, int, int]:
    x, y = (sorted(rng.sample(range(side + 1), 2)) for side in size)
    return x[0], y[0], x[1], y[1]


def painted(size: tuple[int, int], box=None) -> Image.Image:
    """White in the box, black outside."""
    picture = Image.new("RGB", size)
    if box:
        ImageDraw.Draw(picture).rectangle((box[0], box[1], box[2] - 1, box[3] - 1), fill="white")
    return picture


def noise(size: tuple[int, int], seed: int) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    return Image.fromarray(torch.randint(0, 256, (size[1], size[0], 3), generator=generator, dtype=torch.uint8).numpy())


@torch.no_grad()
def seen(model, family, sizes, boxes):
    """How much brighter the boxes make each token, and which are newlines; padding is as bright as before."""
    dark = family.encode(model, family.pixels([painted(size) for size in sizes])).pooler_output
    light = family.encode(model, family.pixels([painted(*one) for one in zip(sizes, boxes, strict=True)])).pooler_output
    return [(own[:, 0] - before[:, 0], before[:, 0] == llava_onevision.NEWLINE)
            for own, before in zip(light, dark, strict=True)]  # fmt: skip


def errors(folder: Path, is_swapped: bool = False) -> dict[str, torch.Tensor]:
    """Of the weights of all tokens but newlines, by the way their picture is cut."""
    checkpoint, rng, found = open_checkpoint(str(folder)), random.Random(1), {}
    family, model = checkpoint.family, checkpoint.load()
    llava_onevision.show_light(model, family)
    for sizes in prompts(40):
        boxes = [box_in(size, rng) for size in sizes]
        for size, box, (brighter, is_newline) in zip(sizes, boxes, seen(model, family, sizes, boxes), strict=True):
            image = family.image(size, len(sizes))
            assert len(image.ids) == len(image.areas) == len(brighter) == family.num_image_tokens(size, len(sizes))
            shown = (box[1], box[0], box[3], box[2]) if is_swapped else box
            off = (image.weights(shown) - brighter)[~is_newline].abs()
            found.setdefault(f"{type(image).__name__}, {'alone' if len(sizes) == 1 else 'several'}", []).append(off)
            assert is_newline.sum() == newlines(family, image)
    return {way: torch.cat(own) for way, own in found.items()}


def newlines(family, image) -> int:
    """Tokens that are none of the squashed or padded picture nor of a grid of equal spans."""
    if isinstance(family, LlavaInterleave):
        return 0
    lines = image.areas[family.base :]
    return int(((lines[:, 0] == 0) & (lines[:, 2] == image.size[0])).sum())


# ---- geometry


def test_a_token_weighs_what_a_white_box_makes_it_brighter(folders, kind):
    found = errors(folders[kind])
    own = {"ImageTokens, alone", "ImageTokens, several"}
    assert set(found) == (own | {"InterpolatedTokens, alone"} if kind == ONEVISION else own)
    for way, off in found.items():
        assert len(off) > 300 and off.mean() < 1e-3 and off.max() < 0.03, (way, off.mean(), off.max())


def test_with_x_and_y_swapped_it_does_not(folders, kind):
    for way, off in errors(folders[kind], is_swapped=True).items():
        assert off.mean() > 0.02, (way, off.mean())


def test_newlines_stand_for_the_strip_of_their_row(folders):
    family = open_checkpoint(str(folders[ONEVISION])).family
    for size, count in (((100, 60), 1), ((600, 500), 1), ((600, 30), 1), ((100, 60), 2)):
        image = family.image(size, count)
        assert isinstance(image, InterpolatedTokens) == (size == (600, 500))
        left, right = image.weights((0, 0, size[0] / 4, size[1])), image.weights((size[0] / 4, 0, *size))
        lines = (image.areas[:, 0] == 0) & (image.areas[:, 2] == size[0])
        assert torch.allclose(left[lines] * 3, right[lines], atol=1e-5)  # as wide as the picture
        assert torch.allclose(left + right, image.weights((0, 0, *size)), atol=1e-5)


def test_a_part_of_a_map_has_what_the_weights_of_its_box_say(folders, kind):
    """Also where a grid is interpolated: mass goes back to where features are from."""
    family = open_checkpoint(str(folders[kind])).family
    for size, count in (((100, 60), 1), ((600, 500), 1), ((600, 30), 1), ((100, 60), 2)):
        image = family.image(size, count)
        mass = torch.rand(len(image.areas), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        raster, (rows, cols), (x0, y0, x1, y1) = image.raster(mass), image.shape, image.extent
        corner = (x0, y0, x0 + (x1 - x0) * 2 / cols, y0 + (y1 - y0) * 3 / rows)
        assert float(raster[:3, :2].sum()) == pytest.approx(float(mass @ image.weights(corner).double()), rel=1e-4)
        assert raster.sum() == pytest.approx(float(mass.sum()), rel=1e-6)


@pytest.mark.parametrize("size", [(4, 600), (1, 3000), (3000, 1), (600, 4)])
def test_what_is_left_of_thin_pictures(folders, size):
    """Of a picture a few px wide no column of an even number is left: newlines alone, as transformers has it."""
    checkpoint = open_checkpoint(str(folders[ONEVISION]))
    family, model = checkpoint.family, checkpoint.load()
    for grids in (family.image_processor.image_grid_pinpoints, [[264, 88]], [[88, 264]]):
        family.image_processor.image_grid_pinpoints = grids
        features, image = family.encode(model, family.pixels([noise(size, 0)])).pooler_output[0], family.image(size)
        assert len(features) == len(image.ids) == len(image.areas) == family.num_image_tokens(size)
        assert torch.isfinite(image.weights((0, 0, size[0], size[1] / 2))).all()
        assert torch.isfinite(image.raster(torch.ones(len(image.areas)))).all()
    family.image_processor.image_grid_pinpoints = [[264, 88]]
    image = family.image((4, 600))
    assert newlines(family, image) == len(image.ids) - family.base == 30


# ---- counts


class Stock(LlavaOnevisionProcessor):
    """transformers' own, which reads no videos here: without torchvision it could not say what reads them."""

    def check_argument_for_proper_class(self, argument_name, argument):
        if argument_name != "video_processor":
            super().check_argument_for_proper_class(argument_name, argument)


def expansion(family, sizes) -> list[int]:
    """Tokens of each picture of one prompt by transformers' own processor."""
    tokenizer, pictures = family.tokenizer, family.image_processor
    if isinstance(family, LlavaOneVision):
        own = Stock(pictures, tokenizer, None, num_image_tokens=25, vision_feature_select_strategy="full")
        images = [[painted(size) for size in sizes]]
    else:
        own = LlavaProcessor(pictures, tokenizer, patch_size=8, vision_feature_select_strategy="full")
        images = [painted(size) for size in sizes]
    ids = own(images=images, text="|".join(["<image>"] * len(sizes)), return_tensors="pt")["input_ids"][0].tolist()
    bar = tokenizer("|")["input_ids"]
    assert len(bar) == 1 and ids.count(bar[0]) == len(sizes) - 1
    return [part.count("1") for part in "".join("01"[i == family.image_id] for i in ids).split("0")]


def test_as_many_tokens_as_transformers_processor_makes(folders, kind):
    family = open_checkpoint(str(folders[kind])).family
    for sizes in prompts(150):
        assert [family.num_image_tokens(s, len(sizes)) for s in sizes] == expansion(family, sizes), sizes


def test_as_many_tokens_at_the_real_scale(folders):
    """27 x 27 patches of 14 px in tiles of 384 px."""
    checkpoint = open_checkpoint(str(folders[ONEVISION]))
    config, own = checkpoint.config, checkpoint.family
    config.vision_config.image_size, config.vision_config.patch_size = 384, 14
    grids = [[384 * down, 384 * across] for down in range(1, 7) for across in range(1, 7)]
    own.image_processor.image_grid_pinpoints = config.image_grid_pinpoints = grids
    own.image_processor.size = {"height": 384, "width": 384}
    family, rng = LlavaOneVision(config, own.tokenizer, own.image_processor), random.Random(0)
    real = Stock(own.image_processor, own.tokenizer, None, num_image_tokens=729, vision_feature_select_strategy="full")
    sizes = [(rng.randint(8, 4000), rng.randint(8, 4000)) for _ in range(300)]
    counts = real._get_num_multimodal_tokens(image_sizes=[size[::-1] for size in sizes])["num_image_tokens"]
    assert [family.num_image_tokens(size) for size in sizes] == list(counts)
    assert all(len(family.image(size).areas) == count for size, count in zip(sizes[:40], counts, strict=False))
    assert family.num_image_tokens((640, 480)) == 2929 and family.num_image_tokens((640, 480), 3) == 730
    assert family.patches((640, 480)) == (729,) * 5 and family.patches((640, 480), 3) == (729,)
    with pytest.raises(ValueError, match="needs 1485 for a picture"):
        family.cap(1484)
    family.cap(1485)
    assert family.image_processor.image_grid_pinpoints == [[384, 384]]


@pytest.mark.parametrize("most", [55, 100, 200, 250])
def test_a_capped_picture_costs_so_many_at_most_and_the_model_knows(folders, most):
    checkpoint = open_checkpoint(str(folders[ONEVISION]), max_image_tokens=most)
    family, model = checkpoint.family, checkpoint.load()
    free = open_checkpoint(str(folders[ONEVISION])).family
    costs = {size: family.num_image_tokens(size) for [size] in prompts(120)[::3]}
    assert max(costs.values()) <= most < max(free.num_image_tokens(size) for size in costs)
    for size in EXTREMES:
        with torch.no_grad():
            features = family.encode(model, family.pixels([noise(size, 0)])).pooler_output
        assert [len(own) for own in features] == [costs.get(size, family.num_image_tokens(size))]
    assert model.config.image_grid_pinpoints == checkpoint.config.image_grid_pinpoints


def test_a_cap_below_the_least_names_it(folders, kind):
    least = 55 if kind == ONEVISION else 25
    with pytest.raises(ValueError, match=f"needs {least} for a picture"):
        open_checkpoint(str(folders[kind]), max_image_tokens=least - 1).family  # noqa: B018
    open_checkpoint(str(folders[kind]), max_image_tokens=least).family  # noqa: B018


# ---- the model


@torch.no_grad()
@pytest.mark.parametrize("count", [1, 3])
def test_features_given_are_pixels_given(folders, kind, count):
    """Against transformers' own forward of its own processor's text, with eager attention and its own positions."""
    checkpoint = open_checkpoint(str(folders[kind]))
    family, model = checkpoint.family, checkpoint.load()
    sizes = [(200, 90), (70, 140), (64, 64)][:count]
    pictures = [noise(size, n) for n, size in enumerate(sizes)]
    prompt = PROMPT if count == 3 else "<image>\nWhat colour is the picture?"
    ids = family.expand(family.encode_prompt(prompt), images := family.images(sizes))
    tokens = torch.tensor([ids])
    pixels = family.pixels(pictures)
    positions = family.positions(ids, images)[:, None]
    given = model(tokens, **model_inputs(family.encode(model, pixels), positions)).logits
    model.set_attn_implementation("eager")
    stock = model(tokens, attention_mask=torch.ones_like(tokens), **pixels).logits
    assert (given - stock).abs().max() < 1e-5
    assert (stock - model(tokens, **family.pixels([noise(s, 9) for s in sizes])).logits).abs().max() > 1e-3


@torch.no_grad()
def test_prompts_of_one_and_of_three_pictures_are_encoded_together(folders, kind):
    checkpoint = open_checkpoint(str(folders[kind]))
    family, model = checkpoint.family, checkpoint.load()
    install(model)
    groups = [[noise((200, 90), 0)], [noise((70, 140), n) for n in range(3)], [noise((600, 500), 5)]]
    parts = [family.pixels(group) for group in groups]
    apart = [own for part in parts for own in family.encode(model, part).pooler_output]
    whole = family.encode(model, family.join(parts)).pooler_output
    assert len(whole) == len(apart) == 5
    for ours, alone in zip(whole, apart, strict=True):
        assert ours.shape == alone.shape and (ours - alone).abs().max() < 1e-5


# ---- text and files


@pytest.mark.parametrize("kind", [*FAMILIES])
def test_a_folder_opens_as_its_family(folders, kind):
    checkpoint = open_checkpoint(str(folders[kind]))
    family = checkpoint.family
    assert type(family) is FAMILIES[kind] is find_family(checkpoint.config)
    assert checkpoint.check_tensors() == len(checkpoint.load().state_dict())
    assert family.end == "<|im_end|>"


@pytest.mark.parametrize("kind", [*FAMILIES])
def test_text_is_that_of_the_template_with_one_text_part(folders, kind):
    family = open_checkpoint(str(folders[kind])).family
    messages = [{"role": "user", "content": [{"type": "text", "text": PROMPT}]}]
    opened = family.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert family.render([(PROMPT, None)]) == opened and "Image2:<image>\nImage3:<image>\n" in opened
    messages += [{"role": "assistant", "content": [{"type": "text", "text": "red"}]}]
    messages += [{"role": "user", "content": [{"type": "text", "text": "Sure?"}]}]
    two = family.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert family.render([(PROMPT, "red"), ("Sure?", None)]) == two
    prompt, answer = family.encode_prompt(PROMPT), family.encode_answer(PROMPT, "red")
    assert family.tokenizer.decode(prompt + answer) == opened + "red<|im_end|>"
    assert answer[-1] == family.end_id and prompt.count(family.image_id) == 3
    assert family.encode_answer("Sure?", "yes", [("user", PROMPT), ("assistant", "red")])[-1] == family.end_id


def test_the_hubs_template_begins_a_given_answer_elsewhere(folders):
    """Why the last answer is not rendered by it: if this fails, `ChatFamily.render` may be simpler."""
    tokenizer = open_checkpoint(str(folders[ONEVISION])).family.tokenizer
    messages = [{"role": "assistant", "content": [{"type": "text", "text": "red"}]}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "<|im_start|>assistant \nred<|im_end|>"


def test_one_model_type_of_two_families_is_told_apart(folders):
    config = open_checkpoint(str(folders[INTERLEAVE])).config
    assert LlavaInterleave.fits(config) and LlavaInterleave.fits(config.to_dict())
    config.vision_feature_select_strategy = "default"
    assert find_family(config) is Llava15
    config.vision_feature_select_strategy, config.vision_config = "full", AutoConfig.for_model("pixtral")
    assert find_family(config) is Llava15
    with pytest.raises(ValueError, match="'full'"):
        Llava15.check_config(config)


def test_newline_and_projector_are_trained_together_but_only_one_is_a_module(folders):
    checkpoint = open_checkpoint(str(folders[ONEVISION]))
    names = [name for name, _ in checkpoint.load().named_parameters()]
    trained = {name for name in names if LlavaOneVision.part_of(name) == "multi_modal_projector"}
    assert "model.image_newline" in trained and len(trained) == 5
    assert LlavaOneVision.projector_modules(checkpoint.config) == ["multi_modal_projector"]
    assert LlavaOneVision.bare_name("image_newline") == LlavaOneVision.bare_name("base_model.model.model.image_newline")


def test_settings_that_do_not_fit_the_tower_are_refused(folders, kind):
    family = open_checkpoint(str(folders[kind])).family
    family.image_processor.size = {"height": 48, "width": 48}
    with pytest.raises(ValueError, match="different checkpoints"):
        type(family)(family.config, family.tokenizer, family.image_processor)
    assert family.check_processor({}) is None


def test_what_plain_transformers_would_count_wrongly_is_said(folders):
    onevision, interleave = (open_checkpoint(str(folders[kind])).family for kind in (ONEVISION, INTERLEAVE))
    assert "counts 729 tokens" in onevision.check_processor({"num_image_tokens": 729})
    onevision.image_processor.image_grid_pinpoints = [[44, 44]]
    assert "image_grid_pinpoints" in onevision.check_processor({})
    right = {"patch_size": 8, "vision_feature_select_strategy": "full"}
    assert interleave.check_processor(right) is None
    assert "counts 24 tokens" in interleave.check_processor(right | {"vision_feature_select_strategy": "default"})
