"""Prompts about emoji in the formats of the project, with the truth known."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from PIL import Image

from scripts.larger import draw
from scripts.larger.world import ATTRIBUTES, Emoji
from scripts.miniature.prompts import Prompt, sample_prompt

QUESTIONS = {"kind": "What is shown?", "category": "What is the category?"}


@dataclass(frozen=True)
class EmojiPrompt(Prompt):
    """The miniature's prompt, about emoji."""

    attributes: ClassVar = ATTRIBUTES
    questions: ClassVar = QUESTIONS
    side: ClassVar = draw.SIDE
    inner_side: ClassVar = draw.INNER_SIDE

    def pictures(self) -> list[Image.Image]:
        """The pictures in the order of the prompt's `<image>`s."""
        if self.image_type == "collage":
            return [draw.draw_collage(self.scenes, self.grid)]
        if self.image_type == "pip":
            return [draw.draw_pip(*self.scenes)]
        return [draw.draw_single(scene) for scene in self.scenes]


def sampler(emoji: Emoji) -> Callable[..., EmojiPrompt]:
    """`sample_prompt` of the miniature for these emoji."""
    return partial(sample_prompt, prompt_class=EmojiPrompt, sample_scene=emoji.sample)
