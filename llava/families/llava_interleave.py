"""LLaVA-NeXT-Interleave: SigLIP's patches of one squashed picture as image tokens, and Qwen's chat template.

Source: LLaVA-NeXT-Interleave (arXiv 2407.07895); the layout is LLaVA-1.5's with another tower and language model.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image
from torch import Tensor

from llava.families.chat import ChatFamily
from llava.families.family import ImageTokens, grid_areas, miscounted, other_checkpoint
from llava.families.llava15 import OLDER
from llava.records import IMAGE


class LlavaInterleave(ChatFamily):
    """See `Family`. A picture of `side` px has `rows` x `rows` patches, which leave out px at its right and below."""

    name = "LLaVA-Interleave"
    model_types = ("llava",)
    image_token = placeholder = IMAGE
    fixed = True
    older = OLDER

    def __init__(self, config, tokenizer, image_processor, pad: bool | None = None):
        super().__init__(config, tokenizer, image_processor, pad)
        self.side, self.patch = config.vision_config.image_size, config.vision_config.patch_size
        self.rows = self.side // self.patch
        size = dict(image_processor.size) if image_processor.do_resize else {}
        others = [name for name in ("do_center_crop", "do_pad") if getattr(image_processor, name, None)]
        if (size.get("height"), size.get("width")) != (self.side, self.side) or others:
            raise other_checkpoint(f"pictures of {size or 'any size'} ({', '.join(others) or 'no more'})", self.side)

    @classmethod
    def fits(cls, config) -> bool:
        """Whether all patches of a SigLIP are image tokens: LLaVA-1.5 leaves out the class token of its CLIP."""
        strategy, tower = (_setting(config, name) for name in ("vision_feature_select_strategy", "vision_config"))
        return strategy == "full" and _setting(tower, "model_type") == "siglip_vision_model"

    def check_processor(self, settings: Mapping[str, Any]) -> str | None:
        """What plain transformers would do wrong with a folder's processor_config.json; None: nothing."""
        if "patch_size" not in settings:
            return None
        is_default = settings.get("vision_feature_select_strategy") == "default"
        found = (self.side // settings["patch_size"]) ** 2 + settings.get("num_additional_image_tokens", 0) - is_default
        return miscounted(found, self.rows**2, "picture")

    def image(self, size: tuple[int, int], count: int = 1) -> ImageTokens:
        """A square grid of patches, row by row, over what they see of the squashed picture."""
        seen = self.rows * self.patch / self.side
        areas = grid_areas((0, 0, size[0] * seen, size[1] * seen), self.rows, self.rows)
        return ImageTokens((self.image_id,) * self.rows**2, areas, (self.rows, self.rows), size)

    def num_image_tokens(self, size: tuple[int, int] | None = None, count: int = 1) -> int:
        """As many for every picture."""
        return self.rows**2

    def patches(self, size: tuple[int, int] | None = None, count: int = 1) -> tuple[int, ...]:
        """Those of the one square."""
        return (self.rows**2,)

    def pixels(self, pictures: Sequence[Image.Image]) -> dict[str, Tensor]:
        """`pixel_values` (pictures, 3, side, side) float32."""
        return dict(self.image_processor(images=list(pictures), return_tensors="pt"))

    def cap(self, max_image_tokens: int) -> None:
        """Every picture costs the same. Raises ValueError if that is too much."""
        self.check_cap(max_image_tokens, self.rows**2)


def _setting(settings: Any, name: str) -> Any:
    return settings.get(name) if isinstance(settings, Mapping) else getattr(settings, name, None)
