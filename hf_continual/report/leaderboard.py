"""A leaderboard: many runs ranked by what they reached, each among those that it can be compared with.

Runs are compared if they started from the same model, learned the same tasks in the same order, and were scored in the same way on as
many rows. What they may differ in, such as methods, rates and steps, is in the table.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_continual.atomic_files import write_text
from hf_continual.disk import size
from hf_continual.report import tables
from hf_continual.report.compared import arms_of, jsonable
from hf_continual.report.figures import frontier_picture
from hf_continual.report.page import Section, render
from hf_continual.report.read import Sweep, read_folders
from hf_continual.report.run import Run
from hf_continual.report.style import drawing, look
from hf_continual.report.tables import Table, Value
from hf_continual.report.write import put_in, svgs_of, write_pictures

Board = dict[str, Any]
_SEED = re.compile(r"[-_]?seed[-_]?\d+$")


def write_leaderboard(
    folders: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str] = "leaderboard.html",
    *,
    figures: str | os.PathLike[str] | None = None,
    title: str | None = None,
    said: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Rank runs on one HTML page that needs no server.

    Reads results alone, so that it can be made from files that others sent. Nothing is ranked across settings: each has its own table.

    Example:
        >>> write_leaderboard(["out/sweep", "sent/theirs.json"], "board.html")

    Args:
        folders: Folders of runs and sweeps, or their ``continual_results.json``, under any name.
        out: The page.
        figures: Folder for the pictures; None: none are written.
        title: Heading of the page.
        said: Is told what is being done.

    Returns:
        ``boards``: per setting its ``label``, what it is (``model``, ``tasks``, ``metric``, ``rows``) and its ``arms``, best first;
        ``missing``, ``out``, ``figures``.

    Raises:
        FileNotFoundError: If a folder or file is not there.
        ValueError: If none of the runs has scores, or a folder holds nothing that can be shown.
    """
    said("reading results")
    runs, sweeps = read_folders(folders, 0)
    boards, missing = boards_of(runs, sweeps)
    if not boards:
        raise ValueError(f"none of the {len(runs)} runs has scores after its last task, so there is nothing to rank.")
    with drawing():
        said("drawing")
        sections = [_section(board, f"board-{i + 1}") for i, board in enumerate(boards)]
        named = svgs_of(sections)
        written = [] if figures is None else write_pictures(Path(figures), named)
    put_in(sections, named)
    write_text(Path(out), render(title or "Leaderboard", runs, sections, missing))
    return {"format": 1, "out": str(out), "figures": written, "boards": boards, "missing": missing}


def boards_of(runs: Sequence[Run], sweeps: Sequence[Sweep]) -> tuple[list[Board], list[str]]:
    """The runs by setting, and their arms, best first.

    Args:
        runs: All runs.
        sweeps: Sweeps among the folders.

    Returns:
        The boards, that with most arms first; and a sentence on each run that is not ranked.
    """
    settings: dict[tuple, list[Run]] = {}
    missing = []
    for run in runs:
        if not run.tasks or len(run.scores) < len(run.tasks) or run.summary.get("overall_performance") is None:
            missing.append(f"{run.name} is not ranked: {_unfinished(run)}.")
        else:
            settings.setdefault(setting_of(run), []).append(run)
    _join_unknown(settings, missing)
    boards = []
    for (model, tasks, metric, lower, rows, _), own in settings.items():
        _join_seeds(own)
        per_task = ", ".join(str(n) for n in dict.fromkeys(rows))
        boards.append({
            "label": f"{model or 'a model without a name'}: {', '.join(tasks)}",
            "model": model, "tasks": list(tasks), "metric": metric, "rows": list(rows), "lower_is_better": lower,
            "said": f"{metric or 'score'}, {per_task} rows a task",
            "arms": _ranked(own, sweeps, lower),
        })  # fmt: skip
    return sorted(boards, key=lambda board: -len(board["arms"])), missing


def _unfinished(run: Run) -> str:
    return f"it was scored after {len(run.scores)} of its {len(run.tasks)} tasks" if run.tasks else "it has no scores"


def _join_unknown(settings: dict[tuple, list[Run]], missing: list[str]) -> None:
    """Runs whose test rows are not known join those that are otherwise alike, if these are of one kind; and that is reported."""
    for key in [key for key in settings if not key[-1]]:
        alike = [other for other in settings if other[:-1] == key[:-1] and other[-1]]
        if len(alike) == 1:
            joining = settings.pop(key)
            settings[alike[0]] += joining
            names = ", ".join(run.name for run in joining)
            missing.append(
                f"{names}: not known to be scored on the same rows as the others; as many rows of tasks of the same name."
            )


def setting_of(run: Run) -> tuple:
    """What runs must have in common to be ranked together.

    Args:
        run: A run with scores.

    Returns:
        Model, tasks in order, metric, direction, number of scored rows of each task; and, where the plan is known, digests of these rows
        and of a local model's files.
    """
    last = run.cells.get(run.tasks[-1]) or {}
    rows = tuple((last.get(task) or {}).get("n") for task in run.tasks)
    planned = [task for task in run.config.get("tasks", ()) if isinstance(task, Mapping)]
    digests = tuple((task.get("test") or {}).get("sha256") for task in planned if isinstance(task.get("test"), Mapping))
    weights = (run.config.get("model") or {}).get("files") if digests else None
    known = (*digests, *sorted(weights.items())) if isinstance(weights, Mapping) else digests
    return run.model, tuple(run.tasks), run.metric, run.lower, rows, known


