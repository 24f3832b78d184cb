"""Is a method better than plain fine-tuning at its best learning rate? And who is on the frontier of learning and retention?

The best plain run is the one with the best overall performance among those that were made. It was chosen on the same rows,
which favours it a little: a method that is better than it is better than it seems.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

Verdict = Literal["better", "within", "worse"]
MEASURED_ON = ("learning_accuracy", "backward_transfer")
WORDS: dict[str, str] = {
    "better": "better than the best plain run",
    "within": "within the best plain run",
    "worse": "worse than the best plain run",
}


def verdict_of(test: Mapping[str, Any]) -> Verdict:
    """What a paired test against the best plain run says.

    Args:
        test: The fields of `PairedTest`; differences above 0 favour the method.

    Returns:
        ``better`` or ``worse`` if the 95 % interval of the difference is on that side of 0; else ``within``: a plain run at
        another learning rate reaches as much, as far as these rows can tell.
    """
    low, high = test.get("interval") or (0.0, 0.0)
    return "better" if low > 0 else "worse" if high < 0 else "within"


def sentence(test: Mapping[str, Any], lower: bool = False) -> str:
    """A comparison with the best plain run as a sentence.

    Args:
        test: The fields of `PairedTest`, with ``first``, ``second``, and optionally ``learning_rate``, of the plain run.
        lower: Whether scores are losses.

    Returns:
        For example ``replay: +1.2 points against the best plain run (plain-6.67e-05, learning rate 6.67e-05), 95 % interval -3.0 to
        +5.1: its gain is within what a learning rate gives``.
    """
    scale, unit, form = (1.0, "", "+.3f") if lower else (100.0, " points", "+.1f")
    rate = f", learning rate {test['learning_rate']:.3g}" if test.get("learning_rate") else ""
    span = test.get("interval")
    shown = f", 95 % interval {scale * span[0]:{form}} to {scale * span[1]:{form}}" if span else ""
    ends = {
        "better": "better than plain fine-tuning at its best rate",
        "within": "its gain is within what a learning rate gives",
        "worse": "worse than plain fine-tuning at its best rate",
    }
    return (
        f"{test['second']}: {scale * test['difference']:{form}}{unit} against the best plain run ({test['first']}{rate}){shown}: "
        f"{ends[verdict_of(test)]}"
    )


def best_plain(arms: Mapping[str, Mapping[str, Any]], names: Sequence[str], lower: bool = False) -> str | None:
    """The plain arm with the best overall performance.

    Args:
        arms: By name ``figures``, and for plain arms ``plain: {learning_rate: ...}``.
        names: The arms to choose from; the first of equals.
        lower: Whether scores are losses.

    Returns:
        Its name; None if no plain arm was measured.
    """
    found = {}
    for name in names:
        mean = (arms[name].get("figures", {}).get("overall_performance") or {}).get("mean")
        if arms[name].get("plain") is not None and mean is not None:
            found[name] = mean
    return (min if lower else max)(found, key=lambda name: found[name]) if found else None


def frontier(arms: Mapping[str, Mapping[str, Any]], lower: bool = False) -> list[str]:
    """The arms that no other beats both in learning and in retention.

    Args:
        arms: By name ``figures``, with `learning_accuracy` and `backward_transfer`.
        lower: Whether scores are losses; backward transfer is positive for a gain either way.

    Returns:
        Their names, the best learner first; arms without both figures are left out.
    """
    points: dict[str, tuple[float, float]] = {}
    for name, arm in arms.items():
        learned, kept = (((arm.get("figures") or {}).get(key) or {}).get("mean") for key in MEASURED_ON)
        if learned is not None and kept is not None and not math.isnan(learned) and not math.isnan(kept):
            points[name] = (-learned if lower else learned, kept)
    best = [
        name
        for name, (x, y) in points.items()
        if not any(a >= x and b >= y and (a, b) != (x, y) for a, b in points.values())
    ]
    return sorted(best, key=lambda name: (-points[name][0], -points[name][1]))
