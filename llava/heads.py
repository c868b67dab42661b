"""Heads that route: which (layer, head) looks at the image that a prompt refers to.

`python -m scripts.discover_heads` ranks them on a validation set; the attention ratio, the training term, the selection
of pairs and AdaptViz take the best of its file (`--attention_heads FILE --top_heads K`) in place of all heads.

Letters: L layers, H heads, P parts of one prompt.
"""

import dataclasses
import functools
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llava.attention import attention_ratio
from llava.checkpoints import Checkpoint
from llava.command_line import flag
from llava.run_folder import read_object
from llava.runtime import is_main_process, write_text

logger = logging.getLogger(__name__)

TOP = 10  # heads taken, and printed, where nothing is said
DISCOVER = "python -m scripts.discover_heads"


@dataclass(frozen=True)
class Heads:
    """Some heads of a language model, zero-based."""

    by_layer: Mapping[int, tuple[int, ...]]  # ascending

    @classmethod
    def of(cls, pairs: Iterable[tuple[int, int]]) -> "Heads":
        """From (layer, head) in any order."""
        pairs = sorted(set(pairs))
        layers = dict.fromkeys(layer for layer, _ in pairs)
        return cls({layer: tuple(head for own, head in pairs if own == layer) for layer in layers})

    @classmethod
    def from_json(cls, raw: Any) -> "Heads":
        """As `to_json` writes them. Raises ValueError."""
        problem = f'heads must be lists of whole numbers by layer, as {{"16": [3, 20]}}, not {raw!r}'
        if not isinstance(raw, Mapping) or not raw or not all(str(layer).isdigit() for layer in raw):
            raise ValueError(problem)
        if not all(isinstance(own, list | tuple) and own and all(map(_is_count, own)) for own in raw.values()):
            raise ValueError(problem)
        return cls.of((int(layer), head) for layer, own in raw.items() for head in own)

    def to_json(self) -> dict[str, list[int]]:
        """Lists of heads by layer; a JSON object's names are text."""
        return {str(layer): list(own) for layer, own in self.by_layer.items()}

    @property
    def layers(self) -> frozenset[int]:
        """The layers that have a selected head."""
        return frozenset(self.by_layer)

    def __len__(self) -> int:
        return sum(map(len, self.by_layer.values()))

    def __str__(self) -> str:
        return ", ".join(f"{layer}.{head}" for layer, own in self.by_layer.items() for head in own)

    def selected(self, num_heads: int) -> Tensor:
        """(L, H) 1 for the heads of each layer that has any, else 0."""
        selected = torch.zeros(len(self.by_layer), num_heads)
        for row, own in enumerate(self.by_layer.values()):
            selected[row, list(own)] = 1.0
        return selected

    def check(self, num_layers: int, num_heads: int) -> None:
        """Raises ValueError for a head that a model does not have."""
        for layer, own in self.by_layer.items():
            if layer >= num_layers or own[-1] >= num_heads:
                raise ValueError(
                    f"layer {layer} head {own[-1]} does not exist: the language model has layers 0 to "
                    f"{num_layers - 1} of heads 0 to {num_heads - 1}; the heads are of another model"
                )


@dataclass(frozen=True)
class RankedHead:
    """How well one head picks the referred image."""

    layer: int
    head: int
    auc: float  # chance (0..1) that the referred part has more of the head's image mass than another part, ties half
    accuracy: float  # share of the prompts of which a referred part has the most


