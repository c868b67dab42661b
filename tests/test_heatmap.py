"""Maps of attention by patch: their numbers against the region masses, their drawing against known places."""

import json
import sys

import numpy as np
import pytest
import torch
from llava.layout import PatchGrid
from PIL import Image

from llava.generation import batch_prompts, generate
from llava.heatmap import OUTLINE, STRIP, attention_map, draw_prompt, patch_masses
from scripts import draw_attention
from tests.conftest import SIDE
from tests.test_layout import grid_of

TOKENS = 36


def test_patches_add_up_to_the_regions_of_the_same_answer(model, processor):
    """Sampled, so that the answer said again is not the greedy one."""
    image = [model.config.image_token_id] * TOKENS
    target = torch.rand(2 * TOKENS)
    pixels = torch.randn(2, 3, SIDE, SIDE)
    regions = [torch.stack([target, torch.ones_like(target)])]
    prompt = [1, 11, *image, 12, *image, 13]
    token, pad = model.config.image_token_id, processor.tokenizer.pad_token_id
    batch = batch_prompts([prompt], regions, pixels, token, pad)
    torch.manual_seed(0)
    settings = {"do_sample": True, "temperature": 3.0, "max_new_tokens": 5}
    (answer,) = generate(model, processor.tokenizer, batch, [1, 2], **settings)
    masses = patch_masses(model, processor.tokenizer, batch, answer.tokens, [1, 2], token)
    assert masses.shape == (2 * TOKENS,)
    torch.testing.assert_close(masses.sum(), answer.masses[:, 1].mean(), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close((masses * target).sum(), answer.masses[:, 0].mean(), atol=1e-6, rtol=1e-5)


def brightest(sheet):
    """(x, y) centre of what the overlay made brightest."""
    light = np.asarray(sheet.convert("L"), dtype=float)
    return np.argwhere(light > light.max() - 10).mean(axis=0)[::-1]


@pytest.mark.parametrize("size", [(200, 100), (100, 200), (120, 120)], ids=str)
@pytest.mark.parametrize("pad", [True, False], ids=["pad", "crop"])
def test_a_hot_patch_is_drawn_where_its_pixels_are(size, pad):
    """One patch in the middle row and third column: its place in the picture, padding or cropping undone."""
    grid: PatchGrid = grid_of(side=72, patch=12, pad=pad)
    masses = torch.zeros(36)
    row, col = 3, 2
    masses[row * 6 + col] = 0.5
    (one,) = attention_map(masses, [size], grid)
    # Every patch is so many px of the square that the grid covers, which lies centred on the picture.
    side = max(size) if pad else min(size)
    wanted = [(size[0] - side) / 2 + (col + 0.5) * side / 6, (size[1] - side) / 2 + (row + 0.5) * side / 6]
    height = 300
    sheet = draw_prompt([Image.new("RGB", size, "black")], [one], 1, None, height)
    assert np.abs(brightest(sheet) - np.array(wanted) * height / size[1]).max() < 0.1 * height / size[1] * side / 6


def test_two_images_share_one_scale_and_show_their_shares():
    grid = grid_of(side=72, patch=12)
    masses = torch.cat([torch.full((36,), 0.003), torch.full((36,), 0.001)])
    maps = attention_map(masses, [(72, 72), (72, 72)], grid)
    pictures = [Image.new("RGB", (72, 72), "black")] * 2
    sheet = np.asarray(draw_prompt(pictures, maps, 0, None, 100).convert("L"), dtype=float)
    assert sheet.shape == (100 + STRIP, 208)
    assert sheet[STRIP + 50, 50] > sheet[STRIP + 50, 158] > 0


def test_the_target_is_outlined():
    red = Image.new("RGB", (100, 100), "red")
    boxed = draw_prompt([red], None, 0, [50, 0, 100, 50], 200)
    assert boxed.size == (200, 200)
    assert boxed.getpixel((102, 50)) == OUTLINE and boxed.getpixel((50, 150)) == (255, 0, 0)
    second = draw_prompt([red, red], None, 1, None, 200)
    assert second.getpixel((2, STRIP + 100)) == (255, 0, 0) and second.getpixel((210, STRIP + 100)) == OUTLINE


def test_maps_survive_json():
    maps = attention_map(torch.rand(36), [(72, 72)], grid_of(side=72, patch=12))
    assert json.loads(json.dumps(maps)) == maps


class TestCommand:
    """`python -m scripts.draw_attention` on a test set of one collage and one sequence."""

    @pytest.fixture
    def draw(self, data, checkpoint, monkeypatch):
        records = [
            {"id": "a/b", "image": ["red.png", "blue.png"], "answer": "red",
             "prompt": "Image1:<image>\nImage2:<image>\nIn Image1, what is the colour?"},
            {"id": "c", "image": ["green.png"], "prompt": "<image>\nIn Image2, what is the colour?", "answer": "green",
             "grid": [1, 2]},
        ]  # fmt: skip
        path = data(records, "test.json")

        def run(*more):
            words = ["--model_name_or_path", checkpoint, "--data_path", path, "--image_folder", data.images]
            words += ["--output", data.folder / "maps", "--max_new_tokens", 3, *more]
            monkeypatch.setattr(sys, "argv", ["draw_attention", *map(str, words)])
            with torch.inference_mode():
                draw_attention.main()
            return sorted(path.name for path in (data.folder / "maps").glob("*.png"))

        run.folder = data.folder
        return run

    def test_one_picture_a_prompt(self, draw):
        assert draw() == ["a_b.png", "c.png"]
        with Image.open(draw.folder / "maps" / "a_b.png") as sheet:
            assert sheet.size == (2 * 336 + 8, 336 + STRIP)

    def test_chosen_ids_and_given_answers(self, draw):
        answers = draw.folder / "answers.jsonl"
        given = {"question_id": "c", "text": "blue", "answer": "green", "image_type": "collage", "target": 2}
        answers.write_text(json.dumps(given | {"num_images": 2}))
        assert draw("--ids", "c", "--answers", answers) == ["c.png"]

    def test_an_unknown_id(self, draw, capsys):
        with pytest.raises(SystemExit) as ended:
            draw("--ids", "d")
        assert ended.value.code == 2 and "no 'd' there" in capsys.readouterr().err
