"""Rules on gauges: when to stop, when to roll back, which weights were best."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hf_continual.gauges.values import Value

# Values of all gauges at one step, by "gauge/measure".
Point = Mapping[str, Value]

SATURATED = "task saturated"
_RULE = re.compile(r"\s*(\S+)\s*([<>])\s*([-+]?[\d.]+(?:[eE][-+]?\d+)?)(?:\s+for\s+(\d+)(?:\s+evaluations?)?)?\s*")
_KEYS = ("gauge", "above", "below", "for", "noise")


@dataclass(frozen=True)
class Rule:
    """A limit on a gauge that must be crossed beyond the gauge's noise, several times in a row.

    Args:
        gauge: ``gauge/measure``, such as ``general/loss_change``.
        sign: 1 if values above the limit cross it, -1 if values below do.
        limit: The limit, in the gauge's unit.
        times: Evaluations in a row that must cross it.
        noise: Standard errors by which each must cross it.
    """

    gauge: str
    sign: int
    limit: float
    times: int = 2
    noise: float = 2.0

    def __str__(self) -> str:
        return f"{self.gauge} {'>' if self.sign > 0 else '<'} {self.limit:g} for {self.times}"

    def passes(self, point: Point) -> bool:
        """Whether a point is on the right side of the limit, ignoring its noise."""
        return self.sign * (point[self.gauge].value - self.limit) <= 0

    def crossed(self, points: Sequence[Point]) -> str | None:
        """Why the rule holds after these points, or None.

        Args:
            points: All points so far, the newest last.

        Returns:
            The reason, as text.
        """
        last = points[-self.times :]
        if len(last) < self.times:
            return None
        for point in last:
            value = point[self.gauge]
            if not self.sign * (value.value - self.limit) > self.noise * (value.se or 0.0):
                return None
        value = last[-1][self.gauge]
        error = "" if value.se is None else f" +- {value.se:.2g}"
        often = f", {self.times} evaluations in a row" if self.times > 1 else ""
        return (
            f"{self.gauge} is {value.value:.4g}{error}, {'above' if self.sign > 0 else 'below'} {self.limit:g}{often}"
        )


@dataclass(frozen=True)
class Saturated:
    """The new task is learned: its loss no longer falls (Spurious Forgetting's early stop, arXiv 2501.13453, section 5).

    Args:
        gauge: The loss that must have stopped falling.
        share: Fraction of the total drop so far that the last evaluations must have added for training to continue.
        times: Number of evaluations considered.
    """

    gauge: str = "task/loss"
    share: float = 0.02
    times: int = 2

    def __str__(self) -> str:
        return SATURATED

    def crossed(self, points: Sequence[Point]) -> str | None:
        """Why the rule holds after these points, or None."""
        values = [point[self.gauge].value for point in points]
        if len(values) < self.times + 2:
            return None
        before, now = min(values[: -self.times]), min(values[-self.times :])
        fall = values[0] - before
        if fall <= 0 or before - now > self.share * fall:
            return None
        return (
            f"{self.gauge} is {now:.4g}: its last {self.times} evaluations brought it down by {max(before - now, 0.0):.2g}, "
            f"less than {100 * self.share:g} % of the {fall:.3g} before"
        )


def read_rules(owner: str, key: str, given: Any) -> tuple[Rule, ...]:
    """Parse rules that a user writes.

    Args:
        owner: Class whose option it is.
        key: The option.
        given: None, a rule, or a list of rules. A rule is ``"general/loss_change > 0.1 for 2"``, or a mapping with ``gauge``
            and ``above`` or ``below``, and optionally ``for`` (evaluations in a row, 2) and ``noise`` (standard errors,
            2.0).

    Returns:
        The rules.

    Raises:
        TypeError: If a rule is neither text nor a mapping.
        ValueError: If one cannot be understood.
    """
    if given is None:
        return ()
    if isinstance(given, str | Mapping):
        given = [given]
    if not isinstance(given, Sequence):
        raise TypeError(f"{owner}({key}={given!r}) must be a rule or a list of rules, got {type(given).__name__}.")
    return tuple(_rule(owner, key, rule) for rule in given)


def _rule(owner: str, key: str, given: Any) -> Rule:
    example = "'general/loss_change > 0.1 for 2' or {gauge: general/loss_change, above: 0.1, for: 2}"
    if isinstance(given, str):
        if (met := _RULE.fullmatch(given)) is None:
            raise ValueError(f"{owner}({key}={given!r}) is not a rule. Write it as {example}.")
        gauge, sign, limit, times = met.groups()
        return _checked(owner, key, given, Rule(gauge, 1 if sign == ">" else -1, float(limit), int(times or 2)))
    if not isinstance(given, Mapping):
        raise TypeError(f"{owner}({key}) has {given!r} ({type(given).__name__}), but a rule is {example}.")
    if unknown := [k for k in given if k not in _KEYS]:
        raise ValueError(f"{owner}({key}) has a rule with the key {unknown[0]!r}. Known are {', '.join(_KEYS)}.")
    if "gauge" not in given or ("above" in given) == ("below" in given):
        raise ValueError(
            f"{owner}({key}) has the rule {dict(given)!r}: it needs gauge, and above or below. For example {example}."
        )
    limit = given["above"] if "above" in given else given["below"]
    numbers = {"above or below": limit, "for": given.get("for", 2), "noise": given.get("noise", 2.0)}
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"{owner}({key}): {name} must be a number, got {value!r} ({type(value).__name__}).")
    sign = 1 if "above" in given else -1
    rule = Rule(str(given["gauge"]), sign, float(limit), int(numbers["for"]), float(numbers["noise"]))
    return _checked(owner, key, given, rule)


def _checked(owner: str, key: str, given: Any, rule: Rule) -> Rule:
    if rule.times < 1 or rule.noise < 0:
        raise ValueError(f"{owner}({key}={given!r}): 'for' must be at least 1 evaluation and noise at least 0.")
    return rule


def read_weights(owner: str, key: str, given: Any) -> dict[str, float]:
    """Parse the sum of gauges that is smallest for the best weights.

    Args:
        owner: Class whose option it is.
        key: The option.
        given: None, a gauge, a list of gauges, or a mapping of gauges to their weights in the sum.

    Returns:
        Weight by ``gauge/measure``; empty for None. Measures where higher is better have negative weights.

    Raises:
        TypeError: If it is none of these, or a weight is not a number.
    """
    if given is None:
        return {}
    if isinstance(given, str):
        given = [given]
    if isinstance(given, Sequence):
        given = {str(gauge): -1.0 if "/exact" in str(gauge) else 1.0 for gauge in given}
    if not isinstance(given, Mapping) or not given:
        raise TypeError(
            f"{owner}({key}={given!r}) must be gauges whose sum should be small, such as ['task/loss', 'general/loss'], or a "
            f"mapping of gauges to weights."
        )
    for gauge, weight in given.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float):
            raise TypeError(f"{owner}({key}): the weight of {gauge!r} must be a number, got {weight!r}.")
    return {str(gauge): float(weight) for gauge, weight in given.items()}
