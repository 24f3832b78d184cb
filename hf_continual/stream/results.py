"""What a run measured, as one file: matrices, figures with intervals, gauges. Rebuilt from the tasks' folders."""

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
from hf_continual.stream.prepare import Prepared
from hf_continual.stream.scores import read_stage
from hf_continual.stream.stored_run import BASE_FOLDER, row_values
from hf_continual.tasks import Task

PACKAGES = ("hf-continual", "torch", "transformers", "trl", "peft", "accelerate", "datasets")


@dataclass(frozen=True)
class StreamResult:
    """What `train_stream` returns.

    Args:
        output_dir: The run's folder.
        matrix: The accuracy matrix of the last task's line, with the base row if it was measured.
        results: All that was measured, as in ``continual_results.json``.
    """

    output_dir: Path
    matrix: AccuracyMatrix
    results: dict[str, Any]


def collect(prepared: Prepared, output_dir: Path, base_dir: Path) -> StreamResult:
    """Read everything that was measured, as far as the run has come.

    Args:
        prepared: The plan made ready.
        output_dir: The run's folder.
        base_dir: The folder that holds ``base/`` and its predictions; a sweep's runs share one.

    Returns:
        What was measured.
    """
    stages = {t.name: read_stage(output_dir / t.folder) for t in prepared.stream}
    base = read_stage(base_dir / BASE_FOLDER)
    line = prepared.scored(prepared.stream.lineage(prepared.stream[len(prepared.stream) - 1]))
    names = [t.name for t in line]
    matrix = _matrix(line, stages, base, lambda cell: cell.get("value"), _lower(stages, base, names))
    losses = _matrix(line, stages, base, lambda cell: cell.get("nll", {}).get("value"), True)
    results: dict[str, Any] = {
        "format": 1,
        "model": prepared.plan.model.path,
        "complete": all((output_dir / t.folder).is_dir() for t in prepared.stream),
        "tasks": names,
        "metric": protocols([s[n] for n in names for s in stages.values() if n in s]),
        "matrix": {"scores": matrix.scores, "base": matrix.base, "lower_is_better": matrix.lower_is_better},
        "summary": {**matrix.summary, "per_task_minimum": matrix.per_task_minimum},
        "intervals": _intervals(prepared, line, output_dir, base_dir, matrix),
        "nll": {"scores": losses.scores, "base": losses.base, "summary": losses.summary},
        "gauges": _gauges(prepared, stages, base, matrix),
        "curves": {
            t.name: read_curve(output_dir / t.folder) for t in prepared.stream if prepared.plan.tasks[t.index].curve
        },
        "cells": {name: _all_cells(prepared, cells) for name, cells in (("base", base), *stages.items())},
        "versions": {name: _version(name) for name in PACKAGES},
    }
    return StreamResult(output_dir, matrix, results)


def _matrix(line: Sequence[Task], stages: dict, base: dict, read: Any, lower: bool) -> AccuracyMatrix:
    """Rows after each scored task of a line, columns the same tasks, up to the first row that is not there yet.

    A row after that would stand in the place of another task's.
    """
    there = itertools.takewhile(lambda t: stages[t.name], line)
    rows = [[read(stages[t.name].get(c.name, {})) for c in line] for t in there]
    first = [read(base.get(c.name, {})) for c in line] if base and rows else None
    return AccuracyMatrix(rows, first if first and any(v is not None for v in first) else None, lower)


def protocols(cells: Iterable[Mapping[str, Any]]) -> str | None:
    """How cells were scored, each way once; None where nothing was."""
    found = list(dict.fromkeys(c["protocol"] for c in cells if c.get("protocol")))
    return "; ".join(found[:3] + [f"and {len(found) - 3} more"] * (len(found) > 3)) or None


def _lower(stages: dict, base: dict, names: Sequence[str]) -> bool:
    flags = {
        cell.get("lower_is_better", False) for s in [base, *stages.values()] for n, cell in s.items() if n in names
    }
    return flags == {True}


def _intervals(
    prepared: Prepared, line: Sequence[Task], output_dir: Path, base_dir: Path, matrix: AccuracyMatrix
) -> dict[str, Any] | None:
    """95 % intervals over the scored rows, from the stored predictions."""
    draws = prepared.plan.evaluation.bootstrap
    if not draws or len(matrix.scores) < len(line) or not line:
        return None
    return figure_intervals(
        [row_scores(line, output_dir, base_dir)], len(line), draws, lower_is_better=matrix.lower_is_better
    )


def row_scores(line: Sequence[Task], output_dir: Path, base_dir: Path) -> dict[tuple[int, int], list[float]]:
    """The score of every row in every cell of a matrix, from the stored predictions."""
    rows: dict[tuple[int, int], list[float]] = {}
    for i, stage in enumerate([None, *line], start=-1):
        place = (base_dir, BASE_FOLDER) if stage is None else (output_dir, stage.folder)
        # Those of a score that is not believed are written again before they are read.
        believed = read_stage(place[0] / place[1])
        for j, column in enumerate(line):
            if column.name in believed:
                rows[i, j] = row_values(read_lines(predictions_file(*place, column.name)))
    return rows


def _gauges(prepared: Prepared, stages: dict, base: dict, matrix: AccuracyMatrix) -> dict[str, Any]:
    """Each gauge before, after every task, and its change; GeRe's harmonic mean where it is a share."""
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
    """The scores of a moment, with what was not asked for as NOT_RUN."""
    names = [*(t.name for t in prepared.scored()), *prepared.gauges]
    return {name: cells.get(name, Score(None, 0, "", status="NOT_RUN").to_dict()) for name in names}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
