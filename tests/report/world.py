"""Folders as runs leave them, without training: scores and predictions go through the library's own writers."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from datasets import Dataset

from hf_continual.atomic_files import write_checked, write_json, write_lines
from hf_continual.evaluation.files import predictions_file
from hf_continual.evaluation.result import RowScore, Scored
from hf_continual.intervals import figure_intervals
from hf_continual.metrics import AccuracyMatrix
from hf_continual.paired import paired_test
from hf_continual.stream.results import row_scores
from hf_continual.stream.scores import keep_score, read_stage
from hf_continual.tasks import Task, TaskStream

EXACT = "exact match, teacher forced"


def run(
    folder: Path, names: Sequence[str] = ("law", "tickets", "recipes"), *, seed: int = 0, keep: float = 0.5, rows: int = 12,
    learn: float = 0.9, text: str = "", gauges: bool = True, base_dir: Path | None = None, settings: Mapping[str, Any] | None = None,
    model: str = "tiny-llama",
) -> dict[str, Any]:  # fmt: skip
    """Write the folder of a finished run.

    Args:
        folder: Where.
        names: Tasks.
        seed: Of what is right and wrong.
        keep: Probability that a right answer is still right after one more task.
        rows: Test rows of each task.
        learn: Probability that a row is right after its task.
        text: Put into prompts, answers and predictions.
        gauges: Whether a general benchmark is measured.
        base_dir: Folder of the base model's scores.
        settings: Put into the plan.
        model: Name of the model.

    Returns:
        ``continual_results.json``.
    """
    draw, base_dir = random.Random(seed), base_dir or folder
    tests = {
        n: Dataset.from_list([{"prompt": f"{n} {i}? {text}", "completion": f" a{i} {text}"} for i in range(rows)])
        for n in names
    }
    stream = TaskStream([Task(n, i, None, tests[n]) for i, n in enumerate(names)])
    right: dict[str, list[bool]] = {}
    (base_dir / "base").mkdir(parents=True, exist_ok=True)
    for task in stream:
        keep_score(
            base_dir / "base", "base", base_dir, task, _scored([i % 16 == task.index for i in range(rows)], task, text)
        )
    for task in stream:
        place = folder / task.folder
        (place / "continual").mkdir(parents=True, exist_ok=True)
        for old in right:
            right[old] = [draw.random() < (keep if was else 0.08) for was in right[old]]
        right[task.name] = [draw.random() < learn for _ in range(rows)]
        for seen in list(stream)[: task.index + 1]:
            keep_score(place, task.folder, folder, seen, _scored(right[seen.name], seen, text))
        write_checked(
            place / "continual" / "trained.json",
            {"name": task.name, "index": task.index, "parent": None, "steps": 40, "methods": []},
        )
    results = _results(stream, folder, base_dir, model, _gauge(stream, keep, text) if gauges else {})
    write_json(folder / "continual_results.json", results)
    plan = {"model": {"path": f"/home/me/{model}"}, "seed": seed, "sft": {"learning_rate": 2e-4, **(settings or {})}}
    write_checked(
        folder / "plan.json",
        {**plan, "tasks": [{"name": n, "train": {"source": f"{n}.jsonl", "rows": 99}} for n in names]},
    )
    return results


def _scored(right: Sequence[bool], task: Task, text: str) -> Scored:
    rows = [
        RowScore(float(r), 1.0, f"a{i} {text}" if r else f"no {text}", f" a{i} {text}", {"nll": 0.1 if r else 2.5})
        for i, r in enumerate(right)
    ]
    return Scored(rows, EXACT)


def _gauge(stream: TaskStream, keep: float, text: str) -> dict[str, Any]:
    def cell(value: float) -> dict[str, Any]:
        return {
            "value": value,
            "n": 900,
            "protocol": f"nats per token {text}",
            "standard_error": 0.02,
            "status": "MEASURED",
            "lower_is_better": True,
        }

    after = {task.name: cell(3.1 + (1 - keep) * 0.1 * (task.index + 1)) for task in stream}
    last = list(after.values())[-1]["value"]
    return {f"general{text}": {"base": cell(3.0), "after": after, "change": last - 3.0}}


def _results(stream: TaskStream, folder: Path, base_dir: Path, model: str, gauges: dict[str, Any]) -> dict[str, Any]:
    names = [t.name for t in stream]
    stages = {t.name: read_stage(folder / t.folder) for t in stream}
    base = read_stage(base_dir / "base")
    matrices = {}
    for kind, value in (("matrix", lambda c: c.get("value")), ("nll", lambda c: c.get("nll", {}).get("value"))):
        scores = [[value(stages[a].get(b, {})) for b in names] for a in names]
        matrices[kind] = AccuracyMatrix(scores, [value(base[n]) for n in names], kind == "nll")
    matrix, loss = matrices["matrix"], matrices["nll"]
    prepared = SimpleNamespace(joint=None, line=list(stream))
    intervals = figure_intervals([row_scores(prepared, folder, base_dir)], len(names), 100)
    return {
        "format": 1, "model": f"/home/me/{model}", "complete": True, "tasks": names, "metric": EXACT,
        "matrix": {"scores": matrix.scores, "base": matrix.base, "lower_is_better": False},
        "summary": {**matrix.summary, "per_task_minimum": matrix.per_task_minimum}, "intervals": intervals,
        "nll": {"scores": loss.scores, "base": loss.base, "summary": loss.summary}, "gauges": gauges, "curves": {},
        "cells": {"base": base, **stages}, "versions": {"hf-continual": "0.1.0"},
    }  # fmt: skip


def sweep(
    folder: Path,
    arms: Mapping[str, float],
    seeds: Sequence[int] = (0, 1),
    names: Sequence[str] = ("law", "tickets", "recipes"),
    rows: int = 12,
) -> dict[str, Any]:
    """Write the folder of a sweep; `arms` by name with what they keep."""
    runs, table = {}, {}
    for arm, keep in arms.items():
        own = []
        for seed in seeds:
            name = f"{arm}-seed{seed}"
            found = run(folder / name, names, seed=seed, keep=keep, rows=rows, base_dir=folder, settings={"arm": arm})
            changes = {g: v["change"] for g, v in found["gauges"].items()}
            kept = {k: found[k] for k in ("summary", "tasks", "matrix", "nll")}
            runs[name] = {"arm": arm, "order": "", "seed": seed, "status": "MEASURED", **kept, "gauge_changes": changes}
            own.append(found)
        figures = {}
        for key in ("overall_performance", "learning_accuracy", "backward_transfer", "forgetting"):
            values = [f["summary"][key] for f in own]
            mean = sum(values) / len(values)
            figures[key] = {"mean": mean, "sd": None, "interval": [mean - 0.07, mean + 0.07]}
        table[arm] = {"runs": [f"{arm}-seed{s}" for s in seeds], "figures": figures}
    first, *others = arms
    tests = []
    for other in others:
        a, b = ({n: _last(folder / f"{arm}-seed{seeds[0]}", names, n) for n in names} for arm in (first, other))
        tests.append({"first": first, "second": other, "seeds": list(seeds), **paired_test(a, b).to_dict()})
    data = {"format": 1, "lower_is_better": False, "runs": runs, "arms": table, "comparisons": tests}
    write_json(folder / "continual_results.json", data)
    return data


def _last(folder: Path, names: Sequence[str], name: str) -> list[float]:
    stage = f"task-{len(names) - 1:02d}-{names[-1].replace(' ', '-')}"
    lines = predictions_file(folder, stage, name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["score"] for line in lines]


def gauges_during(folder: Path, text: str = "") -> None:
    """Write gauges during training, and what rules did, into every task of a run."""
    for index, place in enumerate(sorted(folder.glob("task-*"))):
        task = place.name.split("-", 2)[2]
        lines: list[dict[str, Any]] = []
        for step in range(0, 41, 8):
            lines.append(
                {
                    "step": step,
                    "task": task,
                    "gauge": "general/loss",
                    "value": 3 + 0.1 * index + 0.004 * step,
                    "se": 0.03,
                }
            )
            lines.append(
                {
                    "step": step,
                    "task": task,
                    "gauge": f"general/forward_kl{text}",
                    "value": 0.002 * step * (index + 1),
                    "se": None,
                }
            )
        lines.append(
            {
                "step": 32,
                "event": ("keep_best", "rollback", "stop")[index % 3],
                "rule": f"general/loss > +0.1 {text}",
                "reason": f"0.16 above the base for two evaluations {text}",
            }
        )
        write_lines(place / "continual" / "gauges.jsonl", lines)


def merged(folder: Path, layers: int = 12, text: str = "") -> None:
    """Write the reports of three merges and a diagnosis."""
    names = ["embed", *(f"layer.{i}" for i in range(layers)), "final"]
    models = [
        {"name": "base", "role": "base"},
        {"name": f"law{text}", "role": "model 1"},
        {"name": f"tax{text}", "role": "model 2"},
    ]
    weights = {name: [0.3 + 0.03 * i, 0.7 - 0.03 * i] for i, name in enumerate(names)}
    write_json(
        folder / "recall_report.json",
        {"schema": 1, "method": "recall", "models": models, "groups": names, "weights": weights},
    )
    sides = {
        n: {"elements": 100, "both": 10, "new_only": 20 + i, "old_only": 15, "neither": 55 - i}
        for i, n in enumerate(names)
    }
    write_json(folder / "kif_report.json", {"schema": 1, "method": "kif", "models": models, "layers": sides})
    cosines = {f"model.layers.{i}.mlp.{p}.weight": 0.99 - 0.01 * i for i in range(layers) for p in ("up", "down")}
    write_json(folder / "merge_report.json", {"schema": 1, "method": "slerp", "models": models, "cosines": cosines})
    held = {"held": {"value": 0.62, "interval": [0.5, 0.72]}, "shown": {"value": 0.97}}
    by_layer = [
        {
            "layer": n, "size": 0.01 * i, "old_size": 0.02, "angle": 20.0 + 4 * i if i else None, "chance": 80.0,
            "cka": 1 - 0.02 * i, "moved": 0.1,
        }
        for i, n in enumerate(names)
    ]  # fmt: skip
    diagnosis = {
        "format": 1, "verdict": "spurious", "reason": f"the half never shown recovers{text}", "confidence": 0.8,
        "scores": {"recovered": held}, "layers": by_layer, "notes": [],
        "recovery": {"after": {"0": 0.2, "10": 0.6, "30": 0.9}, "control": {"0": 0.0, "10": 0.2, "30": 0.3}},
        "line": [{"share": s, "score": 0.9 - s / 2, "nll": 0.2 + s} for s in (0.0, 0.5, 1.0)],
        "remedies": [{"what": "freeze", "why": f"the bottom moved{text}", "command": "hf-continual train"}],
    }  # fmt: skip
    write_json(folder / "diagnosis.json", diagnosis)


def demo(folder: Path) -> None:
    """Write the folder of the demo."""
    names = ("birth city", "field of study", "employer")
    for arm, keep in (("sequential", 0.2), ("continual", 0.97)):
        own = folder / arm
        found = run(own, names, keep=keep)
        settings = {"model": "/home/me/smollm2", "steps": 40, "seed": 0, "learning_rate": 1e-3}
        general = {"value": 3.0, "n": 90, "standard_error": 0.05, "protocol": "loss per token", "lower_is_better": True}
        base = {
            "exact": found["cells"]["base"],
            "nll": {n: c["nll"] for n, c in found["cells"]["base"].items()},
            "general": general,
        }
        nll = {n: c["nll"] for n, c in found["cells"][names[-1]].items()}
        after = {**general, "value": 3.0 + (1 - keep)}
        write_json(
            own / "results.json",
            {
                "arm": arm,
                "settings": settings,
                "base": base,
                "matrix": found["matrix"]["scores"],
                "nll": nll,
                "general": after,
            },
        )
        points = [
            {"at": 40 * i + s, "general": 3 + 0.01 * s, "exact": {n: min(1.0, s / 40) for n in names[: i + 1]}, "nll": {}}
            for i in range(3) for s in (20, 40)
        ]  # fmt: skip
        write_lines(own / "curves.jsonl", points)
        for left in ("continual_results.json", "plan.json"):
            (own / left).unlink()
    write_json(folder / "settings.json", {"seed": 0})


def trained(folder: Path, test_rows: bool = True) -> dict[str, Any]:
    """Write the folder of `hf-continual train`."""
    rows = Dataset.from_list([{"prompt": f"q{i}", "completion": f" a{i}"} for i in range(8)])
    task = Task("new", 0, None, rows)
    cells: dict[str, Any] = {}
    for stage, right in (("base", [True] * 2 + [False] * 6), ("after", [False] + [True] * 7)):
        if test_rows:
            keep_score(folder / stage, stage, folder, task, _scored(right, task, ""))
            cells[stage] = read_stage(folder / stage)["new"]
    result = {
        "output_dir": "out",
        "kind": "model",
        "steps": 4,
        "methods": [],
        "before": cells.get("base"),
        "after": cells.get("after"),
    }
    write_json(folder / "train_results.json", result)
    write_checked(folder / "plan.json", {"model": {"path": "/home/me/tiny"}, "tasks": [{"name": "new"}]})
    write_json(folder / "continual_config.json", {"format": 1, "seconds": 12.5, "hardware": "CPU", "steps": 4})
    return result
