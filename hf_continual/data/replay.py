"""Choose which old rows join which micro-batch: the arithmetic of replay, without tensors.

A *slot* is one micro-batch of one optimizer step: ``micro_index * world_size + rank``. Two ranks
without accumulation and one rank with two accumulation steps have the same slots, so they draw the
same rows. Every slot keeps its own three counters (task tokens, replayed tokens, rows drawn);
everything else is a pure function of (seed, source, counters), so a resumed run needs only the
counters, and no random number generator of the run is touched.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from datasets import Dataset

RowType = Literal["same", "text", "prompt_completion", "messages", "tokenized"]


@dataclass(frozen=True)
class ReplayRows:
    """The rows a method adds to every micro-batch of the task.

    Args:
        rows: Raw rows of the task's type, or rows already tokenised (``input_ids`` and ``labels``).
        ratio: Share of the tokens of the final mix, strictly between 0 and 1. Exclusive with `per_batch`.
        per_batch: Number of rows added to each micro-batch of each process.
        weight: Weight of a replayed token in the token mean that is the loss; a task token has 1.
        row_type: ``"same"`` requires rows of the task's type; any other value declares that the rows are
            of that type on purpose.
    """

    rows: Dataset
    ratio: float | None = None
    per_batch: int | None = None
    weight: float = 1.0
    row_type: RowType = "same"


def owed_per_token(ratios: Sequence[float | None]) -> list[float | None]:
    """Replayed tokens that each source owes per token outside all ratios.

    With ratios r_k of the final mix and T other tokens, source k holds r_k / (1 - sum r) * T tokens.

    Args:
        ratios: Ratio of each source, None for sources with a fixed number of rows.

    Returns:
        One factor per source, None where the ratio is None.

    Raises:
        ValueError: If the ratios leave nothing for the task.
    """
    total = sum(ratio for ratio in ratios if ratio is not None)
    if total >= 1:
        raise ValueError(
            f"The replay ratios {[r for r in ratios if r is not None]} add up to {total:g}: nothing is left for "
            f"the task. Their sum must stay below 1."
        )
    return [None if ratio is None else ratio / (1 - total) for ratio in ratios]


@lru_cache(maxsize=32)
def _permutation(seed: int, source: int, epoch: int, rows: int) -> np.ndarray:
    return np.random.default_rng([seed, source, epoch]).permutation(rows)


def shuffled(seed: int, rows: int, draw: int, source: int = 0) -> int:
    """Index of the row that the `draw`-th draw takes: passes over all rows, each in a new order.

    Args:
        seed: Seed of the orders.
        rows: Number of rows.
        draw: Number of the draw, counted from 0.
        source: Tells the orders of several sources apart.

    Returns:
        The index.
    """
    epoch, position = divmod(draw, rows)
    return int(_permutation(seed, source, epoch, rows)[position])


def _phase(seed: int, source: int, slot: int) -> float:
    """Uniform number in [0, 1) that staggers the slots, so that their rounding errors do not add up."""
    return float(np.random.default_rng([seed, source, slot, 7]).random())


@dataclass
class ReplayDraw:
    """Draws rows of one source: slot by slot, without replacement within each pass over the rows.

    Args:
        lengths: Number of tokens of each row.
        seed: Seed of the order; the trainer passes its ``args.data_seed`` or ``args.seed``.
        source: Index of the source, so that two sources of one run are shuffled independently.
        owed_per_token: Replayed tokens owed for each other token, or None when `per_batch` is set;
            see `owed_per_token`.
        per_batch: Rows for every micro-batch, or None when a ratio is set.
        slots: Micro-batches of an optimizer step over all processes.
    """

    lengths: Sequence[int]
    seed: int
    source: int
    owed_per_token: float | None
    per_batch: int | None
    slots: int
    counters: np.ndarray = field(init=False)  # (slots, 3): task tokens, replayed tokens, rows drawn

    def __post_init__(self) -> None:
        self.counters = np.zeros((self.slots, 3), dtype=np.int64)

    def row(self, slot: int, draw: int) -> int:
        """Index of the row that a slot's `draw`-th draw takes; a pure function."""
        return shuffled(self.seed, len(self.lengths), draw * self.slots + slot, self.source)

    def draw(self, slot: int, task_tokens: int, fixed_tokens: int = 0) -> list[int]:
        """Draw the rows of one micro-batch, and count them.

        With a ratio, a row is taken while more than the slot's phase times its length is owed, so a slot
        is never off by more than one row, however long the run, and it averages out over the slots.

        Args:
            slot: Index of the micro-batch of the optimizer step, over all processes.
            task_tokens: Tokens of the task in this micro-batch.
            fixed_tokens: Tokens that sources with `per_batch` have added in this slot so far.

        Returns:
            Indices of the rows to add; may be empty.
        """
        counted = self.counters[slot]
        counted[0] += task_tokens
        rows: list[int] = []
        if self.per_batch is not None:
            rows = [self.row(slot, int(counted[2]) + i) for i in range(self.per_batch)]
            counted[1] += sum(self.lengths[row] for row in rows)
            counted[2] += len(rows)
            return rows
        assert self.owed_per_token is not None
        owed = self.owed_per_token * (int(counted[0]) + fixed_tokens) - int(counted[1])
        phase = _phase(self.seed, self.source, slot)
        while True:
            row = self.row(slot, int(counted[2]))
            if owed <= phase * self.lengths[row]:
                return rows
            rows.append(row)
            owed -= self.lengths[row]
            counted[1] += self.lengths[row]
            counted[2] += 1

    def resume(self, counters: np.ndarray) -> None:
        """Load a checkpoint's counters; a different number of slots splits them evenly."""
        if len(counters) == self.slots:
            self.counters = counters.astype(np.int64).copy()
            return
        total = counters.sum(axis=0)
        self.counters = np.stack([total // self.slots] * self.slots).astype(np.int64)
        self.counters[0] += total - self.counters.sum(axis=0)
