"""Maps of attention by patch: their numbers against the region masses, their drawing against known places."""

import json
import re
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from llava.checkpoints import open_checkpoint
from llava.generation import generate
from llava.heads import Heads
from llava.heatmap import COLOURS, GAP, OUTLINE, STRIP, attention_map, draw_prompt, explained
from llava.measuring import measure
from scripts import draw_attention
from tests.conftest import tiny_model
from tests.test_generation import batch_of, prompts_of


def mapped_batch(family, prompts):
    """The prompts of a batch whose maps are all wanted."""
    return batch_of(family, prompts, is_mapped=[True] * len(prompts))


def test_tokens_add_up_to_the_regions_of_the_same_answer(model, family):
    """Sampled, of two prompts of different length."""
    prompts = prompts_of(model)[:2]
    torch.manual_seed(0)
    settings = {"do_sample": True, "temperature": 3.0, "max_new_tokens": 5}
    answers = generate(model, family, mapped_batch(family, prompts), [1, 2], **settings)
    for answer, (_, target, _) in zip(answers, prompts, strict=True):
        assert answer.by_token.shape == target.shape
        torch.testing.assert_close(answer.by_token.sum(), answer.masses[:, 1].mean(), atol=1e-6, rtol=1e-5)
        torch.testing.assert_close((answer.by_token * target).sum(), answer.masses[:, 0].mean(), atol=1e-6, rtol=1e-5)


def test_a_map_changes_nothing_else(model, family):
    prompts = prompts_of(model)
    plain, mapped = (
        generate(model, family, batch, [1, 2], max_new_tokens=4)
        for batch in (batch_of(family, prompts), mapped_batch(family, prompts))
    )
    for a, b in zip(plain, mapped, strict=True):
        assert (a.tokens, a.confidence, a.perplexity) == (b.tokens, b.confidence, b.perplexity)
        torch.testing.assert_close(a.masses, b.masses, atol=1e-6, rtol=1e-5)
        assert not len(a.by_token)


HEADS = {"all heads": None, "some heads": Heads({1: (0, 3), 2: (1,)}).selected(4)}


def eager_rows(processor, prompt, pixels, tokens):
    """(2, H, S) eager attention of layers 1 and 2 from the answer's rows to the prompt's tokens, their mean."""
    eager = tiny_model(processor)
    eager.set_attn_implementation("eager")
    ids = torch.tensor([[*prompt, *tokens[:-1]]])
    with torch.no_grad():
        out = eager(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels, output_attentions=True)
    return torch.stack([out.attentions[n][0, :, len(prompt) - 1 :, : len(prompt)].mean(dim=1) for n in (1, 2)])


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
def test_maps_and_measured_answers_equal_eager_attention(model, processor, family, heads):
    """The map of a greedy answer, and what one pass over prompt and answer finds, against every attention map."""
    prompts = prompts_of(model)
    answers = generate(model, family, mapped_batch(family, prompts), [1, 2], heads=heads, max_new_tokens=5)
    for answer, one in zip(answers, prompts, strict=True):
        prompt, _, pixels = one
        is_image = torch.tensor(prompt) == family.image_id
        rows = eager_rows(processor, prompt, pixels, answer.tokens)
        chosen = torch.ones(2, 4) if heads is None else heads
        by_layer = (rows * chosen[..., None]).sum(dim=1) / chosen.sum(dim=1, keepdim=True)  # (2, S)
        wanted = (by_layer * (chosen.sum(dim=1) / chosen.sum())[:, None]).sum(dim=0)[is_image]
        torch.testing.assert_close(answer.by_token, wanted, atol=1e-6, rtol=1e-4)
        (measured,) = measure(model, family, mapped_batch(family, [one]), [answer.tokens], [1, 2], heads)
        torch.testing.assert_close(measured.masses, answer.masses, atol=1e-6, rtol=0)
        torch.testing.assert_close(measured.by_token, answer.by_token, atol=1e-6, rtol=0)


def brightest(sheet):
    """(x, y) centre of what the overlay made brightest."""
    light = np.asarray(sheet.convert("L"), dtype=float)
    return np.argwhere(light > light.max() - 10).mean(axis=0)[::-1]


@pytest.mark.parametrize("size", [(200, 100), (100, 200), (120, 120)], ids=str)
@pytest.mark.parametrize("pad", [True, False], ids=["pad", "crop"])
def test_a_hot_patch_is_drawn_where_its_pixels_are(checkpoint, size, pad):
    """One patch in the middle row and third column: its place in the picture, padding or cropping undone."""
    image = open_checkpoint(checkpoint, pad=pad).family.image(size)
    masses = torch.zeros(36)
    row, col = 3, 2
    masses[row * 6 + col] = 0.5
    (one,) = attention_map(masses, [image])
    # Every patch is so many px of the square that the grid covers, which lies centred on the picture.
    side = max(size) if pad else min(size)
    wanted = [(size[0] - side) / 2 + (col + 0.5) * side / 6, (size[1] - side) / 2 + (row + 0.5) * side / 6]
    height = 300
    sheet = draw_prompt([Image.new("RGB", size, "black")], [one], (), None, height)
    assert np.abs(brightest(sheet) - np.array(wanted) * height / size[1]).max() < 0.1 * height / size[1] * side / 6


