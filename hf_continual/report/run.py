"""What a report knows about one run: plain data, read from its folder."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Cell = float | None

# Characters that XML does not allow, halves of surrogate pairs, which UTF-8 does not, and marks that turn the direction of
# what follows, by which a text can be made to read as another.
_UNFIT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff\u202a-\u202e\u2066-\u2069]")


def clean(text: Any) -> str:
    """A text that can be written into HTML and SVG once it is escaped.

    Args:
        text: Any value.

    Returns:
        Its text; characters that XML or UTF-8 do not allow, and overrides of the direction of text, became U+FFFD.
    """
    return _UNFIT.sub("\ufffd", str(text))


def short(text: Any, length: int = 28) -> str:
    """A name on one line of a picture; a long one keeps its beginning and its end."""
    name = re.sub(r"\s+", " ", clean(text))
    if len(name) > length:
        name = f"{name[: length - 11]}…{name[-10:]}"
    # matplotlib leaves labels that begin with an underscore out of a legend.
    return f" {name}" if name.startswith("_") else name


@dataclass(frozen=True)
class Stage:
    """One row of the accuracy matrix: the base model, or a model after a task.

    Args:
        label: ``"base model"`` or the task's name.
        name: Its name in the names of predictions, such as ``task-00-law``.
        folder: The folder with its scores.
        index: Number of tasks learned by then.
    """

    label: str
    name: str
    folder: Path
    index: int


@dataclass(frozen=True)
class Point:
    """A gauge's value during training.

    Args:
        gauge: Name of the gauge.
        step: Optimizer step over the whole sequence.
        value: The value.
        error: Its standard error, or None.
    """

    gauge: str
    step: float
    value: float
    error: float | None = None


@dataclass(frozen=True)
class Event:
    """What a rule did during training: ``stop``, ``rollback`` or ``keep_best``."""

    task: str
    step: float
    at: float
    kind: str
    rule: str
    reason: str


@dataclass
class Timeline:
    """Gauges during training, over the optimizer steps of the whole sequence.

    Args:
        points: Values by step.
        events: What rules did.
        boundaries: First step of each task, and the task's name.
    """

    points: list[Point] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    boundaries: list[tuple[float, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Layers:
    """Evidence layer by layer.

    Args:
        title: What it is.
        source: The file it was read from, in the run's folder.
        kind: ``"weights"`` (share of each model), ``"sides"`` (KIF's counts) or ``"lines"`` (one number per layer and name).
        values: By layer; ``{name: number}`` each.
        unit: Of the numbers.
        across: What it is over, where that is not the layers.
    """

    title: str
    source: str
    kind: str
    values: Mapping[str, Mapping[str, float]]
    unit: str = ""
    across: str = "layer, from the input upwards"


@dataclass(frozen=True)
class Change:
    """A row that was answered right, and wrong later.

    Args:
        task: Its task.
        row: Its number in the test rows.
        kind: ``"lost"`` (wrong at the end) or ``"regained"`` (right again at the end).
        path: Right or wrong at each stage, oldest first.
        prompt: The prompt, or "" where it was not stored.
        reference: The right answer.
        said: Stage and prediction: the last right one before the fall, the first wrong one after it, and the last one.
    """

    task: str
    row: int
    kind: str
    path: tuple[tuple[str, bool], ...]
    prompt: str
    reference: str
    said: tuple[tuple[str, str], ...]


@dataclass
class Changes:
    """Predictions that changed.

    Args:
        counts: By task: ``rows``, ``lost``, ``regained``, ``kept`` (right whenever asked since it was first right) and ``never``.
        shown: Those with their text; at most as many as were asked for.
        graded: Tasks whose scores are not 0 or 1, where a row counts as right from 0.5 on.
    """

    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    shown: list[Change] = field(default_factory=list)
    graded: list[str] = field(default_factory=list)

    def total(self, kind: str) -> int:
        """Number of rows of a kind over all tasks."""
        return sum(count[kind] for count in self.counts.values())


@dataclass
class Run:
    """One run, as its folder tells it. What the folder does not hold is empty, and named in `missing`.

    Args:
        name: Name in the report; no two runs have the same.
        folder: Its folder.
        kind: ``run``, ``sweep``, ``demo``, ``train``, ``model`` or ``evidence``.
        group: Runs of one group differ in their seed alone: the arm of a sweep.
        sweep: Folder of the sweep that it belongs to, or "".
        model: What it was trained from.
        tasks: Names of the scored tasks, in order.
        metric: How they were scored.
        lower: Whether scores are losses.
        scores: The accuracy matrix.
        base: Its base row, or None.
        summary: Figures of the matrix by name.
        intervals: 95 % intervals of these.
        losses: The matrix of the answers' losses: ``scores``, ``base``, ``summary``.
        cells: By stage and task, with n and standard error.
        gauges: General benchmarks: ``base``, ``after``, ``change``.
        curves: Scores during training: by task and step, by scored task.
        stages: The stages, oldest first.
        timeline: Gauges during training.
        changes: Predictions that changed.
        layers: Evidence by layer.
        diagnoses: Name of the file and what it holds.
        config: The plan or the settings, without paths.
        versions: Of packages.
        cost: What each task took.
        missing: What is not there, each a sentence.
    """

    name: str
    folder: Path
    kind: str
    group: str = ""
    sweep: str = ""
    model: str | None = None
    tasks: list[str] = field(default_factory=list)
    metric: str | None = None
    lower: bool = False
    scores: list[list[Cell]] = field(default_factory=list)
    base: list[Cell] | None = None
    summary: dict[str, Any] = field(default_factory=dict)
    intervals: dict[str, Any] = field(default_factory=dict)
    losses: dict[str, Any] = field(default_factory=dict)
    cells: dict[str, Any] = field(default_factory=dict)
    gauges: dict[str, Any] = field(default_factory=dict)
    curves: dict[str, Any] = field(default_factory=dict)
    stages: list[Stage] = field(default_factory=list)
    timeline: Timeline = field(default_factory=Timeline)
    changes: Changes = field(default_factory=Changes)
    layers: list[Layers] = field(default_factory=list)
    diagnoses: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, Any] = field(default_factory=dict)
    cost: list[dict[str, Any]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    def score(self, after: int, task: int) -> Cell:
        """A cell of the matrix; `after` = -1 is the base model. None where it was not measured."""
        row = (self.base or []) if after < 0 else self.scores[after]
        return row[task] if task < len(row) else None
