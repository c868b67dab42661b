"""From a box in a stored picture to weights of image tokens: golden values, hand-computed shares, painted pictures."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from transformers import CLIPImageProcessorPil

from llava.families import ImageTokens
from llava.families.llava15 import Llava15
from llava.records import Prompt
from llava.regions import collage_box, num_parts, part_weights, pip_box, prompt_regions, target_weights
from tests.conftest import llava15

CANVAS = {2: (936, 488), 3: (1424, 488), 4: (936, 976), 6: (1424, 976), 9: (1424, 1464)}  # reference.md I.3
GRID = {2: (1, 2), 3: (1, 3), 4: (2, 2), 6: (2, 3), 9: (3, 3)}
PADDING = {2: (224, 0), 3: (468, 0), 4: (0, 20), 6: (224, 0), 9: (0, 20)}  # top, left


def processor_of(side):
    return CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})


def family_of(side=336, patch=14, pad=True):
    return llava15(processor_of(side), patch, pad)


def target_of(record, sizes, family):
    return target_weights(record, [family.image(size) for size in sizes])


def prompt(image_type, *targets, target_box=None, grid=None, num_images=1):
    images, targets = tuple(f"{n}.png" for n in range(num_images)), targets or (0,)
    return Prompt("train.json record 3 (id coco_41)", "coco_41", images, "", image_type, targets, target_box, grid)


# ---- boxes


@pytest.mark.parametrize("n", CANVAS)
def test_cells_of_the_published_collages(n):
    rows, cols = GRID[n]
    wanted = [(488 * c, 40 + 488 * r, 488 * c + 448, 488 + 488 * r) for r in range(rows) for c in range(cols)]
    assert [collage_box(CANVAS[n], k, None) for k in range(n)] == wanted
    assert wanted[-1][2:] == CANVAS[n]  # the last cell ends in the corner


def test_golden_last_cell_of_nine():
    assert collage_box((1424, 1464), 8, None) == (976, 1016, 1424, 1464)


@pytest.mark.parametrize("n", CANVAS)
def test_a_published_collage_has_no_other_cell(n):
    with pytest.raises(ValueError, match=f"Image{n + 1} does not exist.*{GRID[n][0]} x {GRID[n][1]} cells"):
        collage_box(CANVAS[n], n, None)


def test_other_collages_are_split_evenly():
    assert [collage_box((900, 500), k, None) for k in range(2)] == [(0, 0, 450, 500), (450, 0, 900, 500)]
    assert collage_box((300, 200), 3, (2, 2)) == (150, 100, 300, 200)
    assert collage_box((100, 90), 1, (1, 3)) == (33, 0, 66, 90)


@pytest.mark.parametrize(("size", "grid"), [((936, 400), None), ((300, 300), None), ((1424, 488), (1, 2))])
def test_a_cell_that_does_not_exist_names_the_record(size, grid):
    with pytest.raises(ValueError, match=r"train\.json record 3 \(id coco_41\): Image3 does not exist"):
        target_of(prompt("collage", 2, grid=grid), [size], family_of())


@pytest.mark.parametrize(
    ("size", "box"),
    [((640, 480), (96, 72, 544, 408)), ((480, 640), (72, 96, 408, 544)), ((333, 500), (50, 75, 283, 425))],
)
def test_pip_is_the_centred_box_of_seven_tenths(size, box):
    assert pip_box(size) == box


# ---- weights


def weights_2d(family, box, size):
    image = family.image(size)
    return image.weights(box).reshape(image.shape).double().numpy()


@pytest.mark.parametrize("n", CANVAS)
def test_square_padding_shifts_the_box(n):
    """Golden offsets: the whole canvas covers the padded square's middle and nothing of the padding."""
    (width, height), (top, left) = CANVAS[n], PADDING[n]
    side = max(width, height)
    inside = [
        np.clip((np.arange(1, 25) * side / 24 - offset) / (side / 24), 0, 1)
        * np.clip((offset + length - np.arange(24) * side / 24) / (side / 24), 0, 1)
        for offset, length in ((top, height), (left, width))
    ]
    np.testing.assert_allclose(weights_2d(family_of(), (0, 0, width, height), CANVAS[n]), np.outer(*inside), atol=1e-5)


def test_a_cut_patch_has_the_covered_share():
    """A 96 x 96 picture on 6 x 6 patches: 16 px of the picture a patch. Box 8..40 by 4..16."""
    found = weights_2d(family_of(72, 12), (8, 4, 40, 16), (96, 96))
    assert found[0].tolist() == [0.375, 0.75, 0.375, 0, 0, 0] and not found[1:].any()


