"""How pairs become one packed row: the prompt once, its answers as branches.

Letters in tensor names: S tokens of a packed row, T kept rows (one per answer token), A answers, M of them rejected,
R regions (0 = target, 1 = all image tokens).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llava.attention import Tree


@dataclass(frozen=True)
class EncodedPair:
    """Token ids of one pair: the prompt with its image tokens, and answers that end in the family's end token.

    `rejected` is empty when the loss does not need it. `target` has a weight for every image token of the prompt.
    """

    prompt: list[int]
    chosen: list[int]
    rejected: Sequence[list[int]]
    target: Tensor
    positions: Tensor | None = None  # (axes, tokens of the prompt), as of `Family.positions`; None: 0, 1, 2, ...


@dataclass(frozen=True, eq=False)
class PackedRow:
    """Several pairs in one row without padding, each `[prompt | chosen | rejected ...]`, and what to read off it.

    The last prompt token opens every answer's branch, so that each kept row predicts exactly one answer token and
    the last answer token is never fed. Positions restart after the prompt.
    """

    input_ids: Tensor  # (1, S)
    positions: Tensor  # (axes, 1, S)
    keep: Tensor  # (T,) places of the rows whose logits are wanted; a mask would have to be read to be counted
    labels: Tensor  # (T,) the token each kept row predicts
    branch: Tensor  # (T,) number of the answer in the row
    answer_tokens: Tensor  # (A,) length of each answer
    chosen: Tensor  # (N,) number of each pair's chosen answer
    chosen_owner: Tensor  # (T_chosen,) pair number of each row that predicts a token of a chosen answer
    rejected: Tensor  # (M,) numbers of the rejected answers
    rejected_owner: Tensor  # (M,) pair number of each
    regions: Tensor  # (1, S, R) weight of each token in the target and in all images
    trees: tuple[Tree, ...]
    num_pairs: int

    def to(self, device, non_blocking: bool = False) -> "PackedRow":
        """The same row on another device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "PackedRow":
        """The same row in page-locked memory, from where it reaches a GPU while that is computing."""
        return self._map(Tensor.pin_memory)

    def _map(self, change: Callable[[Tensor], Tensor]) -> "PackedRow":
        moved = {name: change(value) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **moved, trees=tuple(tree.map(change) for tree in self.trees))


def pack(pairs: Sequence[EncodedPair], image_token: int) -> PackedRow:
    """One row of all pairs; equal to separate forwards of every answer to rounding."""
    ids, positions, keep, labels, lengths, chosen, rejected, trees = [], [], [], [], [], [], [], []
    for number, pair in enumerate(pairs):
        start = len(ids)
        shared, last = pair.prompt[:-1], pair.prompt[-1]
        ids += shared
        own = torch.arange(len(pair.prompt))[None] if pair.positions is None else pair.positions
        positions.append(own[:, :-1])
        spans = []
        for answer in (pair.chosen, *pair.rejected):
            spans.append((len(ids), len(ids) + len(answer)))
            ids += [last, *answer[:-1]]
            positions.append(own[:, -1:] + torch.arange(len(answer)))
            keep += range(*spans[-1])
            labels += answer
        chosen.append(len(lengths))
        rejected += [(chosen[-1] + 1 + other, number) for other in range(len(pair.rejected))]
        lengths += [stop - begin for begin, stop in spans]
        trees.append(Tree.of((start, start + len(shared)), tuple(spans)))
    input_ids = torch.tensor([ids])
    is_image = input_ids == image_token
    regions = torch.zeros(1, len(ids), 2)
    regions[..., 1] = is_image
    regions[..., 0][is_image] = torch.cat([pair.target for pair in pairs])
    return PackedRow(
        input_ids=input_ids,
        positions=torch.cat(positions, dim=1)[:, None],
        keep=torch.tensor(keep),
        labels=torch.tensor(labels),
        branch=torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)),
        answer_tokens=torch.tensor(lengths),
        chosen=torch.tensor(chosen),
        chosen_owner=torch.arange(len(pairs)).repeat_interleave(torch.tensor(lengths)[chosen]),
        rejected=torch.tensor([answer for answer, _ in rejected], dtype=torch.long),
        rejected_owner=torch.tensor([number for _, number in rejected], dtype=torch.long),
        regions=regions,
        trees=tuple(trees),
        num_pairs=len(pairs),
    )
