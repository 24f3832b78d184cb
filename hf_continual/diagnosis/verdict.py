"""The rule of the verdict. Pure functions on the scores of the held rows, the half that no short training is shown.

For every held row there is a score (higher is better) of five models:

    s0  BEFORE                      b0  BEFORE's base
    s1  AFTER                       c   the control: the base after the same short training
    r   AFTER after a short training on the other half

A short training teaches two things: what was known and is hidden, and what can be learned about the held rows from the
others (their format, their common answers). The control shows the second alone, so only what exceeds it was remembered.
Every comparison is paired by rows; "shown" means that the interval of the difference (95 % unless `alpha` says otherwise)
lies on one side. With a margin m:

* **none**: a loss s0 - s1 of m or more is excluded.
* **spurious**: a loss is shown; r regains more than half of it, shown; r exceeds the control, shown, by at least m on average.
* **real**: a loss is shown; r is shown to stay below s0; and that r exceeds the control by m or more is excluded. Without a
  control: r is shown to regain less than half, and a gain of m or more over AFTER is excluded.
* **undecided**: everything else. Always so where the short training did not even teach the half that it was shown, or where
  the control does not stay below BEFORE by m, since then the held rows can be answered without remembering them.

The margin m is 0.05 by default; it and the half were fixed before any model was diagnosed (recipes/biography/README.md).
Rows count as independent, also those of one group: where answers of a group are right or wrong together, the intervals are too
narrow. The tests of one verdict must all hold, so they need no correction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from hf_continual.diagnosis.result import Difference, Judgement, Verdict
from hf_continual.intervals import combined_interval
from hf_continual.paired import paired_test

MARGIN, ALPHA = 0.05, 0.05
TAUGHT = 0.8  # of BEFORE's score on the shown half: less was not taught

HALF = "regained over half"

Scores = Mapping[str, Sequence[float]]


def judge(
    held: Scores,
    taught: float | None = None,
    margin: float = MARGIN,
    alpha: float = ALPHA,
    draws: int = 1000,
    seed: int = 0,
) -> Judgement:
    """Decide what happened to the held rows.

    Args:
        held: One score per held row, higher being better: ``before``, ``after``, ``recovered``, and where there is a control
            ``base`` and ``control``.
        taught: Score of the recovered model on the rows that it was shown, as a share of BEFORE's on them; None: not known.
        margin: Difference that counts, in the unit of the scores.
        alpha: 1 - the confidence of each interval.
        draws: Resamples of the rows for the confidence.
        seed: Seed of the resamples.

    Returns:
        The verdict, its reason, confidence and tests.
    """
    rows = {name: np.asarray(values, float) for name, values in held.items()}
    tests = {name: _compared(low, high, alpha, seed) for name, (low, high) in _pairs(rows).items()}
    tests[HALF] = _over_half(rows, alpha)
    bounds = {name: test.interval or (test.difference, test.difference) for name, test in tests.items()}
    verdict, reason = _decide(bounds, {n: t.difference for n, t in tests.items()}, taught, margin)
    return Judgement(verdict, reason, _confidence(rows, verdict, taught, margin, draws, seed), tests)


def _pairs(rows: Mapping[str, np.ndarray]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """What is compared: the second minus the first."""
    found = {
        "lost": (rows["after"], rows["before"]),
        "regained": (rows["after"], rows["recovered"]),
        "still missing": (rows["recovered"], rows["before"]),
    }
    if "control" in rows:
        found["over the control"] = (rows["control"], rows["recovered"])
        found["room over the control"] = (rows["control"], rows["before"])
    return found


def _compared(low: np.ndarray, high: np.ndarray, alpha: float, seed: int) -> Difference:
    found = paired_test({"held": list(low)}, {"held": list(high)}, draws=1999, seed=seed, confidence=1 - alpha)
    return Difference(found.difference, found.interval, found.p_value)


def _over_half(rows: Mapping[str, np.ndarray], alpha: float) -> Difference:
    """By how much the recovered model exceeds the middle between AFTER and BEFORE, on the same rows."""
    parts = [(1.0, rows["recovered"]), (-0.5, rows["before"]), (-0.5, rows["after"])]
    middle = (rows["before"] + rows["after"]) / 2
    return Difference(
        float((rows["recovered"] - middle).mean()), combined_interval([(c, list(v)) for c, v in parts], 1 - alpha)
    )


def _decide(
    bounds: Mapping[str, tuple[float, float]], means: Mapping[str, float], taught: float | None, margin: float
) -> tuple[Verdict, str]:
    """The rule of the module's head; bounds and means of the differences that `_pairs` names."""
    lost, control = bounds["lost"], bounds.get("over the control")
    if lost[1] < margin:
        return (
            "none",
            f"the held rows lost {means['lost']:.3f} ({lost[0]:.3f} to {lost[1]:.3f}): a loss of {margin:g} is excluded.",
        )
    if lost[0] <= 0:
        return "undecided", (
            f"whether anything was forgotten is not shown: the held rows lost {means['lost']:.3f} ({lost[0]:.3f} to "
            f"{lost[1]:.3f}). More rows would tell."
        )
    if taught is not None and taught < TAUGHT:
        return "undecided", (
            f"the short training did not teach the half that it was shown ({taught:.0%} of BEFORE's score on it; {TAUGHT:.0%} is "
            f"needed). Give it more steps or another learning rate."
        )
    if control is None:
        return _without_control(bounds, means, margin)
    over, missing = means["over the control"], bounds["still missing"]
    if bounds["room over the control"][0] < margin:
        return "undecided", (
            f"the control, which never learned these rows, stays only {means['room over the control']:.3f} below BEFORE: the held "
            f"rows can be answered without remembering them. Give rows that do not follow from each other."
        )
    said = (
        f"{means['regained']:+.3f} of {means['lost']:.3f} lost came back on rows that were not shown; the control "
        f"is exceeded by {over:+.3f} ({control[0]:+.3f} to {control[1]:+.3f})"
    )
    if bounds[HALF][0] > 0 and control[0] > 0 and over >= margin:
        return "spurious", f"{said}: most of it was hidden, not gone."
    if control[1] < margin and missing[0] > 0:
        return "real", f"{said}: no more is there than a fresh learner has."
    return (
        "undecided",
        f"{said}: neither that most was hidden nor that no more is there than a fresh learner has is shown.",
    )


