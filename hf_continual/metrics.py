"""The accuracy matrix of a task sequence and the figures computed from it. Plain floats, no framework.

Row i holds the scores after task i, column j is task j; a_{i,j} is the score on task j after learning task i, b_j
the base model's, T the last task. A cell that was not measured is None, and a mean over a missing cell is None:
never a guess. With losses in the cells (`lower_is_better`) every difference changes its sign, so that a backward
transfer below 0 and a forgetting above 0 always mean that something was lost.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real

Cell = float | None


def mean(cells: Iterable[Cell]) -> Cell:
    """Arithmetic mean; None if there are no cells or one is missing."""
    values = list(cells)
    if not values or any(v is None for v in values):
        return None
    return sum(v for v in values if v is not None) / len(values)


def difference(a: Cell, b: Cell) -> Cell:
    """a - b; None if one is missing."""
    return None if a is None or b is None else a - b


def harmonic_mean(general: Cell, task: Cell) -> Cell:
    """2 g t / (g + t): GeRe's "F1 Avg" of a general-ability score and the overall performance; 0 if both are 0."""
    if general is None or task is None:
        return None
    return 2 * general * task / (general + task) if general + task > 0 else 0.0


def _check_row(name: str, row: Sequence[Cell]) -> None:
    for j, cell in enumerate(row):
        if cell is None:
            continue
        if isinstance(cell, bool) or not isinstance(cell, Real):
            raise TypeError(
                f"{name}[{j}] is {cell!r} ({type(cell).__name__}). Give a number, or None if it was not measured."
            )
        if not math.isfinite(cell):
            raise ValueError(
                f"{name}[{j}] is {cell}: a mean over it says nothing. Give None if a score was not measured; NaN from a "
                f"metric usually means that the model's weights or logits are broken."
            )


@dataclass(frozen=True)
class AccuracyMatrix:
    """Scores of every task after every task.

    Args:
        scores: Row i = after task i; a row may be shorter than the number of tasks (later tasks are not
            measured) or hold None.
        base: Scores of the base model before the first task, or None.
        lower_is_better: Whether the scores are losses; the signs of transfer and forgetting keep their meaning.

    Raises:
        TypeError: If a cell is neither a number nor None.
        ValueError: If a cell is NaN or infinite, a row stops before its own task, or the base row has a different
            length.
    """

    scores: list[list[float | None]]
    base: list[float] | list[float | None] | None = None
    lower_is_better: bool = False

    def __post_init__(self) -> None:
        tasks = max((len(row) for row in self.scores), default=0)
        for i, row in enumerate(self.scores):
            _check_row(f"scores[{i}]", row)
            if len(row) <= i:
                raise ValueError(
                    f"scores[{i}] has {len(row)} scores; the row after task {i} needs one for each of the {i + 1} tasks learned "
                    f"by then, None for a score that was not measured."
                )
        _check_row("base", self.base or [])
        if self.base is not None and self.scores and len(self.base) != tasks:
            raise ValueError(f"base has {len(self.base)} scores and the matrix has {tasks} tasks.")

    def check_named(self, tasks: Sequence[str]) -> None:
        """Refuse task names that do not fit the matrix.

        Args:
            tasks: One name per task; later tasks too, if there are more names than columns.

        Raises:
            ValueError: If there are more rows or columns than names.
        """
        wide = max([len(row) for row in self.scores] + [len(self.base or [])])
        if wide > len(tasks):
            raise ValueError(f"the matrix has scores for {wide} tasks and {len(tasks)} names: {', '.join(tasks)}.")

    def score(self, after: int, task: int) -> Cell:
        """a_{after,task}; `after` = -1 is the base model. None if it was not measured."""
        row: Sequence[Cell] = (self.base or []) if after < 0 else self.scores[after]
        return row[task] if task < len(row) else None

    def gain(self, new: Cell, old: Cell) -> Cell:
        """Improvement of `new` over `old`."""
        return difference(old, new) if self.lower_is_better else difference(new, old)

    @property
    def last(self) -> int:
        """Index of the last task learned."""
        return len(self.scores) - 1

    @property
    def overall_performance(self) -> Cell:
        """OP, also AP or Last: mean of a_{T,j} over the tasks learned."""
        return mean(self.score(self.last, j) for j in range(self.last + 1))

    @property
    def average_performance(self) -> Cell:
        """Mean over i of the mean of a_{i,j} over j <= i: the average over the whole sequence, also Avg."""
        return mean(mean(self.score(i, j) for j in range(i + 1)) for i in range(self.last + 1))

    @property
    def learning_accuracy(self) -> Cell:
        """LA: mean of a_{j,j}, each task right after it was learned."""
        return mean(self.score(j, j) for j in range(self.last + 1))

    @property
    def backward_transfer(self) -> Cell:
        """BWT: mean of a_{T,j} - a_{j,j} over all but the last task; below 0 is forgetting (TRACE, Recurrent-KIF)."""
        return mean(self.gain(self.score(self.last, j), self.score(j, j)) for j in range(self.last))

    @property
    def backward_transfer_over_all(self) -> Cell:
        """BWT as SAPT computes it: the same sum divided by the number of tasks, the last one included."""
        value = self.backward_transfer
        return None if value is None else value * self.last / (self.last + 1)

    @property
    def forward_transfer(self) -> Cell:
        """FWT: mean of a_{j-1,j} - b_j over all tasks except the first."""
        return mean(self.gain(self.score(j - 1, j), self.score(-1, j)) for j in range(1, self.last + 1))

    @property
    def forgetting(self) -> Cell:
        """Mean of max_i a_{i,j} - a_{T,j} over all tasks except the last, i < T (Chaudhry et al. 2018, SAPT's Fgt).

        The maximum is over the measured cells; those from the task's own row on must be measured.
        """
        return mean(self.forgotten(j) for j in range(self.last))

    def forgotten(self, task: int) -> Cell:
        """Drop of a task's last score below its best earlier one; below 0 if it gained. None if a cell is missing."""
        past = [self.score(i, task) for i in range(self.last)]
        if None in past[task:]:
            return None
        best = (min if self.lower_is_better else max)(p for p in past if p is not None)
        return self.gain(best, self.score(self.last, task))

    @property
    def per_task_minimum(self) -> list[Cell]:
        """Worst score of each task from its own row to the last: least accuracy, or greatest loss."""
        worst = max if self.lower_is_better else min
        columns = [[self.score(i, j) for i in range(j, self.last + 1)] for j in range(self.last + 1)]
        return [None if None in column else worst(v for v in column if v is not None) for column in columns]

    @property
    def summary(self) -> dict[str, Cell]:
        """The figures above by name."""
        return {name: getattr(self, name) for name in SUMMARY}


