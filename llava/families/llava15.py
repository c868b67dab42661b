"""LLaVA-1.5: CLIP's patches of one square picture as image tokens, and the `vicuna_v1` template."""

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from llava.families.family import Family, ImageTokens

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
END = "</s>"


class Llava15(Family):
    """See `Family`."""

    name = "LLaVA-1.5"
    model_type = "llava"
    model_class = LlavaForConditionalGeneration
    end = END
    fixed = True

    def __init__(self, config, tokenizer, image_processor, pad: bool = True):
        super().__init__(config, tokenizer, image_processor, pad)
        side, patch = config.vision_config.image_size, config.vision_config.patch_size
        self.side, self.rows = side, side // patch
        self._covered = patch * self.rows  # px of the model's input that become tokens
        resized = dict(image_processor.size) if image_processor.do_resize else {}
        self._shortest = resized.get("shortest_edge")  # resized to this, aspect kept ...
        self._exact = (resized["width"], resized["height"]) if "height" in resized else None  # ... or to exactly this
        crop = image_processor.crop_size if image_processor.do_center_crop else None
        self._crop = (crop["width"], crop["height"]) if crop else None  # then this is cut from the centre
        if (self._crop or self._exact) != (side, side):
            raise ValueError(
                f"the image processor makes {self._crop or self._exact or resized} px pictures but the vision tower "
                f"takes {side} x {side}: processor and model are of different checkpoints"
            )

    @classmethod
    def check_config(cls, config) -> None:
        """Raises ValueError where image tokens are not the patches alone."""
        if config.vision_feature_select_strategy != "default":
            raise ValueError(
                f"vision_feature_select_strategy is {config.vision_feature_select_strategy!r}; regions need the patch "
                "tokens alone ('default'), as LLaVA-1.5 has them"
            )
        layers, number = config.vision_feature_layer, config.vision_config.num_hidden_layers
        wrong = [n for n in (layers if isinstance(layers, list) else [layers]) if not -number - 1 <= n <= number]
        if wrong:
            raise ValueError(f"vision_feature_layer is {wrong[0]}, but the vision tower has {number} layers")

    def processor(self) -> LlavaProcessor:
        """Tokenizer and image processor as transformers saves and loads them together."""
        return LlavaProcessor(
            self.image_processor, self.tokenizer, patch_size=self.config.vision_config.patch_size,
            vision_feature_select_strategy="default", num_additional_image_tokens=1,
        )  # fmt: skip

    def render(self, turns: Sequence[tuple[str, str | None]], system: str | None = None) -> str:
        """As `vicuna_v1`."""
        return vicuna_v1(turns, SYSTEM if system is None else system)

    def image(self, size: tuple[int, int]) -> ImageTokens:
        """A square grid of patches, row by row, over what padding, resizing and cropping leave of the picture."""
        left, top, right, bottom = self._seen(size)
        across = torch.linspace(0, 1, self.rows + 1, dtype=torch.float64)
        x, y = left + (right - left) * across, top + (bottom - top) * across
        sides = (x[:-1], y[:-1], x[1:], y[1:])
        areas = torch.stack([
            side[:, None].expand(-1, self.rows) if number % 2 else side.expand(self.rows, -1)
            for number, side in enumerate(sides)
        ], dim=-1)  # fmt: skip
        ids = (self.image_id,) * self.rows**2
        return ImageTokens(ids, areas.reshape(-1, 4), (self.rows, self.rows), size)

    def num_image_tokens(self, size: tuple[int, int] | None = None) -> int:
        """As many for every picture, without its areas: asked for each picture of a data set at the start."""
        return self.rows**2

    def pixels(self, pictures: Sequence[Image.Image]) -> dict[str, Tensor]:
        """`pixel_values` (pictures, 3, side, side) float32."""
        if self.pad:
            pictures = [pad_to_square(picture, mean_colour(self.image_processor)) for picture in pictures]
        return {"pixel_values": self.image_processor(images=list(pictures), return_tensors="pt")["pixel_values"]}

    def _seen(self, size: tuple[int, int]) -> tuple[float, float, float, float]:
        """Box in px of the stored picture, that the grid covers: beyond it where it is padded, inside where cropped."""
        width, height = size
        left = top = 0
        if self.pad:
            side = max(width, height)
            left, top = (side - width) // 2, (side - height) // 2
            width = height = side
        new_width, new_height = self._resized(width, height)
        crop_width, crop_height = self._crop or (new_width, new_height)
        x0, y0 = (new_width - crop_width) // 2, (new_height - crop_height) // 2
        across, down = width / new_width, height / new_height
        return (
            x0 * across - left, y0 * down - top,
            (x0 + self._covered) * across - left, (y0 + self._covered) * down - top,
        )  # fmt: skip

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        if self._exact:
            return self._exact
        if self._shortest is None:
            return width, height
        longer = int(self._shortest * max(width, height) / min(width, height))
        return (self._shortest, longer) if width <= height else (longer, self._shortest)


def vicuna_v1(turns: Sequence[tuple[str, str | None]], system: str = SYSTEM) -> str:
    """Text of a conversation of (prompt, answer); an answer of None ends it at `ASSISTANT:`, ready to be continued.

    Source: the template LLaVA-1.5 was trained with (`--version v1`): a space between turns, `</s>` and no space after
    an answer. Raises ValueError if a turn follows an unanswered one.
    """
    text = system + " "
    for number, (prompt, answer) in enumerate(turns):
        text += f"USER: {prompt} ASSISTANT:"
        if answer is None:
            if number != len(turns) - 1:
                raise ValueError(f"turn {number + 1} has no answer but another turn follows it")
            return text
        text += f" {answer}{END}"
    return text


def pad_to_square(picture: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    """The picture centred on a square of its longer side. Source: `expand2square` of LLaVA-1.5 (`pad`)."""
    width, height = picture.size
    if width == height:
        return picture
    side = max(width, height)
    square = Image.new("RGB", (side, side), colour)
    square.paste(picture, ((side - width) // 2, (side - height) // 2))
    return square


def mean_colour(image_processor) -> tuple[int, int, int]:
    """The processor's mean in 0..255, rounded down as LLaVA does: (122, 116, 104) for CLIP."""
    return tuple(int(255 * mean) for mean in image_processor.image_mean)
