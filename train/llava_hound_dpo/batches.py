"""Which pairs form each optimiser step, and how a step's pairs are packed into rows: all of it known before the start.

The pairs of a step follow from seed, epoch and pairs per step alone, so that an experiment can run, and go on after a
stop, on any number of processes. Within a step the pairs are divided over as many rows as the processes make forward
passes, balanced by tokens. Rows may hold different numbers of pairs: the loss of a pair is weighted by `step_pairs` so
that the gradient of a step is the mean over its pairs, whatever the rows.
"""

import heapq
import itertools
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch.utils.data import DataLoader, Dataset, Sampler

Row = list[int]  # positions of the pairs that share a packed row
Slot = tuple[int, int]  # a pair, and the number of pairs of its step: 0 if it only fills a row that would be empty


@dataclass(frozen=True)
class BatchPlan:
    """Steps and rows of a whole run. `make_plan` makes one; W processes have W * `accumulation` rows a step."""

    lengths: tuple[int, ...]  # packed tokens of every pair
    pairs_per_step: int  # at most: steps of an epoch differ by one pair where it does not divide the number of pairs
    world_size: int
    accumulation: int  # rows of a process and step
    seed: int
    total_steps: int
    pairs_per_row: int  # at most; 0: no limit
    tokens_per_row: int  # at most; 0: no limit

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps in which every pair is used once."""
        return num_steps(len(self.lengths), self.pairs_per_step)

    @property
    def rows_per_step(self) -> int:
        """Rows of a step over all processes."""
        return self.world_size * self.accumulation

    @property
    def step_sizes(self) -> str:
        """Pairs that a step really has, in words."""
        least, rest = divmod(len(self.lengths), self.steps_per_epoch)
        own = f"{least} or {least + 1}" if rest else f"{least}"
        return f"{own} pairs" + (f", of at most {self.pairs_per_step}" if least < self.pairs_per_step else "")

    def steps(self, epoch: int) -> list[list[int]]:
        """The pairs of every step of an epoch, whatever the number of processes."""
        return epoch_steps(len(self.lengths), self.pairs_per_step, self.seed, epoch)

    def steps_of_run(self) -> Iterator[list[int]]:
        """The pairs of every step of the run."""
        for epoch in range(math.ceil(self.total_steps / self.steps_per_epoch)):
            yield from self.steps(epoch)[: self.total_steps - epoch * self.steps_per_epoch]

    def rows(self, pairs: Sequence[int]) -> list[Row]:
        """A step's pairs in rows, the longest row first; row k belongs to process k % W. Some may be empty."""
        lengths = [self.lengths[pair] for pair in pairs]
        rows = divide(lengths, self.rows_per_step, self.pairs_per_row, self.tokens_per_row)
        assert rows is not None, "the number of rows was chosen so that every step fits"
        rows.sort(key=lambda row: (-sum(lengths[n] for n in row), row))
        return [[pairs[n] for n in row] for row in rows]

    def slots(self, pairs: Sequence[int]) -> list[list[Slot]]:
        """As `rows`, but with the step's shortest pair, not counted, in rows that would be empty.

        Every process must make the same number of passes; such a pass adds nothing to the gradient.
        """
        filler = [(min(pairs, key=lambda pair: (self.lengths[pair], pair)), 0)]
        return [[(pair, len(pairs)) for pair in row] or filler for row in self.rows(pairs)]

    def __str__(self) -> str:
        rows = [row for pairs in self.steps_of_run() for row in self.rows(pairs)]
        totals = [sum(self.lengths[pair] for pair in row) for row in rows]
        fill = sum(totals) / (len(totals) * (self.tokens_per_row or max(totals)))
        of = f"--tokens_per_batch {self.tokens_per_row:,}" if self.tokens_per_row else "the longest"
        return (
            f"{self.rows_per_step} rows per step = {self.accumulation} accumulated x {self.world_size} processes, "
            f"at most {max(totals):,} tokens in one, {fill:.0%} of {of} on average"
        )


def make_plan(
    lengths: Sequence[int], pairs_per_row: int, accumulation: int, world_size: int, seed: int, epochs: float,
    max_steps: int = -1, tokens_per_batch: int = 0,
) -> BatchPlan:  # fmt: skip
    """The plan of a run with `pairs_per_row * accumulation * world_size` pairs per step.

    With `tokens_per_batch` rows hold up to so many tokens, however many pairs that are; else up to `pairs_per_row`
    pairs. The rows of a step are as few as the step with the most pairs or tokens needs. No length may be above
    `tokens_per_batch`.
    """
    pairs_per_step = pairs_per_row * accumulation * world_size
    total_steps = max_steps if max_steps > 0 else math.ceil(num_steps(len(lengths), pairs_per_step) * epochs)
    assert not tokens_per_batch or max(lengths) <= tokens_per_batch
    limits = (0 if tokens_per_batch else pairs_per_row, tokens_per_batch)
    plan = BatchPlan(tuple(lengths), pairs_per_step, world_size, 1, seed, total_steps, *limits)
    found = 1
    for pairs in plan.steps_of_run():
        while divide([lengths[pair] for pair in pairs], world_size * found, *limits) is None:
            found += 1
    return replace(plan, accumulation=found)


