"""Folders that `hf-continual run` and `hf-continual train` leave, and the runs of a sweep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_continual.atomic_files import DamagedFile, read_object
from hf_continual.evaluation.files import PREDICTIONS, file_name
from hf_continual.hub.facts import CONFIG, RESULTS
from hf_continual.hub.text import safe
from hf_continual.metrics import AccuracyMatrix
from hf_continual.report.changed import find_changes
from hf_continual.report.evidence import number, read_layers, read_timeline
from hf_continual.report.run import Run, Stage
from hf_continual.stream.scores import PARTIAL, read_stage
from hf_continual.stream.stored_run import TRAIN_RESULTS

PLAN = "plan.json"
TRAINED = Path("continual") / "trained.json"


def read_run(folder: Path, name: str, limit: int, base_dir: Path | None = None) -> Run:
    """Read the folder of a run of a plan; one that is not finished as far as it has come.

    Args:
        folder: The folder.
        name: Name of the run in the report.
        limit: Maximum number of changed predictions with their text.
        base_dir: The folder with the base model's scores, where that is a sweep's.

    Returns:
        The run.
    """
    base_dir = base_dir or folder
    run = Run(name, folder, "run", group=name, config=read_config(folder))
    planned = [str(t.get("name")) for t in run.config.get("tasks", []) if isinstance(t, Mapping)]
    if (folder / RESULTS).is_file():
        take_results(run, read_object(folder / RESULTS))
    else:
        run.tasks = planned
        run.missing.append(f"The run is not finished: it has no {RESULTS}. What its tasks' folders hold is shown.")
    order = planned or list(dict.fromkeys([*run.tasks, *run.cells]))
    order = [task for task in order if task != "base"]
    folders = task_folders(folder, order)
    run.stages = [Stage("base model", "base", base_dir / "base", 0)]
    run.stages += [Stage(t, folders[t].name, folders[t], order.index(t) + 1) for t in order if t in folders]
    _check_cells(run)
    if not run.scores:
        _from_cells(run)
    if waiting := [task for task in order if task not in folders]:
        run.missing.append(f"The run is not finished: no folder of {', '.join(map(repr, waiting))}.")
    begun = {**task_folders(folder, order, PARTIAL), **folders}
    run.cost = [read_cost(task, begun[task]) for task in order if task in begun]
    steps = {entry["task"]: entry["steps"] for entry in run.cost}
    run.timeline = read_timeline(run, [(t, begun[t], steps[t]) for t in order if t in begun])
    run.changes = find_changes(run, base_dir, limit)
    read_layers(run, [folder, *begun.values()])
    return run


def take_results(run: Run, data: Mapping[str, Any]) -> None:
    """Take over what ``continual_results.json`` holds; parts that are not as they should be are left out with a sentence."""
    run.model = None if data.get("model") is None else str(safe(str(data["model"])))
    matrix = data.get("matrix") or {}
    run.metric, run.lower = data.get("metric"), bool(matrix.get("lower_is_better"))
    run.tasks = [str(task) for task in data.get("tasks", [])]
    try:
        scores, base = matrix.get("scores") or [], matrix.get("base")
        AccuracyMatrix(scores, base, run.lower).check_named(run.tasks)
        run.scores, run.base = scores, base
    except (TypeError, ValueError) as error:
        run.missing.append(f"The accuracy matrix was left out: {error}")
    for name in ("summary", "intervals", "gauges", "curves", "cells", "versions"):
        found = data.get(name) or {}
        setattr(run, name, found if isinstance(found, dict) else {})
    run.losses = data.get("nll") or {}


def task_folders(folder: Path, names: Sequence[str], ending: str = "") -> dict[str, Path]:
    """The folders of tasks by name. Names come from a file, so they are looked up among the folders that there are."""
    listed = sorted(p for p in folder.glob(f"task-*{ending}") if p.is_dir())
    found = {}
    for i, name in enumerate(names):
        wanted = f"-{file_name(name)}{ending}"
        own = [p for p in listed if p.name == f"task-{i:02d}{wanted}"] or [
            p for p in listed if p.name.endswith(wanted) and p.name.split("-")[1].isdigit()
        ]
        if own:
            found[name] = own[0]
    return found


def _check_cells(run: Run) -> None:
    """Compare the results with the scores that the tasks' folders hold, which their predictions vouch for."""
    for stage in run.stages:
        label = "base" if stage.index == 0 else stage.label
        believed, told = read_stage(stage.folder), run.cells.get(label)
        if told is None and believed:
            run.cells[label] = believed
            continue
        for task, cell in (told or {}).items():
            if cell.get("status") == "ERROR":
                run.missing.append(f"{task!r} {_when(stage)} was not measured: {cell.get('error')}")
            if cell.get("status") == "MEASURED" and believed.get(task, {}).get("value") != cell.get("value"):
                found = believed.get(task, {}).get("value", "no score that its predictions vouch for")
                run.missing.append(
                    f"{RESULTS} gives {cell.get('value')} for {task!r} {_when(stage)}, and {stage.folder.name} holds "
                    f"{found}. Run the plan again to measure it again."
                )


