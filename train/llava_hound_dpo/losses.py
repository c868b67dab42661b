"""The losses of design §5, as pure functions of log-probs and attention ratios.

N pairs in a batch, L probed layers. Every function returns one value per pair; `total_loss` takes their mean, so
that a global batch has the same loss however it is split over micro-batches and processes.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


def logits_margin(
    chosen: Float[Tensor, " N"],
    rejected: Float[Tensor, " N"],
    reference_chosen: Float[Tensor, " N"],
    reference_rejected: Float[Tensor, " N"],
) -> Float[Tensor, " N"]:
    """z: how much more the policy prefers chosen to rejected than the reference does, in nats.

    All four are log-probs of whole answers, summed over tokens including the end token.
    """
    return (chosen - rejected) - (reference_chosen - reference_rejected)


def sigmoid_loss(z: Float[Tensor, " N"], beta: float, smoothing: float) -> Float[Tensor, " N"]:
    """DPO. Source: arXiv 2305.18290 eq. 7; with smoothing the conservative DPO of arXiv 2305.18290's authors."""
    return -(1 - smoothing) * F.logsigmoid(beta * z) - smoothing * F.logsigmoid(-beta * z)


def robust_loss(z: Float[Tensor, " N"], beta: float, smoothing: float) -> Float[Tensor, " N"]:
    """Unbiased under a share `smoothing` of flipped labels. Source: arXiv 2403.00409 eq. 5."""
    flipped = smoothing * F.logsigmoid(-beta * z)
    return (-(1 - smoothing) * F.logsigmoid(beta * z) + flipped) / (1 - 2 * smoothing)


def hinge_loss(z: Float[Tensor, " N"], beta: float, smoothing: float) -> Float[Tensor, " N"]:
    """max(0, 1 - βz). Source: SLiC, arXiv 2305.10425 eq. 7, with the reference inside z as in arXiv 2309.06657."""
    return torch.relu(1 - beta * z)


def ipo_loss(z: Float[Tensor, " N"], beta: float, smoothing: float) -> Float[Tensor, " N"]:
    """(z - 1/(2β))², for z of log-probs averaged over tokens. Source: arXiv 2310.12036 eq. 17."""
    return (z - 1 / (2 * beta)) ** 2


PREFERENCE_LOSSES: dict[str, Callable] = {
    "sigmoid": sigmoid_loss,
    "robust": robust_loss,
    "hinge": hinge_loss,
    "ipo": ipo_loss,
}
SMOOTHED = ("sigmoid", "robust")  # the others do not know label smoothing


def hinge_attention(ratio: Float[Tensor, " N"], threshold: float | Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """max(0, τ - R): 0 once the target has the share τ of the image attention. Source: design §5."""
    return torch.relu(threshold - ratio)


def log_attention(ratio: Float[Tensor, " N"], threshold: float | Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """-log R, which never stops pulling; the threshold does not enter. Source: design §5, variant `log`."""
    return -torch.log(ratio.clamp(min=1e-6))


ATTENTION_LOSSES: dict[str, Callable] = {"hinge": hinge_attention, "log": log_attention}
SCHEDULES = ("constant", "linear_decay")  # of λ, after its warm-up
DEFAULT = "default"  # in a table of thresholds: every number of images that it does not name


def threshold_of(
    threshold: float | Mapping[str, float], num_images: Int[Tensor, " N"] | None
) -> float | Float[Tensor, " N"]:
    """τ of every pair: one number, or a table by the number of pictures that its prompt shows."""
    if not isinstance(threshold, Mapping):
        return threshold
    values = torch.full(num_images.shape, threshold[DEFAULT], device=num_images.device)
    for number, value in threshold.items():
        if number != DEFAULT:
            values[num_images == int(number)] = value
    return values


def weight_factor(progress: float, warmup_share: float, schedule: str) -> float:
    """Factor of λ at a point (0..1) of the training: up from 0 over the first share, then 1 or linearly down to 0."""
    if progress < warmup_share:
        return progress / warmup_share
    return (1 - progress) / (1 - warmup_share) if schedule == "linear_decay" else 1.0


@dataclass(frozen=True)
class Weights:
    """total = dpo_alpha · (L_dpo + λ·L_att) + gamma · (L_sft + λ·L_att), and what its parts need."""

    dpo_alpha: float
    gamma: float
    beta: float = 0.1
    label_smoothing: float = 0.0
    loss_type: str = "sigmoid"
    attention_weight: float = 0.9  # λ
    attention_threshold: float | Mapping[str, float] = 0.75  # τ, or a table of them as of `threshold_of`
    attention_loss: str = "hinge"
    attention_warmup_share: float = 0.0
    attention_schedule: str = "constant"

    @property
    def needs_rejected(self) -> bool:
        """Whether the rejected answer and the reference model are computed at all."""
        return self.dpo_alpha > 0

    @property
    def averages_logps(self) -> bool:
        """Whether z is of log-probs per token (IPO) instead of per answer."""
        return self.loss_type == "ipo"

    @property
    def is_scheduled(self) -> bool:
        """Whether λ changes over the training."""
        return self.attention_warmup_share > 0 or self.attention_schedule != "constant"

    def at(self, progress: float) -> "Weights":
        """The weights at a point (0..1) of the training, where λ is `weight_factor` of what it is at most."""
        factor = weight_factor(progress, self.attention_warmup_share, self.attention_schedule)
        return replace(self, attention_weight=self.attention_weight * factor)


def total_loss(
    weights: Weights,
    chosen: Float[Tensor, " N"],
    chosen_tokens: Float[Tensor, " N"],
    ratio: Float[Tensor, " N"],
    z: Float[Tensor, " N"] | None,
    num_images: Int[Tensor, " N"] | None = None,
) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, " N"]]]:
    """Mean total loss of a batch, and its parts per pair (`dpo`, `sft`, `attention`, `total`).

    `chosen` are log-probs of the chosen answers, `chosen_tokens` their lengths, `ratio` the attention ratios R and
    `z` the margins of `logits_margin` (None where `dpo_alpha` is 0); `num_images` is for a table of thresholds. Source:
    design §5.
    """
    sft = -chosen / chosen_tokens
    threshold = threshold_of(weights.attention_threshold, num_images)
    attention = ATTENTION_LOSSES[weights.attention_loss](ratio, threshold)
    parts = {"sft": sft, "attention": attention}
    total = weights.gamma * (sft + weights.attention_weight * attention)
    if weights.needs_rejected:
        preference = PREFERENCE_LOSSES[weights.loss_type](z, weights.beta, weights.label_smoothing)
        parts["dpo"] = preference
        total = total + weights.dpo_alpha * (preference + weights.attention_weight * attention)
    parts["total"] = total
    return total.mean(), parts
