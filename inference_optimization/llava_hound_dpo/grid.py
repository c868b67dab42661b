"""Greedy answers under many scales at once, from one prefill of each prompt.

The last prompt token is run again once for every variant, all variants side by side as a tree: each sees the cached
prompt and its own answer, nothing of another's. No cache is copied, so dozens of variants fit beside one prompt.

Letters: B prompts, V variants, S prompt tokens, K keys, T answer tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llava.attention import Plan, use_plan
from llava.cache import new_cache
from llava.families import Family, model_inputs, position_ids
from llava.generation import PromptBatch
from llava.scaling import Scale

ANOTHER = "another"  # scope: a part of the prompt that is not the target, on purpose


@dataclass(frozen=True)
class Variant:
    """One way to scale: `scope` of adaptviz.SCOPES or ANOTHER."""

    scope: str
    rule: str
    factor: float


PLAIN = Variant("all", "multiply", 1.0)


@torch.no_grad()
def answer_grid(
    model, family: Family, batch: PromptBatch, variants: Sequence[Variant], max_new_tokens: int,
    every_step: bool = False, layers: frozenset[int] | None = None, heads: Mapping[int, tuple[int, ...]] | None = None,
) -> tuple[list[float], list[list[str]]]:  # fmt: skip
    """(confidence of every prompt, answer of every prompt and variant); `layers` and `heads` as of `Scale`."""
    batch, cache = batch.to(model.device), new_cache()
    out = model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, past_key_values=cache, use_cache=True,
        **model_inputs(family.encode(model, batch.pixels), batch.positions), logits_to_keep=1,
    )  # fmt: skip
    confidence = torch.softmax(out.logits[:, -1].float(), dim=-1).amax(dim=-1)
    cache.crop(-1)
    count, tokenizer, end = len(variants), family.tokenizer, family.end_id
    prefix = batch.attention_mask[:, None, None, :-1].bool().expand(-1, 1, count, -1)
    own = torch.eye(count, dtype=torch.bool, device=model.device).expand(len(prefix), 1, -1, -1)
    position = position_ids(batch.positions[..., -1:])
    tokens, answers = batch.input_ids[:, -1:].expand(-1, count), []
    ended = torch.zeros_like(tokens, dtype=torch.bool)
    scale = scale_of(batch, variants, None if every_step else prefix.shape[-1] + count, layers, heads)
    with use_plan(Plan(scale=scale)):
        for step in range(max_new_tokens):
            out = model(
                input_ids=tokens,
                attention_mask=torch.cat([prefix, *[own] * (step + 1)], dim=-1),
                position_ids=(position + step).expand(*position.shape[:-1], count),
                past_key_values=cache,
                use_cache=True,
            )
            tokens = out.logits.argmax(dim=-1).masked_fill(ended, end)
            answers.append(tokens)
            ended = ended | (tokens == end)
            if bool(ended.all()):
                break
    given = torch.stack(answers, dim=-1)
    texts = [[text.strip() for text in tokenizer.batch_decode(row, skip_special_tokens=True)] for row in given]
    return confidence.tolist(), texts


def scale_of(
    batch: PromptBatch, variants: Sequence[Variant], num_keys: int | None, layers: frozenset[int] | None,
    heads: Mapping[int, tuple[int, ...]] | None,
) -> Scale:  # fmt: skip
    """A row for every variant."""
    regions, device = batch.regions, batch.regions.device
    by_scope = {"target": regions[..., 0], "balance": regions[..., 0], "all": regions[..., 1]}
    if any(variant.scope == ANOTHER for variant in variants):
        by_scope[ANOTHER] = another_part(batch)
    factor = torch.tensor([[variant.factor for variant in variants]], device=device)
    return Scale(
        factor=factor.expand(len(regions), -1),
        weights=torch.stack([by_scope[variant.scope] for variant in variants], dim=1),
        images=regions[..., 1] > 0,
        adds=torch.tensor([variant.rule == "add" for variant in variants], device=device),
        keeps_mass=torch.tensor([variant.scope == "balance" for variant in variants], device=device),
        num_keys=num_keys,
        layers=layers,
        heads=heads,
    )


def another_part(batch: PromptBatch) -> Tensor:
    """(B, S) weights of the first part after a target (after the last comes the first) that is none itself.

    All 0 where there is no such part, or nothing is pointed at.
    """
    weights = torch.zeros_like(batch.regions[..., 0])
    for row, (count, targets) in enumerate(zip(batch.num_regions, batch.pointed, strict=True)):
        parts = batch.regions[row, :, 2:count]
        after = [(target + 1) % max(1, parts.shape[1]) for target in targets]
        others = [part for part in after if part not in targets]
        if others:
            weights[row] = parts[:, others[0]]
    return weights
