"""The losses, as pure functions of log-probs and attention ratios.

N pairs in a batch with M rejected answers, L probed layers. `total_loss` takes the mean over pairs, so that a global
batch has the same loss however it is split over micro-batches and processes. A pair with several rejected answers has
the mean of their preference losses, L_dpo = 1/m Σ_j ℓ(z_j) with z_j of the chosen and its j-th rejected answer: what m
pairs of one rejected answer each have on average.

Answers end in the end token e. Chosen and rejected share it, so that z says little about it and DPO may unlearn it:

    kept        z of log π(y|x) = Σ_t log π(y_t | x, y_<t), with e the last of the y_t
    left_out    z of log π(y|x) - log π(e | x, y without e), of policy and reference: L_dpo does not move e
    likelihood  z as kept, and L_dpo + ω·L_end with L_end = -log π(e | x, chosen answer without e)

L_sft is of the whole answer in each.

L_att is of the rows that predict tokens of the chosen answer y, and of pairs by what the policy says of their answers:

    rows first      R from the one that predicts y_1, the last of the prompt (KLAL, arXiv 2511.12738)
    rows all        R from all of these rows
    gate none       L_att of every pair
    gate preferred  L_att is 0 unless log π(y|x) > log π(y_j|x) for every rejected y_j, both as DPO compares them; the
                    gate has no gradient (after EASE, arXiv 2605.30912: attention trained on what succeeds)
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor


def logits_margin(
    chosen: Float[Tensor, " M"],
    rejected: Float[Tensor, " M"],
    reference_chosen: Float[Tensor, " M"],
    reference_rejected: Float[Tensor, " M"],
) -> Float[Tensor, " M"]:
    """z: how much more the policy prefers chosen to rejected than the reference does, in nats.

    All four are log-probs of answers, summed over tokens, with or without the end token alike; a chosen answer stands
    once for each of its rejected ones.
    """
    return (chosen - rejected) - (reference_chosen - reference_rejected)


def sigmoid_loss(z: Float[Tensor, " M"], beta: float, smoothing: float) -> Float[Tensor, " M"]:
    """DPO. Source: arXiv 2305.18290 eq. 7; with smoothing the conservative DPO of arXiv 2305.18290's authors."""
    return -(1 - smoothing) * F.logsigmoid(beta * z) - smoothing * F.logsigmoid(-beta * z)


def robust_loss(z: Float[Tensor, " M"], beta: float, smoothing: float) -> Float[Tensor, " M"]:
    """Unbiased under a share `smoothing` of flipped labels. Source: arXiv 2403.00409 eq. 5."""
    flipped = smoothing * F.logsigmoid(-beta * z)
    return (-(1 - smoothing) * F.logsigmoid(beta * z) + flipped) / (1 - 2 * smoothing)


def hinge_loss(z: Float[Tensor, " M"], beta: float, smoothing: float) -> Float[Tensor, " M"]:
    """max(0, 1 - βz). Source: SLiC, arXiv 2305.10425 eq. 7, with the reference inside z as in arXiv 2309.06657."""
    return torch.relu(1 - beta * z)


def ipo_loss(z: Float[Tensor, " M"], beta: float, smoothing: float) -> Float[Tensor, " M"]:
    """(z - 1/(2β))², for z of log-probs averaged over tokens. Source: arXiv 2310.12036 eq. 17."""
    return (z - 1 / (2 * beta)) ** 2


PREFERENCE_LOSSES: dict[str, Callable] = {
    "sigmoid": sigmoid_loss,
    "robust": robust_loss,
    "hinge": hinge_loss,
    "ipo": ipo_loss,
}
SMOOTHED = ("sigmoid", "robust")  # the others do not know label smoothing


def mean_by_pair(values: Float[Tensor, " M"], owner: Tensor, num_pairs: int) -> Float[Tensor, " N"]:
    """Mean of what each pair's rejected answers have; `owner` (M,) is their pair's number."""
    none = values.new_zeros(num_pairs)
    return none.index_add(0, owner, values) / none.index_add(0, owner, torch.ones_like(values))


