"""InternVL 2.5, 3 and 3.5 in transformers' own layout: square tiles of a picture, and the whole picture behind them.

Source of the geometry: InternVL 1.5 (arXiv 2404.16821), section 3.3.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import (
    GotOcr2ImageProcessorPil,
    get_optimal_tiled_canvas,
)

from llava.families.chat import ChatFamily
from llava.families.family import SIZES, ImageTokens, grid_areas, miscounted, other_checkpoint
from llava.families.llava15 import OLDER

START, STOP = "<img>", "</img>"  # around the tokens of each picture


class InternVL(ChatFamily):
    """See `Family`. The language model is Qwen2, Qwen3 or LLaMA."""

    name = "InternVL"
    model_types = ("internvl",)
    image_token = "<IMG_CONTEXT>"
    placeholder = image_token
    strategy = "default"
    tower_sizes = SIZES  # `image_size` and `patch_size` are lists
    older = OLDER

    def __init__(self, config, tokenizer, image_processor, pad: bool | None = None):
        super().__init__(config, tokenizer, image_processor, pad)
        missing = [token for token in (START, STOP) if token not in self._specials]
        if missing:
            raise ValueError(f"the tokenizer has no special token {missing[0]}, which stands around a picture")
        self._start, self._stop = tokenizer.convert_tokens_to_ids([START, STOP])
        self.side = config.vision_config.image_size[0]
        self._across = self.side // config.vision_config.patch_size[0]  # patches
        self.grid = round(self._across * config.downsample_ratio)  # image tokens across and down a tile
        if not isinstance(image_processor, GotOcr2ImageProcessorPil):
            raise ValueError(f"the image processor is a {type(image_processor).__name__}, which makes no tiles")
        made = dict(image_processor.size) if image_processor.do_resize else {}
        if (made.get("height"), made.get("width")) != (self.side, self.side):
            raise other_checkpoint(f"tiles of {made or 'any size'}", self.side)
        # Published settings have it off, and InternVL's processor switches it on in each call.
        image_processor.crop_to_patches = True

    @classmethod
    def check_config(cls, config) -> None:
        """Raises ValueError where image tokens are not a square of patches each, or a size is none."""
        super().check_config(config)
        vision, layer = config.vision_config, config.vision_feature_layer
        sides, patches, ratio = set(vision.image_size), set(vision.patch_size), config.downsample_ratio
        if len(sides) != 1 or len(patches) != 1 or min(sides | patches) < 1:
            raise ValueError(f"tiles of {vision.image_size} px in patches of {vision.patch_size} px: squares are due")
        if not 0 < ratio <= 1 or 1 / ratio % 1 or sides.pop() % (patches.pop() / ratio):
            raise ValueError(f"patches joined by {ratio} (downsample_ratio) do not fill the vision tower's square")
        if not isinstance(layer, int) or not -vision.num_hidden_layers - 1 <= layer <= vision.num_hidden_layers:
            raise ValueError(f"vision_feature_layer is {layer}, but the tower has {vision.num_hidden_layers} layers")

    def check_processor(self, settings: Mapping[str, Any]) -> str | None:
        """What plain transformers would do wrong with a folder's processor_config.json; None: nothing."""
        return miscounted(settings.get("image_seq_length", 256), self.grid**2)

    def image(self, size: tuple[int, int], count: int = 1) -> ImageTokens:
        """Tiles row by row, each row by row, then the whole picture unless it is the one tile; squashed, not padded."""
        (cols, rows), grid = self._tiles(size), self.grid
        tiles = list(grid_areas((0, 0, *size), rows, cols))
        whole = [torch.tensor((0, 0, *size))] if len(tiles) > 1 else []
        areas = torch.cat([grid_areas(tile.tolist(), grid, grid) for tile in tiles + whole])
        ids = (self._start, *[self.image_id] * len(areas), self._stop)
        return ImageTokens(ids, areas, (rows * grid, cols * grid), size)

    def num_image_tokens(self, size: tuple[int, int] | None, count: int = 1) -> int:
        """Those of all tiles and the two around them, without their areas: asked for each picture of a data set."""
        return len(self.patches(size)) * self.grid**2 + 2

    def patches(self, size: tuple[int, int] | None, count: int = 1) -> tuple[int, ...]:
        """Those of each tile, and its class token."""
        cols, rows = self._tiles(size)
        return (self._across**2 + 1,) * (rows * cols + (rows * cols > 1))

    def pixels(self, pictures: Sequence[Image.Image]) -> dict[str, Tensor]:
        """`pixel_values` (tiles of all pictures, 3, side, side) float32."""
        return {"pixel_values": self.image_processor(images=list(pictures), return_tensors="pt")["pixel_values"]}

    def cap(self, max_image_tokens: int) -> None:
        """Change the image processor so that a picture costs so many image tokens at most, `<img>` and `</img>` aside.

        Raises ValueError below one tile. Above it the whole picture takes the place of one.
        """
        tiles, own = max_image_tokens // self.grid**2, self.image_processor
        self.check_cap(max_image_tokens, self.grid**2)
        own.max_patches = min(own.max_patches, max(1, tiles - 1))
        own.min_patches = min(own.min_patches, own.max_patches)

    def _tiles(self, size: tuple[int, int]) -> tuple[int, int]:
        """Columns and rows of tiles, as the image processor finds them."""
        least, most = self.image_processor.min_patches, self.image_processor.max_patches
        return get_optimal_tiled_canvas((size[1], size[0]), (self.side,) * 2, least, most) if most > 1 else (1, 1)
