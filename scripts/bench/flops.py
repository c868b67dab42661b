"""Floating-point operations of a training step from shapes, and the share of a GPU's peak that they are.

A LoRA step with checkpointing runs every block forward for the reference and for the policy, once more in the backward
pass, and then once for the gradients of its inputs (base weights have none): four times the linear layers, three with
precomputed reference log-probs. Attention's backward pass is 2.5 of its forwards. The output layer is not recomputed.
The vision tower runs forward only. LoRA's own operations are left out.
"""

from dataclasses import dataclass

from scripts.bench.pairs import Shape
from train.llava_hound_dpo.flops import A100_PEAK, count

PEAK = {"H100": 989e12, "H200": 989e12, "A100": A100_PEAK, "L40S": 362e12}  # dense bf16 of the SXM boards, per second
TEXT = 60  # prompt tokens that are not of images


@dataclass(frozen=True)
class Forward:
    """Operations of one forward of the language model over a batch, and of encoding its pictures once."""

    linear: float
    attention: float
    output: float
    vision: float

    @property
    def total(self) -> float:
        """All of them, pictures included."""
        return self.linear + self.attention + self.output + self.vision


def forward(config, shape: Shape, text: int = TEXT, packed: bool = True, every_row: bool = False) -> Forward:
    """Of a pair: packed, or as two rows with every prompt token and picture twice; `every_row`: logits of all rows."""
    costs, vision = count(config), config.vision_config
    prompt = (vision.image_size // vision.patch_size) ** 2 * shape.images + text
    answers = (shape.chosen, shape.rejected)
    lengths = [prompt + sum(answers)] if packed else [prompt + answer for answer in answers]
    rows = sum(lengths) if every_row else sum(answers)
    return Forward(
        linear=costs.token * sum(lengths),
        attention=sum(costs.attended * length**2 / 2 for length in lengths),  # causal: half
        output=costs.answer * rows,
        vision=shape.images * costs.picture * len(lengths),
    )


def step(one: Forward, encodings: int, cached: bool = False) -> float:
    """Operations of a LoRA step with checkpointing; `encodings`: how often the pictures are encoded in it."""
    references = 0 if cached else 1
    return (
        (3 + references) * one.linear
        + (4.5 + references) * one.attention
        + (2 + references) * one.output
        + encodings * one.vision
    )


def peak(device: str) -> float | None:
    """Peak of a GPU by its name, operations per second; None if it is not in the table."""
    return next((value for name, value in PEAK.items() if name in device), None)
