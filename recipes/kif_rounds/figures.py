"""Every number of a result file from its rows: numpy and the standard library, nothing of hf_continual.

python recipes/kif_rounds/figures.py            # fails if a number of results/*.json is not that of the rows in the file
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent / "results"


def unpacked(rows: dict[str, Any]) -> dict[str, Any]:
    """The rows of a result file as arrays by moment and task: `score` and `nll`, or `score` (a loss) and `weight`."""
    found: dict[str, Any] = {}
    for after, cells in rows.items():
        found[after] = {}
        for name, cell in cells.items():
            if "loss" in cell:
                found[after][name] = {"score": np.array(cell["loss"]) / 1000, "weight": np.array(cell["weight"], float)}
            else:
                found[after][name] = {
                    "score": np.array([int(c) for c in cell["score"]], float),
                    "nll": np.array(cell["nll"]) / 1000,
                }
    return found


def figures(rows: dict[str, Any], tasks: list[str]) -> dict[str, Any]:
    """What the tables show, for one run.

    Args:
        rows: `rows` of a result file.
        tasks: Its tasks in order.

    Returns:
        Fractions and nats: `final`, `right_after` by task, `op`, `bwt`, `learned`, `old_loss`, `new_loss`, `general_loss`,
        and `base` with the base model's; None where a run has no such moment.
    """
    cells, last = unpacked(rows), len(tasks) - 1

    def mean(after: int, task: str, key: str) -> float:
        return float(np.mean(cells[str(after)][task][key]))

    final = [mean(last, task, "score") for task in tasks]
    losses = [mean(last, task, "nll") for task in tasks]
    one_by_one = all(str(j) in cells for j in range(last))
    right_after = [mean(j, task, "score") for j, task in enumerate(tasks)] if one_by_one else None
    text = {
        after: np.average(cell["general"]["score"], weights=cell["general"]["weight"])
        for after, cell in cells.items()
        if "general" in cell
    }
    base = None
    if "-1" in cells:
        base = {key: float(np.mean([mean(-1, task, key) for task in tasks])) for key in ("score", "nll")} | {
            "general": float(text["-1"])
        }
    return {
        "final": final, "right_after": right_after, "op": float(np.mean(final)),
        "bwt": float(np.mean(np.subtract(final, right_after)[:last])) if right_after else None,
        "learned": float(np.mean(right_after)) if right_after else None,
        "old_loss": float(np.mean(losses[:last])), "new_loss": losses[last],
        "general_loss": float(text[str(last)]), "base": base,
    }  # fmt: skip


def differences(result: dict[str, Any]) -> list[str]:
    """Figures of a result file that its rows do not give."""
    found = figures(result["rows"], result["tasks"])

    def same(said: Any, value: Any) -> bool:
        if said is None or value is None:
            return said is value
        if isinstance(value, dict):
            return said.keys() == value.keys() and same(list(said.values()), list(value.values()))
        return bool(np.allclose(said, value, rtol=0, atol=1e-9))

    return [
        f"{k}: {result['figures'].get(k)} in the file, {v} here"
        for k, v in found.items()
        if not same(result["figures"].get(k), v)
    ]


def main() -> int:
    """Check all files; the exit code is 1 if a number differs."""
    files = sorted(RESULTS.glob("*.json"))
    found = [f"{f.name}: {d}" for f in files for d in differences(json.loads(f.read_text(encoding="utf-8")))]
    print("\n".join([*found, f"{len(files)} result files, {len(found)} differences"]))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
