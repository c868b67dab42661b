"""Batched answers with the attention they were given with: how much of it lay on the target, and how sure they were."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llava.attention import Plan, Probe, attention_ratio, mean_masses, use_plan


@dataclass(frozen=True)
class Generated:
    """One generated answer."""

    text: str
    num_tokens: int  # with the end token
    confidence: float  # largest probability of the first answer token, at temperature 1
    ratio_by_layer: list[float]  # R_l of design §4 for each probed layer, in order

    @property
    def ratio(self) -> float:
        """R: mean of the ratio over the probed layers."""
        return sum(self.ratio_by_layer) / len(self.ratio_by_layer)


@dataclass(frozen=True, eq=False)
class PromptBatch:
    """Prompts of different length in one left-padded batch."""

    input_ids: Tensor  # (B, S), image tokens expanded
    attention_mask: Tensor  # (B, S)
    pixel_values: Tensor  # (all images of all prompts in order, 3, side, side)
    regions: Tensor  # (B, S, 2) weight of each token in the target and in all images


def batch_prompts(
    prompts: Sequence[list[int]],
    targets: Sequence[Tensor],
    pixel_values: Tensor,
    image_token: int,
    pad_token: int,
) -> PromptBatch:
    """Left-pad expanded prompts; `targets` hold a weight for every image token of each prompt."""
    longest = max(len(prompt) for prompt in prompts)
    input_ids = torch.full((len(prompts), longest), pad_token)
    attention_mask = torch.zeros(len(prompts), longest, dtype=torch.long)
    regions = torch.zeros(len(prompts), longest, 2)
    for row, (prompt, target) in enumerate(zip(prompts, targets, strict=True)):
        input_ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        attention_mask[row, longest - len(prompt) :] = 1
        is_image = input_ids[row] == image_token
        regions[row, is_image] = torch.stack([target, torch.ones_like(target)], dim=-1)
    return PromptBatch(input_ids, attention_mask, pixel_values, regions)


@torch.no_grad()
def generate(model, tokenizer, batch: PromptBatch, layers: Sequence[int], **settings) -> list[Generated]:
    """Answers of a batch, greedy unless `settings` (of transformers' `generate`) say otherwise.

    The attention is measured in `layers` on the rows that predict the answer's tokens, end token included.
    """
    settings = {"do_sample": False, "max_new_tokens": 128, "pad_token_id": tokenizer.pad_token_id, **settings}
    device = model.device
    with use_plan(Plan(probe=Probe(batch.regions.to(device), frozenset(layers)))):
        out = model.generate(
            input_ids=batch.input_ids.to(device),
            attention_mask=batch.attention_mask.to(device),
            pixel_values=batch.pixel_values.to(device),
            output_attentions=True,
            output_logits=True,
            return_dict_in_generate=True,
            **settings,
        )
    tokens = out.sequences[:, batch.input_ids.shape[1] :]
    lengths = _lengths(tokens, tokenizer.eos_token_id)
    first = torch.softmax(out.logits[0].float(), dim=-1).amax(dim=-1)
    ratios = _ratios(out.attentions, lengths)
    texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    return [
        Generated(text.strip(), int(length), float(confidence), by_layer.tolist())
        for text, length, confidence, by_layer in zip(texts, lengths, first, ratios, strict=True)
    ]


def _lengths(tokens: Tensor, end: int) -> Tensor:
    """(B,) tokens of each answer up to and including its end token."""
    ended = (tokens == end).cumsum(dim=1)
    return ((ended == 0).sum(dim=1) + (ended > 0).any(dim=1).long()).clamp(max=tokens.shape[1])


def _ratios(attentions: Sequence[Sequence[Tensor]], lengths: Tensor) -> Tensor:
    """(B, L) ratio of each answer from the masses (B, H, 1, 2) of every step and layer."""
    masses = torch.stack(
        [torch.cat([step[layer] for step in attentions], dim=2) for layer in range(len(attentions[0]))]
    )
    steps = torch.arange(masses.shape[3], device=masses.device)
    rows = []
    for sample, length in enumerate(lengths):
        own = masses[:, sample, :, steps < length]  # (L, H, T, 2) of the answer's own tokens
        owner = torch.zeros(int(length), dtype=torch.long, device=masses.device)
        rows.append(attention_ratio(mean_masses(own, owner, 1))[:, 0])
    return torch.stack(rows)
