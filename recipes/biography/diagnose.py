"""Is the forgetting spurious? `hf-continual diagnose` on cases whose answer is known by construction.

    python recipes/biography/diagnose.py --seeds 2 3 4 --out diagnose-out

The world of run.py: a tiny Llama reads biographies of 120 invented people (`read`) and learns to answer questions about
them (`old`). From there it continues in five ways:

    early     20 steps of questions about 60 new people: the old answers collapse in a few steps (the paper's spurious forgetting)
    rewritten 200 steps of questions about the same 120 people with other answers: the facts are overwritten
    replayed  200 steps of questions about the new people with half of the tokens replayed: nothing is forgotten
    frozen    300 steps about the new people with the embeddings and the two bottom blocks frozen
    plain     300 steps about the new people; what this is is not known beforehand

Each is diagnosed against `old`, with `read` as the base of the control. Finished parts are not repeated.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from datasets import Dataset
from run import NEW, OLD, make_model

from hf_continual import train_stream
from hf_continual.data.biography import ATTRIBUTES, Person, biography_rows, people, questions
from hf_continual.diagnosis import diagnose

CASES = ("early", "rewritten", "replayed", "frozen", "plain")


def contradicted(seed: int) -> Dataset:
    """Questions about the old people, answered with the facts of others; a row whose answer happens to agree is left out."""
    old, others = people(OLD, seed), people(OLD, seed + 1000)
    false = questions([Person(p.name, o.facts) for p, o in zip(old, others, strict=True)])
    return Dataset.from_list(
        [row for row, true in zip(false, questions(old), strict=True) if row["completion"] != true["completion"]]
    )


def plan(seed: int, folder: Path) -> dict:
    """Reading, the old questions, and the five ways to continue; one tree."""

    def named(number: int, skip: int = 0, kind: str = "questions") -> dict:
        return {"biography": {"people_number": number, "skip": skip, "kind": kind, "seed": seed}}

    new = {"parent": "old", "train": named(NEW, OLD), "test": named(NEW, OLD)}
    long = {"max_steps": 300, "lr_scheduler_type": "constant_with_warmup"}
    replay = {"replay": {"rows": biography_rows(OLD, seed=seed), "ratio": 0.5}}
    return {
        "model": str(folder / "model"),
        "output_dir": str(folder / "run"),
        "seed": seed,
        "sft": {
            "learning_rate": 5e-4, "lr_scheduler_type": "linear", "warmup_steps": 10, "per_device_train_batch_size": 48,
            "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "save_strategy": "steps", "save_steps": 200,
            "disable_tqdm": True, "logging_steps": 50, "max_length": 256,
        },
        "tasks": [
            {
                "name": "read", "train": named(OLD, kind="texts"),
                "sft": {"max_steps": 800, "learning_rate": 2e-3, "per_device_train_batch_size": 16, "warmup_steps": 0},
            },
            {"name": "old", "train": named(OLD), "test": named(OLD), "sft": {"max_steps": 120}},
            {"name": "early", **new, "sft": {**long, "max_steps": 20}},
            {"name": "rewritten", "parent": "old", "train": contradicted(seed), "test": contradicted(seed), "sft": {**long, "max_steps": 200}},
            {"name": "replayed", **new, "sft": {**long, "max_steps": 200}, "methods": [replay]},
            {"name": "frozen", **new, "sft": long, "methods": [{"freeze": {"bottom": 2}}]},
            {"name": "plain", **new, "sft": long},
        ],
        "evaluation": {"batch_size": 256, "bootstrap": 0, "tasks": "all"},
    }  # fmt: skip


def examined(seed: int, folder: Path, case: str) -> dict:
    """The diagnosis of one case; one that is there is not made again."""
    file = folder / f"diagnosis-{case}.json"
    if not file.is_file():
        run = folder / "run"
        read, old, after = (next(run.glob(f"task-*-{name}")) for name in ("read", "old", case))
        diagnose(old, after, old_rows(seed), read, steps=30, learning_rate=5e-4, batch_size=48, group="who").write(file)
    return json.loads(file.read_text())


def old_rows(seed: int) -> list[dict]:
    """The old questions, each with the person that it is about: all questions about one are in one half."""
    asked = [person.name for person in people(OLD, seed) for _ in ATTRIBUTES]
    return [{**row, "who": who} for row, who in zip(biography_rows(OLD, seed=seed), asked, strict=True)]


def line(seed: int, case: str, found: dict) -> str:
    """A row of the README's table."""
    held = {moment: 100 * score["held"]["value"] for moment, score in found["scores"].items()}
    over = [100 * x for x in found["tests"]["over the control"]["interval"]]
    shown = [f"{held[m]:.0f}" for m in ("before", "after", "recovered", "control")]
    blocks = [e for e in found["layers"] if e["layer"].startswith("layer.")]
    angles = " ".join(f"{e['angle']:.0f}" for e in blocks)
    alike = " ".join(f"{e['cka']:.2f}" for e in blocks)
    verdict = f"{found['verdict']} ({found['confidence']:.2f})"
    return (
        f"| {case} | {seed} | {' | '.join(shown)} | {over[0]:+.0f} to {over[1]:+.0f} | {verdict} | {angles} | {alike} |"
    )


def main() -> None:
    """Train the cases of every seed, diagnose each, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--out", type=Path, default=Path("diagnose-out"))
    args = parser.parse_args()
    lines = []
    for seed in args.seeds:
        folder = args.out / f"seed{seed}"
        if not (folder / "model" / "config.json").is_file():
            make_model(folder / "model", seed)
        whole = plan(seed, folder)
        last = max(i for i, task in enumerate(whole["tasks"]) if task["name"] in args.cases)
        train_stream({**whole, "tasks": whole["tasks"][: last + 1]})  # more cases later continue from there
        lines += [line(seed, case, examined(seed, folder, case)) for case in CASES if case in args.cases]
    print("\n".join(lines))


if __name__ == "__main__":
    main()
