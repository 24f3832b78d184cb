"""A run's measurements in one file: matrices, figures with intervals, gauges. Rebuilt from the tasks' folders."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from hf_continual.atomic_files import read_lines
from hf_continual.evaluation.files import predictions_file
from hf_continual.evaluation.result import Score
from hf_continual.intervals import figure_intervals
from hf_continual.metrics import AccuracyMatrix, harmonic_mean
from hf_continual.stream.curve import read_curve
from hf_continual.stream.prepared import Prepared
from hf_continual.stream.scores import read_stage, row_values
from hf_continual.stream.stored_run import BASE_FOLDER
from hf_continual.tasks import Task

PACKAGES = ("hf-continual", "torch", "transformers", "trl", "peft", "accelerate", "datasets")


@dataclass(frozen=True)
class StreamResult:
    """Result of `train_stream`.

    Args:
        output_dir: The run's folder.
        matrix: The accuracy matrix of the last task's line, with the base row if it was measured.
        results: All measurements, as in ``continual_results.json``.
    """

    output_dir: Path
    matrix: AccuracyMatrix
    results: dict[str, Any]


def collect(prepared: Prepared, output_dir: Path, base_dir: Path) -> StreamResult:
    """Read all measurements of the run so far.

    Args:
        prepared: The prepared plan.
        output_dir: The run's folder.
        base_dir: The folder that holds ``base/`` and its predictions; a sweep's runs share one.

    Returns:
        The measurements.
    """
    stages = {t.name: read_stage(output_dir / t.folder) for t in prepared.runs}
    base = read_stage(base_dir / BASE_FOLDER)
    line, moments = prepared.line, moments_of(prepared)
    names = [t.name for t in line]
    rows = [stages[t.name] if t is not None else None for t in moments]
    matrix = _matrix(names, rows, base, lambda cell: cell.get("value"), _lower(stages, base, names))
    losses = _matrix(names, rows, base, lambda cell: cell.get("nll", {}).get("value"), True)
    results: dict[str, Any] = {
        "format": 1,
        "model": prepared.plan.model.path,
        "complete": all((output_dir / t.folder).is_dir() for t in prepared.runs),
        "between_tasks": "merge" if prepared.plan.merge else prepared.plan.between_tasks,
        "tasks": names,
        "metric": protocols([s[n] for n in names for s in stages.values() if n in s]),
        "matrix": {"scores": matrix.scores, "base": matrix.base, "lower_is_better": matrix.lower_is_better},
        "summary": {**matrix.summary, "per_task_minimum": matrix.per_task_minimum},
        "intervals": _intervals(prepared, output_dir, base_dir, matrix),
        "nll": {"scores": losses.scores, "base": losses.base, "summary": losses.summary},
        "gauges": _gauges(prepared, stages, base, matrix),
        "curves": {
            t.name: read_curve(output_dir / t.folder) for t in prepared.runs if prepared.plan.tasks[t.index].curve
        },
        "cells": {name: _all_cells(prepared, cells) for name, cells in (("base", base), *stages.items())},
        "versions": {name: _version(name) for name in PACKAGES},
    }
    return StreamResult(output_dir, matrix, results)


def moments_of(prepared: Prepared) -> list[Task | None]:
    """The run that each row of the matrix comes after; None for the rows before a joint run's, which do not exist."""
    if prepared.joint is None:
        return list(prepared.line)
    return [*[None] * (len(prepared.line) - 1), prepared.joint] if prepared.line else []


def _matrix(names: Sequence[str], moments: Sequence[dict | None], base: dict, read: Any, lower: bool) -> AccuracyMatrix:
    """A row of scores for each moment, columns the scored tasks, up to the first row that is not there yet.

    A row after that would stand in the place of another task's. A moment that does not exist (None) has an empty row; its
    scores are known to be missing.
    """
    there = list(itertools.takewhile(lambda cells: cells is None or cells, moments))
    rows = [[read((cells or {}).get(name, {})) for name in names] for cells in there]
    rows = rows if any(there) else []
    first = [read(base.get(name, {})) for name in names] if base and rows else None
    return AccuracyMatrix(rows, first if first and any(v is not None for v in first) else None, lower)


def protocols(cells: Iterable[Mapping[str, Any]]) -> str | None:
    """How cells were scored, each protocol once; None if no cell was."""
    found = list(dict.fromkeys(c["protocol"] for c in cells if c.get("protocol")))
    return "; ".join(found[:3] + [f"and {len(found) - 3} more"] * (len(found) > 3)) or None


def _lower(stages: dict, base: dict, names: Sequence[str]) -> bool:
    flags = {
        cell.get("lower_is_better", False) for s in [base, *stages.values()] for n, cell in s.items() if n in names
    }
    return flags == {True}


def _intervals(prepared: Prepared, output_dir: Path, base_dir: Path, matrix: AccuracyMatrix) -> dict[str, Any] | None:
    """95 % intervals over the scored rows, from the stored predictions."""
    draws, line = prepared.plan.evaluation.bootstrap, prepared.line
    if not draws or len(matrix.scores) < len(line) or not line:
        return None
    return figure_intervals(
        [row_scores(prepared, output_dir, base_dir)], len(line), draws, lower_is_better=matrix.lower_is_better
    )


def row_scores(prepared: Prepared, output_dir: Path, base_dir: Path) -> dict[tuple[int, int], list[float]]:
    """The score of every row in every cell of the matrix of a run, from the stored predictions."""
    rows: dict[tuple[int, int], list[float]] = {}
    line = prepared.line
    places = [(i, output_dir, run.folder) for i, run in enumerate(moments_of(prepared)) if run is not None]
    for i, folder, stage in [(-1, base_dir, BASE_FOLDER), *places]:
        # Predictions of a score that fails its checksum are rewritten before they are read.
        believed = read_stage(folder / stage)
        for j, column in enumerate(line):
            if column.name in believed:
                rows[i, j] = row_values(read_lines(predictions_file(folder, stage, column.name)))
    return rows


def _gauges(prepared: Prepared, stages: dict, base: dict, matrix: AccuracyMatrix) -> dict[str, Any]:
    """Each gauge before, after every task, and its change; GeRe's harmonic mean if it is a fraction."""
    found: dict[str, Any] = {}
    for name in prepared.gauges:
        before = base.get(name)
        after = {stage: cells[name] for stage, cells in stages.items() if name in cells}
        last = after[next(reversed(after))] if after else {}
        entry: dict[str, Any] = {"base": before, "after": after, "change": None}
        if before and last and None not in (before["value"], last["value"]):
            entry["change"] = last["value"] - before["value"]
        if last and not last.get("lower_is_better", False) and not matrix.lower_is_better:
            entry["harmonic_mean_with_tasks"] = harmonic_mean(last["value"], matrix.overall_performance)
        found[name] = entry
    return found


def _all_cells(prepared: Prepared, cells: dict[str, Any]) -> dict[str, Any]:
    """The scores after a task, with those not requested as NOT_RUN."""
    names = [*(t.name for t in prepared.scored()), *prepared.gauges]
    return {name: cells.get(name, Score(None, 0, "", status="NOT_RUN").to_dict()) for name in names}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
