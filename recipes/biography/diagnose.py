"""Is the forgetting spurious? `hf-continual diagnose` on cases whose answer is known by construction.

    python recipes/biography/diagnose.py --seeds 2 3 4 --out diagnose-out

The world of run.py: a tiny Llama reads biographies of 120 invented people (`read`) and learns to answer questions about
them (`old`). From there it goes on in five ways:

    early     20 steps of questions about 60 new people: the old answers collapse within a few steps (the paper's spurious forgetting)
    frozen    300 steps of them with the embeddings and the two bottom blocks frozen
    plain     300 steps of them
    rewritten 300 steps of questions about the same 120 people with other answers: the facts are overwritten
    replayed  300 steps of questions about the new people with half of the tokens replayed: nothing is forgotten

Each is diagnosed against `old`, with `read` as the base of the control. Finished parts are not repeated.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from datasets import Dataset
from run import NEW, OLD, make_model

from hf_continual import train_stream
from hf_continual.data.biography import Person, biography_rows, people, questions

CASES = ("early", "rewritten", "replayed", "frozen", "plain")


def contradicted(seed: int) -> Dataset:
    """Questions about the old people, answered with the facts of others; a row whose answer happens to agree is left out."""
    old, others = people(OLD, seed), people(OLD, seed + 1000)
    false = questions([Person(p.name, o.facts) for p, o in zip(old, others, strict=True)])
    return Dataset.from_list(
        [row for row, true in zip(false, questions(old), strict=True) if row["completion"] != true["completion"]]
    )


def plan(seed: int, folder: Path) -> dict:
    """Reading, the old questions, and the five ways to go on; one tree."""

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


def main() -> None:
    """Train the cases of every seed, diagnose each, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--out", type=Path, default=Path("diagnose-out"))
    args = parser.parse_args()
    for seed in args.seeds:
        folder = args.out / f"seed{seed}"
        if not (folder / "model" / "config.json").is_file():
            make_model(folder / "model", seed)
        found = train_stream(plan(seed, folder)).results
        print(seed, json.dumps({k: v.get("old", {}).get("value") for k, v in found["cells"].items()}), flush=True)


if __name__ == "__main__":
    main()
