"""Preference pairs on their way to the model: checked and tokenised at the start, pictures read when needed."""

import logging
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from llava.conversation import encode_answer, encode_prompt
from llava.image import ImageStore, pixel_values
from llava.layout import PatchGrid, expand_images, needs_sizes, target_weights
from llava.records import FORMATS, DataError, Preference
from llava.runtime import is_main_process
from train.llava_hound_dpo.packing import EncodedPair, PackedRow, pack

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pair:
    """A checked record with its token ids; `<image>` still counts as one token of the prompt."""

    record: Preference
    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    num_tokens: int  # prompt with image tokens, and the longer answer: what must fit the model's context


def tokenize(records: Sequence[Preference], tokenizer, image_token: int, tokens_per_image: int) -> list[Pair]:
    """Token ids of every record. Raises DataError listing all records that cannot be tokenised as a pair."""
    pairs, problems = [], []
    for record in tqdm(records, desc="tokenising", disable=not is_main_process() or len(records) < 1000):
        try:
            prompt = encode_prompt(tokenizer, record.prompt)
            chosen = encode_answer(tokenizer, record.prompt, record.chosen)
            rejected = encode_answer(tokenizer, record.prompt, record.rejected)
            if prompt.count(image_token) != len(record.images):
                raise ValueError(f"{prompt.count(image_token)} image tokens for {len(record.images)} images")
            if chosen == rejected:
                raise ValueError("chosen and rejected are the same tokens")
        except ValueError as error:
            problems.append(f"{record.where}: {error}")
            continue
        length = len(prompt) + (tokens_per_image - 1) * len(record.images) + max(len(chosen), len(rejected))
        pairs.append(Pair(record, prompt, chosen, rejected, length))
    if problems:
        raise DataError(problems)
    return pairs


def within_length(pairs: Sequence[Pair], max_length: int, overlong: str) -> tuple[list[Pair], list[Pair]]:
    """(fitting, dropped) pairs; none is cut. Raises DataError listing the overlong ones unless they may go."""
    fitting = [pair for pair in pairs if pair.num_tokens <= max_length]
    dropped = [pair for pair in pairs if pair.num_tokens > max_length]
    if dropped and (overlong == "error" or not fitting):
        raise DataError(
            [
                f"{pair.record.where}: {pair.num_tokens} tokens with {len(pair.record.images)} images, above "
                f"--model_max_length {max_length}; raise it, or leave such pairs out with --overlong drop"
                for pair in dropped
            ]
        )
    for pair in dropped:
        logger.info("dropped: %s, %d tokens above %d", pair.record.where, pair.num_tokens, max_length)
    return fitting, dropped


def split(pairs: Sequence[Pair], share: float, seed: int) -> tuple[list[Pair], list[Pair]]:
    """(train, evaluation) pairs, a seeded random choice; every pair is in exactly one of them."""
    count = round(len(pairs) * share)
    if share and not 0 < count < len(pairs):
        raise ValueError(f"--eval_split {share} of {len(pairs)} pairs leaves {count} to evaluate on")
    held_out = set(random.Random(seed).sample(range(len(pairs)), count))
    train = [pair for number, pair in enumerate(pairs) if number not in held_out]
    return train, [pairs[number] for number in sorted(held_out)]


def describe(pairs: Sequence[Pair]) -> dict[str, Any]:
    """Counts for run.json and the plan: pairs by format and number of images, token lengths."""
    lengths = sorted(pair.num_tokens for pair in pairs)
    return {
        "pairs": len(pairs),
        "by_format": dict(Counter(pair.record.image_type for pair in pairs)),
        "by_images": dict(sorted(Counter(len(pair.record.images) for pair in pairs).items())),
        "tokens": {"min": lengths[0], "median": lengths[len(lengths) // 2], "max": lengths[-1]},
    }


class PairDataset(Dataset):
    """Pairs with their pictures and target weights. An item is a dict of tensors of one pair."""

    def __init__(self, pairs: Sequence[Pair], store: ImageStore, image_processor, grid: PatchGrid, image_token: int):
        self.pairs, self.store, self.grid = list(pairs), store, grid
        self.image_processor, self.image_token = image_processor, image_token

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        pair = self.pairs[index]
        try:
            pictures = [self.store.open(name) for name in pair.record.images]
        except (OSError, ValueError) as error:
            raise DataError([f"{pair.record.where}: {error}"]) from error
        sizes = [picture.size for picture in pictures] if needs_sizes(pair.record) else []
        return {
            "index": index,
            "format": FORMATS.index(pair.record.image_type),
            "pair": EncodedPair(
                prompt=expand_images(pair.prompt, self.image_token, self.grid.num_tokens),
                chosen=pair.chosen,
                rejected=pair.rejected,
                target=target_weights(pair.record, sizes, self.grid),
            ),
            "pixel_values": pixel_values(pictures, self.image_processor, self.grid.pad),
        }


@dataclass(frozen=True)
class PairCollator:
    """Items of `PairDataset` to one packed row; without the rejected answers where the loss needs none."""

    image_token: int
    needs_rejected: bool

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor | PackedRow]:
        pairs = [item["pair"] for item in items]
        if not self.needs_rejected:
            pairs = [EncodedPair(pair.prompt, pair.chosen, [], pair.target) for pair in pairs]
        batch = {
            "index": torch.tensor([item["index"] for item in items]),  # first: the Trainer reads the batch size off it
            "format": torch.tensor([item["format"] for item in items]),
            "row": pack(pairs, self.image_token),
            "pixel_values": torch.cat([item["pixel_values"] for item in items]),
        }
        if "step_pairs" in items[0]:  # of a training step
            batch["step_pairs"] = torch.tensor([item["step_pairs"] for item in items])
        return batch
