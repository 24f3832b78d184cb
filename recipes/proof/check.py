"""Every number of the result files, computed a second time: numpy and the standard library, nothing of hf_continual.

    python recipes/proof/check.py                  # from the scores of single rows that the result files hold
    python recipes/proof/check.py OUT              # from OUT's predictions, gauges and files

Fails if a number differs by more than 2e-5 (rows are rounded to 5 decimals) or, from predictions, by more than 1e-9.
"""

from __future__ import annotations

import argparse
import glob
import json
import sys
from pathlib import Path

import numpy as np

REPORTS = (
    "scores.json",
    "trained.json",
    "task.json",
    "gauges.jsonl",
)  # what a task's folder holds besides handed-over state


def lines_of(file: Path) -> list[dict]:
    """The rows of a file of predictions."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line]


def stage_folder(run: Path, after: int, joint: bool) -> Path | None:
    """The folder of the model after a task; -1 is the base model, which a sweep's runs share."""
    if after < 0:
        return run.parent / "base"
    if joint:
        return run / "task-00-joint"
    found = sorted(
        Path(p) for p in glob.glob(f"{glob.escape(str(run))}/task-{after:02d}-*") if not p.endswith(".partial")
    )
    return found[0] if found else None


def cells_from_predictions(run: Path, result: dict) -> dict:
    """Scores, losses and weights of each row by (after, name), from the predictions of a run."""
    tasks, joint = result["tasks"], result["joint"]
    cells = {}
    for after in [-1, len(tasks) - 1] if joint else range(-1, len(tasks)):
        stage = stage_folder(run, after, joint)
        for name in [*tasks, "general"]:
            file = stage.parent / "predictions" / f"{stage.name}.{name}.jsonl"
            if not file.is_file():
                continue
            rows = lines_of(file)
            cells[after, name] = {
                "score": np.array([r["score"] for r in rows]),
                "nll": np.array([r["nll"] for r in rows]) if all("nll" in r for r in rows) else None,
                "weight": np.array([r.get("weight", 1.0) for r in rows]),
            }
    return cells


def cells_from_rows(result: dict) -> dict:
    """The same from the result file."""
    cells = {}
    for after, stage in result["rows"].items():
        for name, rows in stage.items():
            size = len(rows["score"])
            cells[int(after), name] = {
                "score": np.array(rows["score"], float),
                "nll": np.array(rows["nll"], float) if "nll" in rows else None,
                "weight": np.array(rows.get("weight", np.ones(size)), float),
            }
    return cells


def average(cell: dict | None, key: str = "score") -> float | None:
    """Mean over rows: of the scores weighted by tokens, if they are weighted; of the losses each answer counts once."""
    if cell is None or cell[key] is None:
        return None
    weights = cell["weight"] if key == "score" else np.ones(len(cell[key]))
    return float(np.sum(cell[key] * weights) / np.sum(weights))


def mean(values: list) -> float | None:
    """Mean; None if there is nothing, or something is missing."""
    return None if not values or any(v is None for v in values) else float(np.mean(values))


def minus(a: float | None, b: float | None) -> float | None:
    """Difference; None if one is missing."""
    return None if a is None or b is None else a - b


def figures(cells: dict, tasks: list[str]) -> dict:
    """Matrix, losses and figures from the cells of a run."""
    number = len(tasks)

    def table(key: str) -> list[list]:
        return [[average(cells.get((i, t)), key) for t in tasks] for i in range(-1, number)]

    base, *scores = table("score")
    nll_base, *nll = table("nll")
    last = number - 1
    forgotten = []
    for j in range(last):
        past = [scores[i][j] for i in range(last)]
        known = [p for p in past if p is not None]
        forgotten.append(None if None in past[j:] else max(known) - scores[last][j])
    general = average(cells.get((last, "general")))
    general_base = average(cells.get((-1, "general")))
    return {
        "matrix": scores, "base": base, "nll": nll, "nll_base": nll_base,
        "figures": {
            "op": mean(scores[last]),
            "bwt": mean([minus(scores[last][j], scores[j][j]) for j in range(last)]),
            "forgetting": mean(forgotten),
            "fwt": mean([minus(scores[j - 1][j], base[j]) for j in range(1, number)]),
            "learned": mean([scores[j][j] for j in range(number)]),
            "old_loss": mean([nll[last][j] for j in range(last)]),
            "general_loss": general, "general_base": general_base, "general_change": minus(general, general_base),
        },
    }  # fmt: skip


def files(run: Path, result: dict) -> dict:
    """KL from the file of gauges, and sizes of the last task's files."""
    stage = stage_folder(run, len(result["tasks"]) - 1, result["joint"])
    state = [p for p in (stage / "continual").iterdir() if p.is_file() and p.name not in REPORTS]
    found = {"state_bytes": sum(p.stat().st_size for p in state)}
    if result["kl_is_of_base"]:
        gauges = [g for g in lines_of(stage / "continual" / "gauges.jsonl") if g.get("gauge") == "task/kl"]
        found["kl"] = max(gauges, key=lambda g: g["step"])["value"]
    return found


def differences(name: str, said: object, found: object, most: float) -> list[str]:
    """Where two structures of numbers differ."""
    if isinstance(found, dict):
        return [d for k, v in found.items() for d in differences(f"{name}.{k}", said.get(k), v, most)]
    if isinstance(found, list):
        if len(said) != len(found):
            return [f"{name}: {len(said)} and {len(found)} entries"]
        return [
            d for i, (s, v) in enumerate(zip(said, found, strict=True)) for d in differences(f"{name}[{i}]", s, v, most)
        ]
    if said is None or found is None:
        return [] if said is found else [f"{name}: {said} in the file, {found} here"]
    return [] if abs(said - found) <= most else [f"{name}: {said} in the file, {found} here"]


def check(result: dict, run: Path | None) -> list[str]:
    """Compare a result file with a second computation.

    Args:
        result: The result file.
        run: The run's folder, or None to start from the rows in the file.

    Returns:
        The differences.
    """
    if "error" in result:
        return []
    cells = cells_from_rows(result) if run is None else cells_from_predictions(run, result)
    most = 2e-5 if run is None else 1e-9
    found = differences("", result, figures(cells, result["tasks"]), most)
    if run is not None:
        found += differences("rows", result["rows"], rounded(cells, result), 1e-12)
        own = files(run, result)
        found += differences("state_bytes", result["cost"]["state_bytes"], own["state_bytes"], 0)
        found += differences("kl", result["figures"]["kl"], own.get("kl"), 1e-9)
    return found


def rounded(cells: dict, result: dict) -> dict:
    """The cells as the result file holds them."""
    found: dict = {}
    for (after, name), cell in cells.items():
        kept = result["rows"].get(str(after), {}).get(name, {})
        found.setdefault(str(after), {})[name] = {k: [round(float(x), 5) for x in cell[k]] for k in kept}
    return found


def main() -> int:
    """Check all files; the exit code is 1 if a number differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "out", type=Path, nargs="?", help="the folder of run.py; without it, only the result files are read"
    )
    parser.add_argument(
        "--results", type=Path, help="the result files; by default OUT/results, or those of this recipe"
    )
    args = parser.parse_args()
    here = Path(__file__).parent / "results"
    folder = args.results or (here if args.out is None else args.out / "results")
    found, number = [], 0
    for file in sorted(folder.glob("*.json")):
        result = json.loads(file.read_text(encoding="utf-8"))
        run = None if args.out is None else args.out / result["run"]
        found += [f"{file.name}: {difference}" for difference in check(result, run)]
        number += 1
    print("\n".join([*found, f"{number} result files, {len(found)} differences"]))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
