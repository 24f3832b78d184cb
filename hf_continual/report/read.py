"""Which kind of folder it is, and the runs it holds."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_continual.atomic_files import read_object
from hf_continual.hub.facts import RESULTS
from hf_continual.report.evidence import DIAGNOSIS
from hf_continual.report.other_runs import is_demo_arm, read_demo_arm, read_evidence, read_model
from hf_continual.report.plan_runs import PLAN, read_run, read_single, take_results
from hf_continual.report.run import Run
from hf_continual.stream.stored_run import TRAIN_RESULTS

Sweep = tuple[Path, dict[str, Any]]


def read_folders(folders: Sequence[str | os.PathLike[str]], limit: int) -> tuple[list[Run], list[Sweep]]:
    """Read the runs of some folders.

    Args:
        folders: Folders of runs, sweeps, the demo, `hf-continual train`, or models; files with the results of a run or a sweep.
        limit: Maximum number of changed predictions of each run that are kept with their text.

    Returns:
        The runs, each with a unique name; and the sweeps among the folders, with their results.

    Raises:
        FileNotFoundError: If a folder is not there.
        ValueError: If a folder holds nothing that a report can show.
    """
    runs: list[Run] = []
    sweeps: list[Sweep] = []
    for folder in dict.fromkeys(Path(f).expanduser() for f in folders):
        if folder.is_file() and folder.suffix == ".json":
            found, sweep = _read_file(folder)
        elif folder.is_dir():
            found, sweep = _read(folder, limit)
        else:
            state = "is a file" if folder.exists() else f"does not exist (looked in {Path.cwd()})"
            raise FileNotFoundError(f"{folder} {state}. Name the folder of a run, such as the output_dir of its plan.")
        runs += found
        sweeps += [] if sweep is None else [(folder, sweep)]
    _name_apart(runs)
    return runs, sweeps


def _read(folder: Path, limit: int) -> tuple[list[Run], dict[str, Any] | None]:
    """The runs of one folder, and its results if it is a sweep's."""
    name = folder.resolve().name
    results = read_object(folder / RESULTS) if (folder / RESULTS).is_file() else {}
    if "arms" in results:
        return _sweep(folder, results, limit), results
    if (folder / TRAIN_RESULTS).is_file():
        return [read_single(folder, name, limit)], None
    if isinstance(results.get("matrix"), Mapping):
        return [read_run(folder, name, limit)], None
    if is_demo_arm(folder):
        return [read_demo_arm(folder, name, limit)], None
    if arms := [child for child in sorted(folder.iterdir()) if child.is_dir() and is_demo_arm(child)]:
        arms.sort(key=lambda arm: arm.name != "sequential")  # plain training first: the others are compared with it
        return [read_demo_arm(arm, arm.name, limit) for arm in arms], None
    if results:
        return [read_model(folder, name, limit)], None
    if (folder / PLAN).is_file() and any(folder.glob("task-*")):
        return [read_run(folder, name, limit)], None
    if (folder / DIAGNOSIS).is_file() or any(folder.glob("*_report.json")):
        return [read_evidence(folder, name, limit)], None
    raise ValueError(_nothing(folder))


def _read_file(file: Path) -> tuple[list[Run], dict[str, Any] | None]:
    """The runs of a file with results, such as a ``continual_results.json`` that was sent under another name.

    Args:
        file: The file.

    Returns:
        The runs; and the results, if they are a sweep's.

    Raises:
        ValueError: If it holds something else.
    """
    results = read_object(file)
    if "arms" in results:
        return _sweep(file, results, 0), results
    if not isinstance(results.get("matrix"), Mapping):
        raise ValueError(f"{file} holds no results. Name the folder of a run, or its {RESULTS}, under any name.")
    run = Run(file.stem, file, "file", group=file.stem)
    take_results(run, results)
    run.missing.append("Read from its results alone: its settings, cost and predictions are not known.")
    return [run], None


def _nothing(folder: Path) -> str:
    names = sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))
    held = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
    inside = [p.name for p in sorted(folder.iterdir()) if p.is_dir() and (p / RESULTS).is_file()]
    instead = f" Its folders {', '.join(inside[:4])} hold results: name these." if inside else ""
    return (
        f"{folder} holds no results ({held or 'it is empty'}). A report shows what hf-continual run, train, merge or demo left: "
        f"name the output folder of one of these that has finished a task.{instead}"
    )


def _sweep(folder: Path, results: Mapping[str, Any], limit: int) -> list[Run]:
    """The runs of a sweep; of one whose folder is gone, what the sweep's own results hold."""
    runs = []
    children = [child for child in folder.iterdir() if child.is_dir()] if folder.is_dir() else []
    for name, entry in results.get("runs", {}).items():
        own = next((child for child in children if child.name == name), None)
        group = "-".join(str(p) for p in (entry.get("arm"), entry.get("order")) if p) or "all"
        if own is not None and (own / RESULTS).is_file():
            run = read_run(own, name, limit, base_dir=folder)
        elif entry.get("status") == "MEASURED":
            run = Run(name, folder / name, "sweep")
            take_results(run, entry)
            run.lower = bool(results.get("lower_is_better"))
            run.gauges = {
                g: {"base": None, "after": {}, "change": c} for g, c in entry.get("gauge_changes", {}).items()
            }
            run.missing.append(f"The folder {name} of the sweep is gone: its predictions and settings cannot be shown.")
        else:
            run = Run(name, folder / name, "sweep", missing=["This run of the sweep was not made yet (NOT_RUN)."])
        run.kind, run.group, run.sweep = "sweep", group, folder.resolve().name
        runs.append(run)
    return runs


def _name_apart(runs: Sequence[Run]) -> None:
    """Give runs of the same name the names of the folders above; groups likewise, so that two sweeps stay apart."""
    for attribute in ("name", "group"):
        by_name: dict[str, dict[str, list[Run]]] = {}
        for run in runs:
            owner = run.sweep if attribute == "group" else str(run.folder)
            by_name.setdefault(getattr(run, attribute), {}).setdefault(owner or str(run.folder), []).append(run)
        for name, owners in by_name.items():
            for i, own in enumerate(owners.values() if len(owners) > 1 else ()):
                above = own[0].sweep or own[0].folder.resolve().parent.name
                for run in own:
                    setattr(run, attribute, f"{above}/{name}" if i or above else name)
    taken: dict[str, int] = {}
    for run in runs:
        taken[run.name] = taken.get(run.name, 0) + 1
        if taken[run.name] > 1:
            run.name = f"{run.name} ({taken[run.name]})"
