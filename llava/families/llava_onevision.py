"""LLaVA-OneVision: a picture alone is cut into tiles, one of several is padded to a square.

Source of the geometry: LLaVA-OneVision (arXiv 2408.03326), section 3.2, "Higher AnyRes".
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad as padded
from transformers.image_processing_utils import select_best_resolution

from llava.families.chat import ChatFamily
from llava.families.family import ImageTokens
from llava.families.llava15 import OLDER
from llava.families.tiles import Tiles
from llava.records import IMAGE


class LlavaOneVision(ChatFamily):
    """See `Family`."""

    name = "LLaVA-OneVision"
    model_types = ("llava_onevision",)
    projectors = ("multi_modal_projector", "image_newline")
    image_token = placeholder = IMAGE
    older = (*OLDER, (re.compile(r"^(model\.)?image_newline$"), "model.image_newline"))

    def __init__(self, config, tokenizer, image_processor, pad: bool | None = None):
        super().__init__(config, tokenizer, image_processor, pad)
        limit = int(config.vision_aspect_ratio.removeprefix("anyres_max_"))
        self.tiles = Tiles(config.vision_config.image_size, config.vision_config.patch_size, limit)
        self.base, made = self.tiles.rows**2, {*dict(image_processor.size).values()}
        grids = {side for pinpoint in image_processor.image_grid_pinpoints for side in pinpoint}
        if made != {self.tiles.side} or not grids or any(side % self.tiles.side for side in grids):
            raise ValueError(
                f"the image processor makes tiles of {made} px and image_grid_pinpoints of {grids} px, but "
                f"the vision tower takes {self.tiles.side} px: processor and model are of different checkpoints"
            )

    @classmethod
    def check_config(cls, config) -> None:
        """Raises ValueError for a config that this code would read wrongly."""
        super().check_config(config)
        if config.vision_feature_select_strategy != "full":  # SigLIP has no class token to leave out
            raise ValueError(f"vision_feature_select_strategy is {config.vision_feature_select_strategy!r}, not 'full'")
        if not re.fullmatch(r"anyres_max_[1-9]\d*", config.vision_aspect_ratio):
            raise ValueError(f"vision_aspect_ratio is {config.vision_aspect_ratio!r}, not 'anyres_max_' and a number")

    @classmethod
    def projector_modules(cls, config) -> list[str]:
        """Without `image_newline`, which is a parameter: LoRA leaves it as it is."""
        return ["multi_modal_projector"]

    def check_processor(self, settings: Mapping[str, Any]) -> str | None:
        """What plain transformers would do wrong with a folder's processor_config.json; None: nothing."""
        found, own, told = settings.get("num_image_tokens", self.base), self.image_processor, self.config
        if found != self.base:
            return f"its processor counts {found} tokens for a tile, the model takes {self.base}"
        if [*map(tuple, own.image_grid_pinpoints)] != [*map(tuple, told.image_grid_pinpoints)]:
            return "image_grid_pinpoints of its pictures and its model differ: those of the pictures are used here"
        return None

    def image(self, size: tuple[int, int], count: int = 1) -> ImageTokens:
        """Alone: the whole picture squashed, then all tiles as one grid with a newline token after each row.

        One of several: padded to a square, and one newline token, which stands for the whole picture.
        """
        if count > 1:
            areas = torch.cat([self.tiles.padded(size), torch.tensor([[0, 0, *size]], dtype=torch.float64)])
            return ImageTokens((self.image_id,) * len(areas), areas, (self.tiles.rows,) * 2, size)
        return self.tiles.grid(self.image_id, size, self._canvas(size))

    def num_image_tokens(self, size: tuple[int, int] | None, count: int = 1) -> int:
        """As `image`, without the areas: asked for each picture of a data set at the start."""
        return self.base + 1 if count > 1 else self.tiles.number(size, self._canvas(size))

    def patches(self, size: tuple[int, int] | None, count: int = 1) -> tuple[int, ...]:
        """Those of the whole picture, and of each tile of one that is alone."""
        return (self.base,) * (1 + (math.prod(self._canvas(size)) // self.tiles.side**2 if count == 1 else 0))

    def pixels(self, pictures: Sequence[Image.Image]) -> dict[str, Tensor]:
        """`pixel_values` (pictures, tiles, 3, side, side), and which picture has what size and is alone."""
        return dict(self.image_processor(images=[list(pictures)], return_tensors="pt"))

    def join(self, parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """The pixels of several prompts as those of one batch: each has as many tiles as the most, unseen."""
        most = max(part["pixel_values"].shape[1] for part in parts)
        return super().join([
            {**part, "pixel_values": padded(pixels, (0, 0) * 3 + (0, most - pixels.shape[1]))}
            for part in parts for pixels in [part["pixel_values"]]
        ])  # fmt: skip

    def encode(self, model, pixels: Mapping[str, Tensor]) -> Any:
        """What the language model reads of pictures. The model is told how they are cut: it has a list of its own."""
        model.config.image_grid_pinpoints = self.image_processor.image_grid_pinpoints
        return super().encode(model, pixels)

    def cap(self, max_image_tokens: int) -> None:
        """Leave out the grids of tiles that could cost more, in the model's config too. Raises ValueError."""
        costs = [(self.tiles.most(pinpoint), pinpoint) for pinpoint in self.image_processor.image_grid_pinpoints]
        kept = [pinpoint for cost, pinpoint in costs if cost <= max_image_tokens]
        if not kept:
            least = min(costs)[0]
            raise ValueError(f"--max_image_tokens {max_image_tokens}: {self.name} needs {least} for a picture alone")
        self.image_processor.image_grid_pinpoints = self.config.image_grid_pinpoints = kept

    def _canvas(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width in px of the grid of tiles that a picture is cut into."""
        return select_best_resolution(size[::-1], self.image_processor.image_grid_pinpoints)
