"""InternVL's tiles, tokens and features against transformers: painted pictures, counts, forward and generation."""

import random
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer, InternVLProcessor

from llava.checkpoints import open_checkpoint
from llava.families import model_inputs
from llava.families.internvl import InternVL
from tests.tiny import internvl as tiny

EXTREME = [(30, 600), (600, 30), (31, 597), (448, 37), (56, 56), (30, 30), (600, 600)]
ONE, TWO, THREE = (
    "".join(f"Image{n}:<image>\n" for n in range(1, count + 1)) + "In Image1, what colour is it?" for count in (1, 2, 3)
)


class Stock(InternVLProcessor):
    """transformers' own, as `AutoProcessor` makes it, but for its video processor, which needs torchvision."""

    def check_argument_for_proper_class(self, argument_name, argument):
        return argument_name == "video_processor" or super().check_argument_for_proper_class(argument_name, argument)


@pytest.fixture(scope="module", params=tiny.KINDS)
def made(request, tmp_path_factory):
    """A checkpoint, its family, and what transformers alone makes of its folder."""
    folder = tmp_path_factory.mktemp(request.param)
    tiny.write(folder, request.param)
    checkpoint = open_checkpoint(str(folder))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    pictures = AutoImageProcessor.from_pretrained(folder, backend="pil")
    assert not pictures.crop_to_patches  # as in published ones
    stock = Stock(pictures, tokenizer, image_seq_length=4, chat_template=tokenizer.chat_template)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    return SimpleNamespace(
        folder=folder, checkpoint=checkpoint, family=checkpoint.family, model=model, stock=stock, kind=request.param
    )


def any_size(rng):
    return rng.choice(EXTREME) if rng.random() < 0.25 else (rng.randint(30, 600), rng.randint(30, 600))


def painted(rng, size):
    """A white box on black, and its place."""
    (x0, x1), (y0, y1) = (sorted(rng.sample(range(side + 1), 2)) for side in size)
    picture = Image.new("RGB", size)
    picture.paste((255, 255, 255), (x0, y0, x1, y1))
    return picture, (x0, y0, x1, y1)


def noisy(seed, sizes):
    rng = torch.Generator().manual_seed(seed)
    return [
        Image.fromarray(torch.randint(0, 256, (height, width, 3), generator=rng, dtype=torch.uint8).numpy())
        for width, height in sizes
    ]


def stock_inputs(made, prompt, pictures):
    """What transformers' processor makes of a rendered prompt."""
    text = made.family.render([(prompt, None)])
    return made.stock(text=[text], images=pictures, return_tensors="pt", return_mm_token_type_ids=False)


def own_ids(family, prompt, pictures):
    images = family.images([picture.size for picture in pictures])
    return family.expand(family.encode_prompt(prompt), images), images


# ---- geometry


def test_every_token_weighs_as_much_as_it_is_bright(made):
    rng, family = random.Random(0), made.family
    model = AutoModelForImageTextToText.from_pretrained(made.folder, dtype=torch.float32).eval()
    tiny.show_light(model, family)
    errors, swapped = [], []
    for number in range(40):
        sizes = [any_size(rng) for _ in range(number % 3 + 1)]
        pictures, boxes = zip(*(painted(rng, size) for size in sizes), strict=True)
        images = family.images(sizes)
        with torch.no_grad():
            light = family.encode(model, family.pixels(pictures)).pooler_output[..., 0].flatten()
        assert len(light) == sum(len(image.areas) for image in images)
        for image, box, shown in zip(images, boxes, light.split([len(image.areas) for image in images]), strict=True):
            (width, height), (x0, y0, x1, y1) = image.size, box
            errors.append((image.weights(box) - shown).abs())
            other = (y0 * width / height, x0 * height / width, y1 * width / height, x1 * height / width)
            swapped.append((image.weights(other) - shown).abs())
    errors, swapped = torch.cat(errors), torch.cat(swapped)
    assert errors.mean() <= 1e-3 and errors.max() <= 0.01  # the resampling filter at the box's edges
    assert swapped.mean() > 0.02


def test_tokens_and_pixels_are_those_of_transformers_own_processor(made):
    rng = random.Random(1)
    for prompt, count in ((ONE, 1), (THREE, 3)):
        pictures = noisy(count, [any_size(rng) for _ in range(count)])
        given = stock_inputs(made, prompt, pictures)
        assert own_ids(made.family, prompt, pictures)[0] == given["input_ids"][0].tolist()
        assert torch.equal(made.family.pixels(pictures)["pixel_values"], given["pixel_values"])


def test_counts_are_transformers_own_for_a_thousand_sizes(made):
    rng, family = random.Random(2), made.family
    sizes = [(rng.randint(1, 4000), rng.randint(1, 4000)) for _ in range(1000)]
    theirs = made.stock._get_num_multimodal_tokens(image_sizes=[(height, width) for width, height in sizes])
    assert [family.num_image_tokens(size) for size in sizes] == theirs["num_image_tokens"]
    assert len(set(theirs["num_image_tokens"])) > 5
    for size, pieces in zip(sizes[:200], theirs["num_image_patches"], strict=False):
        image = family.image(size)
        assert len(image.ids) == family.num_image_tokens(size) and len(image.areas) == image.ids.count(family.image_id)
        assert family.patches(size) == (17,) * pieces


