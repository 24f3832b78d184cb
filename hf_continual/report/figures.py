"""Pictures of what was kept: accuracy matrices, forgetting curves, the comparison of methods, learning against retention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from hf_continual.report.run import Run, short
from hf_continual.report.style import MUTED, Look, Picture, grid, heat, legend, look, looks, percent, scale_of

FEW = 7  # tasks that one panel shows as lines
TITLES = {
    "overall_performance": "overall performance",
    "learning_accuracy": "right after learning",
    "backward_transfer": "backward transfer",
    "forgetting": "forgetting",
}


def matrix_picture(run: Run, key: str) -> Picture:
    """The accuracy matrix of a run with its base row."""
    names = run.tasks[: len(run.scores)]
    rows = [*([("base model", run.base)] if run.base is not None else []), *zip(names, run.scores, strict=True)]
    factor, unit = scale_of(run.lower)
    values = np.full((len(rows), len(run.tasks)), np.nan)
    for i, (_, row) in enumerate(rows):
        values[i, : len(row)] = [np.nan if v is None else factor * v for v in row]
    many = len(run.tasks) > 12
    cell = 0.44 if many else 0.72
    figure = Figure(
        figsize=(2.3 + cell * max(len(run.tasks), 3), 1.5 + (0.27 if many else 0.36) * len(rows)), layout="constrained"
    )
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    found = values[np.isfinite(values)]
    share = not run.lower and bool(len(found)) and 0 <= found.min() and found.max() <= 100
    low, high = (0.0, 100.0) if share or not len(found) else (float(found.min()), float(found.max()))
    heat(axis, values, low, high, run.lower, ".2f" if run.lower else ".0f", 7.5 if many else 9)
    axis.set_xticks(
        np.arange(len(run.tasks)) + 0.5,
        [short(t, 22) for t in run.tasks],
        rotation=40,
        ha="right",
        rotation_mode="anchor",
    )
    axis.set_yticks(np.arange(len(rows)) + 0.5, [short(name, 22) for name, _ in rows])
    axis.set_xlabel("scored on")
    axis.set_ylabel("after learning")
    if run.base is not None:
        axis.axhline(1, color=MUTED, linewidth=1.2)
    caption = f"{run.metric or 'score'}, {unit if run.lower else 'in %'}. Empty: not measured."
    return Picture(key, "matrix", f"Accuracy matrix: {run.name}", caption, figure)


def forgetting_picture(runs: Sequence[Run], key: str) -> Picture:
    """The score of every task after each stage: lines of one run, or a panel per task with a line per run."""
    if len(runs) == 1 and len(runs[0].tasks) <= FEW:
        return _forgetting_of_one(runs[0], key)
    tasks = list(dict.fromkeys(task for run in runs for task in run.tasks))
    own = looks(runs)
    columns = 5 if len(tasks) > 8 else 4 if len(tasks) > 3 else max(len(tasks), 2)
    figure, axes = grid(len(tasks), columns, 10.2 / max(columns, 3), 1.75, sharex=True, sharey=True)
    factor, unit = scale_of(runs[0].lower)
    every: list[float] = []
    for axis, task in zip(axes, tasks, strict=True):
        for run in runs:
            points = _points(run, task)
            every += [y for _, y in points]
            one = sum(r.group == run.group for r in runs) == 1
            _line(axis, points, own[run.group], factor, thin=not one)
        for group, points in _means(runs, task).items():
            _line(axis, points, own[group], factor)
        learned = [run.tasks.index(task) + 1 for run in runs if task in run.tasks]
        for at in sorted(set(learned)):
            axis.axvline(at, color=MUTED, linewidth=0.9, linestyle=(0, (2, 2)))
        axis.set_title(short(task, 20 if columns == 5 else 30))
        axis.xaxis.set_major_locator(MaxNLocator(4, integer=True, min_n_ticks=2))
    percent(axes[0], every, runs[0].lower)
    for i, axis in enumerate(axes):
        if i % columns == 0:
            axis.set_ylabel(unit)
        if i + columns >= len(axes):  # the last of its column
            axis.set_xlabel("tasks learned")
            axis.tick_params(labelbottom=True)
    legend(figure, [(name, own[name]) for name in own])
    caption = (
        "A panel per task, over the number of tasks learned (0: base model). The dotted line marks when the task itself was "
        "learned; what falls to the right of it was forgotten."
    )
    if any(sum(r.group == g for r in runs) > 1 for g in own):
        caption += " Bold: mean over seeds."
    return Picture(key, "forgetting", "Forgetting curves", caption, figure)


def _forgetting_of_one(run: Run, key: str) -> Picture:
    figure, (axis,) = grid(1, 1, max(5.2, 1.1 * len(run.tasks) + 2.2), 3.2)
    factor, unit = scale_of(run.lower)
    every: list[float] = []
    for j, task in enumerate(run.tasks):
        points = _points(run, task)
        every += [y for _, y in points]
        _line(axis, points, look(j), factor)
        for x, y in points:
            if x == j + 1:
                axis.plot([x], [factor * y], "o", markersize=11, fillstyle="none", color=look(j).colour)
    percent(axis, every, run.lower)
    first = 0 if run.base is not None else 1
    names = (["base model"] if first == 0 else []) + [short(t, 18) for t in run.tasks[: len(run.scores)]]
    axis.set_xticks(range(first, first + len(names)), names, rotation=20 if len(names) > 4 else 0)
    axis.set_xlabel("after learning")
    axis.set_ylabel(unit)
    legend(figure, [(task, look(j)) for j, task in enumerate(run.tasks)], "scored on")
    return Picture(key, "forgetting", f"Forgetting curves: {run.name}", "A ring: the task was just learned.", figure)


def _points(run: Run, task: str) -> list[tuple[float, float]]:
    """Tasks learned, and the score by then."""
    if task not in run.tasks:
        return []
    j = run.tasks.index(task)
    cells = [(i + 1, run.score(i, j)) for i in range(-1 if run.base is not None else 0, len(run.scores))]
    return [(x, y) for x, y in cells if y is not None]


def _means(runs: Sequence[Run], task: str) -> dict[str, list[tuple[float, float]]]:
    """The mean over the runs of each group that has several, where all were scored."""
    found = {}
    for group in dict.fromkeys(run.group for run in runs):
        own = [dict(_points(run, task)) for run in runs if run.group == group]
        if len(own) > 1:
            found[group] = [(x, sum(p[x] for p in own) / len(own)) for x in own[0] if all(x in p for p in own)]
    return found


def _line(axis: Any, points: Sequence[tuple[float, float]], own: Look, factor: float, thin: bool = False) -> None:
    if points:
        axis.plot(
            [x for x, _ in points], [factor * y for _, y in points], color=own.colour, linestyle=own.dash,
            marker=None if thin else own.marker, markersize=4, linewidth=0.8 if thin else 1.7, alpha=0.5 if thin else 1.0,
        )  # fmt: skip


def comparison_picture(
    arms: Mapping[str, Mapping[str, Any]], key: str, lower: bool, own: Mapping[str, Look]
) -> Picture:
    """The arms side by side with 95 % intervals.

    Args:
        arms: By name ``figures`` (``{figure: {"mean", "interval", "each"}}``, among them changes of gauges).
        key: Name of the picture.
        lower: Whether scores are losses.
        own: The look of each arm.

    Returns:
        The picture.
    """
    known = list(dict.fromkeys(name for arm in arms.values() for name in arm["figures"]))
    shown = [n for n in TITLES if n in known] + [n for n in known if n not in TITLES][:2]
    across = min(len(shown), 3)
    figure, axes = grid(len(shown), across, 10.0 / max(across, 2), 0.75 + 0.27 * len(arms), sharey=True)
    factor, unit = (1.0, "loss") if lower else (100.0, "%")
    for axis, panel in zip(axes, shown, strict=True):
        scale = factor if panel in TITLES else 1.0
        for i, (name, arm) in enumerate(arms.items()):
            _dot(axis, i, arm["figures"].get(panel), own[name], scale)
        axis.set_title(
            f"{TITLES[panel]} ({unit})" if panel in TITLES else f"{short(panel)}: change from the base model"
        )
        axis.grid(axis="y", visible=False)
        axis.xaxis.set_major_locator(MaxNLocator(5))
        axis.margins(x=0.08)
        axis.tick_params(axis="y", length=0)
        axis.spines["left"].set_visible(False)
        if panel not in ("overall_performance", "learning_accuracy"):
            axis.axvline(0, color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
    axes[0].set_yticks(range(len(arms)), [short(name) for name in arms])
    axes[0].set_ylim(len(arms) - 0.5, -0.5)
    caption = (
        "Large dot: the value, or the mean over seeds. Small dots: each seed. Line: 95 % interval. Backward transfer "
        "below 0 and forgetting above 0: something was lost."
    )
    return Picture(key, "comparison", "Methods compared", caption, figure)


def _dot(axis: Any, place: int, figure: Mapping[str, Any] | None, own: Look, scale: float) -> None:
    if not figure or figure.get("mean") is None:
        return
    if figure.get("interval"):
        low, high = figure["interval"]
        axis.plot([scale * low, scale * high], [place, place], color=own.colour, linewidth=2.2, solid_capstyle="round")
    if len(figure.get("each", ())) > 1:
        axis.plot(
            [scale * v for v in figure["each"]],
            [place] * len(figure["each"]),
            "o",
            color=own.colour,
            markersize=4,
            alpha=0.5,
        )
    axis.plot([scale * figure["mean"]], [place], own.marker, color=own.colour, markersize=7.5)


def frontier_picture(arms: Mapping[str, Mapping[str, Any]], key: str, lower: bool, own: Mapping[str, Look]) -> Picture:
    """What was learned against what was kept, a point per arm; the line joins those that no other beats in both."""
    gauge = next((n for arm in arms.values() for n in arm["figures"] if n not in TITLES), None)
    kept = ["backward_transfer", *([gauge] if gauge else [])]
    figure, axes = grid(len(kept), 2, 4.9, 3.3)
    factor, unit = (1.0, "loss") if lower else (100.0, "%")
    for axis, name in zip(axes, kept, strict=True):
        points = []
        for arm, entry in arms.items():
            x, y = entry["figures"].get("learning_accuracy"), entry["figures"].get(name)
            if not x or not y or None in (x.get("mean"), y.get("mean")):
                continue
            scale = factor if name in TITLES else 1.0
            _cross(axis, x, y, own[arm], factor, scale)
            points.append((factor * x["mean"], scale * y["mean"]))
        _rates(axis, arms, name, factor)
        _front(axis, points, lower, name == "backward_transfer" or not _is_loss(arms, name))
        axis.set_xlabel(f"right after learning ({unit}{', lower is better' if lower else ''})")
        axis.set_ylabel(
            f"backward transfer ({'loss' if lower else 'points'})" if name in TITLES else f"{short(name)}: change"
        )
        axis.axhline(0, color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
        axis.xaxis.set_major_locator(MaxNLocator(6))
        axis.margins(0.12)
        if lower:
            axis.invert_xaxis()
        if name not in TITLES and _is_loss(arms, name):
            axis.invert_yaxis()  # up is better in both panels
    legend(figure, [(arm, own[arm]) for arm in arms])
    caption = "Up and to the right is better. Lines through a point: 95 % intervals. The dotted line joins what nothing beats in both."
    if sum(arm.get("plain") is not None for arm in arms.values()) > 1:
        caption += " The thin line joins the plain runs in the order of their learning rates."
    return Picture(key, "frontier", "Learning against retention", caption, figure)


def _rates(axis: Any, arms: Mapping[str, Mapping[str, Any]], name: str, factor: float) -> None:
    """A line through the plain runs, by their learning rate: what a rate alone can choose."""
    scale, points = factor if name in TITLES else 1.0, []
    for arm in arms.values():
        rate = (arm.get("plain") or {}).get("learning_rate")
        x, y = ((arm["figures"].get(key) or {}).get("mean") for key in ("learning_accuracy", name))
        if rate is not None and x is not None and y is not None:
            points.append((rate, factor * x, scale * y))
    if len(points) > 1:
        points.sort()
        axis.plot([x for _, x, _ in points], [y for _, _, y in points], color=MUTED, linewidth=0.8, zorder=0)


def _is_loss(arms: Mapping[str, Mapping[str, Any]], name: str) -> bool:
    return any(arm["figures"].get(name, {}).get("lower_is_better") for arm in arms.values())


def _cross(axis: Any, x: Mapping[str, Any], y: Mapping[str, Any], own: Look, across: float, up: float) -> None:
    at = (across * x["mean"], up * y["mean"])
    if x.get("interval"):
        axis.plot([across * v for v in x["interval"]], [at[1]] * 2, color=own.colour, linewidth=1.1, alpha=0.6)
    if y.get("interval"):
        axis.plot([at[0]] * 2, [up * v for v in y["interval"]], color=own.colour, linewidth=1.1, alpha=0.6)
    axis.plot(*at, own.marker, color=own.colour, markersize=8)


def _front(axis: Any, points: Sequence[tuple[float, float]], lower_x: bool, higher_y: bool) -> None:
    turned = [((-x if lower_x else x), (y if higher_y else -y)) for x, y in points]
    best = [p for p in turned if not any(q != p and q[0] >= p[0] and q[1] >= p[1] for q in turned)]
    line = sorted((-x if lower_x else x, y if higher_y else -y) for x, y in set(best))
    if len(line) > 1:
        axis.plot([x for x, _ in line], [y for _, y in line], color=MUTED, linewidth=1, linestyle=(0, (1, 2)), zorder=1)
