"""How a model sees answers that are given, by whomever: all answers to a prompt by one teacher-forced pass."""

import math
from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from llava.attention import Plan, Probe, Tree, mean_over_heads, mean_over_layers
from llava.families import Family, model_inputs
from llava.generation import Generated, PromptBatch


@torch.no_grad()
def measure(
    model, family: Family, batch: PromptBatch, answers: Sequence[Sequence[int]], layers: Sequence[int],
    heads: Tensor | None = None,
) -> list[Generated]:  # fmt: skip
    """What `generate` would have noted on each of `answers` (token ids, the end token too) to the batch's one prompt.

    They are branches of one packed row: pictures and prompt are computed once. Attention is measured as `generate` does
    it, and of a prompt that `is_mapped` on every image token. An answer is complete if it ends in the end token. The
    perplexity is exp of minus the mean log-prob of the answer's own tokens: of a greedy answer, whose tokens are the
    likeliest, that of `generate`; of a sampled one, for which `generate` gives none, what it costs to say it.
    """
    assert len(batch.input_ids) == 1 and all(answers), "one prompt, and answers of a token or more"
    assert batch.attention_mask.all(), "a packed row hides nothing"
    batch = batch.to(model.device)
    prompt, lengths = batch.input_ids[0].tolist(), [len(answer) for answer in answers]
    # The last prompt token opens every answer's branch: its row predicts the first token.
    shared = len(prompt) - 1
    said = [token for answer in answers for token in (prompt[-1], *answer[:-1])]
    assert family.image_id not in said, "a placeholder of a picture in an answer, or at the end of the prompt"
    tree = Tree.of((0, shared), tuple(pairwise(accumulate(lengths, initial=shared))))
    steps = torch.cat([torch.arange(length) for length in lengths]).to(model.device)
    positions = torch.cat([batch.positions[..., :-1], batch.positions[..., -1:] + steps], dim=-1)
    input_ids = torch.tensor([prompt[:-1] + said], device=model.device)
    out = model(
        input_ids=input_ids,
        attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=model.device),  # as of training's `score`
        **model_inputs(family.encode(model, batch.pixels), positions),
        logits_to_keep=len(said),
        use_cache=False,
        output_attentions=bool(layers),
        plan=Plan((tree.map(lambda mask: mask.to(model.device)),), _probe(family, batch, len(said), layers)),
    )
    rows = torch.zeros(0, len(said), batch.regions.shape[2])  # (L, T, R)
    if layers:
        found = torch.stack([mass[0] for mass in out.attentions])  # (L, H, T, R)
        rows = mean_over_heads(found, None if heads is None else heads.to(found)[..., None])
    parts = zip(answers, out.logits[0].split(lengths), rows.split(lengths, dim=1), strict=True)
    return [_noted(family, batch, *part, heads) for part in parts]


def _probe(family: Family, batch: PromptBatch, num_said: int, layers: Sequence[int]) -> Probe | None:
    """The regions of a packed row: the prompt's. What is said weighs nothing, nor does the token that opens it."""
    if not layers:
        return None
    regions = batch.regions
    if any(batch.is_mapped):
        each = torch.eye(regions.shape[1], device=regions.device)[:, batch.input_ids[0] == family.image_id]
        regions = torch.cat([regions, each[None]], dim=2)
    return Probe(F.pad(regions[:, :-1], (0, 0, 0, num_said)), frozenset(layers), each_branch=True)


def _noted(
    family: Family, batch: PromptBatch, answer: Sequence[int], logits: Tensor, rows: Tensor, heads: Tensor | None
) -> Generated:
    """An answer's notes, from its (T, V) logits and (L, T, R) masses."""
    logs, width, tokens = logits.float().log_softmax(dim=-1), batch.regions.shape[2], list(answer)
    masses = rows.mean(dim=1).cpu()
    own = logs.gather(-1, torch.tensor(tokens, device=logs.device)[:, None])
    return Generated(
        text=family.tokenizer.decode(tokens, skip_special_tokens=True).strip(),
        tokens=tokens,
        is_complete=tokens[-1] == family.end_id,
        confidence=logs[0].max().exp().item(),
        perplexity=math.exp(-own.double().mean().item()),
        factor=1.0,
        masses=masses[:, :width],
        heads=heads,
        by_token=mean_over_layers(masses[:, width:], heads) if len(masses) else None,
    )
