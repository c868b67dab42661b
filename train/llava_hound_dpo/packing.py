"""How pairs become one packed row: the prompt once, its answers as branches.

Letters in tensor names: S tokens of a packed row, T kept rows (one per answer token), R regions (0 = target, 1 = all
image tokens).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llava.attention import Tree


@dataclass(frozen=True)
class EncodedPair:
    """Token ids of one pair: the prompt with its image tokens, and answers that end in `</s>`.

    `rejected` is empty when the loss does not need it. `target` has a weight for every image token of the prompt.
    """

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    target: Tensor


@dataclass(frozen=True, eq=False)
class PackedRow:
    """Several pairs in one row without padding, each `[prompt | chosen | rejected]`, and what to read off it.

    The last prompt token opens every answer's branch, so that each kept row predicts exactly one answer token and
    the last answer token is never fed. Positions restart after the prompt.
    """

    input_ids: Tensor  # (1, S)
    position_ids: Tensor  # (1, S)
    keep: Tensor  # (1, S) bool, rows whose logits are wanted
    labels: Tensor  # (T,) the token each kept row predicts
    branch: Tensor  # (T,) answer number: 2n is pair n's chosen, 2n + 1 its rejected
    regions: Tensor  # (1, S, R) weight of each token in the target and in all images
    trees: tuple[Tree, ...]
    num_pairs: int

    def to(self, device, non_blocking: bool = False) -> "PackedRow":
        """The same row on another device."""
        moved = {
            name: getattr(self, name).to(device, non_blocking=non_blocking)
            for name in ("input_ids", "position_ids", "keep", "labels", "branch", "regions")
        }
        return replace(self, **moved, trees=tuple(tree.to(device, non_blocking) for tree in self.trees))

    @property
    def chosen_owner(self) -> Tensor:
        """(T_chosen,) pair number of each row that predicts a token of a chosen answer."""
        return self.branch[self.branch % 2 == 0] // 2


def pack(pairs: Sequence[EncodedPair], image_token: int) -> PackedRow:
    """One row of all pairs; equal to separate forwards of every answer to rounding."""
    ids, positions, keep, labels, branch, trees = [], [], [], [], [], []
    for number, pair in enumerate(pairs):
        start = len(ids)
        shared, last = pair.prompt[:-1], pair.prompt[-1]
        ids += shared
        positions += range(len(shared))
        keep += [False] * len(shared)
        spans = []
        for side, answer in enumerate(answer for answer in (pair.chosen, pair.rejected) if answer):
            spans.append((len(ids), len(ids) + len(answer)))
            ids += [last, *answer[:-1]]
            positions += range(len(shared), len(shared) + len(answer))
            keep += [True] * len(answer)
            labels += answer
            branch += [2 * number + side] * len(answer)
        trees.append(Tree.of((start, start + len(shared)), tuple(spans)))
    input_ids = torch.tensor([ids])
    is_image = input_ids == image_token
    regions = torch.zeros(1, len(ids), 2)
    regions[..., 1] = is_image
    regions[..., 0][is_image] = torch.cat([pair.target for pair in pairs])
    return PackedRow(
        input_ids=input_ids,
        position_ids=torch.tensor([positions]),
        keep=torch.tensor([keep]),
        labels=torch.tensor(labels),
        branch=torch.tensor(branch),
        regions=regions,
        trees=tuple(trees),
        num_pairs=len(pairs),
    )
