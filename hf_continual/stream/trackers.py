"""A run's accuracy matrix in the loggers of its trainers: scores as curves over the tasks, the matrix as a table and a picture.

The trainers log losses, methods and gauges themselves, task by task; what spans tasks is logged here, after each of them.
TensorBoard, Weights & Biases and trackio are known; other loggers of transformers get the trainers' values only.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from io import BytesIO
from pathlib import Path
from typing import Any

from transformers.integrations import get_available_reporting_integrations

from hf_continual.stream.report import matrix_rows

logger = logging.getLogger(__name__)

PREFIX = "continual"
TENSORBOARD_FOLDER = Path("runs") / "matrix"


def log_matrix(results: Mapping[str, Any], output_dir: Path, options: Mapping[str, Any]) -> None:
    """Send a run's scores so far to its loggers.

    A logger that fails is a warning: the run's own files hold everything.

    Args:
        results: What ``continual_results.json`` holds.
        output_dir: The run's folder; TensorBoard's files are in its ``runs/matrix``.
        options: Training options of the plan: ``report_to``, ``run_name``, and ``project`` for trackio.
    """
    rows = matrix_rows(results)
    if not rows:
        return
    name = str(options.get("run_name") or output_dir.resolve().name)
    for known in _requested(options.get("report_to")):
        try:
            _LOGGERS[known](results, rows, output_dir, name, options)
        except Exception as error:  # a tracker, its server or its disk may fail in any way
            logger.warning("The accuracy matrix could not be logged to %s: %s: %s", known, type(error).__name__, error)


@contextmanager
def own_run() -> Iterator[None]:
    """End the W&B run that the trainers inside the context began, so that the next run of a sweep has its own.

    A run that was active before is the caller's, and stays.

    Yields:
        None: While runs may begin.
    """
    before = getattr(sys.modules.get("wandb"), "run", None)
    try:
        yield
    finally:
        now = getattr(sys.modules.get("wandb"), "run", None)
        if now is not None and now is not before:
            now.finish()


def scalars(results: Mapping[str, Any], row: Iterable[float | None]) -> dict[str, float]:
    """The values after the last task, under stable names.

    Args:
        results: What ``continual_results.json`` holds.
        row: The scores after the last task.

    Returns:
        ``continual/score/TASK``, ``continual/gauge/NAME``, and the figures of the summary that exist.
    """
    found = {f"{PREFIX}/score/{t}": v for t, v in zip(results["tasks"], row, strict=False) if v is not None}
    for gauge, entry in results["gauges"].items():
        last = list(entry["after"].values())[-1:]
        found |= {f"{PREFIX}/gauge/{gauge}": cell["value"] for cell in last if cell["value"] is not None}
    summary = {k: v for k, v in results["summary"].items() if isinstance(v, int | float)}
    return found | {f"{PREFIX}/{key}": value for key, value in summary.items()}


def _requested(report_to: Any) -> list[str]:
    named = [report_to] if isinstance(report_to, str) else list(report_to or [])
    if "all" in named:
        named = list(get_available_reporting_integrations())
    return [name for name in _LOGGERS if name in named]


def _cells(results: Mapping[str, Any], rows: list[tuple[str, list[float | None]]]) -> tuple[list[str], list[list[Any]]]:
    """Head and rows of the matrix as a table, with its base row."""
    base = results["matrix"]["base"]
    every = [*([("(base model)", base)] if base is not None else []), *rows]
    wide = len(results["tasks"])
    return ["after learning", *results["tasks"]], [[n, *row, *[None] * (wide - len(row))] for n, row in every]


def _picture(results: Mapping[str, Any], rows: list[tuple[str, list[float | None]]]) -> Any:
    """The matrix as a figure."""
    from hf_continual.plots import plot_matrix  # matplotlib only where a logger is used

    matrix = results["matrix"]
    return plot_matrix(
        [row for _, row in rows], results["tasks"], matrix["base"],
        lower_is_better=matrix["lower_is_better"], names=[name for name, _ in rows],
    )  # fmt: skip


def _image(results: Mapping[str, Any], rows: list[tuple[str, list[float | None]]]) -> Any:
    """The matrix as a PIL image."""
    from PIL import Image

    stream = BytesIO()
    _picture(results, rows).savefig(stream, format="png", dpi=120)
    stream.seek(0)
    return Image.open(stream)


def _tensorboard(results: Any, rows: Any, output_dir: Path, name: str, options: Mapping[str, Any]) -> None:
    from torch.utils.tensorboard import SummaryWriter

    head, cells = _cells(results, rows)
    lines = [head, ["---"] * len(head), *([_text(cell) for cell in row] for row in cells)]
    with SummaryWriter(str(output_dir / TENSORBOARD_FOLDER)) as writer:
        for key, value in scalars(results, rows[-1][1]).items():
            writer.add_scalar(key, value, len(rows))
        writer.add_text(f"{PREFIX}/matrix", "\n".join(f"| {' | '.join(line)} |" for line in lines), len(rows))
        writer.add_figure(f"{PREFIX}/matrix", _picture(results, rows), len(rows), close=False)


def _wandb(results: Any, rows: Any, output_dir: Path, name: str, options: Mapping[str, Any]) -> None:
    wandb: Any = import_module("wandb")
    # The trainers of a plan share the run that the first of them began; after a restart there is none yet.
    run: Any = wandb.run or wandb.init(project=os.getenv("WANDB_PROJECT", "huggingface"), name=name)
    run.define_metric(f"{PREFIX}/tasks")
    run.define_metric(f"{PREFIX}/*", step_metric=f"{PREFIX}/tasks")
    head, cells = _cells(results, rows)
    picture = wandb.Image(_image(results, rows), caption="score of each task (column) after each task (row)")
    table = wandb.Table(columns=head, data=cells)
    values: dict[str, Any] = {f"{PREFIX}/tasks": len(rows), **scalars(results, rows[-1][1])}
    run.log({**values, f"{PREFIX}/matrix": table, f"{PREFIX}/matrix_picture": picture})


def _trackio(results: Any, rows: Any, output_dir: Path, name: str, options: Mapping[str, Any]) -> None:
    pandas, trackio = import_module("pandas"), import_module("trackio")
    head, cells = _cells(results, rows)
    trackio.init(project=options.get("project") or "huggingface", name=f"{name}-matrix", resume="allow", embed=False)
    try:
        table = trackio.Table(dataframe=pandas.DataFrame(cells, columns=head))
        picture = trackio.Image(_image(results, rows), caption="score of each task (column) after each task (row)")
        values = {**scalars(results, rows[-1][1]), f"{PREFIX}/matrix": table, f"{PREFIX}/matrix_picture": picture}
        trackio.log(values, step=len(rows))
    finally:
        trackio.finish()


def _text(cell: Any) -> str:
    return "" if cell is None else f"{cell:.3f}" if isinstance(cell, float) else str(cell).replace("|", "\\|")


_LOGGERS: dict[str, Callable[..., None]] = {"tensorboard": _tensorboard, "wandb": _wandb, "trackio": _trackio}
