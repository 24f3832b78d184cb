"""A score with the facts needed to trust it, and the rows that it was computed from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from hf_continual.intervals import mean_interval, spread_interval

Status = Literal["MEASURED", "NOT_RUN", "ERROR"]


@dataclass(frozen=True)
class Score:
    """A measured value.

    Args:
        value: The value, or None if it was not measured.
        n: Number of rows or tokens it is a mean over.
        protocol: How it was measured, in a word or two.
        standard_error: Standard error of the mean, or None.
        status: MEASURED, NOT_RUN or ERROR.
        lower_is_better: Whether it is a loss.
        error: What went wrong, if the status is ERROR.
        interval: 95 % interval of the value: Wilson's for a proportion, so that 16 of 16 right is not certainty, Student's for
            other means; None if it is not known.
    """

    value: float | None
    n: int
    protocol: str
    standard_error: float | None = None
    status: Status = "MEASURED"
    lower_is_better: bool = False
    error: str | None = None
    interval: tuple[float, float] | None = None

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain data; `error` and `interval` only if they are set."""
        plain = asdict(self)
        for name in ("error", "interval"):
            if plain[name] is None:
                del plain[name]
        return plain


@dataclass(frozen=True)
class RowScore:
    """The contribution of one row.

    Args:
        score: Its score, usually 0 to 1, or a loss.
        weight: Its weight in the mean: 1, or the number of its tokens.
        prediction: The model's answer, as text.
        reference: The right answer.
        also: Other values of the same row by name, such as ``{"nll": 0.7}``.
        turns: The assistant turns that the score is a mean over, if several of a conversation are scored.
    """

    score: float
    weight: float = 1.0
    prediction: str = ""
    reference: str = ""
    also: dict[str, float] = field(default_factory=dict)
    turns: tuple[RowScore, ...] = ()


@dataclass(frozen=True)
class Scored:
    """The scores of all rows of a task, in their order, and how they were obtained.

    Args:
        rows: One entry per row.
        protocol: How they were scored, in a word or two.
        lower_is_better: Whether the score is a loss.
    """

    rows: Sequence[RowScore]
    protocol: str
    lower_is_better: bool = False

    @property
    def score(self) -> Score:
        """Weighted mean over the rows; `n` is the sum of the weights."""
        values, weights = [r.score for r in self.rows], [r.weight for r in self.rows]
        return weighted_mean(values, weights, self.protocol, self.lower_is_better)

    @property
    def nll(self) -> Score | None:
        """Negative log-likelihood per token of an answer in nats, averaged over rows; None if it was not computed."""
        if not self.rows or any("nll" not in r.also for r in self.rows):
            return None
        values = [r.also["nll"] for r in self.rows]
        return weighted_mean(values, [1.0] * len(values), "answer NLL per token", lower_is_better=True)

    @property
    def right(self) -> list[bool]:
        """Which rows have the full score of 1."""
        return [r.score == 1 for r in self.rows]


def weighted_mean(
    values: Sequence[float], weights: Sequence[float], protocol: str, lower_is_better: bool = False
) -> Score:
    """Weighted mean with the standard error of a ratio of sums over independent rows.

    Args:
        values: One value per row.
        weights: One weight per row; rows of weight 0 do not count.
        protocol: How the values were obtained.
        lower_is_better: Whether the value is a loss.

    Returns:
        The score; NOT_RUN if there is nothing to average.
    """
    used = [(v, w) for v, w in zip(values, weights, strict=True) if w > 0]
    total = math.fsum(w for _, w in used)
    if not used:
        return Score(None, 0, protocol, status="NOT_RUN", lower_is_better=lower_is_better)
    centre = math.fsum(v * w for v, w in used) / total
    n = len(used)
    spread = None
    if n > 1:
        spread = math.sqrt(math.fsum((w * (v - centre)) ** 2 for v, w in used) * n / (n - 1)) / total
    return Score(
        centre,
        round(total),
        protocol,
        spread,
        lower_is_better=lower_is_better,
        interval=_interval(used, centre, spread),
    )


def _interval(used: Sequence[tuple[float, float]], centre: float, spread: float | None) -> tuple[float, float] | None:
    values = [value for value, _ in used]
    if len({weight for _, weight in used}) == 1:
        return mean_interval(values)
    return spread_interval(centre, spread, len(used)) if spread else None
