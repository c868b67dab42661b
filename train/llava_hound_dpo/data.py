"""Preference pairs on their way to the model: checked and tokenised at the start, pictures read when needed."""

import logging
import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import factorial
from typing import Any

import torch
from torch.utils.data import Dataset

from llava.asked import FORMATS
from llava.checks import check_pictures
from llava.families import Family
from llava.image import ImageStore
from llava.order import of_epoch, why_fixed
from llava.records import DataError, Preference, parse_preference, parse_records, read_json
from llava.regions import target_weights
from llava.runtime import Progress, is_main_process
from train.llava_hound_dpo.packing import EncodedPair, PackedRow, pack

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Pair:
    """A checked record with its token ids; in `prompt` one image token stands for each picture."""

    record: Preference
    prompt: list[int]
    chosen: list[int]
    rejected: list[list[int]]
    image_tokens: int  # of all pictures together
    patches: tuple[int, ...] = ()  # that the tower sees of each piece of them

    @property
    def prompt_tokens(self) -> int:
        """Length of the prompt with its image tokens."""
        return len(self.prompt) - len(self.record.images) + self.image_tokens

    @property
    def num_tokens(self) -> int:
        """Of the prompt and the longest answer: what must fit the model's context."""
        return self.prompt_tokens + max(map(len, (self.chosen, *self.rejected)))


@dataclass(frozen=True)
class PairReader:
    """How pairs are read: which are left out unseen, and whether bad ones stop the run or are dropped and listed."""

    family: Family
    store: ImageStore
    max_length: int = 4096
    overlong: str = "error"
    bad_records: str = "error"  # or "drop"
    check_images: str = "full"
    leave_out: frozenset[str] = frozenset()

    def read(self, path: str) -> tuple[list[Pair], list[str]]:
        """(pairs of a file, a line for each that was dropped). Raises DataError, FileNotFoundError."""
        records, problems = parse_records(path, parse_preference, self.leave_out)
        if problems and self.bad_records == "error":
            raise DataError(problems)
        pairs, refused = _tokenized(records, self.family, self.store)
        refused += _everywhere(self._bad_pictures, pairs, self.bad_records == "drop")
        if refused and self.bad_records == "error":
            raise DataError(refused)
        bad = named_by(refused, {pair.record.where for pair in pairs})
        problems += refused
        for problem in problems:
            logger.info("dropped: %s", problem)
        pairs = [pair for pair in pairs if pair.record.where not in bad]
        if not pairs:
            raise DataError(problems or [f"{path}: the file holds no record"])
        fitting, long = within_length(pairs, self.max_length, self.overlong)
        return fitting, [*problems, *(f"{p.record.where}: {p.num_tokens} tokens, too long" for p in long)]

    def _bad_pictures(self, pairs: Sequence[Pair]) -> list[str]:
        records = [pair.record for pair in pairs]
        return problems_of(check_pictures, records, self.store, self.family, self.check_images)


def problems_of(check: Callable, *arguments: Any) -> list[str]:
    """What a check that raises DataError would have said."""
    try:
        check(*arguments)
    except DataError as error:
        return error.problems
    return []


def read_leave_out(path: str | None) -> frozenset[str]:
    """Names of records, as `scripts.doctor --fix_list` writes them. Raises DataError, FileNotFoundError."""
    names = read_json(path) if path else []
    if not all(isinstance(name, str) for name in names):
        raise DataError([f"{path}: a list of record ids is due, as `python -m scripts.doctor --fix_list` writes it"])
    return frozenset(names)


def named_by(problems: Sequence[str], names: set[str]) -> set[str]:
    """Those of the records' names that lines of problems begin with; a name, as an id, may have a colon in it."""
    starts = {problem[: colon.start()] for problem in problems for colon in re.finditer(": ", problem)}
    return starts & names


def _everywhere(check: Callable[[Sequence[Pair]], list[str]], pairs: Sequence[Pair], is_shared: bool) -> list[str]:
    """What a check of the first process finds; the others hear of it, or are ended with it by the launcher."""
    found = [check(pairs) if is_main_process() else []]
    if is_shared and torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(found)
    return found[0]


def tokenize(records: Sequence[Preference], family: Family, store: ImageStore | None) -> list[Pair]:
    """Token ids of every record. Raises DataError listing all records that cannot be tokenised as a pair.

    `store` is read for the sizes of pictures where a family's image tokens depend on them, else never.
    """
    pairs, problems = _tokenized(records, family, store)
    if problems:
        raise DataError(problems)
    return pairs


def _tokenized(records: Sequence[Preference], family: Family, store: ImageStore | None) -> tuple[list[Pair], list[str]]:
    pairs, problems = [], []
    for record in Progress(records, desc="tokenising", disable=not is_main_process() or len(records) < 1000):
        try:
            pairs.append(tokenize_one(record, family, store))
        except (OSError, ValueError) as error:
            problems.append(f"{record.where}: {error}")
    return pairs, problems


def tokenize_one(record: Preference, family: Family, store: ImageStore | None) -> Pair:
    """Token ids of one record. Raises ValueError, OSError."""
    prompt = family.encode_prompt(record.prompt, record.context)
    chosen, *rejected = (
        family.encode_answer(record.prompt, answer, record.context) for answer in (record.chosen, *record.rejected)
    )
    if prompt.count(family.image_id) != len(record.images):
        raise ValueError(f"{prompt.count(family.image_id)} image tokens for {len(record.images)} images")
    if chosen in rejected:
        raise ValueError("chosen and rejected are the same tokens")
    sizes = [None if family.fixed else store.size(name) for name in record.images]
    patches = [piece for size in sizes for piece in family.patches(size, len(sizes))]
    image_tokens = sum(family.num_image_tokens(size, len(sizes)) for size in sizes)
    return Pair(record, prompt, chosen, rejected, image_tokens, tuple(patches))