def prefers_chosen(
    chosen: Float[Tensor, " M"], rejected: Float[Tensor, " M"], owner: Tensor, num_pairs: int
) -> Bool[Tensor, " N"]:
    """Whether a pair's chosen answer is more likely than each of its rejected ones; `owner` as in `mean_by_pair`."""
    return mean_by_pair((chosen > rejected).to(chosen.dtype), owner, num_pairs) == 1


def hinge_attention(ratio: Float[Tensor, " N"], threshold: float) -> Float[Tensor, " N"]:
    """max(0, τ - R): 0 once the target has the share τ of the image attention."""
    return torch.relu(threshold - ratio)


def log_attention(ratio: Float[Tensor, " N"], threshold: float) -> Float[Tensor, " N"]:
    """-log R, which never stops pulling; the threshold does not enter."""
    return -torch.log(ratio.clamp(min=1e-6))


ATTENTION_LOSSES: dict[str, Callable] = {"hinge": hinge_attention, "log": log_attention}
ANSWER_ENDS = ("kept", "left_out", "likelihood")  # ways of DPO with the end token


@dataclass(frozen=True)
class LossSettings:
    """total = dpo_alpha · (L_dpo + ω·L_end + λ·L_att) + gamma · (L_sft + λ·L_att), and what its parts need."""

    dpo_alpha: float
    gamma: float
    beta: float = 0.1
    label_smoothing: float = 0.0
    loss_type: str = "sigmoid"
    attention_weight: float = 0.9  # λ
    attention_threshold: float = 0.75  # τ
    attention_loss: str = "hinge"
    answer_end: str = "likelihood"
    answer_end_weight: float = 0.1  # ω of `likelihood`, else 0
    attention_rows: str = "first"
    attention_gate: str = "none"

    @property
    def needs_reference(self) -> bool:
        """Whether the reference model is computed at all."""
        return self.dpo_alpha > 0

    @property
    def is_gated(self) -> bool:
        """Whether the attention term acts on some pairs only."""
        return self.attention_gate == "preferred"

    @property
    def needs_rejected(self) -> bool:
        """Whether the rejected answers are computed at all."""
        return self.needs_reference or self.is_gated

    @property
    def averages_logps(self) -> bool:
        """Whether z is of log-probs per token (IPO) instead of per answer."""
        return self.loss_type == "ipo"

    @property
    def leaves_out_end(self) -> bool:
        """Whether z is of log-probs without the end token."""
        return self.answer_end == "left_out"


def total_loss(
    settings: LossSettings,
    chosen: Float[Tensor, " N"],
    chosen_tokens: Float[Tensor, " N"],
    ratio: Float[Tensor, " N"],
    z: Float[Tensor, " M"] | None,
    owner: Tensor | None = None,
    chosen_end: Float[Tensor, " N"] | None = None,
    is_open: Bool[Tensor, " N"] | None = None,
) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, " N"]]]:
    """Mean total loss of a batch, and its parts per pair (`dpo`, `sft`, `attention`, `total`).

    `chosen` are log-probs of the whole chosen answers, `chosen_tokens` their lengths, `chosen_end` log-probs of their
    end tokens (read by `likelihood` alone), `ratio` the attention ratios R and `z` the margins of `logits_margin` (None
    where `dpo_alpha` is 0) of rejected answers whose pairs are `owner` (M,). `is_open`: the gate (None: none).
    """
    sft = -chosen / chosen_tokens
    attention = ATTENTION_LOSSES[settings.attention_loss](ratio, settings.attention_threshold)
    if is_open is not None:
        attention = attention.where(is_open, 0)
    parts = {"sft": sft, "attention": attention}
    total = settings.gamma * (sft + settings.attention_weight * attention)
    if settings.needs_reference:
        preference = PREFERENCE_LOSSES[settings.loss_type](z, settings.beta, settings.label_smoothing)
        if owner is not None:
            preference = mean_by_pair(preference, owner, len(chosen))
        parts["dpo"] = preference
        total = total + settings.dpo_alpha * (preference + settings.attention_weight * attention)
        if settings.answer_end == "likelihood":
            total = total - settings.dpo_alpha * settings.answer_end_weight * chosen_end
    parts["total"] = total
    return total.mean(), parts
