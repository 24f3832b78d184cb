"""`hf-continual report`: folders in, one page and its pictures out."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hf_continual.atomic_files import write_text
from hf_continual.best_plain import frontier
from hf_continual.report.changed import counts_summary
from hf_continual.report.compared import against_plain, arms_of, comparisons, jsonable, one_direction
from hf_continual.report.page import Section, render
from hf_continual.report.read import read_folders
from hf_continual.report.run import Run, clean
from hf_continual.report.sections import sections_of
from hf_continual.report.style import Picture, drawing
from hf_continual.report.svg import as_svg, file_svg, inline_svg


def write_report(
    folders: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str] = "report.html",
    *,
    figures: str | os.PathLike[str] | None = None,
    predictions: int = 100,
    title: str | None = None,
    said: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Write what runs measured as one HTML page that needs no server, and its pictures as PNG and SVG.

    Reads files alone: no model is loaded. A run of 20 tasks with 1,000 rows each takes some seconds; memory holds one
    task's predictions at a time.

    Example:
        >>> write_report(["out/plain", "out/replay"], "report.html")

    Args:
        folders: Folders of runs, sweeps, the demo, `hf-continual train`, merges or models.
        out: The page.
        figures: Folder for the pictures; None: none are written.
        predictions: Maximum number of changed predictions of each run that are shown with their text.
        title: Heading of the page.
        said: Is told what is being done.

    Returns:
        What the page shows, as plain data: ``runs``, ``arms``, ``comparisons``, ``best_plain``,
        ``frontier``, ``missing``, ``out``, ``figures``.

    Raises:
        FileNotFoundError: If a folder is not there.
        ValueError: If a folder holds nothing that can be shown, or there is none.
    """
    _check(folders, predictions)
    said("reading folders")
    runs, sweeps = read_folders(folders, predictions)
    missing: list[str] = []
    alike = one_direction(runs, missing)
    arms = arms_of(alike, sweeps)
    tests = comparisons(runs, sweeps, missing)
    lower = bool(alike and alike[0].lower)
    plain = against_plain(runs, arms, sweeps, lower)
    with drawing():
        said("drawing")
        sections = sections_of(runs, alike, arms, tests, plain)
        named = svgs_of(sections)
        written = [] if figures is None else write_pictures(Path(figures), named)
    put_in(sections, named)
    missing += [f"{run.name}: {sentence}" if len(runs) > 1 else sentence for run in runs for sentence in run.missing]
    said("writing")
    page = render(title or _title(runs), runs, sections, missing)
    write_text(Path(out), page)
    for section in sections:
        missing += section.missing
    return {
        "format": 1,
        "out": str(out),
        "figures": written,
        "runs": [_of_run(run) for run in runs],
        "arms": jsonable(arms),
        "comparisons": tests,
        "best_plain": plain,
        "frontier": frontier(arms, lower),
        "missing": missing,
    }


def _check(folders: Sequence[Any], predictions: int) -> None:
    if not folders:
        raise ValueError("no folder is named. Name the folder of a run, such as the output_dir of its plan.")
    if predictions < 0:
        raise ValueError(
            f"predictions={predictions} must be 0 or more: it is the most answers of a run that are shown."
        )


def svgs_of(sections: Sequence[Section]) -> list[tuple[Picture, str]]:
    """The pictures of all sections with their SVG."""
    return [(picture, as_svg(picture.figure)) for section in sections for picture in section.pending]


def put_in(sections: Sequence[Section], named: Sequence[tuple[Picture, str]]) -> None:
    """Give each section its drawn pictures."""
    svgs = {picture.key: text for picture, text in named}
    for section in sections:
        for picture in section.pending:
            section.pictures.append((picture, inline_svg(svgs[picture.key], f"{picture.key}-", picture.title)))


def write_pictures(folder: Path, named: Sequence[tuple[Picture, str]]) -> list[str]:
    """Each picture as PNG and SVG."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for picture, text in named:
        write_text(folder / f"{picture.key}.svg", file_svg(text))
        picture.figure.savefig(folder / f"{picture.key}.png", dpi=150, facecolor="white", metadata={"Software": None})
        written += [str(folder / f"{picture.key}.{kind}") for kind in ("png", "svg")]
    return written


def _title(runs: Sequence[Run]) -> str:
    names = list(dict.fromkeys(run.sweep or run.name for run in runs))
    return clean(", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else ""))


def _of_run(run: Run) -> dict[str, Any]:
    """What the report knows about a run, without texts of predictions."""
    return {
        "name": run.name,
        "folder": str(run.folder),
        "kind": run.kind,
        "group": run.group,
        "model": run.model,
        "tasks": run.tasks,
        "metric": run.metric,
        "lower_is_better": run.lower,
        "matrix": {"scores": run.scores, "base": run.base},
        "summary": run.summary,
        "intervals": run.intervals,
        "gauge_changes": {name: gauge.get("change") for name, gauge in run.gauges.items()},
        "events": [
            {"task": e.task, "step": e.step, "event": e.kind, "rule": e.rule, "reason": e.reason}
            for e in run.timeline.events
        ],
        "predictions": dict(counts_summary(run.changes)),
        "diagnoses": {source: data.get("verdict") for source, data in run.diagnoses},
        "cost": run.cost,
        "missing": run.missing,
    }