def _join_seeds(own: Sequence[Run]) -> None:
    """Runs outside of sweeps whose plans differ in the seed alone become one arm, under their common name."""
    found: dict[str, list[Run]] = {}
    for run in own:
        if not run.sweep:
            found.setdefault(_SEED.sub("", run.name) or run.name, []).append(run)
    for name, group in found.items():
        plans = [{k: v for k, v in run.config.items() if k not in ("seed", "data_seed")} for run in group]
        if len(group) > 1 and plans[0] and all(plan == plans[0] for plan in plans):
            for run in group:
                run.group = name


def _ranked(own: Sequence[Run], sweeps: Sequence[Sweep], lower: bool) -> list[dict[str, Any]]:
    arms = jsonable(arms_of(own, sweeps))
    order = sorted(arms, key=lambda name: _overall(arms[name]) * (1 if lower else -1))
    first = arms[order[0]]["figures"]["overall_performance"]
    found = []
    for place, name in enumerate(order):
        runs = [run for run in own if run.name in arms[name]["runs"]]
        figure = arms[name]["figures"]["overall_performance"]
        level = place > 0 and (_holds(figure, first["mean"]) or _holds(first, figure["mean"]))
        found.append({"place": place + 1, "name": name, **arms[name], **_made_by(runs), "level_with_first": level})
    return found


def _overall(arm: Mapping[str, Any]) -> float:
    return arm["figures"]["overall_performance"]["mean"]


def _holds(figure: Mapping[str, Any], value: float) -> bool:
    low, high = figure.get("interval") or (figure["mean"], figure["mean"])
    return low <= value <= high


def _made_by(runs: Sequence[Run]) -> dict[str, Any]:
    """How an arm was trained: methods, rate, steps, time and memory as far as its runs tell."""
    config = runs[0].config
    costs = [entry for run in runs for entry in run.cost]

    def total(key: str) -> float | None:
        each = [entry[key] for entry in costs]
        return sum(each) / len(runs) if each and None not in each else None

    between = config.get("between_tasks", "continue")
    peaks = [entry["memory_bytes"] for entry in costs if entry["memory_bytes"] is not None]
    return {
        "methods": _methods(config) if config else None,
        "between_tasks": between if isinstance(between, str) else "merge",
        "learning_rate": (config.get("sft") or {}).get("learning_rate"),
        "steps": total("steps"),
        "seconds": total("seconds"),
        "memory_bytes": max(peaks, default=None),
    }


def _methods(config: Mapping[str, Any]) -> list[str]:
    given = config.get("methods") or []
    listed = given if isinstance(given, list) else [given]
    return [name for entry in listed for name in (entry if isinstance(entry, Mapping) else [entry])]


def _section(board: Board, key: str) -> Section:
    section = Section(key, board["label"], tables=[_table(board)])
    arms = {arm["name"]: arm for arm in board["arms"]}
    own = {name: look(i) for i, name in enumerate(arms)}
    if len(arms) > 2 and len(board["tasks"]) > 1:
        section.pending.append(frontier_picture(arms, f"{key}-frontier", board["lower_is_better"], own))
    return section


def _table(board: Board) -> Table:
    """The arms of a setting, best first."""
    lower, arms = board["lower_is_better"], board["arms"]
    keys = list(dict.fromkeys(key for arm in arms for key in arm["figures"]))
    head = ["arm", "methods", "place", "runs", *(tables.NAMES.get(k, f"{k}, change") for k in keys)]
    costs, rows = _cost(arms), []
    for i, arm in enumerate(arms):
        methods = ", ".join(arm["methods"] or []) or ("" if arm["methods"] is None else "none")
        between = "" if arm["between_tasks"] == "continue" else arm["between_tasks"].replace("_", " ")
        place = Value(str(arm["place"]), arm["place"], below="level with 1" if arm["level_with_first"] else "")
        line = [
            Value(arm["name"]),
            Value(methods, below=between),
            place,
            Value(str(len(arm["runs"])), len(arm["runs"])),
        ]
        line += [tables.figure_value(arm["figures"].get(key) or {}, key, lower) for key in keys]
        rows.append([*line, *(column[i] for column in costs.values())])
    note = (
        f"{board['said']}. By overall performance after the last task; small print: 95 % intervals. Level with 1: the interval of one of the two "
        f"holds the other's mean. Rates and steps may differ between arms; time and memory may come from different machines."
    )
    return Table(board["label"], [*head, *costs], rows, note, words=2)


def _cost(arms: Sequence[Mapping[str, Any]]) -> dict[str, list[Value]]:
    """What the arms took, by the column's heading; columns that would be empty are left out."""
    shown = {
        "learning rate": ("learning_rate", lambda value: f"{float(value):.3g}"),
        "steps": ("steps", lambda value: f"{value:,.0f}"),
        "training, seconds": ("seconds", lambda value: f"{value:,.0f}"),
        "peak memory": ("memory_bytes", lambda value: size(int(value))),
    }
    return {
        name: [Value("") if arm[key] is None else Value(text(arm[key]), float(arm[key])) for arm in arms]
        for name, (key, text) in shown.items()
        if any(arm[key] is not None for arm in arms)
    }
