"""Runs side by side: what each arm reached, and whether the difference is more than chance."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from hf_continual.atomic_files import DamagedFile
from hf_continual.report.read import Sweep
from hf_continual.report.run import Run

FIGURES = ("overall_performance", "learning_accuracy", "backward_transfer", "forgetting")


def arms_of(runs: Sequence[Run], sweeps: Sequence[Sweep]) -> dict[str, dict[str, Any]]:
    """The arms: groups of runs that differ in their seed, or single runs.

    Args:
        runs: Runs whose scores point the same way.
        sweeps: Sweeps among the folders, whose means and intervals are taken as they are.

    Returns:
        By name ``runs`` and ``figures``: ``{figure: {"mean", "interval", "each"}}``; changes of general benchmarks too.
    """
    known = {
        (folder.resolve().name, arm): entry for folder, data in sweeps for arm, entry in data.get("arms", {}).items()
    }
    found: dict[str, dict[str, Any]] = {}
    for group in dict.fromkeys(run.group for run in runs):
        own = [run for run in runs if run.group == group]
        told = known.get((own[0].sweep, group.rpartition("/")[2]), {}).get("figures", {})
        figures = {}
        for name in FIGURES:
            each = [run.summary.get(name) for run in own]
            if (values := [v for v in each if v is not None]) and len(values) == len(each):
                given = told.get(name) or {}
                interval = given.get("interval") or (own[0].intervals.get(name) if len(own) == 1 else None)
                mean = given.get("mean", statistics.fmean(values))
                figures[name] = {"mean": mean, "interval": interval, "each": values}
        figures |= _changes(own)
        if figures:
            found[group] = {"runs": [run.name for run in own], "figures": figures}
    return found


def _changes(own: Sequence[Run]) -> dict[str, Any]:
    """How far each general benchmark moved from the base model, over the runs of an arm."""
    found = {}
    for name in dict.fromkeys(name for run in own for name in run.gauges):
        each = [(run.gauges.get(name) or {}).get("change") for run in own]
        values = [v for v in each if v is not None]
        if values and len(values) == len(each):
            cells = [own[0].gauges[name].get("base") or {}, *(own[0].gauges[name].get("after") or {}).values()]
            lower = any(cell.get("lower_is_better") for cell in cells)
            found[name] = {"mean": statistics.fmean(values), "interval": None, "each": values, "lower_is_better": lower}
    return found


def comparisons(runs: Sequence[Run], sweeps: Sequence[Sweep], missing: list[str]) -> list[dict[str, Any]]:
    """Paired tests: those of each sweep, and every other run against the first of them.

    Args:
        runs: All runs.
        sweeps: The sweeps among the folders; their tests are theirs.
        missing: Sentences on runs that cannot be paired are added here.

    Returns:
        Per test ``first``, ``second``, ``task`` (``"overall"``: all tasks) and the fields of `PairedTest`.
    """
    found = [
        {"task": "overall", **test, "scope": folder.resolve().name}
        for folder, data in sweeps
        for test in data.get("comparisons", ())
    ]
    alone = [run for run in runs if not run.sweep and run.kind in ("run", "demo") and run.tasks and run.scores]
    if len(alone) < 2:
        return found
    from hf_continual.stream.compare import compare_rows, last_rows

    rows: dict[str, Any] = {}
    for run in alone:
        try:
            rows[run.name] = last_rows(run.folder, run.tasks)
        except (FileNotFoundError, DamagedFile, ValueError, KeyError) as error:
            missing.append(f"{run.name} is not compared: {error}")
    names = list(rows)
    for second in names[1:]:
        try:
            tests = compare_rows(rows[names[0]], rows[second], names[0], second)
        except ValueError as error:
            missing.append(f"{names[0]} and {second} are not compared: {error}")
            continue
        found += [
            {"first": names[0], "second": second, "task": task, **t.to_dict(), "scope": ""} for task, t in tests.items()
        ]
    return found


def one_direction(runs: Sequence[Run], missing: list[str]) -> list[Run]:
    """The runs that can share a picture: those whose scores point the same way as the first one's.

    Args:
        runs: All runs.
        missing: Sentences on the others are added here.

    Returns:
        Runs with scores.
    """
    scored = [run for run in runs if run.tasks and (run.scores or run.summary)]
    for run in scored:
        if run.lower != scored[0].lower:
            kinds = ("scores", "losses") if run.lower else ("losses", "scores")
            missing.append(
                f"{run.name} is measured in {kinds[1]} and {scored[0].name} in {kinds[0]}: {run.name} is left out of pictures that "
                f"show several runs."
            )
    return [run for run in scored if run.lower == scored[0].lower]


def jsonable(arms: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The arms as plain data."""
    return {name: {"runs": list(arm["runs"]), "figures": dict(arm["figures"])} for name, arm in arms.items()}
