"""The accuracy matrix of a task sequence and what is read from it. Plain floats, no framework.

Row i holds the scores after task i, column j is task j; a_{i,j} is the score on task j after learning task i, b_j
the base model's. A cell that was not measured is None, and a mean over a missing cell is None: never a guess.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

Cell = float | None


def mean(cells: Iterable[Cell]) -> Cell:
    """Arithmetic mean; None if there is no cell or one is missing."""
    values = list(cells)
    if not values or any(v is None for v in values):
        return None
    return sum(v for v in values if v is not None) / len(values)


def difference(a: Cell, b: Cell) -> Cell:
    """a - b; None if one is missing."""
    return None if a is None or b is None else a - b


@dataclass(frozen=True)
class AccuracyMatrix:
    """Scores of every task after every task, higher is better.

    Args:
        scores: Row i = after task i; a row may be shorter than the number of tasks (tasks to come are not
            measured) or hold None.
        base: Scores of the base model before the first task, or None.

    Raises:
        ValueError: If a row is longer than the number of tasks, or the base row is of another length.
    """

    scores: list[list[float | None]]
    base: list[float] | None = None

    def __post_init__(self) -> None:
        tasks = max((len(row) for row in self.scores), default=0)
        if tasks < len(self.scores):
            raise ValueError(f"{len(self.scores)} rows, but no row has a score for task {len(self.scores) - 1}.")
        if self.base is not None and len(self.base) != tasks:
            raise ValueError(f"base has {len(self.base)} scores and the matrix {tasks} tasks.")

    def score(self, after: int, task: int) -> Cell:
        """a_{after,task}; `after` = -1 is the base model. None where it was not measured."""
        row: Sequence[Cell] = (self.base or []) if after < 0 else self.scores[after]
        return row[task] if task < len(row) else None

    @property
    def last(self) -> int:
        """Index of the last task learnt."""
        return len(self.scores) - 1

    @property
    def overall_performance(self) -> Cell:
        """OP, also AP: mean of a_{T,j} over the tasks learnt."""
        return mean(self.score(self.last, j) for j in range(self.last + 1))

    @property
    def backward_transfer(self) -> Cell:
        """BWT: mean of a_{T,j} - a_{j,j} over all tasks but the last; below 0 is forgetting."""
        return mean(difference(self.score(self.last, j), self.score(j, j)) for j in range(self.last))

    @property
    def forward_transfer(self) -> Cell:
        """FWT: mean of a_{j-1,j} - b_j over all tasks but the first."""
        return mean(difference(self.score(j - 1, j), self.score(-1, j)) for j in range(1, self.last + 1))

    @property
    def forgetting(self) -> Cell:
        """Mean of max_i a_{i,j} - a_{T,j} over all tasks but the last, the maximum over tasks before the last."""
        return mean(self._forgotten(j) for j in range(self.last))

    def _forgotten(self, task: int) -> Cell:
        past = [self.score(i, task) for i in range(task, self.last)]
        if any(p is None for p in past):
            return None
        return difference(max(p for p in past if p is not None), self.score(self.last, task))

    @property
    def per_task_minimum(self) -> list[Cell]:
        """Least score of each task from when it was learnt to the end."""
        columns = [[self.score(i, j) for i in range(j, self.last + 1)] for j in range(self.last + 1)]
        return [None if None in column else min(v for v in column if v is not None) for column in columns]

    @property
    def summary(self) -> dict[str, Cell]:
        """The figures above by name."""
        return {
            "overall_performance": self.overall_performance,
            "backward_transfer": self.backward_transfer,
            "forward_transfer": self.forward_transfer,
            "forgetting": self.forgetting,
        }
