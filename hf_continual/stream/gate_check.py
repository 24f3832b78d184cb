"""One check of a release gate: does a figure, with what chance can have done to it, stay within its limit?

Every limit is brought into the form "q must be at least L", where q is the figure, its negative (of a `max`), or its change
to the better (of a `max_drop`, L is then minus the drop that is allowed). With the interval of q:

* **pass**: the interval lies at or above L.
* **regression**: q is below L, and the interval lies below L (of a change: below 0). Here the interval is that of
  1 - alpha / k for k checks (Bonferroni), so that alpha is the chance of any false alarm.
* **insufficient**: neither. So few rows, or so small a difference, that the interval holds L (of a change mostly both 0 and L).

A run passes only if every check does, which needs no correction (intersection-union test, Berger 1982).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from hf_continual.intervals import Interval, mean_interval
from hf_continual.paired import paired_test
from hf_continual.stream.gate_limits import Limit

Verdict = Literal["pass", "regression", "insufficient"]


@dataclass(frozen=True)
class Measured:
    """A figure and what chance can have done to it.

    Args:
        value: The figure, or its change to the better.
        n: Rows that it rests on.
        interval: Its interval at a confidence; None where the rows say nothing about it.
        p_value: Of a change: probability of one at least as large by chance. None of a level.
        since: Of a change: what it was measured from.
    """

    value: float
    n: int
    interval: Callable[[float], Interval | None]
    p_value: float | None = None
    since: str = ""


@dataclass(frozen=True)
class Check:
    """A limit and whether it is kept.

    Args:
        name: The figure.
        kind: min, max or max_drop.
        limit: The limit.
        verdict: pass, regression or insufficient.
        value: The figure; of a max_drop its change to the better, so that a drop is below 0.
        interval: Interval of the value at confidence 1 - alpha.
        n: Rows.
        p_value: Of a change: probability of one at least as large by chance.
        rows_needed: About so many rows would pass with the chance `power`, if a change is 0 or a level what was measured.
        since: Of a change: what it was measured from.
        where: Where the limit is written.
    """

    name: str
    kind: str
    limit: float
    verdict: Verdict
    value: float
    interval: Interval | None
    n: int
    p_value: float | None = None
    rows_needed: int | None = None
    since: str = ""
    where: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain data."""
        return asdict(self)

    @property
    def sentence(self) -> str:
        """What was found, in a line without its end."""
        span = "" if self.interval is None else f" ({self.interval[0]:+.3f} to {self.interval[1]:+.3f})"
        if self.kind == "max_drop":
            p = "" if self.p_value is None else f", p {'< 0.001' if self.p_value < 0.001 else f'= {self.p_value:.3f}'}"
            text = f"{self.name} changed by {self.value:+.3f}{span} from {self.since}{p}; a drop of {self.limit:g} is allowed"
        else:
            bound = "at least" if self.kind == "min" else "at most"
            text = f"{self.name} is {self.value:.3f}{span.replace('+', '')}, {bound} {self.limit:g} is asked for"
        return f"{text}, n = {self.n:,}{f' [{self.where}]' if self.where else ''}"


def level(values: Sequence[float]) -> Measured:
    """The mean over rows."""
    return Measured(math.fsum(values) / len(values), len(values), lambda confidence: mean_interval(values, confidence))


def change(first: dict[str, list[float]], second: dict[str, list[float]], since: str) -> Measured:
    """The change from scores to others of the same rows, higher being better; of several tasks the mean over them.

    Args:
        first: One score per row, by task.
        second: The same tasks and rows, in the same order.
        since: What `first` is.

    Returns:
        The change, with the p-value of `paired_test`.
    """
    found = paired_test(first, second)

    def interval(confidence: float) -> Interval | None:
        if not found.better and not found.worse and found.interval is None:
            return 0.0, 0.0  # scores that are no shares, the same in every row
        return paired_test(first, second, confidence=confidence).interval

    return Measured(found.difference, found.n, interval, found.p_value, since)


def judged(limit: Limit, found: Measured, checks: int, alpha: float, power: float) -> Check:
    """Hold a figure against its limit.

    Args:
        limit: The limit.
        found: The figure.
        checks: Number of checks of the gate.
        alpha: Chance of a false alarm over all of them.
        power: Chance of passing for which the rows needed are counted.

    Returns:
        The check.
    """
    turned = -1.0 if limit.kind == "max" else 1.0
    least = -limit.value if limit.kind == "max_drop" else turned * limit.value
    sure, surer = (_turned(found.interval(1 - a), turned) for a in (alpha, alpha / checks))
    value = turned * found.value
    verdict: Verdict = "insufficient"
    if sure is not None and sure[0] >= least:
        verdict = "pass"
    elif surer is not None and value < least and surer[1] < (0.0 if limit.kind == "max_drop" else least):
        verdict = "regression"
    needed = None
    if verdict == "insufficient" and sure is not None:
        distance = limit.value if limit.kind == "max_drop" else value - least
        needed = _rows_needed(found.n, value - sure[0], distance, alpha, power)
    return Check(
        limit.name, limit.kind, limit.value, verdict, found.value, found.interval(1 - alpha), found.n, found.p_value, needed,
        found.since, limit.where,
    )  # fmt: skip


def _turned(interval: Interval | None, sign: float) -> Interval | None:
    if interval is None or sign > 0:
        return interval
    return -interval[1], -interval[0]


def _rows_needed(n: int, below: float, distance: float, alpha: float, power: float) -> int | None:
    """Rows at which the interval clears the limit with the chance `power`, its width falling with the root of the rows."""
    if distance <= 0 or below <= 0:
        return None
    from scipy import stats

    sure = float(stats.norm.ppf(1 - alpha / 2))
    ratio = below / distance * (1 + float(stats.norm.ppf(power)) / sure)
    # Two digits: it is an estimate.
    needed = math.ceil(n * ratio**2)
    step = 10 ** max(len(str(needed)) - 2, 0)
    return max(n + 1, math.ceil(needed / step) * step)
