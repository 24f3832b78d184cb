"""Folders that are not a plan's run: the demo's, a published model's, and evidence alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_continual.atomic_files import DamagedFile, read_lines, read_object
from hf_continual.hub.facts import CONFIG, RESULTS
from hf_continual.hub.text import safe
from hf_continual.metrics import AccuracyMatrix, difference
from hf_continual.report.changed import find_changes
from hf_continual.report.evidence import number, read_layers
from hf_continual.report.plan_runs import read_cost, task_folders
from hf_continual.report.run import Point, Run, Stage, Timeline

DEMO_RESULTS, CURVES = "results.json", "curves.jsonl"
FIGURES = {
    "op": "overall_performance",
    "bwt": "backward_transfer",
    "fwt": "forward_transfer",
    "forgetting": "forgetting",
}


def is_demo_arm(folder: Path) -> bool:
    """Whether a folder is that of one arm of the demo."""
    try:
        return (folder / DEMO_RESULTS).is_file() and "arm" in read_object(folder / DEMO_RESULTS)
    except DamagedFile:
        return False


def read_demo_arm(folder: Path, name: str, limit: int) -> Run:
    """Read one arm of `hf-continual demo`."""
    data = read_object(folder / DEMO_RESULTS)
    settings, base = data.get("settings", {}), data.get("base", {})
    run = Run(name, folder, "demo", group=name, config=safe({"arm": data["arm"], **settings}))
    run.model = str(safe(str(settings.get("model"))))
    run.tasks, run.metric = list(base.get("exact", {})), "exact match, teacher forced"
    run.scores = data.get("matrix", [])
    run.base = [base["exact"][task].get("value") for task in run.tasks] or None
    run.summary = AccuracyMatrix(run.scores, run.base).summary
    folders = task_folders(folder, run.tasks)
    run.stages = [Stage(t, folders[t].name, folders[t], i + 1) for i, t in enumerate(run.tasks) if t in folders]
    run.cells = {"base": base.get("exact", {})}
    if data.get("nll"):
        run.losses = {"scores": [[data["nll"].get(t, {}).get("value") for t in run.tasks]], "at": "the end"}
    before, now = base.get("general"), data.get("general")
    if before and now:
        change = now["value"] - before["value"]
        run.gauges = {"general text": {"base": before, "after": {run.tasks[-1]: now}, "change": change}}
    run.cost = [{**read_cost(t, folders[t]), "steps": settings.get("steps")} for t in run.tasks if t in folders]
    _curves(run, int(settings.get("steps") or 0), before)
    run.changes = find_changes(run, folder, limit)
    return run


def _curves(run: Run, steps: int, before: Mapping[str, Any] | None) -> None:
    """The demo's curves: scores of the tasks seen, and the loss on general text, over all steps."""
    file = run.folder / CURVES
    if not file.is_file() or not steps:
        run.missing.append(f"{file.name} is missing: scores during training are not known.")
        return
    points = {point.get("at"): point for point in read_lines(file)}  # a resumed task measures some points again
    run.curves = {task: {} for task in run.tasks}
    timeline = Timeline(boundaries=[(i * steps, task) for i, task in enumerate(run.tasks)])
    if before:
        timeline.points.append(Point("general text", 0, before["value"], number(before.get("standard_error"))))
    for at, point in sorted((int(at), p) for at, p in points.items() if isinstance(at, int)):
        place = min(max(at - 1, 0) // steps, len(run.tasks) - 1)
        losses = point.get("nll", {})
        cells = {t: {"value": v, "nll": losses.get(t)} for t, v in point.get("exact", {}).items()}
        run.curves[run.tasks[place]][str(at - place * steps)] = cells
        if (value := number(point.get("general"))) is not None:
            timeline.points.append(Point("general text", at, value))
    run.timeline = timeline


def read_model(folder: Path, name: str, limit: int) -> Run:
    """Read a task's folder, a published model, or the output of a trainer: what its card was written from."""
    data = read_object(folder / RESULTS)
    config = read_object(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    run = Run(name, folder, "model", group=name, config=safe(config), versions=config.get("versions") or {})
    run.model = (config.get("base") or {}).get("name")
    run.tasks, run.metric = [str(t) for t in data.get("tasks", [])], data.get("metric")
    run.lower = bool(data.get("lower_is_better"))
    run.scores, run.base = data.get("matrix") or [], data.get("base_row")
    if run.scores:
        run.summary = AccuracyMatrix(run.scores, run.base, run.lower).summary
    run.intervals = {FIGURES.get(k, k): v for k, v in (data.get("intervals") or {}).items()}
    for gauge in data.get("general_abilities") or []:
        _gauge(run, gauge)
    if not run.scores and not run.gauges:
        run.missing.append(f"{folder.name}: nothing was measured ({RESULTS} says {data.get('status')}).")
    run.missing.append(f"{folder.name} is a model's folder: predictions and curves are kept in the folder of the run.")
    run.cost = [read_cost(run.tasks[-1] if run.tasks else name, folder)]
    read_layers(run, [folder])
    return run


def _gauge(run: Run, gauge: Mapping[str, Any]) -> None:
    kept: dict[str, Any] = {"lower_is_better": bool(gauge.get("lower_is_better")), "n": gauge.get("n")}
    before, now = ({**kept, "value": number(gauge.get(when))} for when in ("base", "value"))
    change = difference(now["value"], before["value"])
    after = {run.tasks[-1]: now} if run.tasks and now["value"] is not None else {}
    run.gauges[str(gauge.get("name"))] = {"base": before, "after": after, "change": change}


def read_evidence(folder: Path, name: str, limit: int) -> Run:
    """Read a folder that holds the report of a merge, or a diagnosis, and no scores."""
    run = Run(name, folder, "evidence", group=name)
    run.missing.append(f"{folder.name} holds no scores: it is shown for its merge report or diagnosis alone.")
    read_layers(run, [folder])
    return run
