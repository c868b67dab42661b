"""One forward pass over a packed row: log-probs of its answers and the attention of its chosen ones."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from llava.attention import Plan, Probe, mean_masses
from llava.families import model_inputs
from train.llava_hound_dpo.packing import PackedRow


@dataclass(frozen=True, eq=False)
class Scores:
    """What one model says of a row of N pairs with M rejected answers; None where the row holds none of these."""

    chosen: Float[Tensor, " N"]  # log-probs summed over answer tokens, nats
    rejected: Float[Tensor, " M"] | None
    chosen_end: Float[Tensor, " N"]  # of the end token alone, the last that each of these sums has
    rejected_end: Float[Tensor, " M"] | None
    masses: Float[Tensor, "L N 2"] | None = None  # mean attention mass on (target, all images) per probed layer

    def without_end(self) -> "Scores":
        """The same with log-probs of the answers without their end token, which so gets a gradient of exactly 0."""
        rejected = None if self.rejected is None else self.rejected - self.rejected_end
        return replace(self, chosen=self.chosen - self.chosen_end, rejected=rejected)

    def to(self, device) -> "Scores":
        """The same on another device, without waiting for it."""
        found = {name: value.to(device, non_blocking=True) for name, value in vars(self).items() if value is not None}
        return replace(self, **found)


def score(
    model, row: PackedRow, features: Any, layers: frozenset[int] = frozenset(), heads: Tensor | None = None,
    rows: str = "all",
) -> Scores:  # fmt: skip
    """Scores of a packed row; probes attention in `layers`, over those `heads` (L, H) that have a 1 (None: all),
    in all `rows` that predict a chosen answer, or in the "first" of each.

    `features` are the row's pictures as of `Family.encode`. Raises RuntimeError if the masses are cut off from the
    weights while gradients are wanted (a reentrant checkpoint does that): the attention term would train nothing
    without a word.
    """
    probe = Probe(row.regions, layers, first_row=rows == "first") if layers else None
    outputs = model(
        input_ids=row.input_ids,
        # An explicit mask: without any, restarted positions are taken for separate documents. Its four axes are of a
        # finished one, which transformers hands on and does not look into, as it would wait for the GPU to do.
        attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=row.input_ids.device),
        **model_inputs(features, row.positions),
        logits_to_keep=row.keep,
        use_cache=False,
        output_attentions=bool(layers),
        plan=Plan(row.trees, probe),
    )
    logps = token_logps(outputs.logits[0], row.labels)
    sums = logps.new_zeros(len(row.answer_tokens)).index_add(0, row.branch, logps)
    ends = logps[row.answer_tokens.cumsum(0) - 1]
    has_rejected = len(row.rejected) > 0
    return Scores(
        chosen=sums[row.chosen],
        rejected=sums[row.rejected] if has_rejected else None,
        chosen_end=ends[row.chosen],
        rejected_end=ends[row.rejected] if has_rejected else None,
        masses=_masses(outputs.attentions, row, layers, heads, rows) if layers else None,
    )


def token_logps(logits: Float[Tensor, "T V"], labels: Tensor) -> Float[Tensor, " T"]:
    """Log-prob of each label, in fp32."""
    return torch.log_softmax(logits.float(), dim=-1).gather(-1, labels[:, None])[:, 0]


def _masses(
    attentions: tuple[Tensor, ...], row: PackedRow, layers: frozenset[int], heads: Tensor | None, rows: str
) -> Tensor:
    if len(attentions or ()) != len(layers):
        raise RuntimeError(f"{len(layers)} layers were probed but {len(attentions or ())} masses came back")
    if torch.is_grad_enabled() and not attentions[0].requires_grad:
        raise RuntimeError(
            "the attention masses carry no gradient, so the attention term would train nothing; "
            "use non-reentrant checkpointing and do not detach the model's inputs"
        )
    masses = torch.stack([mass[0] for mass in attentions])  # (L, H, T_chosen or N, 2)
    weights = None if heads is None else heads.to(masses)[..., None]
    owner = torch.arange(row.num_pairs, device=masses.device) if rows == "first" else row.chosen_owner
    return mean_masses(masses, owner, row.num_pairs, weights)
