"""Pictures that are made hard to see, or hidden, when a model is asked: its mistakes stand beside the clean picture.

The default is not to: such a mistake shows what noise does, not what another image in the prompt does.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from data_gen.sources import rng_of
from llava.records import Question
from llava.regions import target_boxes

HIDDEN = "hidden"  # no noise: no token of prompt and answer sees the target (`Job.hides_target`)
KINDS = ("none", "target", "whole", "published", HIDDEN)
PUBLISHED = {"collage": "target", "pip": "whole"}  # what MIA-DPO's data was made with; its sequences were clean
STDS = {"sequence": 64.0, "collage": 225.0, "pip": 49.0}  # of 255; that of sequences is in its code, switched off


@dataclass(frozen=True)
class Noise:
    """Gaussian noise on what a prompt refers to (`target`) or on all its pictures (`whole`)."""

    kind: str  # one of KINDS
    std: float | None  # of 255; None: STDS
    seed: int

    def name(self, question: Question) -> str:
        """What `rejected_from` says of an answer to pictures with this noise."""
        region = self._region(question)
        if region in ("none", HIDDEN):
            return {"none": "clean"}.get(region, region)
        return f"noise_{region}_{self._std(question):g}"

    def __call__(self, question: Question, pictures: list[Image.Image]) -> list[Image.Image]:
        """The pictures with noise; a question always gets the same."""
        region = self._region(question)
        if region in ("none", HIDDEN):
            return pictures
        noisy, rng = list(pictures), rng_of(self.seed, question.id)
        is_sequence = question.image_type == "sequence"
        for place in range(len(pictures)) if region == "whole" else question.targets if is_sequence else [0]:
            size = pictures[place].size
            for box in [(0, 0, *size)] if region == "whole" or is_sequence else target_boxes(question, size):
                noisy[place] = add_noise(noisy[place], box, self._std(question), rng)
        return noisy

    def _region(self, question: Question) -> str:
        return PUBLISHED.get(question.image_type, "none") if self.kind == "published" else self.kind

    def _std(self, question: Question) -> float:
        return STDS[question.image_type] if self.std is None else self.std


def add_noise(picture: Image.Image, box: tuple[float, ...], std: float, rng: np.random.Generator) -> Image.Image:
    """A copy with noise in the box (x0, y0, x1, y1; px), computed in floating point and clipped to 0..255."""
    pixels = np.array(picture)
    x0, y0, x1, y1 = int(box[0]), int(box[1]), int(np.ceil(box[2])), int(np.ceil(box[3]))
    part = pixels[y0:y1, x0:x1].astype(np.float32)
    part += rng.standard_normal(part.shape, dtype=np.float32) * std
    pixels[y0:y1, x0:x1] = part.clip(0, 255).round().astype(np.uint8)
    return Image.fromarray(pixels)
