"""A folder's results against their sources: the scores after every task, and the predictions for every row.

A task's folder inside its run has both next to it; a folder that was moved or pushed only has its own scores.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_continual.atomic_files import DamagedFile, read_json, read_lines
from hf_continual.evaluation.files import SCORES, file_name, predictions_file
from hf_continual.hub.facts import RESULTS, Evaluation
from hf_continual.intervals import figure_intervals, is_share

BASE = "base"
_FIGURES = {
    "op": "overall_performance",
    "bwt": "backward_transfer",
    "fwt": "forward_transfer",
    "forgetting": "forgetting",
}


@dataclass(frozen=True)
class Moment:
    """Where the scores of a row of the matrix are kept.

    Args:
        name: The task that was learned last, or ``"base"``.
        folder: The folder of this row's model, or ``base``.
        shown: The folder's name in messages.
    """

    name: str
    folder: Path
    shown: str

    def cells(self) -> Mapping[str, Any]:
        """The scores written for this row, by task; empty if there are none."""
        try:
            data = read_json(self.folder / SCORES)
        except (FileNotFoundError, DamagedFile):
            return {}
        return {k: v for k, v in data.items() if isinstance(v, dict)} if isinstance(data, dict) else {}

    def rows(self, task: str) -> list[dict[str, Any]] | None:
        """The predictions of this row's model on a task; None if they are missing."""
        try:
            lines = read_lines(predictions_file(self.folder.parent, self.folder.name, task))
        except (FileNotFoundError, DamagedFile):
            return None
        return lines if lines and all(isinstance(line.get("score"), int | float) for line in lines) else None


def check_evidence(evaluation: Evaluation, folder: Path) -> Iterator[str]:
    """Find disagreements between results and their sources.

    Args:
        evaluation: The contents of ``continual_results.json``.
        folder: The folder that holds it.

    Yields:
        str: A sentence that names both files.
    """
    if not evaluation.matrix or evaluation.row_names is not None:
        return
    base, *moments = _moments(evaluation, folder)
    lines = [(base, evaluation.base_row or ()), *zip(moments, evaluation.matrix, strict=True)]
    for moment, row in lines:
        if moment is None:
            continue
        for task, value in zip(evaluation.tasks, row, strict=False):
            rows = evaluation.rows.get(task) if moment is moments[-1] else None
            yield from _cell(moment, task, value, rows)
    last = moments[-1]
    for gauge in evaluation.gauges:
        if base is not None and gauge.base is not None:
            yield from _cell(base, gauge.name, gauge.base, None)
        if last is not None and gauge.status == "MEASURED":
            yield from _cell(last, gauge.name, gauge.value, gauge.n)
    yield from _intervals(evaluation, [base, *moments])


def _moments(evaluation: Evaluation, folder: Path) -> list[Moment | None]:
    """The base model and each row of the matrix, as far as their scores are kept."""
    here = folder.resolve()
    found: list[Moment | None] = []
    places = [here.parent / BASE, here.parent.parent / BASE]  # a sweep's runs share one
    found.append(next((_moment(BASE, place, here) for place in places if (place / SCORES).is_file()), None))
    for task in evaluation.tasks[: len(evaluation.matrix) - 1]:
        pattern = re.compile(rf"task-\d+-{re.escape(file_name(task))}")
        own = [p for p in sorted(here.parent.glob("task-*")) if pattern.fullmatch(p.name) and (p / SCORES).is_file()]
        found.append(_moment(task, own[0], here) if len(own) == 1 else None)
    last = evaluation.tasks[len(evaluation.matrix) - 1]
    return [*found, Moment(last, here, "")]


def _moment(name: str, place: Path, here: Path) -> Moment:
    return Moment(name, place, os.path.relpath(place, here).replace(os.sep, "/") + "/")


def _cell(moment: Moment, task: str, value: float | None, rows: int | None) -> Iterator[str]:
    """Check one cell against its score, and against the mean of its rows."""
    cell = moment.cells().get(task)
    file = f"{moment.shown}{SCORES.as_posix()}"
    after = "" if not moment.shown else f" of {moment.name}" if moment.name == BASE else f" after {moment.name}"
    if cell is not None and not same(cell.get("value"), value):
        yield f"{RESULTS} says {value!r} for {task!r}{after}, but {file} says {cell.get('value')!r}."
        return
    if cell is not None and rows is not None and isinstance(cell.get("n"), int) and cell["n"] != rows:
        yield f"{RESULTS} says {rows} rows for {task!r}{after}, but {file} says {cell['n']}."
    lines = moment.rows(task) if value is not None else None
    if lines is not None and not math.isclose(found := _mean(lines), value or 0.0, rel_tol=1e-9, abs_tol=1e-9):
        yield f"{RESULTS} says {value!r} for {task!r}{after}, but its {len(lines)} predictions give {found!r}."


def _mean(lines: list[dict[str, Any]]) -> float:
    weights = [line.get("weight", 1.0) for line in lines]
    return math.fsum(line["score"] * w for line, w in zip(lines, weights, strict=True)) / (math.fsum(weights) or 1.0)


def _intervals(evaluation: Evaluation, moments: list[Moment | None]) -> Iterator[str]:
    """Compute intervals again from the predictions, if all rows are right or wrong: others depend on random draws."""
    if not evaluation.intervals:
        return
    rows: dict[tuple[int, int], list[float]] = {}
    for after, (moment, row) in enumerate(
        zip(moments, [evaluation.base_row or (), *evaluation.matrix], strict=True), -1
    ):
        for j, value in enumerate(row):
            if value is None:
                continue
            lines = None if moment is None else moment.rows(evaluation.tasks[j])
            if lines is None or not is_share([line["score"] for line in lines]):
                return
            rows[after, j] = [float(line["score"]) for line in lines]
    found = figure_intervals([rows], len(evaluation.tasks), lower_is_better=evaluation.lower_is_better)
    for name, pair in evaluation.intervals.items():
        bounds = found.get(_FIGURES.get(name, ""))
        if bounds is not None and not all(math.isclose(a, b, abs_tol=1e-9) for a, b in zip(pair, bounds, strict=True)):
            yield (
                f"{RESULTS} says that {name} lies between {pair[0]:.4f} and {pair[1]:.4f}, but the predictions give "
                f"{bounds[0]:.4f} to {bounds[1]:.4f}. Run the plan again to rewrite the card."
            )


def same(a: Any, b: float | None) -> bool:
    """Whether two numbers are equal, to the precision of JSON."""
    if a is None or b is None:
        return a is b
    return isinstance(a, int | float) and math.isclose(a, b, rel_tol=1e-12, abs_tol=1e-12)
