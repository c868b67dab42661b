"""`--permute_images`: what it asks of a run, where the orders of each epoch are known before the first step."""

from collections import Counter
from collections.abc import Callable, Sequence
from math import factorial

from llava.order import why_fixed
from llava.runtime import Progress, is_main_process
from train.llava_hound_dpo.data import Pair


def refuse_stored(stores_reference: bool) -> None:
    """Raises ValueError where reference log-probs are read from disk: they are of one order."""
    if stores_reference:
        raise ValueError(
            "--permute_images: stored reference log-probs are of one order of the pictures, and they are stored with "
            "--reference_cache, --reference adapter, full fine-tuning and ZeRO-3; do without, or take --dpo_alpha 0"
        )


def longest_orders(
    pairs: Sequence[Pair], epochs: int, in_epoch: Callable[[Pair, int], Pair], max_length: int,
    tokens_of: Callable[[Pair], int],
) -> list[Pair]:  # fmt: skip
    """Each pair in the order of its epochs whose row has the most tokens, as `tokens_of` counts them.

    Raises ValueError if no pair has another order, or one is longer than `max_length` in it.
    """
    if all(why_fixed(pair.record) for pair in pairs):
        raise ValueError(f"--permute_images: no pair to train on can be shown so: {describe_order(pairs)}")
    longest = []
    for pair in Progress(pairs, desc="orders", disable=not is_main_process() or len(pairs) < 1000):
        shown = [in_epoch(pair, epoch) for epoch in range(min(epochs, factorial(len(pair.record.images))))]
        if any(own.num_tokens > max_length for own in shown):
            raise ValueError(
                f"{pair.record.where}: {max(own.num_tokens for own in shown)} tokens in another order of its pictures, "
                f"above --model_max_length {max_length}: raise it, or name the pair in --leave_out"
            )
        longest.append(max(shown, key=tokens_of))
    return longest


def describe_order(pairs: Sequence[Pair]) -> str:
    """How many pairs are shown in other orders, and why the others are not, in words."""
    reasons = Counter(why_fixed(pair.record) for pair in pairs)
    moved = reasons.pop(None, 0)
    kept = ", ".join(f"{reason}: {count:,}" for reason, count in reasons.items())
    return f"another each epoch in {moved:,} pairs, by seed, id and epoch{'; kept where: ' * bool(kept)}{kept}"
