"""Runs side by side: what each arm reached, and whether the difference is more than chance."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from hf_continual.atomic_files import DamagedFile
from hf_continual.best_plain import best_plain, verdict_of
from hf_continual.report.read import Sweep
from hf_continual.report.run import Run
from hf_continual.stream.baselines import DEFAULT_RATE

FIGURES = ("overall_performance", "learning_accuracy", "backward_transfer", "forgetting")


def arms_of(runs: Sequence[Run], sweeps: Sequence[Sweep]) -> dict[str, dict[str, Any]]:
    """The arms: groups of runs that differ in their seed, or single runs.

    Args:
        runs: Runs whose scores point the same way.
        sweeps: Sweeps among the folders, whose means and intervals are taken as they are.

    Returns:
        By name ``runs`` and ``figures``: ``{figure: {"mean", "interval", "each"}}``; changes of general benchmarks too; and
        ``plain: {"learning_rate"}`` for plain fine-tuning.
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
            if (plain := _plain(own[0])) is not None:
                found[group]["plain"] = plain
    return found


def _plain(run: Run) -> dict[str, Any] | None:
    """The learning rate of a run that fine-tuned plainly, one task after the other; None for every other run."""
    config = run.config
    if run.kind == "demo":
        return {"learning_rate": config.get("learning_rate")} if config.get("arm") == "sequential" else None
    if run.kind not in ("run", "sweep") or config.get("between_tasks", "") != "continue":
        return None
    tasks = [task for task in config.get("tasks", ()) if isinstance(task, Mapping)]
    if config.get("methods") or any(task.get("methods") for task in tasks):
        return None
    rate = (config.get("sft") or {}).get("learning_rate", DEFAULT_RATE)
    return {"learning_rate": None if rate is None else float(rate)}


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
    rows = _rows_of(runs, missing)
    return found + _against(next(iter(rows), ""), rows, missing)


def against_plain(
    runs: Sequence[Run], arms: Mapping[str, Mapping[str, Any]], sweeps: Sequence[Sweep], lower: bool
) -> list[dict[str, Any]]:
    """Paired tests over all tasks against the best plain run: those of each sweep, and of the single runs.

    Args:
        runs: All runs.
        arms: What `arms_of` gives.
        sweeps: The sweeps among the folders.
        lower: Whether scores are losses.

    Returns:
        Per test ``first`` (the plain run), ``second``, ``learning_rate``, ``verdict`` and the fields of `PairedTest`.
    """
    found = [
        {"task": "overall", **test, "scope": folder.resolve().name}
        for folder, data in sweeps
        for test in data.get("best_plain", ())
    ]
    rows, heard = _rows_of(runs, []), []
    first = best_plain(arms, [name for name in rows if name in arms], lower)
    if first is not None:
        rate = arms[first]["plain"]["learning_rate"]
        for test in _against(first, rows, heard):
            if test["task"] == "overall":
                found.append({**test, "learning_rate": rate, "verdict": verdict_of(test)})
    return found


def _rows_of(runs: Sequence[Run], missing: list[str]) -> dict[str, Any]:
    """The rows' last scores of the runs that belong to no sweep, if there are two of them."""
    alone = [run for run in runs if not run.sweep and run.kind in ("run", "demo") and run.tasks and run.scores]
    if len(alone) < 2:
        return {}
    from hf_continual.stream.compare import last_rows

    rows: dict[str, Any] = {}
    for run in alone:
        try:
            rows[run.name] = last_rows(run.folder, run.tasks)
        except (FileNotFoundError, DamagedFile, ValueError, KeyError) as error:
            missing.append(f"{run.name} is not compared: {error}")
    return rows


def _against(first: str, rows: Mapping[str, Any], missing: list[str]) -> list[dict[str, Any]]:
    """Tests of every other run against one of them."""
    from hf_continual.stream.compare import compare_rows

    found = []
    for second in (name for name in rows if name != first):
        try:
            tests = compare_rows(rows[first], rows[second], first, second)
        except ValueError as error:
            missing.append(f"{first} and {second} are not compared: {error}")
            continue
        found += [
            {"first": first, "second": second, "task": task, **t.to_dict(), "scope": ""} for task, t in tests.items()
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
    return {
        name: {"runs": list(arm["runs"]), "figures": dict(arm["figures"])}
        | ({"plain": dict(arm["plain"])} if "plain" in arm else {})
        for name, arm in arms.items()
    }