def test_weights_behind_padding_by_hand():
    """A 96 x 48 picture lies in rows 24..72 of its square; one patch is 16 px; box 0..16 by 0..8 is half of one."""
    found = weights_2d(family_of(72, 12), (0, 0, 16, 8), (96, 48))
    wanted = np.zeros((6, 6))
    wanted[1, 0] = 0.5
    np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_weights_behind_a_crop_by_hand():
    """96 x 48 becomes 144 x 72 and loses 36 px left and right: 24 px of the picture; one patch is 8 px."""
    found = weights_2d(family_of(72, 12, pad=False), (20, 8, 28, 16), (96, 48))
    wanted = np.zeros((6, 6))
    wanted[1, 0] = 0.5  # 24..28 of 24..32
    np.testing.assert_allclose(found, wanted, atol=1e-6)


@pytest.mark.parametrize(("side", "patch"), [(336, 14), (72, 12)])
@pytest.mark.parametrize("size", [(640, 480), (333, 500), (500, 500), (72, 700), (29, 31)])
@pytest.mark.parametrize("share", [(0.1, 0.2, 0.73, 0.9), (0.45, 0.4, 0.55, 0.6), (0, 0, 1, 1)])
def test_patches_add_up_to_the_box(side, patch, size, share):
    """Area in px of the model's input: nothing is lost or counted twice, whatever the shape of the picture."""
    width, height = size
    box = (share[0] * width, share[1] * height, share[2] * width, share[3] * height)
    padded = family_of(side, patch).image(size).weights(box)
    scale = side / max(size)
    area = (box[2] - box[0]) * (box[3] - box[1]) * scale**2
    assert padded.sum().item() * patch**2 == pytest.approx(area, rel=1e-4)
    assert padded.min() >= 0 and padded.max() <= 1
    seen = min(size)  # cropped: of the longer axis the middle as long as the shorter one is seen
    lengths = []
    for low, high, length in ((box[0], box[2], width), (box[1], box[3], height)):
        first, last = (length - seen) / 2, (length + seen) / 2
        lengths.append(max(0, min(high, last) - max(low, first)))
    cropped = family_of(side, patch, pad=False).image(size).weights(box)
    assert cropped.sum().item() * patch**2 == pytest.approx(
        lengths[0] * lengths[1] * (side / seen) ** 2, rel=0.02, abs=side
    )


def test_the_whole_square_picture_is_every_token_in_full():
    assert family_of().image((50, 50)).weights((0, 0, 50, 50)).tolist() == [1.0] * 576


# ---- painted pictures: the weights against what the image processor really does


def painted(size, box, colour):
    picture = Image.new("RGB", size, (90, 90, 90))
    if colour:
        ImageDraw.Draw(picture).rectangle((box[0], box[1], box[2] - 1, box[3] - 1), fill=colour)
    return picture


def changed_share(family, patch, size, box):
    """Per patch the share of the full change of colour, (rows, cols), and whether any pixel changed at all."""
    colours = (None, (160, 160, 160))
    before, after = family.pixels([painted(size, box, colour) for colour in colours])["pixel_values"]
    full = 70 / 255 / torch.tensor(family.image_processor.image_std)[:, None, None]
    change = ((after - before) / full).mean(0)
    side = change.shape[0] // patch
    patches = change.reshape(side, patch, side, patch).transpose(1, 2)
    return patches.mean((2, 3)).numpy(), (patches != 0).any(-1).any(-1).numpy()


def grown(mask):
    """The mask with all eight neighbours."""
    padded = np.pad(mask, 1)
    rows, cols = mask.shape
    return np.any([padded[r : r + rows, c : c + cols] for r in range(3) for c in range(3)], axis=0)


PAINTED = {
    "collage landscape": (prompt("collage", 1), (936, 488)),
    "collage portrait": (prompt("collage", 2, grid=(3, 1)), (300, 700)),
    "collage nine": (prompt("collage", 5), (1424, 1464)),
    "pip landscape": (prompt("pip"), (640, 480)),
    "pip portrait": (prompt("pip"), (333, 500)),
    "pip with its box": (prompt("pip", target_box=(96, 195, 544, 284)), (640, 480)),
}


@pytest.mark.parametrize("pad", [True, False], ids=["pad", "crop"])
@pytest.mark.parametrize(("side", "patch"), [(336, 14), (72, 12)])
@pytest.mark.parametrize("name", PAINTED)
def test_painting_the_target_changes_the_weighted_patches(name, side, patch, pad):
    """Each patch changes by its weight; patches of weight 0 that do not touch the target stay as they were."""
    record, size = PAINTED[name]
    box = record.target_box or (collage_box(size, record.target, record.grid) if "collage" in name else pip_box(size))
    family = family_of(side, patch, pad)
    weights = target_of(record, [size], family).reshape(family.rows, family.rows).numpy()
    share, changed = changed_share(family, patch, size, box)
    np.testing.assert_allclose(share, weights, atol=0.06)  # blur at the border is symmetric but for clipped overshoot
    assert changed[weights == 1].all() and weights.max() > 0.4
    assert not changed[~grown(weights > 0)].any()


