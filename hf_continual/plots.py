"""Figures of retention and forgetting."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from hf_continual.metrics import AccuracyMatrix

# Okabe-Ito: distinguishable with every kind of colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vP*"

Curve = Sequence[tuple[float, float]]


def plot_forgetting(
    arms: Mapping[str, Mapping[str, Curve]],
    boundaries: Sequence[tuple[float, str]],
    general: Mapping[str, Curve] | None = None,
    title: str = "",
) -> Figure:
    """Plot the accuracy of every task while later ones are learned, one panel per arm.

    Args:
        arms: Name of the arm -> name of the task -> points (optimizer step over the whole sequence, accuracy 0 to 1).
        boundaries: Step at which a task begins, and its name.
        general: Name of the arm -> points (step, loss on general text in nats per token), for a last panel.
        title: Heading.

    Returns:
        The figure; save it with ``figure.savefig(path)``.
    """
    panels = len(arms) + bool(general)
    figure = Figure(figsize=(4.2 * panels, 3.9), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, panels, squeeze=False)[0]
    end = max(x for curves in arms.values() for curve in curves.values() for x, _ in curve)
    for panel, (axis, (arm, curves)) in enumerate(zip(axes, arms.items(), strict=False)):
        for i, (task, curve) in enumerate(curves.items()):
            x, y = zip(*curve, strict=True)
            colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
            axis.plot(x, [100 * v for v in y], color=colour, marker=marker, markersize=5, label=task, linewidth=1.8)
        axis.set_title(arm, fontsize=11, pad=18)
        axis.set_ylim(-4, 104)
        axis.set_xlabel("optimizer steps")
        if panel == 0:
            axis.set_ylabel("exact match (%)")
    if general:
        axis = axes[-1]
        for i, (arm, curve) in enumerate(general.items()):
            x, y = zip(*curve, strict=True)
            axis.plot(x, y, color=COLOURS[-1 - i], marker=MARKERS[i], markersize=5, label=arm, linewidth=1.8)
        axis.set_title("general text", fontsize=11, pad=18)
        axis.set_ylabel("loss (nats per token)")
        axis.set_xlabel("optimizer steps")
        axis.legend(fontsize=8, framealpha=0.9, loc="upper left")
        axis.set_ylim(axis.get_ylim()[0], axis.get_ylim()[1] + 0.18 * (axis.get_ylim()[1] - axis.get_ylim()[0]))
    for axis in axes:
        axis.set_xlim(-0.02 * end, 1.02 * end)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        for step, name in boundaries:
            axis.axvline(step, color="0.6", linewidth=0.9, linestyle=(0, (4, 3)))
            axis.annotate(
                name, (step, 1), xycoords=("data", "axes fraction"), xytext=(0, 4), textcoords="offset points",
                fontsize=7, color="0.35",
            )  # fmt: skip
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower left", ncols=len(labels), fontsize=9, frameon=False, title="questions about",
        title_fontsize=9, alignment="left",
    )  # fmt: skip
    if title:
        figure.suptitle(title, fontsize=12)
    return figure


def plot_matrix(
    scores: Sequence[Sequence[float | None]],
    tasks: Sequence[str],
    base: Sequence[float | None] | None = None,
    title: str = "",
    lower_is_better: bool = False,
) -> Figure:
    """Plot the accuracy matrix as a heat map: one row after each task, one column per task.

    Args:
        scores: Row i = after task i; None if it was not measured.
        tasks: Names of the tasks.
        base: Scores of the base model, for a first row.
        title: Heading.
        lower_is_better: Whether the scores are losses; otherwise they are fractions, shown in per cent.

    Returns:
        The figure; save it with ``figure.savefig(path)``.
    """
    AccuracyMatrix([list(row) for row in scores], list(base) if base else None).check_named(tasks)
    rows = [*([("base model", base)] if base is not None else []), *zip(tasks, scores, strict=False)]
    figure = Figure(figsize=(2.2 + 0.95 * len(tasks), 1.7 + 0.5 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    values = np.full((len(rows), len(tasks)), np.nan)
    for i, (_, row) in enumerate(rows):
        values[i, : len(row)] = [np.nan if value is None else value for value in row]
    image = axis.imshow(values, cmap="viridis_r" if lower_is_better else "viridis", aspect="auto")
    if not lower_is_better:
        image.set_clim(0.0, 1.0)
    low, high = image.get_clim()
    for i, j in np.argwhere(~np.isnan(values)):
        bright = (values[i, j] - low) / max(high - low, 1e-12) > 0.6
        shown = f"{values[i, j]:.2f}" if lower_is_better else f"{100 * values[i, j]:.0f}"
        colour = "black" if bright != lower_is_better else "white"
        axis.text(j, i, shown, ha="center", va="center", fontsize=9, color=colour)
    axis.set_xticks(range(len(tasks)), tasks, rotation=30, ha="right")
    axis.set_yticks(range(len(rows)), [name for name, _ in rows])
    axis.set_xlabel("scored on")
    axis.set_ylabel("after learning")
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0)
    if title:
        axis.set_title(title, fontsize=10, loc="left")
    return figure


def plot_stages(
    scores: Sequence[Sequence[float | None]],
    tasks: Sequence[str],
    base: Sequence[float | None] | None = None,
    lower_is_better: bool = False,
) -> Figure:
    """Plot the score of every task after each task: forgetting curves of a finished sequence.

    Args:
        scores: Row i = after task i; None if it was not measured.
        tasks: Names of the tasks.
        base: Scores of the base model, for a first point.
        lower_is_better: Whether the scores are losses.

    Returns:
        The figure; save it with ``figure.savefig(path)``.
    """
    AccuracyMatrix([list(row) for row in scores], list(base) if base else None).check_named(tasks)
    stages = [*([("base model", base)] if base is not None else []), *zip(tasks, scores, strict=False)]
    figure = Figure(figsize=(2.6 + 0.9 * max(len(stages), 3), 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    first = len(stages) - len(scores)
    for j, task in enumerate(tasks):
        points = [(i, row[j]) for i, (_, row) in enumerate(stages) if j < len(row) and row[j] is not None]
        if not points:
            continue
        x, y = zip(*points, strict=True)
        colour, marker = COLOURS[j % len(COLOURS)], MARKERS[j % len(MARKERS)]
        axis.plot(x, y, color=colour, marker=marker, markersize=5, linewidth=1.8, label=task)
        if j < len(scores) and (first + j) in x:
            at = y[x.index(first + j)]
            axis.plot([first + j], [at], marker="o", markersize=11, fillstyle="none", color=colour)
    if not lower_is_better and all(v is None or 0 <= v <= 1 for _, row in stages for v in row):
        axis.set_ylim(-0.04, 1.04)
    axis.set_xticks(range(len(stages)), [name for name, _ in stages], rotation=20, ha="right")
    axis.set_xlabel("after learning (ring: the task just learned)")
    axis.set_ylabel("loss" if lower_is_better else "score")
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    if axis.get_legend_handles_labels()[0]:
        figure.legend(loc="outside right upper", fontsize=8, frameon=False, title="scored on", title_fontsize=8)
    return figure


def plot_arms(
    arms: Mapping[str, Mapping[str, Any]],
    runs: Mapping[str, Sequence[Mapping[str, Any]]],
    lower_is_better: bool = False,
) -> Figure:
    """Plot the arms of a sweep side by side: final performance, forgetting, and the change in general abilities.

    Args:
        arms: By name ``{"figures": {figure: {"mean", "interval"}}, "gauge_changes": {...}}``.
        runs: The runs of each arm, ``{"summary": {figure: value}, "gauge_changes": {...}}``; each is a small dot.
        lower_is_better: Whether the scores are losses; otherwise they are shown in per cent.

    Returns:
        The figure; save it with ``figure.savefig(path)``.
    """
    scale, unit = (1.0, "loss") if lower_is_better else (100.0, "%")
    titles = {"overall_performance": f"overall performance ({unit})", "forgetting": f"forgetting ({unit})"}
    shown = [key for key in titles if any(key in arm["figures"] for arm in arms.values())]
    gauges = list(dict.fromkeys(g for arm in arms.values() for g in arm.get("gauge_changes", {})))
    panels = [*shown, *gauges]
    figure = Figure(figsize=(1.8 + 3.1 * len(panels), 1.5 + 0.42 * len(arms)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axis, panel in zip(axes, panels, strict=True):
        for i, (name, arm) in enumerate(arms.items()):
            colour = COLOURS[i % len(COLOURS)]
            dots, mean, span = _of_arm(arm, runs[name], panel, panel in shown)
            factor = scale if panel in shown else 1.0
            if span is not None:
                axis.plot([factor * v for v in span], [i, i], color=colour, linewidth=2.2, solid_capstyle="round")
            if len(dots) > 1:
                axis.plot([factor * v for v in dots], [i] * len(dots), "o", color=colour, markersize=4, alpha=0.45)
            if mean is not None:
                axis.plot([factor * mean], [i], "o", color=colour, markersize=8)
        axis.set_title(titles.get(panel, f"{panel}, change"), fontsize=10, loc="left")
        axis.grid(axis="x", alpha=0.25)
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.tick_params(axis="y", length=0)
        if panel != "overall_performance":
            axis.axvline(0, color="0.6", linewidth=0.9, linestyle=(0, (4, 3)))
    axes[0].set_yticks(range(len(arms)), [_folded(name) for name in arms], fontsize=9)
    axes[0].set_ylim(len(arms) - 0.5, -0.5)
    figure.supxlabel("large dot: mean over seeds, small dot: one seed, line: 95 % interval", fontsize=8, color="0.35")
    return figure


def _of_arm(
    arm: Mapping[str, Any], runs: Sequence[Mapping[str, Any]], key: str, is_figure: bool
) -> tuple[list[float], float | None, Sequence[float] | None]:
    """The values of an arm's runs, their mean and its interval."""
    found = [run.get("summary" if is_figure else "gauge_changes", {}).get(key) for run in runs]
    dots = [value for value in found if value is not None]
    if not is_figure:
        return dots, arm.get("gauge_changes", {}).get(key), None
    figure = arm["figures"].get(key) or {}
    return dots, figure.get("mean"), figure.get("interval")


