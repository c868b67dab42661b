"""SmolVLM and Idefics3 against transformers: what a token stands for, prompts, features by picture, beams."""

import json
import random
import re

import pytest
import torch
from PIL import Image, ImageDraw
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer, Idefics3Processor

from llava.checkpoints import open_checkpoint
from llava.families import find_family, model_inputs
from tests.tiny import idefics3 as tiny

ONE = "<image>\nIn Image1, what colour is the picture?"
TWO = "Image1:<image>\nImage2:<image>\nIn Image2, what colour is the picture?"
THREE = "<image><image> Image3:<image>\nAnswer in one word."
STRANGE = [(30, 600), (600, 30), (31, 599), (30, 30), (600, 600), (224, 57), (57, 224), (256, 65), (1, 400), (400, 1)]


@pytest.fixture(scope="module", params=tiny.KINDS)
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param)
    tiny.write(path, request.param)
    return path


@pytest.fixture
def family(folder):
    return open_checkpoint(str(folder)).family


@pytest.fixture(scope="module")
def stock(folder):
    """transformers' own processor. SmolVLM's is the same, but wants packages for videos."""
    own = json.loads((folder / "processor_config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    pictures = AutoImageProcessor.from_pretrained(folder, backend="pil")
    return Idefics3Processor(pictures, tokenizer, own["image_seq_len"], tokenizer.chat_template)


@pytest.fixture(scope="module")
def model(folder):
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()


def noise(size, seed):
    """A picture of random colours in patches that survive resizing."""
    generator = torch.Generator().manual_seed(seed)
    colours = torch.randint(0, 256, (6, 6, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(colours.numpy()).resize(size, Image.Resampling.NEAREST)


def random_size(rng):
    return rng.randint(30, 600), rng.randint(30, 600)


def parts_of(prompt):
    """A prompt as the parts of a message."""
    found = []
    for number, text in enumerate(prompt.split("<image>")):
        found += [{"type": "image"}] if number else []
        found += [{"type": "text", "text": text}] if text else []
    return found


def as_stock(stock, prompt, pictures):
    """Inputs of one prompt by transformers' processor alone; its template gets parts, as users give them."""
    text = stock.apply_chat_template([{"role": "user", "content": parts_of(prompt)}], add_generation_prompt=True)
    return stock(text=text, images=[pictures], return_tensors="pt", add_special_tokens=False)


def expanded(family, prompt, pictures):
    return family.expand(family.encode_prompt(prompt), family.images([picture.size for picture in pictures]))


# ---- geometry


def test_a_tokens_weight_is_the_brightness_that_it_sees(folder, family):
    model, rng = open_checkpoint(str(folder)).load(), random.Random(0)
    tiny.show_light(model, family)
    errors, swapped = [], []
    for number in range(40):
        sizes = [random_size(rng) for _ in range(rng.randint(1, 3))]
        if number < len(STRANGE) - 2:
            sizes[0] = STRANGE[number]
        boxes, pictures = [], []
        for width, height in sizes:
            x, y = (sorted(rng.sample(range(side + 1), 2)) for side in (width, height))
            boxes.append((x[0], y[0], x[1], y[1]))
            pictures.append(Image.new("RGB", (width, height)))
            ImageDraw.Draw(pictures[-1]).rectangle((x[0], y[0], x[1] - 1, y[1] - 1), fill="white")
        with torch.no_grad():
            seen = family.encode(model, family.pixels(pictures)).pooler_output
        for tokens, box, light in zip(family.images(sizes), boxes, seen, strict=True):
            assert tokens.ids.count(family.image_id) == len(tokens.areas) == len(light)
            errors.append((tokens.weights(box) - light[:, 0]).abs())
            other = family.image(tokens.size[::-1]).weights((box[1], box[0], box[3], box[2]))
            swapped.append((other - light[:, 0]).abs() if len(other) == len(light) else torch.ones(0))
    assert torch.cat(errors).mean() <= 1e-3
    assert torch.cat(swapped).mean() > 0.02


@pytest.mark.parametrize("splits", [True, False])
def test_tokens_are_those_of_the_stock_processor(family, stock, splits):
    rng = random.Random(1)
    sizes = STRANGE + [random_size(rng) for _ in range(300 if splits else 20)]
    family.image_processor.do_image_splitting = splits
    for number, size in enumerate(sizes):
        picture = Image.new("RGB", size)
        found = stock(text="<image>", images=[[picture]], add_special_tokens=False, do_image_splitting=splits)
        tokens = family.image(size)
        assert list(tokens.ids) == found["input_ids"][0]
        assert family.num_image_tokens(size) == len(tokens.ids)
        tiles = len(found["pixel_values"][0])
        assert len(family.patches(size)) == tiles
        if number % 20 == 0:
            own = family.pixels([picture])
            assert torch.equal(own["pixel_values"][:, 0], torch.tensor(found["pixel_values"][0]))
            assert own["tiles"].tolist() == [tiles]


@pytest.mark.parametrize("size", [(300, 100), (100, 300), (600, 30)])
def test_the_raster_adds_tiles_and_the_whole_picture_up(family, size):
    tokens = family.image(size)
    rows, cols = family._tiles(size)
    number = family.rows**2
    assert tokens.shape == (rows * family.rows, cols * family.rows)
    mass = torch.rand(len(tokens.areas), generator=torch.Generator().manual_seed(0))
    assert torch.allclose(tokens.raster(mass).sum(), mass.sum())
    first, last = torch.zeros(len(mass)), torch.zeros(len(mass))
    first[0], last[-number - 1] = 1.0, 1.0
    assert tokens.raster(first).argmax() == 0
    assert tokens.raster(last).argmax() == tokens.raster(mass).numel() - 1
    whole = torch.zeros(len(mass))
    whole[-number:] = 1.0
    assert tokens.raster(whole).min() > 0


def test_a_cap_is_kept_by_every_size_and_uses_what_it_may(folder):
    rng, costs = random.Random(2), {}
    for cap in (7, 33, 34, 80, 1000):  # 34: 2 x 2 tiles and the whole picture
        family = open_checkpoint(str(folder), max_image_tokens=cap).family
        sizes = [*STRANGE, *(random_size(rng) for _ in range(100))]
        costs[cap] = max(family.num_image_tokens(size) for size in sizes)
        assert costs[cap] <= cap
        picture = Image.new("RGB", (300, 300))
        assert len(family.pixels([picture])["pixel_values"]) == len(family.patches(picture.size))
    free = open_checkpoint(str(folder)).family.num_image_tokens((300, 300))
    assert costs[7] == costs[33] == 7 < costs[34] == 34 < costs[80] < costs[1000] == free
    with pytest.raises(ValueError, match=r"--max_image_tokens 6: .* needs 7 for a picture"):
        open_checkpoint(str(folder), max_image_tokens=6).family  # noqa: B018


# ---- prompts


@pytest.mark.parametrize("prompt", [ONE, TWO, THREE])
def test_prompts_are_those_of_the_stock_processor(family, stock, prompt):
    pictures = [noise((200 + 90 * number, 150), number) for number in range(prompt.count("<image>"))]
    assert expanded(family, prompt, pictures) == as_stock(stock, prompt, pictures)["input_ids"][0].tolist()


def test_a_picture_has_a_blank_before_it_only_behind_text(family):
    assert "User:<image>\nIn Image1" in family.render([(ONE, None)])
    assert "User: Image1:<image>\nImage2:<image>" in family.render([(TWO, None)])
    said = "User: <image>"
    assert f"User: say {said}" in family.render([(f"say {said}", None)])


def test_what_is_saved_makes_the_same_prompts(folder, family, stock, tmp_path):
    family.save(tmp_path)
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    again = open_checkpoint(str(tmp_path)).family
    again.save(tmp_path)  # what was saved is saved as it is
    saved = AutoTokenizer.from_pretrained(tmp_path)
    assert saved.chat_template == again.tokenizer.chat_template != family.tokenizer.chat_template
    for prompt in (ONE, TWO, THREE, "What?"):
        turns = [(prompt, "red"), ("In Image1?", None)]
        assert again.render(turns, "Be brief.") == family.render(turns, "Be brief.")
        for content in (parts_of(prompt), prompt):
            text = saved.apply_chat_template(
                [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
            )
            assert text == family.render([(prompt, None)])


def test_an_answer_ends_with_the_end_of_utterance(family):
    answer = family.encode_answer(ONE, "red")
    assert family.tokenizer.decode(answer) == " red<end_of_utterance>"
    assert family.end == "<end_of_utterance>" and answer.count(family.end_id) == 1
    prompt = family.encode_prompt(ONE)
    bos = family.tokenizer.bos_token_id
    assert prompt[0] == bos and prompt.count(bos) == 1
    with pytest.raises(ValueError, match="must not contain '<row_1_col_1>'"):
        family.encode_prompt("What is <row_1_col_1>?")


# ---- checkpoints


def test_every_tensor_has_its_place(folder, family):
    checkpoint = open_checkpoint(str(folder))
    assert family.name == "SmolVLM / Idefics3"
    assert checkpoint.check_tensors() == 77
    model = checkpoint.load()
    parts = {family.part_of(name) for name, _ in model.named_parameters()}
    assert parts == {"vision_model", "connector", "text_model", "lm_head"}
    adapted = [name for name, _ in model.named_modules() if re.fullmatch(family.lora_targets(), name)]
    assert len(adapted) == 7 * checkpoint.num_layers and all("text_model" in name for name in adapted)


def test_a_shrunk_twin_has_the_same_tokens_for_a_picture(folder, family):
    config = open_checkpoint(str(folder)).config
    find_family(config).shrink(config)
    twin = AutoModelForImageTextToText.from_config(config)
    picture = noise((300, 100), 0)
    with torch.no_grad():
        features = family.encode(twin, family.pixels([picture])).pooler_output
    assert features[0].shape == (len(family.image(picture.size).areas), config.text_config.hidden_size)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"size": {"longest_edge": 250}}, "size.longest_edge is 250, not a multiple"),
        ({"size": {"longest_edge": 64 * 56 * 2}}, "up to 4096"),
        ({"max_image_size": {"longest_edge": 100}}, "do not make groups"),
    ],
)
def test_pictures_that_the_model_does_not_take_are_refused(folder, family, change, said):
    for name, value in change.items():
        setattr(family.image_processor, name, value)
    with pytest.raises(ValueError, match=said):
        type(family)(family.config, family.tokenizer, family.image_processor)


def test_a_scale_factor_that_is_none_is_refused(family):
    family.config.scale_factor = 0
    with pytest.raises(ValueError, match=r"scale_factor 0 of the .*: a number from 1 is due"):
        type(family)(family.config, family.tokenizer, family.image_processor)


# ---- features


@pytest.mark.parametrize("prompt", [ONE, THREE])
def test_a_forward_with_features_is_one_with_pixels(family, stock, model, prompt):
    pictures = [noise((200 + 90 * number, 150 + 10 * number), number) for number in range(prompt.count("<image>"))]
    ids = expanded(family, prompt, pictures)
    positions = family.positions(ids, family.images([picture.size for picture in pictures]))[:, None]

    def run(shown):
        features = family.encode(model, family.pixels(shown))
        assert [len(one) for one in features.pooler_output] == [len(family.image(p.size).areas) for p in shown]
        return model(input_ids=torch.tensor([ids]), **model_inputs(features, positions)).logits

    with torch.no_grad():
        wanted = model(**as_stock(stock, prompt, pictures)).logits
        assert (run(pictures) - wanted).abs().max() <= 1e-5
        others = [noise(picture.size, 9 + number) for number, picture in enumerate(pictures)]
        assert (run(others) - wanted).abs().max() > 1e-3  # pictures matter


@pytest.mark.parametrize("beams", [1, 2])
def test_a_batch_generates_with_features_what_each_prompt_does_alone(family, stock, model, beams):
    asked = [(TWO, [noise((290, 150), 0), noise((100, 400), 1)]), (ONE, [noise((80, 90), 2)])]
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "num_beams": beams, "do_sample": False}
    settings |= {"pad_token_id": family.tokenizer.pad_token_id, "return_dict_in_generate": True, "output_scores": True}
    wanted = []
    for prompt, pictures in asked:
        inputs = as_stock(stock, prompt, pictures)
        found = model.generate(**inputs, **settings)
        wanted.append((found.sequences[0, inputs["input_ids"].shape[1] :], found))
    prompts = [expanded(family, prompt, pictures) for prompt, pictures in asked]
    longest = max(map(len, prompts))
    assert len(prompts[0]) != len(prompts[1])
    ids = torch.full((2, longest), family.tokenizer.pad_token_id)
    mask, positions = torch.zeros_like(ids), torch.zeros(1, *ids.shape, dtype=torch.long)
    for row, (own, (_, pictures)) in enumerate(zip(prompts, asked, strict=True)):
        ids[row, longest - len(own) :], mask[row, longest - len(own) :] = torch.tensor(own), 1
        positions[:, row, longest - len(own) :] = family.positions(own, family.images([p.size for p in pictures]))
    pixels = family.join([family.pixels(pictures) for _, pictures in asked])
    with torch.no_grad():
        features = family.encode(model, pixels)
    for _ in range(2):  # the features are as they were: another call takes them again
        found = model.generate(input_ids=ids, attention_mask=mask, **model_inputs(features, positions), **settings)
        for row, (tokens, alone) in enumerate(wanted):
            assert torch.equal(found.sequences[row, longest:], tokens)
            if beams > 1:
                assert (found.sequences_scores[row] - alone.sequences_scores[0]).abs() <= 1e-5
        assert len(features.pooler_output) == 3
