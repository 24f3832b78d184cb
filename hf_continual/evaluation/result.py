"""One number and what must be known to believe it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Score:
    """A measured value.

    Args:
        value: The value, or None when it was not measured.
        n: Number of rows or tokens it is a mean over.
        protocol: How it was measured, in a word or two.
        standard_error: Standard error of the mean, or None.
        status: MEASURED, NOT_RUN or ERROR.
    """

    value: float | None
    n: int
    protocol: str
    standard_error: float | None = None
    status: Literal["MEASURED", "NOT_RUN", "ERROR"] = "MEASURED"

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain data."""
        return asdict(self)


def proportion(hits: int, n: int, protocol: str) -> Score:
    """A share of rows with the standard error of a binomial."""
    if n == 0:
        return Score(None, 0, protocol, status="NOT_RUN")
    share = hits / n
    return Score(share, n, protocol, math.sqrt(share * (1 - share) / n))


def mean_of(values: list[float], protocol: str) -> Score:
    """Mean of values with its standard error."""
    n = len(values)
    if n == 0:
        return Score(None, 0, protocol, status="NOT_RUN")
    centre = sum(values) / n
    spread = math.sqrt(sum((v - centre) ** 2 for v in values) / (n - 1) / n) if n > 1 else None
    return Score(centre, n, protocol, spread)