def _folded(name: str, width: int = 22) -> str:
    """Break a long name into several lines."""
    return "\n".join(textwrap.wrap(name, width)) or name


def plot_layer_weights(weights: np.ndarray, groups: Sequence[str], models: Sequence[str]) -> Figure:
    """Plot the weight of each model in each layer of a merge as a heat map.

    Args:
        weights: ``[models, groups]``, summing to one over the models.
        groups: Names of the layer groups from the input upwards.
        models: Names of the models.

    Returns:
        The figure; save it with ``figure.savefig(path)``.
    """
    number, columns = weights.shape
    figure = Figure(figsize=(2.6 + max(3.0, 0.24 * columns), 1.3 + 0.42 * number), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    image = axis.imshow(
        weights, cmap="viridis", aspect="auto", vmin=0.0, vmax=max(1.0 / number * 2, float(weights.max()))
    )
    step = max(1, columns // 24)
    axis.set_xticks(range(0, columns, step), [groups[i] for i in range(0, columns, step)], rotation=90, fontsize=7)
    axis.set_yticks(range(number), [name if len(name) < 32 else f"...{name[-28:]}" for name in models], fontsize=8)
    axis.set_title(f"weight per layer (equal would be {1 / number:.2f})", fontsize=9, loc="left")
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0)
    figure.colorbar(image, ax=axis, pad=0.01)
    return figure


def plot_sides(layers: Mapping[str, Mapping[str, float]]) -> Figure:
    """Plot which side the elements of each layer went to when two models were fused: a heat map of sides by layers.

    Args:
        layers: Name of the layer -> ``elements`` and how many of them are ``both``, ``new_only``, ``old_only`` and
            ``neither``; or ``new_weight``, the mean weight of the new side.

    Returns:
        The figure; save it with ``figure.savefig(path)``.
    """
    names, columns = list(layers), len(layers)
    soft = "new_weight" in next(iter(layers.values()))
    keys = ["new_weight"] if soft else ["both", "new_only", "old_only", "neither"]
    values = np.array(
        [[layer[k] / (1 if soft else max(layer["elements"], 1)) for layer in layers.values()] for k in keys]
    )
    figure = Figure(figsize=(min(16.0, 2.6 + max(3.0, 0.42 * columns)), 1.6 + 0.42 * len(keys)), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    image = axis.imshow(100 * values, cmap="viridis", aspect="auto", vmin=0.0, vmax=100.0)
    for i, j in np.argwhere(np.isfinite(values)) if columns <= 40 else ():
        colour = "black" if values[i, j] > 0.6 else "white"
        axis.text(j, i, f"{100 * values[i, j]:.0f}", ha="center", va="center", fontsize=7, color=colour)
    shown = [name if len(name) < 24 else f"...{name[-20:]}" for name in names]
    step = -(-columns // 80)
    axis.set_xticks(range(0, columns, step), shown[::step], rotation=90, fontsize=7)
    axis.set_yticks(range(len(keys)), [k.replace("_", " ") for k in keys], fontsize=8)
    title = "mean weight of the new side (%)" if soft else "elements that matter to each side (% of the layer)"
    axis.set_title(title, fontsize=9, loc="left")
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0)
    figure.colorbar(image, ax=axis, pad=0.01)
    return figure