def in_epoch(pair: Pair, epoch: int, seed: int, family: Family, store: ImageStore | None) -> Pair:
    """The pair with its pictures in an epoch's order; itself where that is as it is. Raises like `tokenize_one`."""
    record = of_epoch(pair.record, epoch, seed)
    return pair if record is pair.record else tokenize_one(record, family, store)


def within_length(pairs: Sequence[Pair], max_length: int, overlong: str) -> tuple[list[Pair], list[Pair]]:
    """(fitting, dropped) pairs; none is cut. Raises DataError listing the overlong ones unless they may go."""
    fitting = [pair for pair in pairs if pair.num_tokens <= max_length]
    dropped = [pair for pair in pairs if pair.num_tokens > max_length]
    if dropped and (overlong == "error" or not fitting):
        raise DataError([
            f"{pair.record.where}: {pair.num_tokens} tokens with {len(pair.record.images)} images, above "
            f"--model_max_length {max_length}; raise it, or leave such pairs out with --overlong drop"
            for pair in dropped
        ])  # fmt: skip
    for pair in dropped:
        logger.info("dropped: %s, %d tokens above %d", pair.record.where, pair.num_tokens, max_length)
    return fitting, dropped


def longest_orders(
    pairs: Sequence[Pair], epochs: int, shown_in: Callable[[Pair, int], Pair], max_length: int,
    tokens_of: Callable[[Pair], int],
) -> list[Pair]:  # fmt: skip
    """Each pair in the order of its epochs that has the most tokens. Raises DataError, ValueError if all have one."""
    if all(why_fixed(pair.record) for pair in pairs):
        raise ValueError("--permute_images: no pair to train on is a sequence that tells its images by number alone")
    longest = []
    for pair in Progress(pairs, desc="orders", disable=not is_main_process() or len(pairs) < 1000):
        shown = [shown_in(pair, epoch) for epoch in range(min(epochs, factorial(len(pair.record.images))))]
        within_length(shown, max_length, "error")
        longest.append(max(shown, key=tokens_of))
    return longest


def split(pairs: Sequence[Pair], share: float, seed: int) -> tuple[list[Pair], list[Pair]]:
    """(train, evaluation) pairs, a seeded random choice; every pair is in exactly one of them."""
    count = round(len(pairs) * share)
    if share and not 0 < count < len(pairs):
        raise ValueError(f"--eval_split {share} of {len(pairs)} pairs leaves {count} to evaluate on")
    held_out = set(random.Random(seed).sample(range(len(pairs)), count))
    train = [pair for number, pair in enumerate(pairs) if number not in held_out]
    return train, [pairs[number] for number in sorted(held_out)]


def describe(pairs: Sequence[Pair]) -> dict[str, Any]:
    """Counts for run.json and the plan: pairs by format, how many of these were derived, by images, token lengths."""
    lengths = sorted(pair.num_tokens for pair in pairs)
    return {
        "pairs": len(pairs),
        "by_format": dict(Counter(pair.record.image_type for pair in pairs)),
        "derived_formats": sum(pair.record.is_derived for pair in pairs),
        "several_rejected": sum(len(pair.rejected) > 1 for pair in pairs),
        "by_images": dict(sorted(Counter(len(pair.record.images) for pair in pairs).items())),
        "tokens": {"min": lengths[0], "median": lengths[len(lengths) // 2], "max": lengths[-1]},
    }


class PairDataset(Dataset):
    """Pairs with their pictures and target weights. An item is a dict of tensors of one pair.

    With `order_seed`, `item` gives the pictures of a pair in another order each epoch.
    """

    def __init__(self, pairs: Sequence[Pair], store: ImageStore, family: Family, order_seed: int | None = None):
        self.pairs, self.store, self.family, self.order_seed = list(pairs), store, family, order_seed

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._item(index, self.pairs[index])

    def item(self, index: int, epoch: int) -> dict[str, Any]:
        """As it is shown in an epoch of training."""
        pair = self.pairs[index]
        if self.order_seed is not None:
            pair = in_epoch(pair, epoch, self.order_seed, self.family, self.store)
        return self._item(index, pair)

    def _item(self, index: int, pair: Pair) -> dict[str, Any]:
        try:
            pictures = [self.store.open(name) for name in pair.record.images]
        except (OSError, ValueError) as error:
            raise DataError([f"{pair.record.where}: {error}"]) from error
        images = self.family.images([picture.size for picture in pictures])
        prompt = self.family.expand(pair.prompt, images)
        target, positions = target_weights(pair.record, images), self.family.positions(prompt, images)
        return {
            "index": index,
            "format": FORMATS.index(pair.record.image_type),
            "pair": EncodedPair(prompt, pair.chosen, pair.rejected, target, positions),
            "pixels": self.family.pixels(pictures),
        }


@dataclass(frozen=True)
class PairCollator:
    """Items of `PairDataset` to one packed row; without the rejected answers where the loss needs none."""

    family: Family
    needs_rejected: bool

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor | PackedRow]:
        pairs = [item["pair"] for item in items]
        if not self.needs_rejected:
            pairs = [replace(pair, rejected=[]) for pair in pairs]
        batch = {
            "index": torch.tensor([item["index"] for item in items]),  # first: the Trainer reads the batch size off it
            "format": torch.tensor([item["format"] for item in items]),
            "row": pack(pairs, self.family.image_id),
            "pixels": self.family.join([item["pixels"] for item in items]),
        }
        if "step_pairs" in items[0]:  # of a training step
            batch["step_pairs"] = torch.tensor([item["step_pairs"] for item in items])
        return batch
