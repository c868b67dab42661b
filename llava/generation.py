"""Batched answers with the attention they were given with: how much of it lay on each region, and how sure they were.

Letters: B prompts, S tokens of the longest, R regions (0 target, 1 all images, then the parts), L layers, H heads,
T steps.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache, LogitsProcessor

from llava.attention import Ambient, Plan, Probe, attention_ratio, mean_over_heads, mean_over_layers, use_plan
from llava.cache import new_cache
from llava.families import Family, ImageTokens, model_inputs, position_ids
from llava.scaling import Scale


@dataclass(frozen=True)
class Generated:
    """One answer, generated or given, and what was noted on it."""

    text: str
    tokens: list[int]  # with the end token
    is_complete: bool  # it ended by itself, before the limit of new tokens
    confidence: float | None  # largest probability of the first token, at temperature 1, before scaling; None: unknown
    perplexity: float | None  # of a greedy or a given answer, its end token included; else None
    factor: float  # of the attention on the scaled tokens; 1.0: plain
    masses: Tensor  # (L, R) attention mass on each region, mean over answer tokens and heads, per probed layer
    heads: Tensor | None = None  # (L, H) 1 for the heads that `masses` is a mean over, else 0; None: all
    by_head: Tensor | None = None  # (L, H, R) the masses of each head; empty where they were not asked for
    by_token: Tensor | None = None  # (P,) mass on each image token, as R is computed; None or empty: not asked for

    @property
    def ratio_by_layer(self) -> list[float] | None:
        """R of each probed layer, in order: mass on the target by mass on all images; None if no layer was probed."""
        return attention_ratio(self.masses[:, :2]).tolist() or None

    @property
    def ratio(self) -> float | None:
        """R: mean of the ratio over the probed layers, of selected heads as `mean_over_layers` says."""
        by_layer = self.ratio_by_layer
        if by_layer and self.heads is not None:
            return mean_over_layers(torch.tensor(by_layer), self.heads).item()
        return sum(by_layer) / len(by_layer) if by_layer else None

    @property
    def shares(self) -> list[float] | None:
        """Share of the image attention on each part of the prompt, computed as R is; the target's share is R."""
        parts = range(2, self.masses.shape[1] if len(self.masses) else 0)
        of_parts = (attention_ratio(self.masses[:, [part, 1]]) for part in parts)
        return [mean_over_layers(by_layer, self.heads).item() for by_layer in of_parts] or None


