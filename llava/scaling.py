"""Scaling of attention scores on image tokens at inference: the mechanism of AdaptVis, for several images.

Letters: B batch, H heads, Q rows, K keys, S prompt tokens.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

RULES = ("multiply", "add")


@dataclass(frozen=True, eq=False)
class Scale:
    """How the scores of the last prompt row are changed, in every head of the chosen layers.

    The factor of a token is 1 + (factor - 1) · weight, so that a token that lies half in the target is half scaled.
    """

    factor: Tensor  # (B,) α; a sample whose factor is 1 keeps its attention bit for bit
    weights: Tensor  # (B, S) share (0..1) of each prompt token that is scaled; 0 for all text
    images: Tensor  # (B, S) bool, image tokens
    rule: str = "multiply"  # s·α as AdaptVis, which lowers a negative score for α > 1; "add": s + (α - 1)·|s|
    keeps_mass: bool = False  # the total attention on images stays what it was: only its split changes
    every_step: bool = False  # also the rows of the answer's tokens, not only the last prompt row
    layers: frozenset[int] | None = None  # zero-based; None: all

    def applies(self, layer: int, num_keys: int) -> bool:
        """Whether a layer's last row is scaled when it sees `num_keys` keys: the prompt's last row sees the prompt."""
        return (self.layers is None or layer in self.layers) and (
            self.every_step or num_keys == self.weights.shape[1]
        )

    def expand(self, batch: int) -> "Scale":
        """The same scale for a batch in which every sample stands several times in a row (beams)."""
        times = batch // len(self.factor)
        if times == 1:
            return self
        factor, weights, images = (t.repeat_interleave(times, 0) for t in (self.factor, self.weights, self.images))
        return Scale(factor, weights, images, self.rule, self.keeps_mass, self.every_step, self.layers)


def scale_scores(scores: Float[Tensor, "B H Q K"], scale: Scale) -> Float[Tensor, "B H Q K"]:
    """Pre-softmax scores with those of the weighted tokens scaled; keys after the prompt are left alone.

    Source: AdaptVis, "Why Is Spatial Reasoning Hard for VLMs?" (Chen et al. 2025), section 4: image scores times α
    before the softmax. New here: weights per token, the rule `add`, and `keeps_mass`.
    """
    after = scores.shape[-1] - scale.weights.shape[1]
    weights = F.pad(scale.weights, (0, after))[:, None, None].to(scores.dtype)
    change = (scale.factor.to(scores.dtype)[:, None, None, None] - 1) * weights
    # Masked scores are -inf, and -inf times 0 is no number.
    scaled = torch.where(change == 0, scores, scores + change * (scores if scale.rule == "multiply" else scores.abs()))
    if not scale.keeps_mass:
        return scaled
    images = F.pad(scale.images, (0, after))[:, None, None]
    before, now = (
        s.masked_fill(~images, -torch.inf).logsumexp(dim=-1, keepdim=True) for s in (scores, scaled)
    )
    return torch.where(images, scaled + (before - now), scaled)
