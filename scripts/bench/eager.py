"""Attention-aware DPO as one would write it down first, to compare with.

Chosen and rejected answers stand below each other in one padded batch, pictures twice; eager attention returns every
layer's whole map; logits of every row; the reference is a second forward of the same. Of our attention, packing,
scoring and losses nothing is used, so that equality with them says something.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from train.llava_hound_dpo.losses import LossSettings

IGNORED = -100  # label of a token that is not of an answer


def collate(items: Sequence[dict[str, Any]], image_token: int, pad: int = 0) -> dict[str, Tensor]:
    """N items of a `PairDataset` as 2N padded rows of S tokens, the N chosen ones first.

    What the model takes, `labels` (2N, S), and `regions` (N, S, 2): weight of each token in the target and all images.
    """
    pairs = [item["pair"] for item in items]
    rows = [(p.prompt, p.chosen) for p in pairs] + [(p.prompt, rejected) for p in pairs for rejected in p.rejected]
    length = max(len(prompt) + len(answer) for prompt, answer in rows)
    input_ids = torch.full((len(rows), length), pad)
    mask, labels = torch.zeros_like(input_ids), torch.full_like(input_ids, IGNORED)
    for row, (prompt, answer) in enumerate(rows):
        end = len(prompt) + len(answer)
        input_ids[row, :end] = torch.tensor(prompt + answer)
        mask[row, :end] = 1
        labels[row, len(prompt) : end] = torch.tensor(answer)
    is_image = input_ids[: len(pairs)] == image_token
    regions = torch.zeros(*is_image.shape, 2)
    regions[..., 1] = is_image
    regions[..., 0][is_image] = torch.cat([pair.target for pair in pairs])
    inputs = {"input_ids": input_ids, "attention_mask": mask}
    inputs |= {name: torch.cat([item["pixels"][name] for item in items] * 2) for name in items[0]["pixels"]}
    if "image_grid_thw" in inputs:  # Qwen-VL: from this and the grids the model makes its positions itself
        inputs["mm_token_type_ids"] = (input_ids == image_token).long()
    return {**inputs, "labels": labels, "regions": regions}


def attention_aware_dpo(policy, batch: dict[str, Tensor], layers: Sequence[int], settings: LossSettings) -> Tensor:
    """Mean loss of a batch: dpo_alpha · (L_dpo + λ·L_att), hinge, with all attention maps in memory."""
    inputs = {name: tensor for name, tensor in batch.items() if name not in ("labels", "regions")}
    model = policy.get_base_model()  # without accelerate's wrapper, which would turn all maps into fp32
    with torch.no_grad(), policy.disable_adapter():
        reference = answer_logps(model(**inputs, use_cache=False).logits, batch["labels"])
    outputs = model(**inputs, use_cache=False, output_attentions=True)
    margins = answer_logps(outputs.logits, batch["labels"]) - reference
    chosen, rejected = margins.chunk(2)
    preference = -F.logsigmoid(settings.beta * (chosen - rejected))
    maps = torch.stack([outputs.attentions[layer] for layer in layers])
    ratio = target_share(maps, batch["labels"], batch["regions"], settings.attention_rows)
    attention = F.relu(settings.attention_threshold - ratio)
    return (settings.dpo_alpha * (preference + settings.attention_weight * attention)).mean()


def answer_logps(logits: Tensor, labels: Tensor) -> Tensor:
    """(2N,) log-prob of each row's answer, from logits of all rows."""
    logps = F.log_softmax(logits[:, :-1].float(), dim=-1)
    targets = labels[:, 1:]
    return logps.gather(2, targets.clamp(min=0)[..., None])[..., 0].masked_fill(targets == IGNORED, 0).sum(dim=1)


def target_share(maps: Tensor, labels: Tensor, regions: Tensor, attention_rows: str) -> Tensor:
    """(N,) share of the image attention that lies on the target, from maps (L, 2N, H, S, S)."""
    pairs = len(regions)
    rows = F.pad(labels[:pairs, 1:] != IGNORED, (0, 1)).float()  # a row predicts the token after it
    if attention_rows == "first":
        rows = rows * (rows.cumsum(dim=1) == 1)
    mean = maps[:, :pairs].float().mean(dim=2)  # (L, N, S, S)
    mass = torch.einsum("lnqk,nkr,nq->lnr", mean, regions, rows / rows.sum(dim=1, keepdim=True))
    return (mass[..., 0] / mass[..., 1]).mean(dim=0)