def test_two_images_share_one_scale_and_show_their_shares(family):
    masses = torch.cat([torch.full((36,), 0.003), torch.full((36,), 0.001)])
    maps = attention_map(masses, [family.image((72, 72))] * 2)
    pictures = [Image.new("RGB", (72, 72), "black")] * 2
    sheet = np.asarray(draw_prompt(pictures, maps, (0,), None, 100).convert("L"), dtype=float)
    assert sheet.shape == (100 + STRIP, 208)
    assert sheet[STRIP + 50, 50] > sheet[STRIP + 50, 158] > 0


def test_the_target_is_outlined():
    red = Image.new("RGB", (100, 100), "red")
    boxed = draw_prompt([red], None, (0,), [[50, 0, 100, 50]], 200)
    assert boxed.size == (200, 200)
    assert boxed.getpixel((102, 50)) == OUTLINE and boxed.getpixel((50, 150)) == (255, 0, 0)
    second = draw_prompt([red, red], None, (1,), None, 200)
    assert second.getpixel((2, STRIP + 100)) == (255, 0, 0) and second.getpixel((210, STRIP + 100)) == OUTLINE


def test_every_target_is_outlined():
    """The first and third of three pictures; the outer two of four cells of one."""
    red = Image.new("RGB", (100, 100), "red")
    sheet = draw_prompt([red] * 3, None, (0, 2), None, 100)
    starts = [number * (100 + GAP) for number in range(3)]
    assert [sheet.getpixel((start + 2, STRIP + 50)) == OUTLINE for start in starts] == [True, False, True]
    cells = draw_prompt([red], None, (0, 3), [(0, 0, 25, 100), (75, 0, 100, 100)], 200)
    assert [cells.getpixel((x, 100)) == OUTLINE for x in (2, 52, 102, 152)] == [True, False, False, True]
    assert cells.getpixel((100, 100)) == (255, 0, 0)


def test_texts_and_the_scale_of_colours_stand_around_a_drawing():
    """Black on white above; below, the colours that `overlay` uses, from its palest to its hottest."""
    sheet = Image.new("RGB", (400, 100), "red")
    page = np.asarray(explained(sheet, ["What is it?", "word " * 60], 0.25))
    assert (page[-100 - 8 - STRIP, 10] == (255, 0, 0)).all() and page.shape[1] == 400
    above = page[: page.shape[0] - 100 - 16 - STRIP]
    assert above.shape[0] > 4 * STRIP and (above[:STRIP] < 100).any() and not (page[:, 0] == 0).all()
    scale = page[-STRIP + 8, 16 : 16 + 120].astype(int)
    expected = 255 * COLOURS([0.15, 1.0])[:, :3]
    assert np.abs(scale[[0, -1]] - expected).max() <= 1 and len(np.unique(scale, axis=0)) > 60


def test_maps_survive_json(family):
    maps = attention_map(torch.rand(36), [family.image((72, 72))])
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
        with Image.open(draw.folder / "maps" / "a_b.png") as sheet:  # three lines of text above, the scale below
            assert sheet.size == (2 * 336 + 8, 3 * STRIP + 8 + 336 + STRIP + 8 + STRIP)

    def test_a_page_of_all(self, draw):
        draw()
        text = (draw.folder / "maps" / "index.html").read_text()
        assert re.findall(r'<img src="([^"]+)"', text) == ["a_b.png", "c.png"]
        assert text.count("In Image1, what is the colour?") == 1 and "right answer: green; c" in text

    def test_names_of_files_are_each_their_own(self):
        names = []
        for id in ("a/b", "a_b", "a:b", "../x"):
            names.append(draw_attention.file_name(id, names))
        assert names == ["a_b.png", "a_b_2.png", "a_b_3.png", ".._x.png"]

    def test_bad_flags_and_places(self, draw, capsys):
        (draw.folder / "file").write_text("")
        bad = [("--height", 0, "at least 16"), ("--limit", -1, "at least 1"), ("--top_heads", 0, "at least 1")]
        for *flags, said in (*bad, ("--output", draw.folder / "file", "is a file")):
            with pytest.raises(SystemExit) as ended:
                draw(*flags)
            error = capsys.readouterr().err
            assert ended.value.code == 2 and said in error and error.count("\n") == 1

    def test_chosen_ids_and_given_answers(self, draw):
        answers = draw.folder / "answers.jsonl"
        given = {"question_id": "c", "text": "blue", "answer": "green", "image_type": "collage", "target": 2}
        answers.write_text(json.dumps(given | {"num_images": 2}))
        assert draw("--ids", "c", "--answers", answers) == ["c.png"]

    def test_an_unknown_id(self, draw, capsys):
        with pytest.raises(SystemExit) as ended:
            draw("--ids", "d")
        assert ended.value.code == 2 and "no 'd' there" in capsys.readouterr().err
