"""Prompts about scenes of the miniature world in the formats of the project, with the truth known."""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from scripts.miniature import draw
from scripts.miniature.world import ATTRIBUTES, Scene, combinations

QUESTIONS = {  # alike in length: what is asked for stands at a fixed distance from the answer, easy to find
    "colour": "What is the colour?",
    "shape": "What is the shape?",
    "background": "What is the background?",
    "count": "What is the count?",
    "pattern": "What is the pattern?",
}
CENTRE_PHRASES = (
    "In the central picture",
    "In the inner picture",
    "In the picture in the middle",
    "In the small picture",
)
MULTI_IMAGE_TYPES = ("sequence", "collage", "pip")
SEQUENCE_LENGTHS = (2, 3, 4, 5)


@dataclass(frozen=True)
class Prompt:
    """A question about one of several scenes. `target` counts from 0; for pip, 0 is the inner picture."""

    image_type: str  # sequence, collage, pip or single
    scenes: tuple[Scene, ...]
    target: int
    attribute: str
    centre_phrase: str = CENTRE_PHRASES[0]

    @property
    def text(self) -> str:
        """The prompt with one `<image>` for every picture."""
        if self.image_type == "sequence":
            images = "".join(f"Image{number}:<image>\n" for number in range(1, len(self.scenes) + 1))
        else:
            images = "<image>\n"
        return images + self.question

    @property
    def question(self) -> str:
        """The question with the words that say which picture it is about."""
        question = QUESTIONS[self.attribute]
        if self.image_type == "single":
            return question
        where = self.centre_phrase if self.image_type == "pip" else f"In Image{self.target + 1}"
        return f"{where}, {question[0].lower()}{question[1:]}"

    @property
    def answer(self) -> str:
        """What is true of the target."""
        return getattr(self.scenes[self.target], self.attribute)

    @property
    def others(self) -> list[str]:
        """What is true of the other pictures, in their order; never the answer."""
        return [getattr(s, self.attribute) for index, s in enumerate(self.scenes) if index != self.target]

    @property
    def target_box(self) -> list[int]:
        """Box [x0, y0, x1, y1] of the target in the stored picture that holds it."""
        if self.image_type == "collage":
            return draw.cell_box(self.target)
        return draw.inner_box() if self.image_type == "pip" else [0, 0, draw.SIDE, draw.SIDE]

    def pictures(self) -> list[Image.Image]:
        """The pictures in the order of the prompt's `<image>`s."""
        if self.image_type == "collage":
            return [draw.draw_collage(self.scenes)]
        if self.image_type == "pip":
            return [draw.draw_pip(*self.scenes)]
        return [draw.draw_single(scene) for scene in self.scenes]


def sample_scene(rng: np.random.Generator, split: str) -> Scene:
    """A random scene of the split."""
    pool = combinations(split)
    return Scene(*pool[rng.integers(len(pool))], seed=int(rng.integers(2**31)))


def sample_prompt(rng: np.random.Generator, split: str, image_type: str, num_scenes: int | None = None) -> Prompt:
    """A random prompt of the split; every other scene differs from the target on the asked attribute.

    `num_scenes` matters for sequences only, 2 to 5 at random unless given.
    """
    if image_type == "sequence":
        num_scenes = num_scenes or int(rng.choice(SEQUENCE_LENGTHS))
    else:
        num_scenes = {"single": 1, "pip": 2, "collage": draw.GRID[0] * draw.GRID[1]}[image_type]
    target = 0 if image_type == "pip" else int(rng.integers(num_scenes))
    attribute = str(rng.choice(list(ATTRIBUTES)))
    wanted, scenes = sample_scene(rng, split), []
    while len(scenes) < num_scenes - 1:
        scene = sample_scene(rng, split)
        if getattr(scene, attribute) != getattr(wanted, attribute):
            scenes.append(scene)
    scenes.insert(target, wanted)
    return Prompt(image_type, tuple(scenes), target, attribute, str(rng.choice(CENTRE_PHRASES)))
