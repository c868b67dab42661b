"""LLaVA-1.5: CLIP's patches of one square picture as image tokens, and the `vicuna_v1` template."""

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor
from transformers import LlavaImageProcessorPil, LlavaProcessor

from llava.families.family import Family, ImageTokens, grid_areas, other_checkpoint
from llava.records import IMAGE

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
END = "</s>"
# vicuna_v1 for transformers and servers: the parts of a message in the order given, nothing between them. Only where
# pictures come first and the text behind them begins no line of its own, each has a line, as LLaVA-1.5 was trained.
# NOTE: vLLM keeps the order of parts where a template loops over message['content'] itself.
CHAT_TEMPLATE = (
    "{% macro text(content) %}{% if content is string %}{{ content }}{% else %}"
    "{% for part in content %}{{ part['text'] }}{% endfor %}{% endif %}{% endmacro %}"
    "{% if messages[0]['role'] == 'system' %}{{ text(messages[0]['content']) }}{% else %}" + SYSTEM + "{% endif %} "
    "{% for message in messages %}{% if message['role'] == 'user' %}USER: "
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% set texts = message['content'] | selectattr('type', 'equalto', 'text') | map(attribute='text') | list %}"
    "{% set leads = texts and message['content'][0]['type'] == 'image' and texts[0] == texts[0].lstrip() %}"
    "{% set ns = namespace(line='\n' if leads else '') %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>{{ ns.line }}"
    "{% else %}{{ part['text'] }}{% set ns.line = '' %}{% endif %}{% endfor %}{% endif %} "
    "{% elif message['role'] == 'assistant' %}ASSISTANT: {{ text(message['content']) }}</s>"
    "{% elif message['role'] != 'system' or not loop.first %}"
    "{{ raise_exception('a conversation has a system message at most at its start, then user and assistant') }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)

# Names of earlier transformers, and of a model without its head; the first that fits.
OLDER = (
    (re.compile(r"^(model\.)?language_model\.lm_head\."), "lm_head."),
    (re.compile(r"^(model\.)?language_model\.(model\.)?"), "model.language_model."),
    (re.compile(r"^(model\.)?vision_tower\.(vision_model\.)?"), "model.vision_tower."),
    (re.compile(r"^(model\.)?multi_modal_projector\."), "model.multi_modal_projector."),
)
NESTED = re.compile(r"(language_model|vision_tower)(\\?\.)(?:model|vision_model)(\\?\.)")  # of them, in a pattern