SUMMARY = (
    "overall_performance",
    "average_performance",
    "learning_accuracy",
    "backward_transfer",
    "backward_transfer_over_all",
    "forward_transfer",
    "forgetting",
)

Rows = Mapping[tuple[int, int], Sequence[float]]


def bootstrap_intervals(
    runs: Sequence[Rows],
    tasks: int,
    draws: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
    lower_is_better: bool = False,
    figure: Callable[[AccuracyMatrix], Mapping[str, Cell]] = lambda matrix: matrix.summary,
) -> dict[str, tuple[float, float] | None]:
    """Percentile intervals of a matrix' figures, resampled over rows and over runs.

    The rows of a task are drawn once for all stages of all runs, since the same rows are scored after every task;
    with several runs (seeds) the runs are drawn as well, and their figures averaged.

    Args:
        runs: For each run the score of every row in every cell, ``{(after, task): scores}``; `after` = -1 is the
            base model.
        tasks: Number of tasks.
        draws: Number of draws.
        confidence: Probability mass inside the interval.
        seed: Seed of the draws.
        lower_is_better: Whether the scores are losses.
        figure: The figures to compute from a matrix.

    Returns:
        Lower and upper bound by figure; None if a figure cannot be computed.
    """
    import numpy as np

    rng = np.random.default_rng(seed)
    sizes = {j: len(scores) for run in runs for (_, j), scores in run.items()}
    means: list[dict[tuple[int, int], np.ndarray]] = [{} for _ in runs]
    for j, size in sorted(sizes.items()):
        counts = rng.multinomial(size, np.full(size, 1 / size), size=draws) / size
        for run, found in zip(runs, means, strict=True):
            found.update({cell: counts @ np.asarray(scores, float) for cell, scores in run.items() if cell[1] == j})
    chosen = rng.integers(len(runs), size=(draws, len(runs))) if len(runs) > 1 else np.zeros((draws, 1), int)
    drawn: dict[str, list[float]] = {}
    missing: set[str] = set()
    for k in range(draws):
        values: dict[str, list[float]] = {}
        for r in chosen[k]:
            matrix = matrix_of({cell: float(v[k]) for cell, v in means[r].items()}, tasks, lower_is_better)
            for name, value in figure(matrix).items():
                if value is None:
                    missing.add(name)
                else:
                    values.setdefault(name, []).append(value)
        for name, several in values.items():
            drawn.setdefault(name, []).append(sum(several) / len(several))
    tail = 100 * (1 - confidence) / 2
    bounds: dict[str, tuple[float, float] | None] = dict.fromkeys(missing)
    for name, values_of in drawn.items():
        if name not in missing:
            low, high = np.percentile(values_of, [tail, 100 - tail])
            bounds[name] = (float(low), float(high))
    return bounds


def matrix_of(cells: Mapping[tuple[int, int], float], tasks: int, lower_is_better: bool = False) -> AccuracyMatrix:
    """Build a matrix from its cells.

    Args:
        cells: Score by ``(after, task)``; `after` = -1 is the base model. Missing cells were not measured.
        tasks: Number of tasks.
        lower_is_better: Whether the scores are losses.

    Returns:
        The matrix.
    """
    rows = [[cells.get((i, j)) for j in range(tasks)] for i in range(-1, tasks)]
    base = rows[0] if any(v is not None for v in rows[0]) else None
    return AccuracyMatrix(rows[1:], base, lower_is_better)