def _without_control(
    bounds: Mapping[str, tuple[float, float]], means: Mapping[str, float], margin: float
) -> tuple[Verdict, str]:
    """What the recovery alone can show: that nothing comes back, never that what comes back was remembered."""
    gained = bounds["regained"]
    said = f"{means['regained']:+.3f} of {means['lost']:.3f} lost came back on rows that were not shown"
    if bounds[HALF][1] < 0 and gained[1] < margin:
        return "real", f"{said}; {margin:g} is excluded."
    return "undecided", (
        f"{said}, and without a control it is open whether that was remembered or follows from the rows that were shown. Name the "
        f"model that BEFORE was trained from (base)."
    )


def _confidence(
    rows: Mapping[str, np.ndarray], verdict: Verdict, taught: float | None, margin: float, draws: int, seed: int
) -> float:
    """Share of resamples of the rows in which the verdict's conditions hold for the means themselves."""
    rng = np.random.default_rng(seed)
    pairs = {name: high - low for name, (low, high) in _pairs(rows).items()}
    pairs[HALF] = rows["recovered"] - (rows["before"] + rows["after"]) / 2
    n = len(next(iter(pairs.values())))
    counts = rng.multinomial(n, np.full(n, 1 / n), size=draws) / n
    means = {name: counts @ change for name, change in pairs.items()}
    same = 0
    for k in range(draws):
        point = {name: float(values[k]) for name, values in means.items()}
        same += _decide({name: (v, v) for name, v in point.items()}, point, taught, margin)[0] == verdict
    return same / draws
