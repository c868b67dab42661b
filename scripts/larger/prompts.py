"""Prompts about emoji in the formats of the project, with the truth known."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from scripts.larger import draw
from scripts.larger.world import ATTRIBUTES, Emoji
from scripts.miniature.prompts import Prompt, sample_prompt

QUESTIONS = {"kind": "What is shown?", "category": "What is the category?"}


@dataclass(frozen=True)
class EmojiPrompt(Prompt):
    """The miniature's prompt, about emoji."""

    attributes: ClassVar = ATTRIBUTES
    questions: ClassVar = QUESTIONS
    drawing: ClassVar = draw


def sampler(emoji: Emoji) -> Callable[..., EmojiPrompt]:
    """`sample_prompt` of the miniature for these emoji."""
    return partial(sample_prompt, prompt_class=EmojiPrompt, sample_scene=emoji.sample)