# ---- the target of a prompt


def test_sequence_points_at_all_tokens_of_one_image_and_no_other():
    weights = target_of(prompt("sequence", 1, num_images=3), [(9, 7)] * 3, family_of(72, 12))
    assert weights.tolist() == [0.0] * 36 + [1.0] * 36 + [0.0] * 36


def test_two_images_of_a_sequence_are_one_target():
    weights = target_of(prompt("sequence", 0, 2, num_images=3), [(9, 7)] * 3, family_of(72, 12))
    assert weights.tolist() == [1.0] * 36 + [0.0] * 36 + [1.0] * 36


def test_a_token_in_two_cells_that_are_asked_about_counts_for_both():
    """A 96 x 96 picture, 16 px a patch; cells of 24 px: a border cuts the second patch of each four in two halves."""
    record, family = prompt("collage", 0, 1, 3, grid=(1, 4)), family_of(72, 12)
    first, second = [1, 0.5, 0, 0, 0, 0], [0, 0.5, 1, 0, 0, 0]
    third, fourth = [0, 0, 0, 1, 0.5, 0], [0, 0, 0, 0, 0.5, 1]
    found = prompt_regions(record, [family.image((96, 96))]).reshape(6, 6, 6)  # regions, rows, columns
    assert found[0].tolist() == [[1, 1, 1, 0, 0.5, 1]] * 6 and found[1].eq(1).all()
    assert found[2:, 0].tolist() == [first, second, third, fourth]
    assert torch.equal(found[0].flatten(), target_of(record, [(96, 96)], family))


def test_each_target_must_be_seen():
    with pytest.raises(ValueError, match=r"record 3 \(id coco_41\).*cropped away"):
        target_of(prompt("collage", 0, 3, grid=(1, 8)), [(800, 100)], family_of(72, 12, pad=False))
    with pytest.raises(ValueError, match=r"record 3 \(id coco_41\): Image3 does not exist"):
        target_of(prompt("collage", 0, 2), [(936, 488)], family_of())


def test_single_points_at_its_whole_image():
    assert target_of(prompt("single"), [(9, 7)], family_of(72, 12)).tolist() == [1.0] * 36


def test_a_target_that_is_cropped_away_is_refused():
    record = prompt("collage", 0, grid=(1, 8))
    assert target_of(record, [(800, 100)], family_of(72, 12)).any()
    with pytest.raises(ValueError, match=r"record 3 \(id coco_41\).*cropped away.*pad"):
        target_of(record, [(800, 100)], family_of(72, 12, pad=False))


@pytest.mark.parametrize("box", [(0, 0, 641, 10), (0, 0, 10, 481)])
def test_a_box_outside_the_picture_is_refused(box):
    with pytest.raises(ValueError, match=r"record 3 \(id coco_41\).*outside the 640 x 480"):
        target_of(prompt("pip", target_box=box), [(640, 480)], family_of())


def test_own_box_wins_over_the_rule_of_the_format():
    record = prompt("collage", 1, target_box=(0, 0, 48, 48), grid=(1, 2))
    found = target_of(record, [(96, 96)], family_of(72, 12))
    assert found.reshape(6, 6)[:3, :3].eq(1).all() and found.sum() == 9


# ---- the grid of a checkpoint


@pytest.mark.parametrize(("side", "patch", "tokens"), [(336, 14, 576), (224, 14, 256), (72, 12, 36)])
def test_number_of_tokens(side, patch, tokens):
    assert family_of(side, patch).num_image_tokens() == tokens


def test_processor_and_vision_tower_must_fit():
    with pytest.raises(ValueError, match=r"336.*224 x 224"):
        Llava15(family_of(224).config, family_of().tokenizer, processor_of(336))


def test_a_processor_that_resizes_to_a_fixed_square():
    """No crop: both axes are scaled on their own, so a box's shares of width and height are those of the grid."""
    size = SimpleNamespace(do_resize=True, do_center_crop=False, size={"height": 72, "width": 72}, crop_size=None)
    assert (
        weights_2d(llava15(size, 12, pad=False), (0, 0, 100, 30), (200, 60)).tolist()
        == [[1, 1, 1, 0, 0, 0]] * 3 + [[0] * 6] * 3
    )