def _when(stage: Stage) -> str:
    return f"after {stage.label!r}" if stage.index else "of the base model"


def _from_cells(run: Run) -> None:
    """The matrix of a run that is not finished, from the tasks' scores."""
    done = [stage for stage in run.stages if stage.index and stage.label in run.tasks and run.cells.get(stage.label)]
    line = run.tasks[: len(done)]
    if [stage.label for stage in done] != line or not done:
        return
    cells = [run.cells[task] for task in line]
    run.lower = any(cell.get("lower_is_better") for row in cells for task, cell in row.items() if task in run.tasks)
    run.metric = next((cell.get("protocol") for row in cells for cell in row.values()), None)
    run.scores = [[row.get(task, {}).get("value") for task in run.tasks] for row in cells]
    base = [run.cells.get("base", {}).get(task, {}).get("value") for task in run.tasks]
    run.base = base if any(value is not None for value in base) else None
    run.summary = AccuracyMatrix(run.scores, run.base, run.lower).summary


def read_config(folder: Path) -> dict[str, Any]:
    """The plan that a folder was started with, without local paths and tokens; empty if there is no plan."""
    try:
        data = read_object(folder / PLAN) if (folder / PLAN).is_file() else {}
    except DamagedFile:
        return {}
    return safe({k: v for k, v in data.items() if k != "checksum"})


def read_cost(task: str, folder: Path) -> dict[str, Any]:
    """What a task took, as far as its folder says: steps, seconds, tokens, memory."""
    entry: dict[str, Any] = {
        "task": task,
        "steps": None,
        "seconds": None,
        "tokens": None,
        "memory_bytes": None,
        "device": None,
    }
    for file in (folder / CONFIG, folder / TRAINED):
        try:
            data = read_object(file) if file.is_file() else {}
        except DamagedFile:
            continue
        data |= data.get("cost") or {}  # of a plan's task, kept where cards are written again
        for key in ("steps", "seconds", "tokens", "memory_bytes"):
            entry[key] = number(data.get(key)) if number(data.get(key)) is not None else entry[key]
        entry["device"] = data.get("hardware") or data.get("device") or entry["device"]
    return entry


def read_single(folder: Path, name: str, limit: int) -> Run:
    """Read the folder of `hf-continual train`: one task, scored before and after."""
    data = read_object(folder / TRAIN_RESULTS)
    run = Run(name, folder, "train", group=name, config=read_config(folder))
    planned = [str(t.get("name")) for t in run.config.get("tasks", []) if isinstance(t, Mapping)]
    task = planned[0] if planned else "task"
    run.model = run.config.get("model", {}).get("path")
    before, after = data.get("before"), data.get("after")
    run.cost = [read_cost(task, folder)]
    if run.cost[0]["steps"] is None:
        run.cost[0]["steps"] = number(data.get("steps"))
    run.stages = [Stage("base model", "base", folder / "base", 0), Stage(task, "after", folder / "after", 1)]
    if after is None:
        run.missing.append("No test rows were scored: train with --test ROWS.jsonl to see what was learned.")
    else:
        run.tasks, run.metric, run.lower = [task], after.get("protocol"), bool(after.get("lower_is_better"))
        run.scores, run.base = [[after.get("value")]], None if before is None else [before.get("value")]
        run.cells = {"base": {task: before} if before else {}, task: {task: after}}
        run.summary = AccuracyMatrix(run.scores, run.base, run.lower).summary
        if after.get("interval"):
            run.intervals = {"overall_performance": after["interval"], "learning_accuracy": after["interval"]}
    run.timeline = read_timeline(run, [(task, folder, None)])
    run.changes = find_changes(run, folder, limit)
    if (folder / PREDICTIONS).is_dir() is False and after is not None:
        run.missing.append(f"{folder.name} has no folder {PREDICTIONS}: which answers changed is not known.")
    read_layers(run, [folder])
    return run