@dataclass(frozen=True, eq=False)
class PromptBatch:
    """Prompts of different length in one left-padded batch."""

    input_ids: Tensor  # (B, S), image tokens expanded
    attention_mask: Tensor  # (B, S) 0 where padded or hidden: no token looks there, in no layer
    positions: Tensor  # (axes, B, S), 0 where padded
    pixels: dict[str, Tensor]  # of all images of all prompts in order, as the family's model takes them
    regions: Tensor  # (B, S, R) weight of each token in each region; 0 for a region that a prompt does not have
    num_regions: tuple[int, ...]  # regions of each prompt, at least 2
    is_mapped: tuple[bool, ...] = ()  # of these prompts the mass on every image token is wanted
    pointed: tuple[tuple[int, ...], ...] = ()  # parts that each prompt points at (`pointed_at`), where it matters

    def to(self, device) -> "PromptBatch":
        """The same batch on another device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "PromptBatch":
        """The same batch in page-locked memory, from where it reaches a GPU while that is computing."""
        return self._map(Tensor.pin_memory)

    def without_target(self) -> "PromptBatch":
        """The same batch, every token that shows any of the target hidden as padding is, from prompt and answer.

        Positions stay, so that the rest of the prompt stands where it did. Only `generate` looks at what is hidden.
        """
        return replace(self, attention_mask=self.attention_mask * (self.regions[..., 0] == 0))

    def _map(self, change: Callable[[Tensor], Tensor]) -> "PromptBatch":
        names = ("input_ids", "attention_mask", "positions", "regions")
        pixels = {name: change(tensor) for name, tensor in self.pixels.items()}
        return replace(self, pixels=pixels, **{name: change(getattr(self, name)) for name in names})


# What to scale, from the confidence (B,) of the first answer tokens of a batch; None: nothing.
Steer = Callable[[Tensor, PromptBatch], Scale | None]


def batch_prompts(
    family: Family, prompts: Sequence[list[int]], images: Sequence[Sequence[ImageTokens]], regions: Sequence[Tensor],
    pixels: dict[str, Tensor], pointed: Sequence[tuple[int, ...]] = (), is_mapped: Sequence[bool] = (),
) -> PromptBatch:  # fmt: skip
    """Left-pad expanded prompts, each with the tokens of its `images`.

    `regions` are each prompt's (R, image tokens) weights, target and all images first.

    Of a prompt that `is_mapped` the mass on every single image token is measured, too.
    """
    counts = tuple(len(own) for own in regions)
    longest = max(len(prompt) for prompt in prompts)
    input_ids = torch.full((len(prompts), longest), family.tokenizer.pad_token_id)
    attention_mask = torch.zeros(len(prompts), longest, dtype=torch.long)
    weights = torch.zeros(len(prompts), longest, max(counts))
    positions = [family.positions(prompt, own) for prompt, own in zip(prompts, images, strict=True)]
    positions = torch.stack([F.pad(own, (longest - own.shape[1], 0)) for own in positions], dim=1)
    for row, (prompt, own) in enumerate(zip(prompts, regions, strict=True)):
        input_ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        attention_mask[row, longest - len(prompt) :] = 1
        weights[row, input_ids[row] == family.image_id, : len(own)] = own.T
    return PromptBatch(
        input_ids, attention_mask, positions, pixels, weights, counts, tuple(is_mapped), tuple(pointed)
    )


@torch.no_grad()
def generate(
    model, family: Family, batch: PromptBatch, layers: Sequence[int], steer: Steer | None = None,
    heads: Tensor | None = None, each_head: bool = False, **settings: Any,
) -> list[Generated]:  # fmt: skip
    """Answers of a batch, greedy unless `settings` (of transformers' `generate`) say otherwise.

    The attention is measured in `layers`, as a mean over the heads for which `heads` (L, H) is not 0 (None: all) and
    with `each_head` also head by head, on the rows that predict the answer's tokens, end token included, as it is after
    scaling. `steer` decides on the scaling once the first token's confidence is known; where it changes a sample, the
    last prompt token alone is run again, on the cached prompt before it (which that scaling does not touch).
    """
    tokenizer, batch = family.tokenizer, batch.to(model.device)
    # What a checkpoint's generation_config says else would act on greedy answers, too.
    settings = {"do_sample": False, "max_new_tokens": 128, "pad_token_id": tokenizer.pad_token_id,
                "eos_token_id": family.end_id, "repetition_penalty": 1.0, **settings}  # fmt: skip
    beams = settings.get("num_beams", 1)
    probe = Probe(batch.regions, frozenset(layers), each_key=any(batch.is_mapped)) if layers else None
    with use_plan(Plan(probe=probe)) as ambient:
        watch = Watch(model, batch, ambient, steer, beams)
        settings["logits_processor"] = [watch, *settings.get("logits_processor", ())]
        out = model.generate(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            **model_inputs(family.encode(model, batch.pixels), batch.positions),
            output_attentions=bool(layers),
            return_dict_in_generate=True,
            past_key_values=watch.cache,
            **settings,
        )
    tokens = out.sequences[:, batch.input_ids.shape[1] :]
    lengths = _lengths(tokens, family.end_id)
    masses = by_head = torch.zeros(len(tokens), 0, batch.regions.shape[2])
    if layers:
        steps, rows = [watch.corrected(out.attentions[0]), *out.attentions[1:]], _rows(out, tokens)
        masses = _mean_masses([_over_heads(mass, heads) for mass in steps], rows, lengths)
        if each_head:
            by_head = _mean_masses([torch.stack([mass[:, :, 0] for mass in step]) for step in steps], rows, lengths)
    perplexities = watch.perplexities(lengths) if beams == 1 and not settings["do_sample"] else [None] * len(tokens)
    texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    found, width, is_image = [], batch.regions.shape[2], (batch.input_ids == family.image_id).cpu()
    for row, (text, own, length) in enumerate(zip(texts, tokens.tolist(), lengths.tolist(), strict=True)):
        count = batch.num_regions[row]
        by_token = masses[row][:, width:][:, is_image[row]] if any(batch.is_mapped) else masses[row][:, :0]
        found.append(Generated(
            text.strip(), own[:length], own[length - 1] == family.end_id, watch.confidence[row].item(),
            perplexities[row], watch.factor[row].item(), masses[row][:, :count], heads, by_head[row][..., :count],
            mean_over_layers(by_token, heads) if layers else None,
        ))  # fmt: skip
    return found


class Watch(LogitsProcessor):
    """Notes how sure the model is, and at the first answer token has the last prompt row scaled where asked.

    transformers calls it with the raw scores, before temperature and top-p.
    """

    def __init__(self, model, batch: PromptBatch, ambient: Ambient, steer: Steer | None, beams: int):
        self.model, self.batch, self.ambient, self.steer, self.beams = model, batch, ambient, steer, beams
        self.cache = new_cache()
        self.factor = torch.ones(len(batch.input_ids))
        self.confidence: Tensor | None = None  # (B,)
        self.masses: list[Tensor] | None = None  # of the first token, where something was scaled
        self._logs: list[Tensor] = []  # (rows,) log of the largest probability of every step, at temperature 1

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The scores, those of scaled samples replaced at the first step."""
        if self.confidence is None:
            scores = self._first(input_ids, scores)
        self._logs.append(scores.float().log_softmax(dim=-1).amax(dim=-1))
        return scores

    def perplexities(self, num_tokens: Tensor) -> list[float]:
        """exp of minus the mean note over each greedy answer's own tokens, its end token among them."""
        logs = torch.stack(self._logs, dim=1).double().cpu()
        return [math.exp(-row[:count].mean().item()) for row, count in zip(logs, num_tokens.tolist(), strict=True)]

    def _first(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.confidence = torch.softmax(scores[:: self.beams].float(), dim=-1).amax(dim=-1)
        scale = self.steer(self.confidence, self.batch) if self.steer else None
        if scale is None or bool((scale.factor == 1).all()):
            return scores
        self.factor, self.ambient.plan = scale.factor[:, 0], replace(self.ambient.plan, scale=scale)
        self.changed = (self.factor != 1).repeat_interleave(self.beams)
        mask = self.batch.attention_mask.repeat_interleave(self.beams, dim=0)
        place = self.batch.positions[..., -1:].repeat_interleave(self.beams, dim=1)
        logits, self.masses = run_last_again(self.model, self.cache, input_ids[:, -1:], mask, place, self.changed)
        if self.beams > 1:  # beam search hands over, and wants back, log-probs
            logits = logits.log_softmax(dim=-1)
        return torch.where(self.changed[:, None], logits, scores)

    def corrected(self, masses: Sequence[Tensor]) -> Sequence[Tensor]:
        """The masses of the first token per layer, those of scaled samples replaced."""
        if self.masses is None:
            return masses
        return [torch.where(self.changed[:, None, None, None], *both) for both in zip(self.masses, masses, strict=True)]


def run_last_again(
    model, cache: Cache, last: Tensor, mask: Tensor, place: Tensor, changed: Tensor
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """(scores (B, V), masses per probed layer) of the last prompt token `last` (B, 1), computed anew on a full cache.

    `place` (axes, B, 1) is its position.

    Call it inside `use_plan`. Afterwards the cache holds what the new run found for the samples in `changed` (B,) and
    is bit for bit what it was for the others.
    """
    # Copies, since the new run writes where the old one did.
    before = [(layer.keys[:, :, -1:].clone(), layer.values[:, :, -1:].clone()) for layer in cache.layers]
    cache.crop(-1)
    out = model(
        input_ids=last,
        attention_mask=mask,
        position_ids=position_ids(place),
        past_key_values=cache,
        use_cache=True,
        output_attentions=True,
    )
    for layer, (keys, values) in zip(cache.layers, before, strict=True):
        for now, old in ((layer.keys, keys), (layer.values, values)):
            now[:, :, -1:] = torch.where(changed[:, None, None, None], now[:, :, -1:], old)
    return out.logits[:, -1].float(), out.attentions


def _lengths(tokens: Tensor, end: int) -> Tensor:
    """(B,) tokens of each answer up to and including its end token."""
    ended = (tokens == end).cumsum(dim=1)
    return ((ended == 0).sum(dim=1) + (ended > 0).any(dim=1).long()).clamp(max=tokens.shape[1])


def _rows(out, tokens: Tensor) -> Tensor:
    """(B, T) row that each answer's token was predicted from: its own, or that of the beam it came from."""
    rows = getattr(out, "beam_indices", None)
    if rows is None:
        return torch.arange(len(tokens), device=tokens.device)[:, None].expand(-1, tokens.shape[1])
    return rows


def _over_heads(masses: Sequence[Tensor], heads: Tensor | None) -> Tensor:
    """(L, rows, R) mean mass over the heads, from the (rows, H, 1, R) of every layer."""
    if heads is None:
        return torch.stack([mean_over_heads(mass)[:, 0] for mass in masses])
    weights = heads.to(masses[0])[:, None, :, None].expand(-1, len(masses[0]), -1, -1)
    return torch.stack([mean_over_heads(mass, own)[:, 0] for mass, own in zip(masses, weights, strict=True)])


def _mean_masses(steps: Sequence[Tensor], rows: Tensor, lengths: Tensor) -> Tensor:
    """(B, L, ...) mean over each answer's tokens of the (L, rows, ...) of every step; `rows` as of `_rows`."""
    total = steps[0].new_zeros(len(rows), len(steps[0]), *steps[0].shape[2:])
    one_each = (-1, *[1] * (total.dim() - 1))
    for step in range(min(rows.shape[1], len(steps))):
        own = steps[step].transpose(0, 1)[rows[:, step].clamp(min=0)]
        total += own * (step < lengths).view(one_each)
    return (total / lengths.view(one_each)).cpu()
