"""RECALL, given every chance: choices are explored on rows and seeds reserved for that, then measured once on others.

    python recipes/recall/explore.py train  --model MODEL --data data/longseq --general general.heldout.jsonl --seeds 10 11
    python recipes/recall/explore.py states ... --seeds 10 11
    python recipes/recall/explore.py check  ... --seeds 10                          # against merge_with_recall
    python recipes/recall/explore.py score  ... --seeds 10 11 --arms arms.json         # exploration: dev rows
    python recipes/recall/explore.py score  ... --seeds 20 21 --arms final.json --final     # once: test rows

Two settings. Joint: one expert per task, each trained from the base, merged at once; the newest is the last of an order.
Single model: each expert is trained from the merge so far (weights half and half) and merged with it.
Merges are made in memory (experts are LoRA adapters), so a choice costs one scoring. `train` and `states` keep
their results; if interrupted, the same command resumes.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from by_file import read_change, save_full, written
from experts import Change, Workbench, change_of, states, train, weighted
from variants import Variant, weights_by_name

from hf_continual import merge_with_recall
from hf_continual.atomic_files import read_json, write_json
from hf_continual.data.rows import load_rows
from hf_continual.evaluation.exact_match import teacher_forced
from hf_continual.evaluation.general import general_loss

TASKS = ("dbpedia", "amazon", "yahoo", "agnews")
ORDERS = (("dbpedia", "amazon", "yahoo", "agnews"), ("yahoo", "amazon", "agnews", "dbpedia"))  # the papers' 1 and 3
CHAIN = 3  # tasks of the single-model setting: the first of an order
NUMBER, POOL = 20, 40  # typical samples, of so many rows


@dataclass(frozen=True)
class Cell:
    """One thing to merge: a seed, an order of tasks, and the step of a chain (None: all experts jointly)."""

    seed: int
    order: int
    step: int | None = None

    def __str__(self) -> str:
        return f"seed{self.seed} order{self.order} " + ("joint" if self.step is None else f"step{self.step}")

    @property
    def seen(self) -> tuple[str, ...]:
        """Tasks so far, the newest last."""
        return ORDERS[self.order][: len(TASKS) if self.step is None else self.step]


def cells(seeds: list[int]) -> Iterator[Cell]:
    """All cells, seed by seed; a seed has one order in the single-model setting."""
    for seed in seeds:
        yield from (Cell(seed, order) for order in range(len(ORDERS)))
        yield from (Cell(seed, seed % 2, step) for step in range(2, CHAIN + 1))


def chosen_cells(args: argparse.Namespace) -> list[Cell]:
    """The cells that the command names."""
    return [cell for cell in cells(args.seeds) if any(part in str(cell) for part in args.cells)]


class Shelf:
    """Trained experts of one seed, as changes of the base."""

    def __init__(self, out: Path, seed: int) -> None:
        self.folder = out / f"seed{seed}"

    def expert(self, task: str) -> Change:
        """The expert trained from the base."""
        return change_of(self.folder / f"joint-{task}")

    def so_far(self, order: int, step: int) -> Change:
        """The merge of the first steps of a chain, half and half each time."""
        merge = self.expert(ORDERS[order][0])
        for later in range(2, step + 1):
            merge = weighted([merge, change_of(self.folder / f"order{order}-step{later}")], [1.0, 0.5])
        return merge

    def models(self, cell: Cell) -> list[Change]:
        """The models to merge, the newest last."""
        if cell.step is None:
            return [self.expert(task) for task in cell.seen]
        before = self.so_far(cell.order, cell.step - 1)
        return [before, weighted([before, change_of(self.folder / f"order{cell.order}-step{cell.step}")], [1.0, 1.0])]

    def adapters(self, cell: Cell) -> list[Path]:
        """Their folders; for a chain, only the newest."""
        if cell.step is None:
            return [self.folder / f"joint-{task}" for task in cell.seen]
        return [self.folder / f"order{cell.order}-step{cell.step}"]

    def states(self, cell: Cell) -> list[Path]:
        """Files with representations of the newest task's texts by these models."""
        newest = cell.seen[-1]
        if cell.step is None:
            return [self.folder / f"states-{newest}-by-{task}.npz" for task in cell.seen]
        return [self.folder / f"states-order{cell.order}-step{cell.step}-{who}.npz" for who in ("before", "new")]


