"""Tables of the scores from `explore.py score`: means over seeds with their range, and paired differences with standard errors.

python recipes/recall/tables.py recall-explored/final
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Mapping
from pathlib import Path

from explore import ORDERS, TASKS, Cell

from hf_continual.atomic_files import read_json

REFERENCE = {"joint": "uniform", "single": "alpha 0.25"}
Figures = dict[str, float]


def read_cell(file: Path) -> Cell:
    """The cell that a file of scores belongs to."""
    seed, order, step = file.stem.split()
    number = None if step == "joint" else int(step.removeprefix("step"))
    return Cell(int(seed.removeprefix("seed")), int(order.removeprefix("order")), number)


def figures(cell: Cell, scores: Mapping[str, float]) -> Figures:
    """The reported figures of one merge: means over the tasks seen, the last of which is the newest."""
    *old, newest = cell.seen
    return {
        "loss, all": statistics.fmean(scores[f"{t} nll"] for t in cell.seen),
        "old": statistics.fmean(scores[f"{t} nll"] for t in old),
        "newest": scores[f"{newest} nll"],
        "exact match": statistics.fmean(scores[t] for t in cell.seen),
        "general loss": scores["general loss"],
    }


def by_seed(folder: Path, setting: str) -> dict[str, dict[int, Figures]]:
    """Arm -> seed -> figures, means over the seed's cells; arms that lack a cell of a seed lack the seed."""
    found: dict[str, dict[int, list[Figures]]] = {}
    files = {read_cell(file): read_json(file) for file in sorted(folder.glob("*.json"))}
    cells = [cell for cell in files if (cell.step is None) == (setting == "joint")]
    for cell in cells:
        # Arms that do not depend on the order are scored in one of them, on all tasks.
        other = files.get(Cell(cell.seed, 0, None), {}) if cell.step is None else {}
        for arm, scores in {**other, **files[cell]}.items():
            if arm in files[cell] or arm.startswith(("uniform", "ties", "dare")):
                found.setdefault(arm, {}).setdefault(cell.seed, []).append(figures(cell, scores))
    wanted = {seed: sum(cell.seed == seed for cell in cells) for seed in {cell.seed for cell in cells}}
    return {
        arm: {
            seed: {name: statistics.fmean(each[name] for each in rows) for name in rows[0]}
            for seed, rows in seeds.items()
            if len(rows) == wanted[seed]
        }
        for arm, seeds in found.items()
    }


def compared(arm: Mapping[int, Figures], other: Mapping[int, Figures]) -> str:
    """Paired difference of the loss: mean, standard error over seeds, and in how many seeds it is below."""
    pairs = [arm[seed]["loss, all"] - other[seed]["loss, all"] for seed in sorted(arm) if seed in other]
    if len(pairs) < 2 or not any(pairs):
        return ""
    error = statistics.stdev(pairs) / len(pairs) ** 0.5
    return f"{statistics.fmean(pairs):+.3f} ± {error:.3f}, below in {sum(p < 0 for p in pairs)} of {len(pairs)}"


def main(folder: Path) -> None:
    """Print both tables in Markdown."""
    print(f"tasks {TASKS}, orders {ORDERS}")
    for setting, reference in REFERENCE.items():
        arms = by_seed(folder, setting)
        names = list(next(iter(next(iter(arms.values())).values())))
        print(f"\n| {setting} | {' | '.join(names)} | from {reference} |\n|{'---|' * (len(names) + 2)}")
        for arm, seeds in arms.items():
            cells = []
            for name in names:
                values = [f[name] for f in seeds.values()]
                cells.append(
                    f"{statistics.fmean(values):.3f} ({min(values):.3f} to {max(values):.3f})" if values else ""
                )
            print(f"| {arm} | {' | '.join(cells)} | {compared(seeds, arms[reference])} |")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
