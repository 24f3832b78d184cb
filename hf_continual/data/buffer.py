"""The buffer: which rows of a learned task are kept for later ones, as pure choices of row numbers.

* Class-balanced share: a fixed fraction of each task's rows, spread evenly over its classes, as in Recurrent-KIF
  (Feng et al., ACL 2025, https://arxiv.org/abs/2502.17510), whose 2 % are reproduced row for row.
* Reservoir: a uniform sample of all rows ever seen, of fixed size (Vitter 1985, algorithm R).
* Newest first: the class-balanced share within a fixed capacity, dropping the oldest tasks' rows first.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
from datasets import Dataset

if TYPE_CHECKING:
    from hf_continual.tasks import Task

Row = TypeVar("Row")
Policy = Literal["class_balanced", "reservoir", "newest_first"]

# A row's task, its number among that task's rows, the file these were read from, and how many rows the buffer had
# seen when the row was written: a reservoir cannot continue without that count.
ORIGIN = ("memory_task", "memory_row", "memory_source", "memory_seen")


def class_balanced(labels: Sequence[Hashable], number: int, rng: random.Random) -> list[int]:
    """Pick `number` row indices spread evenly over the classes `labels` (Recurrent-KIF's buffer); all if there are fewer.

    Each class gives ``number // classes`` rows, in the order in which the classes first appear; the remainder
    is drawn from all other rows. With more classes than rows to keep, as in free text, the rows are a uniform sample
    (the authors' code then keeps one per class). Pass one `rng` through the tasks in order.
    """
    number = min(number, len(labels))
    classes: dict[Hashable, list[int]] = {}
    for row, label in enumerate(labels):
        classes.setdefault(label, []).append(row)
    quota = number // max(len(classes), 1)
    chosen = [row for rows in classes.values() if quota for row in rng.sample(rows, min(quota, len(rows)))]
    taken = set(chosen)
    return chosen + rng.sample([row for row in range(len(labels)) if row not in taken], number - len(chosen))


def balanced_order(rows: Sequence[int], labels: Sequence[Hashable]) -> list[int]:
    """The same rows, ordered so that every prefix of the list is spread evenly over their classes."""
    met: Counter[Hashable] = Counter()
    turns = {}
    for row in rows:
        turns[row] = met[labels[row]]
        met[labels[row]] += 1
    return sorted(rows, key=turns.__getitem__)


def newest_first(counts: Sequence[int], capacity: int) -> list[int]:
    """Number of rows that fit per task, oldest task first; the newest tasks are served first."""
    fitting: list[int] = []
    for count in reversed(counts):
        fitting.append(min(count, capacity - sum(fitting)))
    return fitting[::-1]


def reservoir(kept: Sequence[Row], rows: Sequence[Row], capacity: int, seed: int, seen: int) -> list[Row]:
    """A uniform sample of a stream's rows, extended by further `rows` (algorithm R).

    `kept` is the sample of the first `seen` rows, as returned. The draw for a row depends on (seed, its place in
    the stream) only: in parts or in one go, the same rows are kept. A row takes the place of the one it replaces.
    """
    draws = np.random.Generator(np.random.PCG64(seed).advance(seen)).random(len(rows))
    sample = list(kept)
    for place, (row, draw) in enumerate(zip(rows, draws, strict=True), start=seen):
        if place < capacity:
            sample.append(row)
        elif (at := int(draw * (place + 1))) < capacity:
            sample[at] = row
    return sample


@dataclass(frozen=True)
class Memory:
    """A rule for which rows of each task are kept, applied to the tasks in the order they were learned.

    Args:
        policy: ``"class_balanced"``, ``"reservoir"`` or ``"newest_first"``; see this module.
        share: Fraction of each task's rows, at least one row; by default the paper's 0.02.
        rows: Rows of each task, instead of `share`.
        capacity: Rows of all tasks together, for ``reservoir`` and ``newest_first``.
        by: Column that holds the class. Rows without a column `completion` count as free text.
        seed: Seed of the draws; 42 is the authors'.
        start: Rows that an earlier buffer kept, with the columns of `ORIGIN`, oldest first.

    Raises:
        ValueError: If the numbers do not fit the policy or each other, or `start` lacks its origin.
    """

    policy: Policy = "class_balanced"
    share: float | None = None
    rows: int | None = None
    capacity: int | None = None
    by: str = "completion"
    seed: int = 42
    start: Sequence[Mapping[str, Any]] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        each = [v for v in (self.share, self.rows) if v is not None]
        balanced = self.policy != "reservoir"
        if (self.capacity is None) == (self.policy != "class_balanced") or len(each) > balanced:
            raise ValueError(
                f"class_balanced takes share or rows (of each task), reservoir a capacity (of all tasks together), "
                f"newest_first a capacity and share or rows; got {self}."
            )
        if (self.share or 0) > 1 or min((v for v in (*each, self.capacity) if v is not None), default=1) <= 0:
            raise ValueError(f"share must lie in (0, 1], rows and capacity must be at least 1; got {self}.")
        if lacking := [name for row in self.start for name in ORIGIN if name not in row]:
            raise ValueError(
                f"a row of start has no {lacking[0]!r}: it was not written by a buffer. Give such rows to a method, rows: PATH."
            )
        if not balanced and len(self.start) != min(self.seen(()), self.capacity or 0):
            raise ValueError(
                f"start holds {len(self.start)} of the {self.seen(())} rows that were seen, which cannot be continued as a "
                f"sample of {self.capacity}. Give the capacity that it was kept with, or the policy newest_first."
            )

    def seen(self, tasks: Sequence[Task]) -> int:
        """Rows that the buffer was offered, up to and including these tasks."""
        return max((row["memory_seen"] for row in self.start), default=0) + sum(len(t.train or ()) for t in tasks)

    def chosen(self, tasks: Sequence[Task]) -> list[tuple[int, int]]:
        """The rows kept after these tasks, as (place of the task, row); place -1 numbers the rows of `start`."""
        if self.policy == "reservoir":
            given = [(-1, row) for row in range(len(self.start))]
            offered = [(place, row) for place, task in enumerate(tasks) for row in range(len(task.train or ()))]
            return reservoir(given, offered, self.capacity or 0, self.seed, self.seen(()))
        groups: dict[Any, list[tuple[int, int]]] = {}
        for i, row in enumerate(self.start):
            groups.setdefault(row["memory_task"], []).append((-1, i))
        rng = random.Random(self.seed)
        for place, task in enumerate(tasks):
            labels = self._labels(task)
            # 0.29 * 100 is 28.999...: do not lose a row to that.
            rows = class_balanced(labels, self.rows or max(int((self.share or 0.02) * len(labels) + 1e-9), 1), rng)
            groups[place] = [(place, row) for row in (balanced_order(rows, labels) if self.capacity else rows)]
        counts = [len(group) for group in groups.values()]
        fitting = newest_first(counts, self.capacity or sum(counts))
        return [pair for group, n in zip(groups.values(), fitting, strict=True) for pair in group[:n]]

    def _labels(self, task: Task) -> Sequence[Hashable]:
        rows: Any = task.train
        if self.by not in rows.column_names and self.by != "completion":
            raise ValueError(f"by: the rows of task {task.name!r} have no {self.by!r}, only {rows.column_names}.")
        return list(map(repr, rows[self.by][:])) if self.by in rows.column_names else range(len(rows))

    def records(self, tasks: Sequence[Task], sources: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
        """The kept rows with their origin, as plain data; `sources` gives the file of each task's rows."""
        found: list[dict[str, Any]] = []
        for place, row in self.chosen(tasks):
            task: Any = tasks[place] if place >= 0 else None
            origin = (task.name, row, (sources or {}).get(task.name)) if task else ()
            found.append({**(task.train if task else self.start)[row], **dict(zip(ORIGIN, origin, strict=False))})
        return [{**row, "memory_seen": self.seen(tasks)} for row in found]

    def kept(self, tasks: Sequence[Task], sources: Mapping[str, str] | None = None) -> Dataset:
        """The kept rows of tasks of one type with their origin; see `records`."""
        return Dataset.from_list(self.records(tasks, sources))