@pytest.mark.parametrize(("size", "tokens"), [((336, 336), 256), ((640, 480), 3328), ((936, 976), 2560)])
def test_tokens_at_the_published_size(made, size, tokens):
    """Tiles of 448 px and 32 x 32 patches, of which four are a token."""
    config = type(made.checkpoint.config).from_pretrained(made.folder)
    config.vision_config.image_size = (448, 448)
    square = {"height": 448, "width": 448}
    pictures = AutoImageProcessor.from_pretrained(made.folder, backend="pil", size=square)
    family = InternVL(config, made.family.tokenizer, pictures)
    assert len(family.image(size).areas) == family.num_image_tokens(size) - 2 == tokens
    assert family.patches(size) == (1025,) * (tokens // 256)


def test_tiles_and_whole_picture_share_the_raster(made):
    image = made.family.image((60, 20))  # 3 x 1 tiles cover it once more than the whole picture does
    assert image.shape == (2, 6) and len(image.areas) == 16
    even = (image.areas[:, 2:] - image.areas[:, :2]).prod(dim=-1)
    assert image.raster(even).allclose(torch.full((2, 6), 2 * 60 * 20 / 12, dtype=even.dtype))
    assert made.family.image((100, 100), 3).shape == (4, 4) and made.family.image((20, 20)).shape == (2, 2)


@pytest.mark.parametrize(("most", "tiles"), [(4, 1), (8, 1), (12, 3), (23, 5), (52, 13), (1000, 13)])
def test_a_picture_costs_no_more_than_it_may(made, most, tiles):
    rng, family = random.Random(3), open_checkpoint(str(made.folder), max_image_tokens=most).family
    sizes = [any_size(rng) for _ in range(200)] + EXTREME
    assert max(family.num_image_tokens(size) for size in sizes) == 4 * tiles + 2
    picture = noisy(0, [(600, 30)])
    assert len(family.pixels(picture)["pixel_values"]) == len(family.patches((600, 30))) <= tiles


def test_less_than_a_tile_is_refused(made):
    with pytest.raises(ValueError, match="--max_image_tokens 3: InternVL needs 4 for a picture"):
        _ = open_checkpoint(str(made.folder), max_image_tokens=3).family


# ---- text


def test_the_template_is_the_checkpoints_and_ends_an_answer(made):
    family, text = made.family, TWO.replace("<image>", "<IMG_CONTEXT>")
    said = [{"role": "user", "content": [{"type": "text", "text": text}]}]
    tokenizer = made.stock.tokenizer
    whole = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
    assert family.render([(TWO, None)]) == whole
    assert family.end == "<|im_end|>" and (tokenizer.eos_token == family.end) == (made.kind != "internvl_llama")
    ids = family.encode_answer(TWO, "red")
    assert tokenizer.decode(ids) == "red<|im_end|>" and ids.count(family.end_id) == 1
    prompt = family.encode_prompt(TWO)
    assert prompt == tokenizer(family.render([(TWO, None)]))["input_ids"] and prompt.count(family.image_id) == 2
    assert prompt.count(tokenizer.bos_token_id) == (made.kind == "internvl_llama")
    for token in ("<IMG_CONTEXT>", "<img>", "<|im_end|>"):
        with pytest.raises(ValueError, match="an answer must not contain"):
            family.encode_answer(TWO, f"red {token}")


def test_a_saved_folder_reads_pictures_and_parts_as_the_family_does(made, tmp_path):
    capped = open_checkpoint(str(made.folder), max_image_tokens=20).family
    capped.save(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    first, second, last = TWO.split("<image>")
    parts = [{"type": "text", "text": first}, {"type": "image"}, {"type": "text", "text": second}, {"type": "image"}]
    said = [{"role": "user", "content": [*parts, {"type": "text", "text": last}]}]
    text = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
    assert text == capped.render([(TWO, None)])
    pictures, shown = AutoImageProcessor.from_pretrained(tmp_path, backend="pil"), noisy(7, [(600, 31), (99, 250)])
    given = Stock(pictures, tokenizer, image_seq_length=4)(text=[text], images=shown, return_tensors="pt")
    assert given["input_ids"][0].tolist() == own_ids(capped, TWO, shown)[0]
    assert torch.equal(given["pixel_values"], capped.pixels(shown)["pixel_values"])


# ---- features


@pytest.mark.parametrize(("prompt", "sizes"), [(ONE, [(300, 120)]), (THREE, [(90, 400), (40, 40), (333, 250)])])
def test_features_give_the_logits_of_pixels(made, prompt, sizes):
    family, pictures = made.family, noisy(4, sizes)
    given = stock_inputs(made, prompt, pictures)
    ids, images = own_ids(family, prompt, pictures)
    positions = family.positions(ids, images)[:, None]
    with torch.no_grad():
        expected = made.model(**given).logits
        features = family.encode(made.model, family.pixels(pictures))
        found = made.model(input_ids=torch.tensor([ids]), **model_inputs(features, positions)).logits
        turned = family.encode(made.model, {"pixel_values": family.pixels(pictures)["pixel_values"].flip(0)})
        other = made.model(input_ids=torch.tensor([ids]), **model_inputs(turned, positions)).logits
    assert (found - expected).abs().max() <= 1e-5
    assert (other - expected).abs().max() > 1e-3


@pytest.mark.parametrize("beams", [1, 2])
def test_a_batch_generates_from_features_what_each_prompt_does_from_pixels(made, beams):
    family, prompts = made.family, [(TWO, [(300, 120), (50, 52)]), (ONE, [(200, 90)])]
    shown = [noisy(5 + number, sizes) for number, (_, sizes) in enumerate(prompts)]
    how = {
        "num_beams": beams, "do_sample": False, "max_new_tokens": 8, "eos_token_id": [family.end_id],
        "pad_token_id": 0, "return_dict_in_generate": True, "output_logits": True, "output_scores": True,
    }  # fmt: skip
    rows = [own_ids(family, prompt, pictures) for (prompt, _), pictures in zip(prompts, shown, strict=True)]
    longest = max(len(ids) for ids, _ in rows)
    assert len({len(ids) for ids, _ in rows}) == 2
    ids, mask = torch.zeros(2, longest, dtype=torch.long), torch.zeros(2, longest, dtype=torch.long)
    positions = torch.zeros(1, 2, longest, dtype=torch.long)
    for number, (row, images) in enumerate(rows):
        ids[number, -len(row) :], mask[number, -len(row) :] = torch.tensor(row), 1
        positions[:, number, -len(row) :] = family.positions(row, images)
    pixels = family.join([family.pixels(pictures) for pictures in shown])
    with torch.no_grad():
        features = family.encode(made.model, pixels)
        before = features.pooler_output.clone()
        found = made.model.generate(input_ids=ids, attention_mask=mask, **model_inputs(features, positions), **how)
        alone = [
            made.model.generate(**stock_inputs(made, prompt, pictures), **how)
            for (prompt, _), pictures in zip(prompts, shown, strict=True)
        ]
    assert torch.equal(features.pooler_output, before)
    for number, (own, (row, _)) in enumerate(zip(alone, rows, strict=True)):
        expected = own.sequences[0, len(row) :].tolist()
        assert found.sequences[number, longest:].tolist()[: len(expected)] == expected
        logits = found.logits[0].view(2, beams, -1)[number, 0]
        assert (logits - own.logits[0][0]).abs().max() <= 1e-4
        if beams > 1:
            assert abs(found.sequences_scores[number] - own.sequences_scores[0]) <= 1e-4
    assert (found.logits[0][0] - found.logits[0][-1]).abs().max() > 1e-2  # the two prompts are no one prompt


# ---- what is refused


def test_all_tensors_are_accounted_for(made):
    assert made.checkpoint.check_tensors() == len(made.model.state_dict())
    parts = {InternVL.part_of(name) for name in made.model.state_dict()}
    assert parts == {"vision_tower", "multi_modal_projector", "language_model", "lm_head"} == set(InternVL.parts())


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy is 'full'"),
        ({"vision_feature_layer": -5}, "vision_feature_layer is -5, but the tower has 3 layers"),
        ({"downsample_ratio": 0.4}, "patches joined by 0.4"),
        ({"vision_config.image_size": (56, 112)}, "squares are due"),
        ({"vision_config.image_size": (70, 70)}, "do not fill the vision tower's square"),
        ({"vision_config.num_attention_heads": 0}, "num_attention_heads 0"),
        ({"text_config.layer_types": ["full_attention"] * 3 + ["linear_attention"]}, "layers of linear_attention"),
    ],
)
def test_configs_that_would_be_read_wrongly_are_refused(made, changed, problem):
    config = type(made.checkpoint.config).from_pretrained(made.folder)
    InternVL.check_config(config)
    for name, value in changed.items():
        part, _, field = name.rpartition(".")
        setattr(getattr(config, part) if part else config, field, value)
    with pytest.raises(ValueError, match=problem):
        InternVL.check_config(config)


def test_tiles_of_another_size_and_processors_of_another_kind_are_refused(made):
    family = made.family
    other = AutoImageProcessor.from_pretrained(made.folder, backend="pil", size={"height": 64, "width": 64})
    with pytest.raises(ValueError, match="the vision tower takes 56 x 56 px"):
        InternVL(family.config, family.tokenizer, other)
    with pytest.raises(ValueError, match="is a object, which makes no tiles"):
        InternVL(family.config, family.tokenizer, object())
    with pytest.raises(ValueError, match="sees pictures whole"):
        InternVL(family.config, family.tokenizer, family.image_processor, pad=False)


def test_a_processor_that_counts_otherwise_is_told(made):
    assert made.family.check_processor({"image_seq_length": 4}) is None
    assert "counts 256 tokens for a tile" in made.family.check_processor({})
