"""Confidence intervals of scores that stay valid at 0 of n and n of n.

A proportion gets Wilson's interval (1927), which has a width even if every row is right. A figure of the accuracy
matrix is a sum of cells; its interval is combined from theirs by squaring and adding (Newcombe 1998 for a difference on
the same rows, Zou & Donner 2008 in general), with the correlation of scores of the same rows after different tasks.
Scores that are not 0 or 1 get Student's interval, and their figures are bootstrapped
(`hf_continual.metrics.bootstrap_intervals`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from hf_continual.metrics import SUMMARY, AccuracyMatrix, Rows, bootstrap_intervals, matrix_of

Interval = tuple[float, float]
Place = tuple[int, int]  # (after, task); after = -1 is the base model


def share_interval(right: int, n: int, confidence: float = 0.95) -> Interval:
    """Wilson's interval of a proportion: for 16 right of 16 it is 0.806 to 1.

    Args:
        right: Number of rows that are right.
        n: Number of rows, at least 1.
        confidence: Probability that such intervals contain the true proportion.

    Returns:
        Lower and upper bound.
    """
    from scipy import stats  # takes a second to import

    found = stats.binomtest(right, n).proportion_ci(confidence, method="wilson")
    return float(found.low), float(found.high)


def is_share(values: Sequence[float]) -> bool:
    """Whether every row is right or wrong, so that their mean is a proportion."""
    return len(values) > 0 and all(v in (0, 1) for v in values)


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> Interval | None:
    """Interval of the mean over rows: Wilson's for rows that are right or wrong, Student's for others.

    Args:
        values: One per row.
        confidence: Probability that such intervals contain the true mean.

    Returns:
        Lower and upper bound; None if the rows say nothing about their spread (fewer than two, or all the same).
    """
    if is_share(values):
        return share_interval(round(sum(values)), len(values), confidence)
    if len(set(values)) < 2:
        return None
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return spread_interval(float(np.mean(values)), error, len(values), confidence)


def spread_interval(centre: float, standard_error: float, n: int, confidence: float = 0.95) -> Interval:
    """Student's interval of a mean over n rows with a standard error."""
    from scipy import stats

    reach = float(stats.t.ppf((1 + confidence) / 2, n - 1)) * standard_error
    return centre - reach, centre + reach


def coefficients(name: str, matrix: AccuracyMatrix) -> dict[Place, float]:
    """A figure of the matrix as a sum of its cells: coefficient by cell.

    For `forgetting` it is the sum at these scores, with each task's best row known.

    Args:
        name: One of `hf_continual.metrics.SUMMARY`.
        matrix: The matrix, with all cells that the figure needs.

    Returns:
        Coefficients, with signs such that higher is better if scores are losses.
    """
    last = matrix.last
    parts: list[tuple[int, int, float]] = []
    if name == "overall_performance":
        parts = [(last, j, 1 / (last + 1)) for j in range(last + 1)]
    elif name == "average_performance":
        parts = [(i, j, 1 / (last + 1) / (i + 1)) for i in range(last + 1) for j in range(i + 1)]
    elif name == "learning_accuracy":
        parts = [(j, j, 1 / (last + 1)) for j in range(last + 1)]
    elif name.startswith("backward_transfer"):
        each = 1 / (last + 1 if name.endswith("over_all") else last)
        parts = [part for j in range(last) for part in ((last, j, each), (j, j, -each))]
    elif name == "forward_transfer":
        parts = [part for j in range(1, last + 1) for part in ((j - 1, j, 1 / last), (-1, j, -1 / last))]
    elif name == "forgetting":
        parts = [part for j in range(last) for part in ((_best(matrix, j), j, 1 / last), (last, j, -1 / last))]
    turned = -1.0 if matrix.lower_is_better and ("transfer" in name or name == "forgetting") else 1.0
    found: dict[Place, float] = {}
    for after, task, value in parts:
        found[after, task] = found.get((after, task), 0.0) + turned * value
    return found


def _best(matrix: AccuracyMatrix, task: int) -> int:
    """The row, before the last, at which a task was best."""
    known = {i: v for i in range(matrix.last) if (v := matrix.score(i, task)) is not None}
    return (min if matrix.lower_is_better else max)(known, key=lambda i: known[i])