def train_all(args: argparse.Namespace) -> None:
    """Experts from the base, then the chain."""
    bench = Workbench(args.model, args.tokens)
    rows = {task: load_rows(str(args.data / f"{task}.train.jsonl")) for task in TASKS}
    for seed in args.seeds:
        shelf, order = Shelf(args.out, seed), seed % 2
        for task in TASKS:
            train(bench, {}, rows[task], seed, shelf.folder / f"joint-{task}")
        for step in range(2, CHAIN + 1):
            task = ORDERS[order][step - 1]
            folder = shelf.folder / f"order{order}-step{step}"
            train(bench, shelf.so_far(order, step - 1), rows[task], seed, folder)


def keep_states(args: argparse.Namespace) -> None:
    """Representations of the newest task's texts by all models of a cell."""
    bench = Workbench(args.model, args.tokens)
    for cell in cells(args.seeds):
        shelf = Shelf(args.out, cell.seed)
        if all(file.is_file() for file in shelf.states(cell)):
            continue
        pairs = bench.encoded(texts_of(args, bench, cell))
        for change, file in zip(shelf.models(cell), shelf.states(cell), strict=True):
            states(bench, change, pairs, file)
        print(cell, "states kept", flush=True)


def texts_of(args: argparse.Namespace, bench: Workbench, cell: Cell) -> Any:
    """Training rows of the newest task that representations are taken from."""
    rows = load_rows(str(args.data / f"{cell.seen[-1]}.train.jsonl"))
    return bench.shown(rows.select([i * len(rows) // POOL for i in range(POOL)]))


def check(args: argparse.Namespace) -> None:
    """Compare merges in memory with those of `merge_with_recall`: the largest change, and the largest difference."""
    bench = Workbench(args.model, args.tokens)
    for cell in chosen_cells(args):
        shelf, room = Shelf(args.out, cell.seed), args.out / f"room {cell}"
        base, adapters = base_of(args, bench, shelf, cell, room), shelf.adapters(cell)
        rows = [row["prompt"] + row["completion"] for row in texts_of(args, bench, cell)]
        # In a chain the merge so far is the first of two models, and can be the anchor.
        models = adapters if cell.step is None else [base, *adapters]
        for anchor, arm in ((-1, {}), (0, {"anchor": "first"})):
            merge_with_recall(
                models, room / "merged", base=base, calibration=rows, anchor=anchor, seed=cell.seed, output="model",
                num_typical=NUMBER, calibration_dtype="float32", dtype="float32", progress=False, overwrite=True,
            )  # fmt: skip
            here, there = merged(shelf, cell, arm, shelf.models(cell)), read_change(bench, room / "merged")
            most = max(float(change.abs().max()) for change in there.values())
            off = max(float((here[name] - there[name]).abs().max()) for name in there)
            print(cell, arm, f"largest change {most:.2e}, largest difference {off:.2e}", flush=True)
        shutil.rmtree(room)


def scored_rows(args: argparse.Namespace, task: str) -> Any:
    """Rows to score: development rows to explore; to measure, test rows, or development rows never explored on."""
    test = args.data / f"{task}.test.jsonl"
    rows = load_rows(str(test if args.final and test.is_file() else args.data / f"{task}.dev.jsonl"))
    start = 250 if args.final else 0
    return rows.select(range(start, start + args.rows))


def made(args: argparse.Namespace, bench: Workbench, shelf: Shelf, cell: Cell, arm: dict[str, Any]) -> Change:
    """A cell's merge by an arm: in memory, or, if it names a rule of the package, through its files."""
    arm = {k: v for k, v in arm.items() if k != "only"}
    if "rule" not in arm:
        return merged(shelf, cell, arm, shelf.models(cell))
    room = args.out / f"room {cell}"
    base = base_of(args, bench, shelf, cell, room)
    change = written(bench, arm.pop("rule"), shelf.adapters(cell), base, room / "merged", **arm)
    shutil.rmtree(room)
    return change


def base_of(args: argparse.Namespace, bench: Workbench, shelf: Shelf, cell: Cell, room: Path) -> Path:
    """The model that a cell's adapters were trained on, in full: the base, or the merge so far, written into a room."""
    room.mkdir(exist_ok=True)
    if cell.step is None:
        return Path(args.model)
    return save_full(bench, shelf.so_far(cell.order, cell.step - 1), Path(args.model), room / "base")


def merged(shelf: Shelf, cell: Cell, arm: dict[str, Any], models: list[Change]) -> Change:
    """A cell's models merged in memory.

    Args:
        shelf: The seed's experts.
        cell: What is merged.
        arm: ``{"share": w}`` gives the newest w and the others equal parts of the rest, ``{"sum": l}`` adds l times every
            change to what they were trained from, anything else is a `Variant` of RECALL; with ``"flat": true`` each
            model gets its mean over all weights of the variant, so that layers do not differ.
    """
    number = len(models)
    if "sum" in arm:
        return weighted(models, [arm["sum"]] * number)
    if "share" in arm:
        return weighted(models, [*[(1.0 - arm["share"]) / (number - 1)] * (number - 1), arm["share"]])
    loaded = [dict(np.load(file)) for file in shelf.states(cell)]
    choices = {k: v for k, v in arm.items() if k != "flat"}
    weights = weights_by_name(loaded, list(models[0]), Variant(**choices), number=NUMBER, seed=cell.seed)
    if arm.get("flat"):
        return weighted(models, np.mean(list(weights.values()), axis=0).tolist())
    return weighted(models, weights)


def score_all(args: argparse.Namespace) -> None:
    """Score every arm in every cell, saving each result at once."""
    arms: dict[str, dict[str, Any]] = read_json(args.arms)
    folder = args.out / ("final" if args.final else "explored")
    folder.mkdir(parents=True, exist_ok=True)
    bench = Workbench(args.model, args.tokens, fast=True)
    rows = {task: bench.shown(scored_rows(args, task)) for task in TASKS}
    general = load_rows(args.general).select(range(16) if args.final else range(100, 110))
    for cell in chosen_cells(args):
        shelf, file = Shelf(args.out, cell.seed), folder / f"{cell}.json"
        known: dict[str, dict[str, float]] = read_json(file) if file.is_file() else {}
        wanted = [name for name in arms if name not in known and fits(arms[name], cell)]
        for name in wanted:
            model = bench.put(made(args, bench, shelf, cell, arms[name]))
            known[name] = score(model, bench, {task: rows[task] for task in cell.seen}, general)
            write_json(file, known)
            print(cell, name, {k: round(v, 3) for k, v in known[name].items() if " " in k}, flush=True)


def fits(arm: dict[str, Any], cell: Cell) -> bool:
    """Whether an arm is for a cell: ``"only"`` names a setting."""
    return arm.get("only") in (None, "joint" if cell.step is None else "single")


def score(model: Any, bench: Workbench, rows: dict[str, Any], general: Any) -> dict[str, float]:
    """Exact match and answers' loss of each task, and the loss of general text."""
    found = {}
    with torch.no_grad():
        for task, its in rows.items():
            result = teacher_forced(model, bench.tokenizer, its)
            found[task], found[f"{task} nll"] = result.score.value, result.nll.value
        found["general loss"] = general_loss(model, bench.tokenizer, general, max_length=48).score.value
    return found


def main() -> None:
    """Run one stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["train", "states", "check", "score"])
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument(
        "--data", type=Path, required=True, help="folder of TASK.train.jsonl, .dev.jsonl and .test.jsonl"
    )
    parser.add_argument("--general", help="general text to measure the loss of, rows with a text")
    parser.add_argument("--out", type=Path, default=Path("recall-explored"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[10, 11])
    parser.add_argument("--rows", type=int, default=16, help="rows of each task to score")
    parser.add_argument("--tokens", type=int, default=32, help="tokens to which prompts are cut")
    parser.add_argument("--arms", type=Path, help="JSON: name -> choices, see `merged`")
    parser.add_argument("--cells", nargs="+", default=[""], help="only cells whose name contains one of these")
    parser.add_argument("--final", action="store_true", help="measure on the rows that are not used for exploring")
    args = parser.parse_args()
    print(json.dumps(vars(args), default=str), flush=True)
    torch.set_num_threads(1)
    {"train": train_all, "states": keep_states, "check": check, "score": score_all}[args.stage](args)


if __name__ == "__main__":
    main()