def test_pictures_of_a_prompt():
    assert num_parts(prompt("sequence", num_images=3), ()) == 3
    assert num_parts(prompt("collage", grid=(2, 3)), ()) == 6
    assert num_parts(prompt("collage"), [(936, 488)]) == 2  # the published canvas
    assert num_parts(prompt("collage"), [(72, 72)]) == 1
    assert num_parts(prompt("pip"), ()) == 2 and num_parts(prompt("single"), ()) == 1


# ---- image tokens


def test_expand_images_by_the_golden_starts():
    """Three placeholders at 35, 40 and 45 begin at 35, 615 and 1195 once each is 576 tokens (reference.md I.3)."""
    ids = list(range(1, 61))
    for position in (35, 40, 45):
        ids[position] = 99
    family = family_of()
    found = family.expand(ids, [family.image((640, 480))] * 3)
    assert len(found) == 57 + 3 * 576
    for start in (35, 615, 1195):
        assert found[start : start + 576] == [99] * 576 and found[start - 1] != 99 and found[start + 576] != 99
    assert [token for token in found if token != 99] == [token for token in ids if token != 99]


# ---- rasters of heat maps


@pytest.mark.parametrize("size", [(640, 480), (333, 500), (50, 50)])
def test_a_raster_of_patches_is_the_patches(size):
    """Row by row, to the number, whether the areas reach outside the picture or not."""
    mass = torch.rand(36, generator=torch.Generator().manual_seed(0))
    for pad in (True, False):
        found = family_of(72, 12, pad).image(size).raster(mass)
        torch.testing.assert_close(found, mass.reshape(6, 6), atol=1e-6, rtol=0)


def tiled():
    """A whole picture of 60 x 40 px as 2 x 2 tokens, then its two halves as 2 x 2 tokens each, as tiling models do."""
    areas = []
    for x0, y0, x1, y1 in ((0, 0, 60, 40), (0, 0, 30, 40), (30, 0, 60, 40)):
        w, h = (x1 - x0) / 2, (y1 - y0) / 2
        areas += [(x0 + w * c, y0 + h * r, x0 + w * (c + 1), y0 + h * (r + 1)) for r in (0, 1) for c in (0, 1)]
    return ImageTokens((99,) * 12, torch.tensor(areas, dtype=torch.float64), (2, 4), (60, 40))


def test_tiles_and_the_whole_picture_add_up_in_a_raster():
    """A token of the whole picture is shared out over the two columns that it covers; a tile's falls on its own."""
    mass = torch.arange(1.0, 13.0)
    by_hand = [[1 / 2 + 5, 1 / 2 + 6, 2 / 2 + 9, 2 / 2 + 10], [3 / 2 + 7, 3 / 2 + 8, 4 / 2 + 11, 4 / 2 + 12]]
    assert tiled().raster(mass).tolist() == by_hand
    assert tiled().extent == (0, 0, 60, 40)


@pytest.mark.parametrize("shape", [(1, 1), (2, 4), (3, 5), (7, 2)])
def test_a_raster_keeps_the_sum(shape):
    image, mass = tiled(), torch.rand(12, generator=torch.Generator().manual_seed(1))
    found = ImageTokens(image.ids, image.areas, shape, image.size).raster(mass)
    assert found.shape == shape and found.dtype == mass.dtype
    assert found.sum().item() == pytest.approx(mass.sum().item(), rel=1e-6)


def test_weights_of_tiles_are_shares_of_their_own_areas():
    """The left half: whole-picture tokens on the left and all of the left tile."""
    assert tiled().weights((0, 0, 30, 40)).tolist() == [1, 0, 1, 0, 1, 1, 1, 1, 0, 0, 0, 0]


def test_areas_are_the_patches_in_px_of_the_stored_picture():
    """A 96 x 48 picture behind padding: 16 px a patch, the first row 24 px above the picture."""
    areas = family_of(72, 12).image((96, 48)).areas
    assert areas[0].tolist() == [0, -24, 16, -8] and areas[1].tolist() == [16, -24, 32, -8]
    assert areas[-1].tolist() == [80, 56, 96, 72] and areas.shape == (36, 4)


# ---- all regions of a prompt


def test_regions_are_target_all_images_then_the_parts():
    images = [family_of(72, 12).image((9, 7))] * 2
    first, second = [1.0] * 36 + [0.0] * 36, [0.0] * 36 + [1.0] * 36
    assert prompt_regions(prompt("sequence", 1, num_images=2), images).tolist() == [second, [1.0] * 72, first, second]


def test_parts_of_a_picture_in_a_picture_are_inner_and_outer():
    image = family_of(72, 12).image((96, 96))
    inner, outer = part_weights(prompt("pip", target_box=(0, 0, 48, 48)), [image])
    assert inner.reshape(6, 6)[:3, :3].eq(1).all() and torch.equal(inner + outer, torch.ones(36))
