"""Pictures over time and over layers: gauges, scores during training, merges and diagnoses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator

from hf_continual.plots import plot_layer_weights, plot_sides
from hf_continual.report.run import Layers, Run, short
from hf_continual.report.style import MUTED, Look, Picture, grid, legend, look, looks, percent, scale_of

EVENT_MARKS = {"stop": "X", "rollback": "<", "keep_best": "*"}
MOST_GAUGES = 12


def benchmarks_picture(runs: Sequence[Run], key: str) -> Picture | None:
    """General benchmarks on the base model and after every task, with standard errors; None where there is no series."""
    names = list(dict.fromkeys(name for run in runs for name in run.gauges if _series(run, name)))
    if not names:
        return None
    own = looks(runs)
    figure, axes = grid(len(names[:MOST_GAUGES]), 3, 3.4 if len(names) > 1 else 5.6, 2.4)
    for axis, name in zip(axes, names[:MOST_GAUGES], strict=True):
        for i, run in enumerate(runs):
            if not (series := _series(run, name)):
                continue
            # Runs side by side at one stage would hide each other's standard errors.
            aside = 0.06 * (i - (len(runs) - 1) / 2) if len(runs) <= 8 else 0.0
            x, y = [p + aside for p, _, _ in series], [v for _, v, _ in series]
            bars = [e or 0.0 for _, _, e in series]
            style = own[run.group]
            axis.errorbar(
                x, y, bars, color=style.colour, marker=style.marker, linestyle=style.dash, markersize=4, linewidth=1.5
            )
        axis.set_title(short(name, 34))
        axis.set_ylabel(_unit(runs, name))
        axis.set_xlabel("tasks learned (0: base model)")
        axis.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    legend(figure, [(name, own[name]) for name in own] if len(runs) > 1 else [])
    more = f" The first {MOST_GAUGES} of {len(names)} gauges." if len(names) > MOST_GAUGES else ""
    return Picture(key, "gauges", "General benchmarks after each task", f"Bars: standard error.{more}", figure)


def _series(run: Run, name: str) -> list[tuple[int, float, float | None]]:
    """Tasks learned, value and standard error of a gauge."""
    gauge = run.gauges.get(name) or {}
    places = {stage.label: stage.index for stage in run.stages}
    cells = [(0, gauge.get("base")), *((places.get(t), c) for t, c in (gauge.get("after") or {}).items())]
    return [
        (place, cell["value"], cell.get("standard_error"))
        for place, cell in cells
        if cell and place is not None and cell.get("value") is not None
    ]


def _unit(runs: Sequence[Run], name: str) -> str:
    cell = next((run.gauges[name]["base"] for run in runs if (run.gauges.get(name) or {}).get("base")), {})
    said = cell.get("protocol") or ("loss" if cell.get("lower_is_better") else "score")
    return short("nats per token" if "loss" in said else said, 30)


def gauges_picture(runs: Sequence[Run], key: str) -> Picture | None:
    """Gauges during training, with standard errors, the tasks' boundaries, and what rules did; None without any."""
    with_points = [run for run in runs if run.timeline.points or run.timeline.events]
    names = list(dict.fromkeys(p.gauge for run in with_points for p in run.timeline.points))
    if not names:
        return None
    own = looks(runs)
    figure, axes = grid(len(names[:MOST_GAUGES]), 2 if len(names) > 1 else 1, 5.0 if len(names) > 1 else 6.6, 2.5)
    for axis, name in zip(axes, names[:MOST_GAUGES], strict=True):
        for run in with_points:
            _band(axis, run, name, own[run.group])
        for begin in dict.fromkeys(begin for run in with_points for begin, _ in run.timeline.boundaries[1:]):
            axis.axvline(begin, color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)))
        axis.set_title(short(name, 40))
        axis.set_ylabel("nats per token" if "loss" in name or "kl" in name.lower() else "value")
        if name == "general text":
            axis.set_ylabel("nats per token")
        axis.set_xlabel("optimizer steps, all tasks in a row")
    legend(figure, [(run.group, own[run.group]) for run in with_points] if len(with_points) > 1 else [])
    caption = "Band or bar: standard error. Dashed: the next task begins."
    if any(run.timeline.events for run in with_points):
        caption += " Cross: a rule stopped the run; triangle: it rolled back; star: the best so far was kept."
    return Picture(key, "gauges", "Gauges during training", caption, figure)


