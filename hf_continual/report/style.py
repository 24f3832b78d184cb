"""How the report's pictures look: one palette, ink that follows the page's theme, legends that fit."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D

from hf_continual.plots import COLOURS, MARKERS
from hf_continual.report.run import Run, short

# The page replaces these colours by its own, which change with light and dark. In files they are as they are here.
INK, MUTED, GRID = "#1b1f24", "#59636e", "#c9d1d9"
# Okabe-Ito without its black, which would vanish on a dark page; ink takes its place.
PALETTE = (*COLOURS[:6], INK)
DASHES: tuple[Any, ...] = ("-", (0, (4, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))
ON_DARK, ON_BRIGHT = "#fefefe", "#010101"  # text on a heat map, whatever the theme

_RC = {
    "svg.fonttype": "none",  # text stays text: small, to be searched and read aloud
    "svg.hashsalt": "hf_continual",  # the same picture gives the same bytes
    "text.parse_math": False,  # a name with dollar signs is a name
    "font.family": ["DejaVu Sans"],
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "legend.fontsize": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.edgecolor": MUTED,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
}


@dataclass(frozen=True)
class Picture:
    """A picture of the report.

    Args:
        key: Name of its files, without an ending.
        section: Section of the page.
        title: What it shows, in a few words.
        caption: How to read it.
        figure: The figure.
    """

    key: str
    section: str
    title: str
    caption: str
    figure: Figure


@dataclass(frozen=True)
class Look:
    """How a run, an arm or a task is drawn everywhere in the report."""

    colour: str
    marker: str
    dash: Any


@contextlib.contextmanager
def drawing() -> Iterator[None]:
    """The report's settings of matplotlib, whatever the user's own are."""
    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_RC)
        # Names may hold any script; in SVG the reader's fonts show them, in PNG a box stands for them.
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        warnings.filterwarnings("ignore", message="Matplotlib currently does not support", category=UserWarning)
        yield


def look(i: int) -> Look:
    """The look of the i-th of several: 7 colours, then the same with other dashes and markers."""
    turn = i // len(PALETTE)
    return Look(PALETTE[i % len(PALETTE)], MARKERS[(i + turn) % len(MARKERS)], DASHES[turn % len(DASHES)])


def looks(runs: Sequence[Run]) -> dict[str, Look]:
    """The look of each group of runs."""
    return {group: look(i) for i, group in enumerate(dict.fromkeys(run.group for run in runs))}


def grid(panels: int, columns: int, width: float, height: float, **options: Any) -> tuple[Figure, list[Any]]:
    """A figure of several panels, rows of at most `columns`; width and height of a panel in inches."""
    across = min(columns, panels)
    down = math.ceil(panels / across)
    size = (max(across * width, 3.6), down * height + 0.5)
    figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(w_pad=0.09, h_pad=0.06, wspace=0.03, hspace=0.03))
    FigureCanvasAgg(figure)
    axes = figure.subplots(down, across, squeeze=False, **options).ravel()
    for axis in axes[panels:]:
        axis.remove()
    for axis in axes[:panels]:
        axis.grid(alpha=0.6)
    return figure, list(axes[:panels])


def legend(figure: Figure, entries: Sequence[tuple[str, Look]], title: str = "") -> None:
    """A legend under the figure, in as many columns as fit."""
    if not entries:
        return
    names = [short(name) for name, _ in entries]
    room = figure.get_figwidth() * 72
    columns = max(1, min(len(names), int(room / (6 * max(map(len, names)) + 46))))
    handles = [
        Line2D([], [], color=own.colour, marker=own.marker, linestyle=own.dash, markersize=4.5, linewidth=1.7)
        for _, own in entries
    ]
    rows = math.ceil(len(names) / columns)
    figure.set_figheight(figure.get_figheight() + 0.19 * rows + (0.2 if title else 0))
    figure.legend(
        handles, names, loc="outside lower left", ncols=columns, frameon=False, title=title or None, alignment="left",
        title_fontsize=9,
    )  # fmt: skip


def percent(axis: Any, values: Sequence[float], lower: bool) -> None:
    """The range of an axis of scores: 0 to 100 % where they are shares."""
    if not lower and all(0 <= v <= 1 for v in values):
        axis.set_ylim(-5, 105)
        axis.set_yticks([0, 25, 50, 75, 100])


def scale_of(lower: bool) -> tuple[float, str]:
    """Factor and unit with which scores are shown."""
    return (1.0, "loss") if lower else (100.0, "score (%)")


def heat(axis: Any, values: np.ndarray, low: float, high: float, lower: bool, text: str, size: float) -> Any:
    """A heat map of vector cells with their numbers; empty for NaN."""
    colours = matplotlib.colormaps["viridis_r" if lower else "viridis"]
    mesh = axis.pcolormesh(
        np.ma.masked_invalid(values), cmap=colours, vmin=low, vmax=high, linewidth=0.6, edgecolor="face"
    )
    for i, j in np.argwhere(np.isfinite(values)):
        share = (values[i, j] - low) / max(high - low, 1e-12)
        bright = (1 - share if lower else share) > 0.58
        axis.text(
            j + 0.5, i + 0.5, format(values[i, j], text), ha="center", va="center", fontsize=size,
            color=ON_BRIGHT if bright else ON_DARK,
        )  # fmt: skip
    axis.invert_yaxis()
    axis.grid(False)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    return mesh
