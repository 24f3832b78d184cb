"""Folders of finished runs with chosen scores, as a plan leaves them, without a model."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path

from hf_continual.atomic_files import write_json
from hf_continual.evaluation.result import RowScore, Scored
from hf_continual.stream.scores import keep_score

ROWS = 400


class Task:
    """A task as far as scores need one."""

    def __init__(self, name, rows):
        self.name, self.test = name, rows


def rows_of(name: str, number: int = ROWS) -> list[dict[str, str]]:
    return [{"prompt": f"{name} {i}", "completion": "x"} for i in range(number)]


def shares(right: float, number: int = ROWS, seed: int = 0, changed: float = 0.0) -> list[float]:
    """Right and wrong rows: the first ones are right; a part of all is drawn again, so that pairs differ."""
    draw = random.Random(seed)
    scores = [1.0 if i < round(right * number) else 0.0 for i in range(number)]
    for i in draw.sample(range(number), round(changed * number)):
        scores[i] = float(draw.random() < right)
    return scores


def write_trained(folder: Path, before: Sequence[float] | None, after: Sequence[float] | None) -> Path:
    """Write the folder of `hf-continual train` on a task called law: every row's scores before and after."""
    for stage, scores in (("base", before), ("after", after)):
        (folder / stage / "continual").mkdir(parents=True)
        if scores is not None:
            scored = Scored([RowScore(s, reference="x") for s in scores], "exact match", False)
            keep_score(folder / stage, stage, folder, Task("law", rows_of("law", len(scores))), scored)
    write_json(folder / "train_results.json", {"output_dir": str(folder), "kind": "model", "steps": 3})
    return folder


def write_run(
    folder: Path,
    matrix: Sequence[Mapping[str, Sequence[float]]],
    base: Mapping[str, Sequence[float]] | None = None,
    gauges: Sequence[str] = (),
    complete: bool = True,
) -> Path:
    """Write a run.

    Args:
        folder: Where.
        matrix: After each task the scores of every row by task and gauge.
        base: The same of the base model.
        gauges: Which names are gauges, and losses.
        complete: Whether the run is finished.
    """
    tasks = [f"t{i}" for i in range(len(matrix))]
    stages = ([("base", base)] if base else []) + [(f"task-{i:02}-t{i}", m) for i, m in enumerate(matrix)]
    for stage, cells in stages:
        (folder / stage / "continual").mkdir(parents=True)
        for name, scores in cells.items():
            lower, rows = name in gauges, rows_of(name, len(scores))
            scored = Scored([RowScore(s, reference="x") for s in scores], "loss" if lower else "exact match", lower)
            keep_score(folder / stage, stage, folder, Task(name, rows), scored)
    results = {"tasks": tasks, "gauges": {g: {} for g in gauges}, "complete": complete}
    write_json(folder / "continual_results.json", results)
    return folder


def losses(centre: float, number: int = ROWS, seed: int = 0) -> list[float]:
    draw = random.Random(seed)
    return [centre + draw.gauss(0, 0.05) for _ in range(number)]


def furnish(folder: Path) -> None:
    """The runs and files that exit_codes.sh names."""

    def two(first: float, then: float, second: float, general: float, seed: int, changed: float = 0.0):
        return [
            {"t0": shares(first), "t1": shares(0.0), "general": losses(3.0)},
            {
                "t0": shares(then, seed=seed, changed=changed),
                "t1": shares(second),
                "general": losses(general, seed=seed),
            },
        ]

    base = {"t0": shares(0.1), "t1": shares(0.05), "general": losses(3.0)}
    write_run(folder / "released", two(0.9, 0.7, 0.9, 3.0, 1), base, ["general"])
    write_run(folder / "better", two(0.9, 0.85, 0.95, 2.99, 2), base, ["general"])
    write_run(folder / "worse", two(0.9, 0.5, 0.95, 3.0, 3), base, ["general"])
    write_run(folder / "alike", two(0.9, 0.7, 0.9, 3.0, 4, changed=0.4), base, ["general"])
    write_run(folder / "begun", two(0.9, 0.7, 0.9, 3.0, 5), base, ["general"], complete=False)
    write_run(folder / "damaged", two(0.9, 0.7, 0.9, 3.0, 6), base, ["general"])
    with (folder / "damaged" / "predictions" / "task-01-t1.t0.jsonl").open("a") as file:
        file.write("{}\n")
    (folder / "kept.yaml").write_text(
        "overall_performance: {min: 0.8}\nforgetting: {max: 0.15}\ntasks:\n  '*': {max_drop: 0.15}\n"
        "gauges:\n  general: {max_drop: 0.05, max: 3.1}\n"
    )
    (folder / "misspelled.yaml").write_text("forgetting: {max: 0.1}\nforgeting: {max: 0.1}\n")
