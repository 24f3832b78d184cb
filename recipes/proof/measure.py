"""A finished run of a plan as one small result file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hf_continual.atomic_files import read_json, read_lines
from hf_continual.evaluation.files import predictions_file
from hf_continual.trainer.facts import hardware

GENERAL = "general"
REPORTS = (
    "scores.json",
    "trained.json",
    "task.json",
    "gauges.jsonl",
)  # what a task's folder holds besides handed-over state
DIGITS = 5  # of the scores of single rows


def stages_of(run: Path, results: dict[str, Any]) -> dict[int, Path]:
    """Folders of the models by the task that they come after; -1 is the base model."""
    if results["between_tasks"] == "joint":
        return {-1: run.parent / "base", len(results["tasks"]) - 1: run / "task-00-joint"}
    folders = sorted(p for p in run.glob("task-*") if p.is_dir() and p.suffix != ".partial")
    return {-1: run.parent / "base", **dict(enumerate(folders))}


def rows_of(stages: dict[int, Path], names: list[str], last: int) -> dict[str, Any]:
    """Scores, losses and weights of single rows by model and task; of general text for the base and the last model."""
    found: dict[str, Any] = {}
    for after, stage in stages.items():
        cells = found.setdefault(str(after), {})
        for name in names + [GENERAL] * (after in (-1, last)):
            file = predictions_file(stage.parent, stage.name, name)
            if not file.is_file():
                continue
            lines = read_lines(file)
            cells[name] = {"score": [round(line["score"], DIGITS) for line in lines]}
            if all("nll" in line for line in lines):
                cells[name]["nll"] = [round(line["nll"], DIGITS) for line in lines]
            if name == GENERAL:
                cells[name]["weight"] = [line.get("weight", 1.0) for line in lines]
    return found


def cost_of(stages: dict[int, Path], last: int) -> dict[str, Any]:
    """Training of all tasks, and the size of what the last one hands on; None where a task was interrupted."""
    facts = [read_json(stage / "continual" / "trained.json") for after, stage in stages.items() if after >= 0]
    trained = [{**fact.get("cost", {}), "steps": fact["steps"]} for fact in facts]
    state = [p for p in (stages[last] / "continual").iterdir() if p.is_file() and p.name not in REPORTS]
    totals = {}
    for name in ("seconds", "tokens", "steps"):
        values = [t.get(name) for t in trained]
        totals[name] = None if None in values else sum(values)
    peaks = [t.get("memory_bytes") for t in trained]
    return {
        **totals,
        "peak_memory_bytes": None if None in peaks else max(peaks),
        "model_bytes": sum(p.stat().st_size for p in stages[last].glob("*.safetensors")),
        "state_bytes": sum(p.stat().st_size for p in state),
        "hardware": hardware(1),
    }


def kl_of(stage: Path) -> float | None:
    """KL to the base on the last task's rows after its last step, in nats per token; None if it was not measured."""
    file = stage / "continual" / "gauges.jsonl"
    lines = [line for line in (read_lines(file) if file.is_file() else []) if line.get("gauge") == "task/kl"]
    return max(lines, key=lambda line: line["step"])["value"] if lines else None


def measure(run: Path, about: dict[str, Any], full: bool) -> dict[str, Any]:
    """Read a finished run.

    Args:
        run: The run's folder.
        about: Preset, use, data set, arm and seed.
        full: Whether all weights were trained, so that the gauge's KL is not to the base.

    Returns:
        The content of its result file.
    """
    results = read_json(run / "continual_results.json")
    tasks, last = results["tasks"], len(results["tasks"]) - 1
    stages = stages_of(run, results)
    summary, nll = results["summary"], results["nll"]
    general = results["gauges"][GENERAL]
    after = (
        general["after"][stages[last].name.split("-", 2)[2]]["value"] if results["between_tasks"] != "joint" else None
    )
    if after is None:
        after = next(reversed(general["after"].values()))["value"]
    before = general["base"]["value"]
    old = [nll["scores"][last][j] for j in range(last)]
    kl_is_of_base = not full and results["between_tasks"] != "merge"
    figures = {
        "op": summary["overall_performance"],
        "bwt": summary["backward_transfer"],
        "forgetting": summary["forgetting"],
        "fwt": summary["forward_transfer"],
        "learned": summary["learning_accuracy"],
        "old_loss": None if not old or None in old else sum(old) / len(old),
        "general_loss": after,
        "general_base": before,
        "general_change": after - before,
        "kl": kl_of(stages[last]) if kl_is_of_base else None,
    }
    probes = {
        n: [g["base"]["value"], next(reversed(g["after"].values()))["value"]]
        for n, g in results["gauges"].items()
        if n != GENERAL
    }
    return {
        "format": 1, **about, "model": Path(results["model"]).name, "joint": results["between_tasks"] == "joint",
        "kl_is_of_base": kl_is_of_base, "tasks": tasks, "matrix": results["matrix"]["scores"], "base": results["matrix"]["base"],
        "nll": nll["scores"], "nll_base": nll["base"], "figures": figures, "probes": probes, "cost": cost_of(stages, last),
        "versions": results["versions"], "rows": rows_of(stages, tasks, last),
    }  # fmt: skip