class Llava15(Family):
    """See `Family`."""

    name = "LLaVA-1.5"
    model_types = ("llava",)
    image_token = IMAGE
    strategy = "default"
    end = END
    fixed = True
    older = OLDER

    def __init__(self, config, tokenizer, image_processor, pad: bool | None = None):
        if pad is None:
            pad = image_processor.do_pad if isinstance(image_processor, LlavaImageProcessorPil) else True
        super().__init__(config, tokenizer, image_processor, pad)
        if tokenizer.eos_token != self.end:
            raise ValueError(f"the end token is {tokenizer.eos_token!r}, {self.name} ends answers with {self.end!r}")
        side, patch = config.vision_config.image_size, config.vision_config.patch_size
        self.side, self.rows = side, side // patch
        self._covered = patch * self.rows  # px of the model's input that become tokens
        resized = dict(image_processor.size) if image_processor.do_resize else {}
        self._shortest = resized.get("shortest_edge")  # resized to this, aspect kept ...
        self._exact = (resized["width"], resized["height"]) if "height" in resized else None  # ... or to exactly this
        crop = image_processor.crop_size if image_processor.do_center_crop else None
        self._crop = (crop["width"], crop["height"]) if crop else None  # then this is cut from the centre
        if (self._crop or self._exact) != (side, side):
            raise other_checkpoint(f"{self._crop or self._exact or resized} px pictures", side)

    @classmethod
    def check_config(cls, config) -> None:
        """Raises ValueError where image tokens are not the patches alone, or a size is none."""
        super().check_config(config)
        layers, number = config.vision_feature_layer, config.vision_config.num_hidden_layers
        wrong = [n for n in (layers if isinstance(layers, list) else [layers]) if not -number - 1 <= n <= number]
        if wrong:
            raise ValueError(f"vision_feature_layer is {wrong[0]}, but the vision tower has {number} layers")

    @cached_property
    def _feeding(self) -> LlavaImageProcessorPil:
        """transformers' own for LLaVA with these settings: what leaves in a folder is what the model is fed here."""
        settings = self.image_processor.to_dict() | {"do_pad": self.pad}
        settings.pop("image_processor_type", None)
        return LlavaImageProcessorPil.from_dict(settings)

    @classmethod
    def renewed(cls, names: Any) -> Any:
        """What names modules in an adapter's config (a pattern, a list, or a table) with today's names in it."""
        if isinstance(names, str):
            return rf"(?:model\.)?(?:{NESTED.sub(lambda found: found[1] + found[2], names)})"
        return super().renewed(names)

    def processor(self) -> LlavaProcessor:
        """Tokenizer, pictures' settings and chat template as transformers saves and loads them together.

        It gives the pixels of `pixels`, the text of `render` and the tokens of `expand`.
        """
        return LlavaProcessor(
            self._feeding, self.tokenizer, patch_size=self.config.vision_config.patch_size,
            vision_feature_select_strategy="default", num_additional_image_tokens=1, chat_template=CHAT_TEMPLATE,
        )  # fmt: skip

    @property
    def chat_template(self) -> str:
        """See `CHAT_TEMPLATE`."""
        return CHAT_TEMPLATE

    def save(self, folder: Path) -> None:
        """Write tokenizer, pictures' settings and chat template, as transformers and servers read them together."""
        self.processor().save_pretrained(folder)

    def check_processor(self, settings: Mapping[str, Any]) -> str | None:
        """What plain transformers would do wrong with a folder's processor_config.json; None: nothing."""
        patch, extra = settings.get("patch_size"), settings.get("num_additional_image_tokens", 0)
        is_default = settings.get("vision_feature_select_strategy") == "default"
        found = (self.side // patch) ** 2 + extra - is_default if patch else "no"
        if found == self.num_image_tokens():
            return None
        return (
            f"its processor counts {found} tokens for a picture, the model takes {self.num_image_tokens()}: nothing "
            "here reads that number, plain transformers stops at it; what is saved and exported from here has it right"
        )

    def render(self, turns: Sequence[tuple[str, str | None]], system: str | None = None) -> str:
        """As `vicuna_v1`."""
        return vicuna_v1(turns, SYSTEM if system is None else system)

    def image(self, size: tuple[int, int], count: int = 1) -> ImageTokens:
        """A square grid of patches, row by row, over what padding, resizing and cropping leave of the picture."""
        ids = (self.image_id,) * self.rows**2
        return ImageTokens(ids, grid_areas(self._seen(size), self.rows, self.rows), (self.rows, self.rows), size)

    def num_image_tokens(self, size: tuple[int, int] | None = None, count: int = 1) -> int:
        """As many for every picture, without its areas: asked for each picture of a data set at the start."""
        return self.rows**2

    def patches(self, size: tuple[int, int] | None = None, count: int = 1) -> tuple[int, ...]:
        """Those of the one square, and CLIP's class token."""
        return (self.rows**2 + 1,)

    def cap(self, max_image_tokens: int) -> None:
        """Every picture costs the same. Raises ValueError if that is too much."""
        self.check_cap(max_image_tokens, self.rows**2)

    def pixels(self, pictures: Sequence[Image.Image]) -> dict[str, Tensor]:
        """`pixel_values` (pictures, 3, side, side) float32."""
        return {"pixel_values": self._feeding(images=list(pictures), return_tensors="pt")["pixel_values"]}

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
