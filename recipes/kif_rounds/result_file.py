"""A finished run as one small result file: scores and losses of single rows, from which every number is computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from figures import figures

from hf_continual.atomic_files import read_json, read_lines
from hf_continual.evaluation.files import predictions_file

GENERAL = "general"


def packed(file: Path) -> dict[str, Any]:
    """Rows of a file of predictions: exact match as a string of 0 and 1, losses in thousandths of a nat."""
    lines = read_lines(file)
    if all("nll" in line for line in lines):
        return {
            "score": "".join(str(int(line["score"])) for line in lines),
            "nll": [round(1000 * line["nll"]) for line in lines],
        }
    return {
        "loss": [round(1000 * line["score"]) for line in lines],
        "weight": [line.get("weight", 1.0) for line in lines],
    }


def measure(run: Path, about: dict[str, Any]) -> dict[str, Any]:
    """Read a finished run: each task right after it, all tasks and the general text after the last one.

    Args:
        run: The run's folder.
        about: Use, arm and seed.

    Returns:
        The content of its result file.
    """
    results = read_json(run / "continual_results.json")
    tasks, joint = results["tasks"], results["between_tasks"] == "joint"
    last = len(tasks) - 1
    stages = sorted(p for p in run.glob("task-*") if p.is_dir() and p.suffix != ".partial")
    moments = {last: stages[0]} if joint else dict(enumerate(stages))
    rows: dict[str, Any] = {}
    for after, stage in {-1: run / "base", **moments}.items():
        names = tasks if after in (-1, last) else [tasks[after]]
        if not stage.is_dir():
            continue  # one arm scores the base model
        wanted = [*names, GENERAL] if after in (-1, last) else names
        rows[str(after)] = {name: packed(predictions_file(stage.parent, stage.name, name)) for name in wanted}
    trained = [read_json(stage / "continual" / "trained.json") for stage in stages]
    found = {
        "format": 1,
        **about,
        "tasks": tasks,
        "joint": joint,
        "seconds": round(sum(t["cost"]["seconds"] for t in trained), 1),
    }
    return {**found, "rows": rows, "figures": figures(rows, tasks), "versions": results["versions"]}
