"""What a release gate allows: a file of thresholds, or the margin of a comparison with another run.

    baseline: out/released      # a run that drops are measured from, on the same rows
    margin: 0.02                # with a baseline: drop that is allowed unless another limit is given
    alpha: 0.05                 # chance, over all checks, that a run is called worse that is not
    power: 0.8                  # chance of passing for which the rows needed are counted
    overall_performance: {min: 0.8, max_drop: 0.01}
    forgetting: {max: 0.1}
    backward_transfer: {min: -0.05}
    tasks:
      "*": {max_drop: 0.05}     # every task that is not named
      law: {min: 0.7}
    gauges:
      general text: {max_drop: 0.05, max: 3.2}

`min` and `max` limit the figure as it was measured. `max_drop` limits by how much it got worse, so of a loss by how much it
rose: from the baseline; without one, of a task from its score right after it was learned, of a gauge from the base model's. In
the folder of `hf-continual train` it is from the score before training.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_continual.metrics import SUMMARY
from hf_continual.named import did_you_mean
from hf_continual.stream.plan_lines import Key, PlanError, Where, read_yaml

MARGIN, ALPHA, POWER = 0.02, 0.05, 0.8
SETTINGS = ("baseline", "margin", "alpha", "power")
LIMITS = ("min", "max", "max_drop")
EVERY = "*"


@dataclass(frozen=True)
class Limit:
    """One limit of one figure.

    Args:
        name: The figure: one of `hf_continual.metrics.SUMMARY`, ``tasks.NAME`` or ``gauges.NAME``.
        kind: min, max or max_drop.
        value: The limit, in the figure's unit.
        where: Where it is written, such as ``gate.yaml, line 7``; empty for the margin of a comparison.
    """

    name: str
    kind: str
    value: float
    where: str = ""


@dataclass(frozen=True)
class Limits:
    """Everything that a gate checks.

    Args:
        baseline: Run that drops are measured from, or None.
        margin: Drop from the baseline that is allowed of every task, gauge and overall; None: only what is named.
        alpha: Chance, over all checks, that a run is called worse that is not; 1 - alpha is each interval's confidence.
        power: Chance of passing for which the rows needed are counted.
        named: The limits by name of the figure and kind.
    """

    baseline: Path | None = None
    margin: float | None = None
    alpha: float = ALPHA
    power: float = POWER
    named: Mapping[tuple[str, str], Limit] = field(default_factory=dict)


def read_limits(
    against: str | os.PathLike[str], margin: float | None = None, alpha: float | None = None, power: float | None = None
) -> Limits:
    """Read what ``--against`` names.

    Args:
        against: Folder of a run, or a YAML file of thresholds.
        margin: Of a comparison with a run: drop that is allowed; 0.02 by default.
        alpha: As in the file; 0.05 by default.
        power: As in the file; 0.8 by default.

    Returns:
        The limits.

    Raises:
        PlanError: If the file cannot be used as it stands, or numbers are given as well.
        FileNotFoundError: If there is no such file or folder.
    """
    place = Path(against)
    given = {k: v for k, v in (("margin", margin), ("alpha", alpha), ("power", power)) if v is not None}
    if place.is_dir():
        where = Where("the command line")
        for key, value in given.items():
            where.overridden[(key,)] = f"--{key} {value}"
        return _limits({"margin": MARGIN, **given, "baseline": str(place)}, where)
    if not place.exists():
        raise FileNotFoundError(
            f"--against {place}: there is no such folder or file (looked in {Path.cwd()}). Name the folder of a run, or a "
            f"YAML file of thresholds."
        )
    data, where = read_yaml(place)
    if not isinstance(data, dict):
        raise where.error((), f"thresholds are a mapping of figures to limits, not {type(data).__name__}.")
    if given:
        key = next(iter(given))
        raise PlanError(f"--{key} {given[key]} and {place}: write {key}: {given[key]} in the file instead.")
    return _limits(data, where)


def _limits(data: Mapping[str, Any], where: Where) -> Limits:
    known = (*SETTINGS, *SUMMARY, "tasks", "gauges")
    for key in data:
        if key not in known:
            raise where.error((key,), f"unknown key {key!r}.{did_you_mean(key, known)} Known are {', '.join(known)}.")
    named: dict[tuple[str, str], Limit] = {}
    for figure in (k for k in data if k in SUMMARY):
        named |= _of_figure(figure, data[figure], (figure,), where)
    for group in (g for g in ("tasks", "gauges") if g in data):
        if not isinstance(data[group], Mapping):
            raise where.error(
                (group,),
                f"must be a mapping of names to limits, such as {{NAME: {{min: 0.7}}}}, and is {data[group]!r}.",
            )
        for name, limits in data[group].items():
            named |= _of_figure(f"{group}.{name}", limits, (group, name), where)
    baseline, margin = data.get("baseline"), data.get("margin")
    if baseline is not None and not isinstance(baseline, str):
        raise where.error(("baseline",), f"must be the folder of a run, and is {baseline!r}.")
    if margin is not None:
        margin = _number(margin, ("margin",), where, least=0)
        if baseline is None:
            raise where.error(
                ("margin",), "is the drop allowed from a baseline, and there is none. Add baseline: FOLDER, or drop it."
            )
    if not named and margin is None:
        raise where.error((), "there is nothing to check. Add a limit, such as forgetting: {max: 0.1}.")
    _check_drops(named, baseline, where)
    shares = {k: _share(data[k], (k,), where) for k in ("alpha", "power") if data.get(k) is not None}
    return Limits(None if baseline is None else Path(baseline), margin, named=named, **shares)


def _of_figure(name: str, limits: Any, path: tuple[Key, ...], where: Where) -> dict[tuple[str, str], Limit]:
    if not isinstance(limits, Mapping) or not limits:
        raise where.error(path, f"must hold limits, such as {{min: 0.7}} or {{max_drop: 0.02}}, and is {limits!r}.")
    found = {}
    for kind, value in limits.items():
        if kind not in LIMITS:
            raise where.error(
                (*path, kind), f"unknown limit {kind!r}.{did_you_mean(kind, LIMITS)} Known are {', '.join(LIMITS)}."
            )
        number = _number(value, (*path, kind), where, least=0 if kind == "max_drop" else None)
        found[name, kind] = Limit(name, kind, number, where.of((*path, kind)))
    low, high = limits.get("min"), limits.get("max")
    if low is not None and high is not None and low > high:
        raise where.error((*path, "min"), f"{low} is above max: {high}, so that nothing can pass. Exchange them.")
    return found


def _check_drops(named: Mapping[tuple[str, str], Limit], baseline: str | None, where: Where) -> None:
    """Refuse a drop that has nothing to be measured from."""
    for figure in SUMMARY:
        if (figure, "max_drop") not in named:
            continue
        if figure != "overall_performance":
            other = "max: ..." if figure == "forgetting" else "min: ..."
            raise where.error(
                (figure, "max_drop"), f"{figure} of two runs cannot be paired by rows. Limit it with {other} instead."
            )
        if baseline is None:
            raise where.error(
                (figure, "max_drop"),
                "a drop of it is measured from another run. Add baseline: FOLDER, or limit forgetting with max: ...",
            )


def _number(value: Any, path: tuple[Key, ...], where: Where, least: float | None = None) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise where.error(path, f"must be a number, and is {value!r}. Shares are written 0.8, not 80.")
    if least is not None and value < least:
        raise where.error(path, f"must be at least {least:g}, and is {value}: a drop is written without a sign.")
    return float(value)


def _share(value: Any, path: tuple[Key, ...], where: Where) -> float:
    number = _number(value, path, where)
    if not 0 < number < 1:
        raise where.error(path, f"must lie between 0 and 1, both excluded, and is {value}.")
    return number
