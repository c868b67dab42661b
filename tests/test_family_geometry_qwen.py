"""Qwen-VL's positions against transformers' own, and what its cells are."""

import random

import pytest
import torch

from llava.checkpoints import open_checkpoint
from llava.families import model_inputs
from tests.tiny import qwen_vl


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_positions_are_those_of_transformers(tmp_path, kind):
    """200 prompts of 1 to 4 pictures of random size."""
    qwen_vl.write(tmp_path, kind)
    checkpoint, rng = open_checkpoint(str(tmp_path)), random.Random(0)
    family, model = checkpoint.family, checkpoint.load().model
    for _ in range(200):
        sizes = [(rng.randint(20, 900), rng.randint(20, 900)) for _ in range(rng.randint(1, 4))]
        text = rng.choice(["", "\n", "and "]).join(f"Image{n + 1}:<image>" for n in range(len(sizes))) + " what?"
        images = family.images(sizes)
        ids = family.expand(family.encode_prompt(text), images)
        tensor = torch.tensor([ids])
        grids = torch.tensor([[1, *(2 * side for side in image.shape)] for image in images])
        types = (tensor == family.image_id).int()
        expected, _ = model.get_rope_index(tensor, image_grid_thw=grids, mm_token_type_ids=types)
        found = family.positions(ids, images)
        assert torch.equal(found, expected[:, 0])
        assert (found[:, -1] == found[0, -1]).all()  # so that answers branch off on all axes alike


def test_what_the_model_remembers_of_another_prompt_is_not_read(tmp_path):
    """transformers keeps `rope_deltas` of the last prompt; explicit positions go past it."""
    qwen_vl.write(tmp_path, "qwen2_5_vl")
    checkpoint = open_checkpoint(str(tmp_path))
    family, model = checkpoint.family, checkpoint.load().eval()
    images = family.images([(90, 60)])
    ids = family.expand(family.encode_prompt("<image>\nwhat?"), images)
    pixels = torch.randn(images[0].shape[0] * images[0].shape[1] * 4, 3 * 2 * 14 * 14)
    grid = torch.tensor([[1, *(2 * side for side in images[0].shape)]])
    found = []
    for poison in (None, torch.tensor([[999]])):
        model.model.rope_deltas = poison
        with torch.no_grad():
            features = family.encode(model, {"pixel_values": pixels, "image_grid_thw": grid})
            inputs = model_inputs(features, family.positions(ids, images)[:, None])
            out = model.generate(
                input_ids=torch.tensor([ids]), **inputs, max_new_tokens=4, do_sample=False, output_logits=True,
                return_dict_in_generate=True,
            )  # fmt: skip
        found.append(torch.cat(out.logits))
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("size", "shape"),
    [((28, 28), (2, 2)), ((336, 336), (12, 12)), ((640, 480), (17, 23)), ((56, 1000), (36, 2)), ((13, 900), (17, 1))],
)
def test_cells_by_hand(tmp_path, size, shape):
    """640 x 480 px are 23 x 17 cells of 28 px (644 x 476); the smallest picture has four cells."""
    qwen_vl.write(tmp_path, "qwen2_5_vl")
    image = open_checkpoint(str(tmp_path)).family.image(size)
    assert image.shape == shape and len(image.areas) == shape[0] * shape[1]
    width, height = size[0] / shape[1], size[1] / shape[0]
    expected = torch.tensor([0, 0, width, height], dtype=torch.float64)
    torch.testing.assert_close(image.areas[0], expected)
    assert image.extent == (0, 0, *size)
