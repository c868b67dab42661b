"""Prompts about scenes of the miniature world in the formats of the project, with the truth known."""

from dataclasses import dataclass, replace
from itertools import combinations as pairs_of

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
NAMED, COMPARE, SEARCH = LEVELS = (1, 2, 3)  # a picture is named; two are, and compared; it is to be found
CATEGORIES = dict(zip(LEVELS, ("named", "compare", "search"), strict=True))  # as records call them
NUMBERED = ("sequence", "collage")  # formats that have all levels


@dataclass(frozen=True)
class Prompt:
    """A question about one of several scenes, or two. `target` counts from 0; for pip, 0 is the inner picture."""

    image_type: str  # sequence, collage, pip or single
    scenes: tuple[Scene, ...]
    target: int
    attribute: str
    centre_phrase: str = CENTRE_PHRASES[0]
    level: int = NAMED
    partner: int | None = None  # that the target is compared with

    @property
    def targets(self) -> tuple[int, ...]:
        """The pictures that the question is about, in the order in which it names them."""
        return (self.target,) if self.partner is None else tuple(sorted((self.target, self.partner)))

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
        if self.level == SEARCH:
            return f"Which image has the {self.attribute} {self._values[self.target]}?"
        question = QUESTIONS[self.attribute]
        if self.image_type == "single":
            return question
        named = " and ".join(f"Image{target + 1}" for target in self.targets)
        where = self.centre_phrase if self.image_type == "pip" else f"In {named}"
        return f"{where}, {question[0].lower()}{question[1:]}"

    @property
    def answer(self) -> str:
        """What is true of the target, of both in the order of their names, or the number of the one to be found."""
        return str(self.target + 1) if self.level == SEARCH else self._said_of(self.targets)

    @property
    def others(self) -> list[str]:
        """What is true of the other pictures, in their order; never the answer.

        Where two are compared: the two the other way round, then every other pair that differs, each text once. Where
        one is to be found: the other numbers.
        """
        rest = [number for number in range(len(self.scenes)) if number != self.target]
        if self.level == SEARCH:
            return [str(number + 1) for number in rest]
        if self.level == NAMED:
            return [self._values[number] for number in rest]
        pairs = [self.targets[::-1], *pairs_of(range(len(self.scenes)), 2)]
        differing = [pair for pair in pairs if len({self._values[number] for number in pair}) == 2]
        return [text for text in dict.fromkeys(map(self._said_of, differing)) if text != self.answer]

    @property
    def _values(self) -> list[str]:
        """What is asked for, of each picture."""
        return [getattr(scene, self.attribute) for scene in self.scenes]

    def _said_of(self, numbers: tuple[int, ...]) -> str:
        return " and ".join(self._values[number] for number in numbers)

    @property
    def target_box(self) -> list[int] | None:
        """Box [x0, y0, x1, y1] of the target in the stored picture that holds it; None of two."""
        if self.level == COMPARE:
            return None
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


def sample_prompt(
    rng: np.random.Generator, split: str, image_type: str, num_scenes: int | None = None, level: int = NAMED
) -> Prompt:
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
    prompt = Prompt(image_type, tuple(scenes), target, attribute, str(rng.choice(CENTRE_PHRASES)), level)
    if level != COMPARE:
        return prompt
    return replace(prompt, partner=int(rng.choice([number for number in range(num_scenes) if number != target])))