@dataclass(frozen=True)
class Ranking:
    """A file of heads: the ranking, and what it was found with."""

    model: str  # checkpoint or adapter
    base: str  # the whole checkpoint below it
    weights: str  # digest of `model`
    base_weights: str  # digest of `base`
    data: str  # number and digest of the prompts given
    num_prompts: int  # those with several parts, which were ranked on
    chance: float  # accuracy of a part picked at random
    ranking: tuple[RankedHead, ...]  # best first

    def top(self, count: int, layers: frozenset[int] | None = None) -> Heads:
        """The `count` best, of `layers` if given. Raises ValueError if there are fewer."""
        found = [(one.layer, one.head) for one in self.ranking if layers is None or one.layer in layers]
        if not 1 <= count <= len(found):
            where = "" if layers is None else f" in layers {', '.join(map(str, sorted(layers)))}"
            raise ValueError(f"--top_heads {count}: the file ranks {len(found)} heads{where}")
        return Heads.of(found[:count])

    def write(self, path: Path) -> None:
        """Write the file that `read` reads."""
        write_text(path, json.dumps(dataclasses.asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, path: str | Path) -> "Ranking":
        """Raises FileNotFoundError, or ValueError for anything but what `write` wrote."""
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; `{DISCOVER}` writes one")
        try:
            raw = read_object(path)
            if "ranking" not in raw:
                raise ValueError("it has no `ranking`")
            ranking = tuple(RankedHead(**one) for one in raw.pop("ranking"))
            found = cls(**raw, ranking=ranking)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: not a file of heads ({error}); `{DISCOVER}` writes one") from error
        if not ranking:
            raise ValueError(f"{path}: the ranking is empty; `{DISCOVER}` writes one that is not")
        for one in ranking:
            if not _is_count(one.layer) or not _is_count(one.head):
                raise ValueError(f"{path}: layer {one.layer!r} head {one.head!r} are not whole numbers from 0")
        return found


def rank(
    shares: Sequence[Tensor], targets: Sequence[Sequence[int]], layers: Sequence[int]
) -> tuple[RankedHead, ...]:
    """Every head, the best first: by AUC over all (prompt, part) pairs, then by accuracy, then by place.

    `shares`: for each prompt (L, H, P), what share of a head's image mass each part has; `targets`: the parts that are
    referred to; `layers`: what the L are.
    """
    from llava.statistics import auc  # scipy takes a second to import, and every training and answering would wait

    both = [(own, torch.tensor(parts)) for own, parts in zip(shares, targets, strict=True)]
    is_target = torch.cat([torch.isin(torch.arange(own.shape[-1]), parts) for own, parts in both])
    scores = torch.cat(list(shares), dim=-1)
    right = torch.stack([torch.isin(own.argmax(dim=-1), parts) for own, parts in both])
    accuracy = right.double().mean(dim=0)
    ranked = [
        RankedHead(layer, head, auc(scores[row, head].tolist(), is_target.tolist()), accuracy[row, head].item())
        for row, layer in enumerate(layers)
        for head in range(scores.shape[1])
    ]
    return tuple(sorted(ranked, key=lambda one: (-one.auc, -one.accuracy, one.layer, one.head)))


def shares_of_parts(by_head: Tensor) -> Tensor:
    """(L, H, P) share of each head's image mass on each part, from the masses (L, H, 2 + P) of `generate`."""
    images = by_head[..., 1:2].expand_as(by_head[..., 2:])
    return attention_ratio(torch.stack([by_head[..., 2:], images], dim=-1))


@dataclass(kw_only=True)
class HeadSettings:
    """The two flags that select heads."""

    attention_heads: str | None = flag(
        f"file of `{DISCOVER}`: its best heads, of --attention_layers if those are given, instead of all heads", None
    )
    top_heads: int = flag("how many of the best heads", TOP)


def select_heads(path: str, count: int, checkpoint: Checkpoint, layers: frozenset[int] | None = None) -> Heads:
    """The best heads of a file for a model, with one line that says what they were found on.

    Raises FileNotFoundError, or ValueError naming the file: malformed, of a model of another size, too few heads.
    """
    ranking = Ranking.read(path)
    try:
        Heads.of((one.layer, one.head) for one in ranking.ranking).check(checkpoint.num_layers, checkpoint.num_heads)
        heads = ranking.top(count, layers)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if is_main_process():
        _say_origin(path, ranking, heads, checkpoint)
    return heads


def _say_origin(path: str, ranking: Ranking, heads: Heads, checkpoint: Checkpoint) -> None:
    base = checkpoint.root
    if base.digest != ranking.base_weights:
        _say_once(
            logging.WARNING,
            f"{path}: the heads were found on another base model, {ranking.base}, and may not be those that route in "
            f"{base.path}: run `{DISCOVER}` on it",
        )
        return
    is_same = checkpoint.digest == ranking.weights
    origin = "this checkpoint" if is_same else f"{ranking.model}, of the same base as {checkpoint.path}"
    _say_once(logging.INFO, f"{path}: {len(heads)} heads (layer.head) {heads}; found on {origin}")


@functools.cache
def _say_once(level: int, line: str) -> None:
    logger.log(level, line)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
