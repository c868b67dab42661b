"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: cells of 2 x 2 patches of a picture of any size, and positions on three axes.

Source of geometry and positions: Qwen2-VL (arXiv 2409.12191), sections 2.1 and 2.2.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize
from transformers.vision_utils import get_vision_cu_seqlens, get_vision_position_ids, get_vision_window_index

from llava.families.chat import ChatFamily
from llava.families.family import ImageTokens, grid_areas, sent


class QwenVL(ChatFamily):
    """See `Family`. Of the mixtures of experts LoRA reaches the attention alone: their experts are no linear layers."""

    name = "Qwen-VL"
    model_types = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")
    tower = "visual"
    tower_sizes = ("depth", "num_heads", "patch_size", "spatial_merge_size")
    projectors = ("visual.merger", "visual.deepstack_merger_list")
    image_token = "<|image_pad|>"
    shapes = ("image_grid_thw",)
    placeholder = "<|vision_start|><|image_pad|><|vision_end|>"
    older = (
        (re.compile(r"^visual\."), "model.visual."),
        (re.compile(r"^model\.(?=layers\.|embed_tokens\.|norm\.)"), "model.language_model."),
    )

    @classmethod
    def shrink(cls, config) -> None:
        """Make a config small in place, for a random twin."""
        vision, text = config.vision_config, config.get_text_config()
        super().shrink(config)
        text.rope_parameters |= {"mrope_section": [2, 3, 3]}  # half a head's size
        vision.depth, vision.num_heads, vision.out_hidden_size = 3, 2, text.hidden_size
        if hasattr(vision, "embed_dim"):  # Qwen2-VL, whose `hidden_size` is the language model's
            vision.embed_dim, vision.hidden_size = vision.hidden_size, text.hidden_size
        if hasattr(vision, "fullatt_block_indexes"):
            vision.fullatt_block_indexes = [1]
        if hasattr(vision, "deepstack_visual_indexes"):
            vision.deepstack_visual_indexes = [0, 1]
        if hasattr(text, "num_experts"):
            text.num_experts, text.num_experts_per_tok, text.moe_intermediate_size = 4, 2, 32

    @classmethod
    def tower_shape(cls, config) -> tuple[int, int]:
        """(width, blocks whose attention sees all patches of a picture); those with small windows hardly cost any."""
        vision = config.vision_config
        whole = getattr(vision, "fullatt_block_indexes", None)
        return getattr(vision, "embed_dim", vision.hidden_size), vision.depth if whole is None else len(whole)

    @classmethod
    def projector_modules(cls, config) -> list[str]:
        """The merger, and one more for each block of the tower whose features go into the language model deeper."""
        deeper = getattr(config.vision_config, "deepstack_visual_indexes", ())
        return ["visual.merger", *(f"visual.deepstack_merger_list.{number}" for number in range(len(deeper)))]

    @property
    def cell(self) -> int:
        """Px of the resized picture that one token stands for, across and down."""
        return self.image_processor.patch_size * self.image_processor.merge_size

    def image(self, size: tuple[int, int], count: int = 1) -> ImageTokens:
        """Cells row by row over the whole picture, which is resized to multiples of a cell, its shape roughly kept."""
        rows, cols = self._cells(size)
        areas = grid_areas((0, 0, *size), rows, cols)
        return ImageTokens((self.image_id,) * (rows * cols), areas, (rows, cols), size)

    def patches(self, size: tuple[int, int] | None, count: int = 1) -> tuple[int, ...]:
        """All patches of the picture."""
        rows, cols = self._cells(size)
        return (rows * cols * self.image_processor.merge_size**2,)

    def pixels(self, pictures: Sequence[Image.Image]) -> dict[str, Tensor]:
        """`pixel_values` (patches of all pictures, numbers of a patch) float32, and `image_grid_thw` (pictures, 3)."""
        return dict(self.image_processor(images=list(pictures), return_tensors="pt"))

    def encode(self, model, pixels: Mapping[str, Tensor]) -> Any:
        """See `Family`. The tower is told what it would read off shapes of pictures, waiting for a GPU each time."""
        grid, vision, device = pixels["image_grid_thw"].cpu(), model.config.vision_config, pixels["pixel_values"].device
        if hasattr(vision, "num_position_embeddings"):  # Qwen3-VL's reads more off them
            return super().encode(model, {**pixels, "image_grid_thw": grid.to(device)})
        places = sent(get_vision_position_ids(grid, vision.spatial_merge_size), device)
        told = {"image_grid_thw": grid, "cu_seqlens": get_vision_cu_seqlens(grid), "position_ids": places}
        if hasattr(vision, "window_size"):
            sizes = vision.spatial_merge_size, vision.window_size, vision.patch_size
            index, told["cu_window_seqlens"] = get_vision_window_index(grid, *sizes)
            told["window_index"] = sent(index, device)
        return super().encode(model, {**pixels, **told})

    def positions(self, ids: Sequence[int], images: Sequence[ImageTokens]) -> Tensor:
        """(3, S) time, height and width: a picture is a plane at one time, and what follows is as far as it is long."""
        is_image, steps = torch.tensor(ids) == self.image_id, torch.ones(len(ids), dtype=torch.long)
        cells = [torch.cartesian_prod(*map(torch.arange, image.shape)).view(-1, 2) for image in images]
        # The tokens of a picture are at one time; the last of them steps as far as the picture is long.
        steps[is_image] = torch.cat([F.pad(own.max()[None] + 1, (len(own) - 1, 0)) for own in cells])
        found = (steps.cumsum(dim=0) - steps).repeat(3, 1)
        found[1:, is_image] += torch.cat(cells).T
        return found

    def cap(self, max_image_tokens: int) -> None:
        """Change the image processor so that a picture costs so many tokens at most."""
        size, most = dict(self.image_processor.size), max_image_tokens * self.cell**2
        longest = min(size["longest_edge"], most)  # in spite of their names, both are numbers of px
        self.image_processor.size = {"shortest_edge": min(size["shortest_edge"], longest), "longest_edge": longest}

    def _cells(self, size: tuple[int, int]) -> tuple[int, int]:
        limits = self.image_processor.size
        height, width = smart_resize(
            size[1], size[0], self.cell, min_pixels=limits["shortest_edge"], max_pixels=limits["longest_edge"]
        )
        return height // self.cell, width // self.cell
