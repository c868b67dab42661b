"""Idefics3 and SmolVLM: square tiles of a picture, row by row, then the whole picture, with text between them.

Source of the tiles: Idefics3 (arXiv 2408.12637), section 4.1; of their text: transformers' SmolVLM processor.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers.models.idefics3.image_processing_pil_idefics3 import MAX_IMAGE_SIZE
from transformers.models.smolvlm.processing_smolvlm import get_image_prompt_string

from llava.families.chat import IN_PLACE, ChatFamily
from llava.families.family import ImageTokens, check_sizes, grid_areas
from llava.records import IMAGE

# Behind `chat.IN_PLACE` in a template: makes a picture that begins a message a part again, as `_content` does.
LEADING = (
    "{%% set kept = namespace(turns=[]) %%}{%% for message in messages %%}{%% set text = message['content'][0]['text'] "
    "%%}{%% set parts = [{'type': 'image'}, {'type': 'text', 'text': text[7:]}] if text.startswith('<image>') "
    "else message['content'] %%}{%% set kept.turns = kept.turns + [{'role': message['role'], 'content': parts}] %%}"
    "{%% endfor %%}{%% set messages = kept.turns %%}"
)


class Idefics3(ChatFamily):
    """See `Family`."""

    name = "SmolVLM / Idefics3"
    model_types = ("idefics3", "smolvlm")
    language = "text_model"
    tower = "vision_model"
    projectors = ("connector",)
    image_token = placeholder = IMAGE
    prelude = IN_PLACE + LEADING

    def __init__(self, config, tokenizer, image_processor, pad: bool | None = None):
        super().__init__(config, tokenizer, image_processor, pad)
        check_sizes(config, ("scale_factor",))
        self.side = image_processor.max_image_size["longest_edge"]  # px of a tile
        self._patches = self.side // config.vision_config.patch_size  # of a tile, across and down; so for the next
        self.rows, rest = divmod(self._patches, config.scale_factor)  # of its tokens
        if rest or not self.rows:
            raise ValueError(f"tiles of {self.side} px (max_image_size) do not make groups of scale_factor patches")
        longest = dict(image_processor.size).get("longest_edge") if image_processor.do_resize else None
        is_whole = longest and longest % self.side == 0 and longest <= MAX_IMAGE_SIZE
        if image_processor.do_image_splitting and not is_whole:  # `get_number_of_image_patches` would count other tiles
            raise ValueError(f"size.longest_edge is {longest}, not a multiple of {self.side} px up to {MAX_IMAGE_SIZE}")
        self._known: dict[tuple[int, int], tuple[int, ...]] = {}

    def image(self, size: tuple[int, int], count: int = 1) -> ImageTokens:
        """Tiles row by row, each an even share of the picture, then the whole of it again; in each a grid of tokens.

        A patch that does not fit into a tile is not seen, which leaves gaps between tiles.
        """
        rows, cols = self._tiles(size)
        pieces = torch.cat([grid_areas((0, 0, *size), rows, cols), grid_areas((0, 0, *size), 1, 1)])
        seen = self._patches * self.config.vision_config.patch_size / self.side
        pieces[:, 2:] = pieces[:, :2] + seen * (pieces[:, 2:] - pieces[:, :2])
        areas = torch.cat([grid_areas(piece, self.rows, self.rows) for piece in pieces.tolist()])
        return ImageTokens(self._text(rows, cols), areas, (max(rows, 1) * self.rows, max(cols, 1) * self.rows), size)

    def num_image_tokens(self, size: tuple[int, int] | None, count: int = 1) -> int:
        """As many as `image` has, without areas: asked for each picture of a data set at the start."""
        return len(self._text(*self._tiles(size)))

    def patches(self, size: tuple[int, int] | None, count: int = 1) -> tuple[int, ...]:
        """Those of every tile and of the whole picture."""
        rows, cols = self._tiles(size)
        return (self._patches**2,) * (rows * cols + 1)

    def pixels(self, pictures: Sequence[Image.Image]) -> dict[str, Tensor]:
        """`pixel_values` (tiles of all pictures, 1, 3, side, side) float32, and `tiles` (pictures,): how many each has.

        A row a tile: prompts join without padding, and the mask of pixels, all ones, is not needed. transformers drops
        a tile that is all 0, as if it were padding: with the mean of these models, 0.5, no grey of 8 bits becomes 0.
        """
        values = self.image_processor(images=[list(pictures)], return_tensors="pt")["pixel_values"]
        tiles = torch.tensor([len(self.patches(picture.size)) for picture in pictures])
        return {"pixel_values": values.transpose(0, 1), "tiles": tiles}

    def plain_pixels(self, pixels: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`pixel_values` (1, tiles of all pictures, 3, side, side)."""
        return {"pixel_values": pixels["pixel_values"].transpose(0, 1)}

    def encode(self, model, pixels: Mapping[str, Tensor]) -> Any:
        """What the language model reads of pictures, one tensor for each, which beams then repeat by prompt."""
        found = super().encode(model, {"pixel_values": pixels["pixel_values"]})
        found.pooler_output = list(torch.cat(found.pooler_output).split((pixels["tiles"] * self.rows**2).tolist()))
        return found

    def cap(self, max_image_tokens: int) -> None:
        """Change the image processor so that a picture costs so many tokens at most. Raises ValueError."""
        self.check_cap(max_image_tokens, len(self._text(0, 0)))
        pictures = self.image_processor
        if pictures.do_image_splitting:
            numbers = range(2, pictures.size["longest_edge"] // self.side + 1)  # of tiles a side of a square
            fitting = [number for number in numbers if len(self._text(number, number)) <= max_image_tokens]
            pictures.do_image_splitting = bool(fitting)
            pictures.size = {"longest_edge": fitting[-1] * self.side} if fitting else pictures.size

    def _content(self, text: str) -> list[dict[str, str]]:
        """These templates write `User:<image>` for a part, `User: <image>` for text; they keep the order of parts."""
        if not text.startswith(IMAGE):
            return super()._content(text)
        return [{"type": "image"}, *super()._content(text.removeprefix(IMAGE))]

    def _tiles(self, size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of tiles, both 0 if the whole picture is all there is."""
        return self.image_processor.get_number_of_image_patches(size[1], size[0])[1:]

    def _text(self, rows: int, cols: int) -> tuple[int, ...]:
        """Ids of a picture's tokens and of the text between its tiles."""
        if (rows, cols) not in self._known:
            around = {"fake_token_around_image": "<fake_token_around_image>", "global_image_token": "<global-img>"}
            text = get_image_prompt_string(rows, cols, self.rows**2, image_token=self.image_token, **around)
            self._known[rows, cols] = tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        return self._known[rows, cols]
