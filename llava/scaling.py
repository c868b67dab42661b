"""Scaling of attention scores on image tokens at inference: the mechanism of AdaptVis, for several images.

Letters: B batch, H heads, Q scaled rows, K keys, S prompt tokens.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

RULES = ("multiply", "add")


@dataclass(frozen=True, eq=False)
class Scale:
    """How the scores of a forward's last Q rows are changed, in every head of the chosen layers.

    The factor of a token is 1 + (factor - 1) · weight, so that a token that lies half in the target is half scaled.
    """

    factor: Float[Tensor, "B Q"]  # α; where it is 1 the attention stays as it is, bit for bit
    weights: Float[Tensor, "B #Q S"]  # share (0..1) of each prompt token that is scaled; 0 for all text
    images: Bool[Tensor, "B S"]  # image tokens
    adds: Bool[Tensor, " #Q"]  # s + (α - 1)·|s| instead of s·α, which lowers a negative score for α > 1
    keeps_mass: Bool[Tensor, " #Q"]  # the total attention on images stays what it was: only its split changes
    num_keys: int | None = None  # only forwards that see so many keys are scaled; None: every one
    layers: frozenset[int] | None = None  # zero-based; None: all
    heads: Mapping[int, tuple[int, ...]] | None = None  # zero-based, by layer; None: all heads of the layers
    keeps_any: bool | None = None  # whether any row keeps its mass; None: look, once, as a GPU is waited for

    def __post_init__(self):
        if self.keeps_any is None:
            object.__setattr__(self, "keeps_any", bool(self.keeps_mass.any()))

    @classmethod
    def of_last_row(
        cls, factor: Tensor, weights: Tensor, images: Tensor, rule: str = "multiply", keeps_mass: bool = False,
        every_step: bool = False, layers: frozenset[int] | None = None,
        heads: Mapping[int, tuple[int, ...]] | None = None,
    ) -> "Scale":  # fmt: skip
        """For `factor` (B,) and `weights` (B, S): the last prompt row, and the answer's rows too with `every_step`."""
        device = weights.device
        adds, keeps = (torch.tensor([value], device=device) for value in (rule == "add", keeps_mass))
        num_keys = None if every_step else weights.shape[1]  # the row that sees just the prompt
        factor, weights = factor.to(device)[:, None], weights[:, None]
        return cls(factor, weights, images, adds, keeps, num_keys, layers, heads, keeps_mass)

    def applies(self, layer: int, num_keys: int) -> bool:
        """Whether a layer's last rows are scaled in a forward that sees `num_keys` keys."""
        is_chosen = all(chosen is None or layer in chosen for chosen in (self.layers, self.heads))
        return is_chosen and self.num_keys in (None, num_keys)

    def heads_of(self, layer: int, num_heads: int, device: torch.device) -> Bool[Tensor, " H"] | None:
        """The heads of a layer that are scaled; None: all."""
        if self.heads is None:
            return None
        return torch.isin(torch.arange(num_heads, device=device), torch.tensor(self.heads[layer], device=device))

    def expand(self, batch: int) -> "Scale":
        """The same scale for a batch in which every sample stands several times in a row (beams)."""
        times = batch // len(self.factor)
        if times == 1:
            return self
        factor, weights, images = (t.repeat_interleave(times, 0) for t in (self.factor, self.weights, self.images))
        return replace(self, factor=factor, weights=weights, images=images)


def scale_scores(
    scores: Float[Tensor, "B H Q K"], scale: Scale, heads: Bool[Tensor, " H"] | None = None
) -> Float[Tensor, "B H Q K"]:
    """Pre-softmax scores with those of the weighted tokens scaled; keys after the prompt are left alone.

    With `heads` the scores of the other heads are left alone, too.
    Source: AdaptVis, "Why Is Spatial Reasoning Hard for VLMs?" (Chen et al. 2025), section 4: image scores times α
    before the softmax. New here: weights per token, the rule `add`, and `keeps_mass`.
    """
    after = scores.shape[-1] - scale.weights.shape[-1]
    change = F.pad((scale.factor[..., None] - 1) * scale.weights, (0, after))[:, None]
    if heads is not None:
        change = change * heads[:, None, None]
    # Masked scores are -inf, and -inf times 0 is no number.
    scaled = torch.where(change == 0, scores, scores + change * torch.where(scale.adds[:, None], scores.abs(), scores))
    if not scale.keeps_any:
        return scaled
    images = F.pad(scale.images, (0, after))[:, None, None]
    before, now = (s.masked_fill(~images, -torch.inf).logsumexp(dim=-1, keepdim=True) for s in (scores, scaled))
    return torch.where(images & scale.keeps_mass[:, None], scaled + (before - now), scaled)