def _band(axis: Any, run: Run, name: str, own: Look) -> None:
    points = sorted((p for p in run.timeline.points if p.gauge == name), key=lambda p: p.step)
    if not points:
        return
    x, y = [p.step for p in points], np.array([p.value for p in points])
    axis.plot(x, y, color=own.colour, linestyle=own.dash, marker=own.marker, markersize=3.5, linewidth=1.5)
    if any(p.error is not None for p in points):
        error = np.array([np.nan if p.error is None else p.error for p in points])
        axis.fill_between(x, y - error, y + error, color=own.colour, alpha=0.22, linewidth=0)
        if np.isnan(error).any():  # a band needs neighbours; a value that stands alone has a bar
            axis.errorbar(x, y, error, color=own.colour, linestyle="none", linewidth=1.2)
    for event in run.timeline.events:
        at = float(np.interp(event.at, x, y))
        axis.axvline(event.at, color=own.colour, linewidth=0.8, alpha=0.6)
        axis.plot([event.at], [at], EVENT_MARKS[event.kind], color=own.colour, markersize=9, markeredgecolor=MUTED)


def training_pictures(runs: Sequence[Run], key: str) -> list[Picture]:
    """Scores while each task was trained, over the steps of the whole sequence: one picture per run."""
    found = []
    for i, run in enumerate(runs):
        lines, begins = training_lines(run)
        if not lines:
            continue
        figure, (axis,) = grid(1, 1, 6.6, 2.9)
        factor, unit = scale_of(run.lower)
        entries = []
        for j, (task, points) in enumerate(lines.items()):
            own = look(run.tasks.index(task) if task in run.tasks else len(run.tasks) + j)
            axis.plot(
                [x for x, _ in points], [factor * y for _, y in points], color=own.colour, linestyle=own.dash,
                marker=own.marker, markersize=4, linewidth=1.6,
            )  # fmt: skip
            entries.append((task, own))
        percent(axis, [y for points in lines.values() for _, y in points], run.lower)
        for begin, _ in begins[1:]:
            axis.axvline(begin, color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)))
        axis.set_xlabel("optimizer steps, all tasks in a row")
        axis.set_ylabel(unit)
        legend(figure, entries, "scored on")
        title = f"Scores during training: {run.name}"
        found.append(Picture(f"{key}-{i + 1}", "forgetting", title, "Dashed: the next task begins.", figure))
    return found


def training_lines(run: Run) -> tuple[dict[str, list[tuple[float, float]]], list[tuple[float, str]]]:
    """The curves of a run by scored task, over the steps of the whole sequence; and where each task begins."""
    lines: dict[str, list[tuple[float, float]]] = {}
    steps, begin, begins = {entry["task"]: entry["steps"] for entry in run.cost}, 0.0, []
    for task in dict.fromkeys([*steps, *run.curves]):
        begins.append((begin, task))
        points = run.curves.get(task) or {}
        for step, cells in sorted(points.items(), key=lambda item: int(item[0])):
            for scored, cell in cells.items():
                if cell.get("value") is not None:
                    lines.setdefault(scored, []).append((begin + int(step), cell["value"]))
        begin += steps.get(task) or max(map(int, points), default=0)
    return lines, begins


def layer_picture(layers: Layers, run: Run, key: str) -> Picture:
    """Weights of a merge, sides of a fusion, or numbers by layer."""
    names = list(layers.values)
    if layers.kind == "weights":
        models = list(next(iter(layers.values.values())))
        weights = np.array([[layers.values[layer][model] for layer in names] for model in models])
        figure = plot_layer_weights(weights, [short(n, 24) for n in names], [short(m) for m in models])
        figure.axes[0].set_xlabel("layer, from the input upwards")
    elif layers.kind == "sides":
        figure = plot_sides({short(name, 24): values for name, values in layers.values.items()})
        figure.axes[0].set_xlabel("layer, from the input upwards")
    else:
        figure, (axis,) = grid(1, 1, min(10.0, max(5.0, 0.24 * len(names) + 2)), 2.8)
        rows = sorted(layers.values.values(), key=len, reverse=True)  # a layer that has all of them gives the order
        series = list(dict.fromkeys(key for values in rows for key in values))
        for i, name in enumerate(series):
            own, points = look(i), [layers.values[layer].get(name, np.nan) for layer in names]
            axis.plot(range(len(names)), points, color=own.colour, marker=own.marker, linestyle=own.dash, markersize=4)
        step = -(-len(names) // 36)
        turned = {"rotation": 90, "fontsize": 7.5} if len(names) > 8 or max(map(len, names)) > 8 else {}
        axis.set_xticks(range(0, len(names), step), [short(n, 24) for n in names[::step]], **turned)
        axis.set_xlabel(layers.across)
        axis.set_ylabel(layers.unit or "value")
        legend(figure, [(name, look(i)) for i, name in enumerate(series)] if len(series) > 1 else [])
    return Picture(key, "layers", f"{run.name}: {layers.title}", f"From {layers.source}.", figure)
