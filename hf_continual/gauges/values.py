"""Compute the values of a gauge from its rows' measurements, each with its standard error."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

NLL, TOKENS, EXACT, KL = range(4)


@dataclass(frozen=True)
class Value:
    """A value and its standard error over the gauge's rows; None with fewer than two rows."""

    value: float
    se: float | None


def ratio(above: np.ndarray, below: np.ndarray) -> Value:
    """sum(above) / sum(below) over rows, with the linearised error of a ratio of sums.

    Args:
        above: One number per row, shape (R).
        below: One positive number per row, shape (R).

    Returns:
        The ratio and its standard error sqrt(R / (R - 1) * sum (a_r - ratio b_r)^2) / sum b.
    """
    number, total = len(above), float(below.sum())
    value = float(above.sum()) / total
    if number < 2:
        return Value(value, None)
    spread = float(((above - value * below) ** 2).sum())
    return Value(value, math.sqrt(number / (number - 1) * spread) / total)


def values_of(rows: np.ndarray, start: np.ndarray | None, kl: bool, by_row: bool = False) -> dict[str, Value]:
    """The values of a gauge.

    Args:
        rows: Each row's current measurements, shape (R, 4) with the columns of `hf_continual.gauges.measure.COLUMNS`.
        start: The same before the first step, or None.
        kl: Whether the KL was measured.
        by_row: Whether each row counts once, like answers in a plan's scores, regardless of length; otherwise each
            token counts.

    Returns:
        ``loss`` in nats per token (with `by_row` the mean over rows of each row's), ``exact`` (fraction of rows), with
        a start ``loss_change``, ``loss_ratio`` and ``exact_change`` paired row by row, and ``kl`` in nats per token.
    """
    one = np.ones(len(rows))
    if by_row:
        each = np.stack([rows[:, TOKENS], one, one, rows[:, TOKENS]], axis=1)
        rows, start = rows / each, None if start is None else start / each
    tokens = one if by_row else rows[:, TOKENS]
    found = {"loss": ratio(rows[:, NLL], tokens), "exact": ratio(rows[:, EXACT], one)}
    if start is not None:
        found["loss_change"] = ratio(rows[:, NLL] - start[:, NLL], tokens)
        found["exact_change"] = ratio(rows[:, EXACT] - start[:, EXACT], one)
        if start[:, NLL].sum() > 0:
            found["loss_ratio"] = ratio(rows[:, NLL], start[:, NLL])
    if kl:
        found["kl"] = ratio(rows[:, KL], tokens)
    return found
