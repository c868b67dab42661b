"""What an answer that is given (by whomever) looks at: one teacher-forced pass instead of generating it again."""

from collections.abc import Sequence

import torch
from torch import Tensor

from llava.attention import Plan, Probe, Tree, mean_over_heads
from llava.families import Family, model_inputs
from llava.generation import PromptBatch


@torch.no_grad()
def masses_of(
    model, family: Family, batch: PromptBatch, answer: Sequence[int], layers: Sequence[int],
    heads: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """(L, R + S) attention mass on each region and each prompt token while `answer` (token ids) is said after it.

    The batch has one prompt. Mean over the rows that predict the answer's tokens, and over `heads` (L, H; None:
    all), as `generate` measures.
    """
    assert len(batch.input_ids) == 1, "one prompt"
    batch, prompt = batch.to(model.device), batch.input_ids.shape[1]
    said = torch.tensor([list(answer[:-1])], dtype=torch.long, device=model.device)
    input_ids = torch.cat([batch.input_ids, said], dim=1)
    # The last prompt token opens the answer's branch: its row predicts the first token.
    tree = Tree.of((0, prompt - 1), ((prompt - 1, prompt - 1 + len(answer)),))
    each = torch.cat([batch.regions, torch.eye(prompt, device=model.device)[None]], dim=2)
    regions = torch.cat([each, each.new_zeros(1, said.shape[1], each.shape[2])], dim=1)
    behind = batch.positions[..., -1:] + torch.arange(1, len(answer), device=model.device)
    inputs = model_inputs(family.encode(model, batch.pixels), torch.cat([batch.positions, behind], dim=-1))
    out = model(
        input_ids=input_ids, attention_mask=torch.ones_like(input_ids), **inputs, use_cache=False,
        output_attentions=True, logits_to_keep=1, plan=Plan((tree,), Probe(regions, frozenset(layers))),
    )  # fmt: skip
    masses = torch.stack([mass[0] for mass in out.attentions])  # (L, H, T, R)
    weights = None if heads is None else heads.to(masses)[..., None]
    return mean_over_heads(masses, weights).mean(dim=1)