def flags_for(pairs_per_step: int, pairs_per_row: int, world_size: int) -> str:
    """Which flags, or how many processes, make so many pairs per step."""
    accumulation, rest = divmod(pairs_per_step, pairs_per_row * world_size)
    if not rest:
        return f"--gradient_accumulation_steps {accumulation}"
    accumulation, rest = divmod(pairs_per_step, world_size)
    if not rest:
        return f"--per_device_train_batch_size 1 --gradient_accumulation_steps {accumulation}"
    fitting = [str(number) for number in range(1, 2 * world_size) if pairs_per_step % number == 0]
    return f"a number of processes that divides it: {', '.join(fitting)}"


def num_steps(num_pairs: int, pairs_per_step: int) -> int:
    """Optimiser steps of an epoch."""
    return math.ceil(num_pairs / pairs_per_step)


def epoch_steps(num_pairs: int, pairs_per_step: int, seed: int, epoch: int) -> list[list[int]]:
    """Every pair once, in random order, in steps whose sizes differ by at most one."""
    order = list(range(num_pairs))
    random.Random(f"{seed} {epoch}").shuffle(order)
    steps = num_steps(num_pairs, pairs_per_step)
    bounds = [num_pairs * step // steps for step in range(steps + 1)]
    return [order[start:end] for start, end in itertools.pairwise(bounds)]


def divide(lengths: Sequence[int], num_rows: int, max_pairs: int = 0, max_tokens: int = 0) -> list[Row] | None:
    """Positions of the pairs of each of `num_rows` rows, within the limits (0: none); None if no way was found.

    The longest pair first, each into the row with the fewest tokens (LPT); where that breaks `max_tokens`, each into
    the fullest row that takes it. A row stays empty only if there are fewer pairs than rows.
    """
    order = sorted(range(len(lengths)), key=lambda n: (-lengths[n], n))
    rows: list[Row] = [[] for _ in range(num_rows)]
    least = [(0, number) for number in range(num_rows)]  # a heap of (tokens, row)
    for n in order:
        if not least:
            return None
        tokens, number = heapq.heappop(least)
        tokens += lengths[n]
        if max_tokens and tokens > max_tokens:
            return _best_fit(lengths, order, num_rows, max_tokens)
        rows[number].append(n)
        if len(rows[number]) != max_pairs:
            heapq.heappush(least, (tokens, number))
    return rows


def _best_fit(lengths: Sequence[int], order: Sequence[int], num_rows: int, max_tokens: int) -> list[Row] | None:
    rows: list[Row] = [[] for _ in range(num_rows)]
    totals = [0] * num_rows
    for n in order:
        fitting = [number for number in range(num_rows) if totals[number] + lengths[n] <= max_tokens]
        if not fitting:
            return None
        number = max(fitting, key=lambda number: (totals[number], -number))
        rows[number].append(n)
        totals[number] += lengths[n]
    for empty in (row for row in rows if not row):
        fullest = max((row for row in rows if len(row) > 1), key=len, default=None)
        if fullest is not None:
            empty.append(fullest.pop())
    return rows


class RowSampler(Sampler[list[tuple[Slot, int]]]):
    """One process's rows of an epoch, in order, as batches of slots with the epoch, which workers do not hear of."""

    def __init__(self, plan: BatchPlan, rank: int):
        self.plan, self.rank, self.epoch = plan, rank, 0

    def set_epoch(self, epoch: int) -> None:
        """Which epoch the next iteration is of."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.plan.steps_per_epoch * self.plan.accumulation

    def __iter__(self) -> Iterator[list[tuple[Slot, int]]]:
        for pairs in self.plan.steps(self.epoch):
            for row in self.plan.slots(pairs)[self.rank :: self.plan.world_size]:
                yield [(slot, self.epoch) for slot in row]


class SlotDataset(Dataset):
    """Items of an epoch by slot, with `step_pairs`: how many pairs share the mean that their loss enters."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[Slot, int]) -> dict[str, Any]:
        (index, step_pairs), epoch = key
        return self.dataset.item(index, epoch) | {"step_pairs": step_pairs}


class RowLoader(DataLoader):
    """A plain DataLoader that hands the epoch on to its `RowSampler`, as the Trainer asks of it.

    It is not prepared by accelerate, which would share the rows out over the processes a second time.
    """

    def __init__(self, dataset: Dataset, plan: BatchPlan, rank: int, **options):
        super().__init__(SlotDataset(dataset), batch_sampler=RowSampler(plan, rank), **options)

    def set_epoch(self, epoch: int) -> None:
        """Before the iteration over an epoch."""
        self.batch_sampler.set_epoch(epoch)