def combined_interval(
    parts: Sequence[tuple[float, Sequence[float]]], confidence: float = 0.95, groups: Sequence[int] | None = None
) -> Interval | None:
    """Interval of a sum of means, from the means' own intervals (MOVER, Zou & Donner 2008).

    Args:
        parts: Coefficient, and one value per row, of each mean.
        confidence: Probability that such intervals contain the true sum.
        groups: Which rows each mean is over: means in one group are over the same rows, in the same order, and those in
            different groups over unrelated rows. By default all are in one group.

    Returns:
        Lower and upper bound; None if a mean has no interval.
    """
    owners = [0] * len(parts) if groups is None else list(groups)
    centre, below, above = 0.0, 0.0, 0.0
    for group in dict.fromkeys(owners):
        own = [part for part, owner in zip(parts, owners, strict=True) if owner == group]
        means = [float(np.mean(values)) for _, values in own]
        bounds = [mean_interval(values, confidence) for _, values in own]
        if None in bounds:
            return None
        down = [m - b[0] for m, b in zip(means, bounds, strict=True) if b is not None]
        up = [b[1] - m for m, b in zip(means, bounds, strict=True) if b is not None]
        weights = np.array([c for c, _ in own])
        together = _correlations([values for _, values in own], weights)
        low = weights * np.where(weights > 0, down, up)
        high = weights * np.where(weights > 0, up, down)
        centre += float(weights @ means)
        below, above = below + float(low @ together @ low), above + float(high @ together @ high)
    return centre - math.sqrt(max(below, 0.0)), centre + math.sqrt(max(above, 0.0))


def _correlations(rows: Sequence[Sequence[float]], weights: np.ndarray) -> np.ndarray:
    """Correlation of scores of the same rows.

    If one of the two does not vary it is unknown: 0 in a difference, as in Newcombe, and 1 in a sum, since the same
    rows counted twice are not more rows.
    """
    values = np.asarray(rows, float)
    centred = values - values.mean(1, keepdims=True)
    size = np.sqrt((centred**2).sum(1))
    scale = np.outer(size, size)
    unknown = (np.outer(weights, weights) > 0).astype(float)
    found = np.divide(centred @ centred.T, scale, out=unknown, where=scale > 0)
    np.fill_diagonal(found, 1.0)
    return found


def figure_intervals(
    runs: Sequence[Rows],
    tasks: int,
    draws: int = 1000,
    seed: int = 0,
    lower_is_better: bool = False,
    confidence: float = 0.95,
) -> dict[str, Interval | None]:
    """Intervals of a matrix' figures over the scored rows, and over runs if there are several.

    Args:
        runs: For each run the score of every row in every cell, ``{(after, task): scores}``; `after` = -1 is the base
            model. Rows of a task are the same in every cell and run.
        tasks: Number of tasks.
        draws: Draws of the bootstrap, if one is needed.
        seed: Seed of the draws.
        lower_is_better: Whether the scores are losses.
        confidence: Probability that such intervals hold the true figure.

    Returns:
        Lower and upper bound by figure; None if a figure cannot be computed. For one run whose rows are all right or
        wrong the intervals are combined from Wilson's; for scores without a proportion, and for several runs, they are
        bootstrapped, and never narrower than the proportions' own intervals give.
    """
    shares = [is_share(scores) for run in runs for scores in run.values()]
    if all(shares) and len(runs) == 1:
        return _from_cells(runs, tasks, lower_is_better, confidence)
    drawn = bootstrap_intervals(runs, tasks, draws, confidence, seed, lower_is_better=lower_is_better)
    if not any(shares):
        return drawn
    combined = _from_cells(runs, tasks, lower_is_better, confidence)
    return {name: _hull(bounds, combined.get(name)) for name, bounds in drawn.items()}


def _hull(one: Interval | None, two: Interval | None) -> Interval | None:
    if one is None or two is None:
        return one
    return min(one[0], two[0]), max(one[1], two[1])


def _from_cells(
    runs: Sequence[Rows], tasks: int, lower_is_better: bool, confidence: float
) -> dict[str, Interval | None]:
    """Intervals of the mean over runs of each figure, combined from those of the cells."""
    found: dict[str, Interval | None] = {}
    matrices = [
        matrix_of({place: float(np.mean(scores)) for place, scores in run.items()}, tasks, lower_is_better)
        for run in runs
    ]
    for name in SUMMARY:
        if any(matrix.summary[name] is None for matrix in matrices):
            found[name] = None
            continue
        parts, groups = [], []
        for run, matrix in zip(runs, matrices, strict=True):
            for place, value in coefficients(name, matrix).items():
                parts.append((value / len(runs), run[place]))
                groups.append(place[1])
        found[name] = combined_interval(parts, confidence, groups)
    return found
