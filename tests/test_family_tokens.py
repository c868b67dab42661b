"""What a picture costs in each family at its real scale, as docs/families.md says it."""

import re
from pathlib import Path

import pytest

from llava.checkpoints import open_checkpoint
from llava.families import Llava15
from tests.conftest import llava15
from tests.tiny import idefics3, internvl, llava_interleave, llava_onevision, qwen_vl

SIZES = ((336, 336), (640, 480), (936, 976), (1424, 1464), (4000, 3000))  # px; two of them collages of 4 and of 9
DOCS = Path(__file__).parent.parent / "docs/families.md"
PINPOINTS = [[384 * rows, 384 * cols] for rows in range(1, 7) for cols in range(1, 7)]


def at_scale(folder, module, kind, vision, pictures, **changes):
    """The family of a tiny checkpoint with a tower and picture settings of real size."""
    module.write(folder, kind)
    family = open_checkpoint(str(folder)).family
    for where, settings in ((family.config.vision_config, vision), (family.image_processor, pictures)):
        for name, value in settings.items():
            setattr(where, name, value)
    for name, value in changes.items():
        setattr(family.config, name, value)
    return type(family)(family.config, family.tokenizer, family.image_processor)


def build(name, folder):
    """By the names of the table."""
    if name == "LLaVA-1.5":
        from transformers import CLIPImageProcessorPil

        return llava15(CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}))
    square = {"size": {"height": 384, "width": 384}}
    siglip, tiles = {"image_size": 384, "patch_size": 14}, {"image_grid_pinpoints": PINPOINTS}
    made = {
        "LLaVA-Interleave": (llava_interleave, "llava_interleave", siglip, square, {}),
        "LLaVA-OneVision": (llava_onevision, "llava_onevision", siglip, square | tiles, tiles),
        "Qwen2-VL, Qwen2.5-VL": (qwen_vl, "qwen2_5_vl", {}, {"size": limits(28)}, {}),
        "Qwen3-VL": (qwen_vl, "qwen3_vl", {}, {"size": {"shortest_edge": 65536, "longest_edge": 16777216}}, {}),
        "InternVL": (internvl, "internvl_qwen2", {"image_size": [448, 448], "patch_size": [14, 14]},
                     {"size": {"height": 448, "width": 448}, "max_patches": 12}, {}),
        "SmolVLM2-2.2B": (idefics3, "smolvlm", {"patch_size": 14, "image_size": 384},
                          {"size": {"longest_edge": 1536}, "max_image_size": {"longest_edge": 384}},
                          {"scale_factor": 3}),
        "Idefics3-8B": (idefics3, "idefics3", {"patch_size": 14, "image_size": 364},
                        {"size": {"longest_edge": 1456}, "max_image_size": {"longest_edge": 364}},
                        {"scale_factor": 2}),
    }  # fmt: skip
    module, kind, vision, pictures, changes = made[name]
    return at_scale(folder, module, kind, vision, pictures, **changes)


def limits(cell):
    """Of Qwen2-VL and Qwen2.5-VL as published: 4 to 16,384 cells."""
    return {"shortest_edge": 4 * cell**2, "longest_edge": 16384 * cell**2}


def table():
    """Rows of the documented table: name, then a number, or two (alone / one of three), for each size."""
    rows = re.findall(r"^\| ([^|]+) \|((?: [\d, /]+ \|){5})$", DOCS.read_text(encoding="utf-8"), re.MULTILINE)
    return [(name, [cell.strip() for cell in cells.strip("| ").split("|")]) for name, cells in rows]


def test_the_table_has_every_family():
    assert len(table()) >= 8


@pytest.mark.parametrize(("name", "cells"), table() if DOCS.is_file() else [])
def test_tokens_of_a_picture(tmp_path, name, cells):
    capped = re.fullmatch(r"(.*), --max_image_tokens (\d+)", name)
    family = build(capped[1] if capped else name, tmp_path)
    if capped:
        family.cap(int(capped[2]))
    for size, cell in zip(SIZES, cells, strict=True):
        counts = [family.image(size, count).ids.count(family.image_id) for count in (1, 3)]
        expected = [int(number.replace(",", "")) for number in cell.split("/")]
        assert counts == (expected if len(expected) == 2 else expected * 2), (size, counts)
    assert isinstance(family, Llava15) or not family.fixed or len(set(cells)) == 1
