"""Is the merge worth it? RECALL beside the uniform average, task arithmetic, TIES, magnitude-max, the last expert, and training in sequence.

    python recipes/recall/compare.py --model MODEL --data data/longseq --general data/general.heldout.jsonl

Four tasks; one expert (a LoRA adapter) per task, each trained from the base model without the others, and the same tasks
trained one after the other. The experts are merged in several ways and every result is scored on all four tasks, and by
the loss of general text. Interrupted, the same command goes on.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from hf_continual import train_stream

TASKS = ("dbpedia", "amazon", "yahoo", "agnews")


def plan(args: argparse.Namespace, independent: bool) -> dict[str, Any]:
    """Experts from the base, or one adapter through all tasks; the seeds are a sweep."""
    tasks = []
    for name in TASKS:
        test = args.data / f"{name}.test.jsonl"
        entry = {
            "name": name, "train": str(args.data / f"{name}.train.jsonl"), "train_rows": 128, "test_rows": args.rows,
            # yahoo has no published test rows here: its development rows stand for them
            "test": str(test if test.is_file() else args.data / f"{name}.dev.jsonl"),
            "drop_options": True, "max_prompt_tokens": 72,
        }  # fmt: skip
        tasks.append({**entry, "parent": "base"} if independent else entry)
    general = {"rows": args.general, "split": "train", "limit": 24, "metric": {"general_loss": {"max_length": 128}}}
    return {
        "model": {"path": args.model, "dtype": "float32"},
        "output_dir": str(args.out / ("experts" if independent else "sequential")),
        "peft": {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]},
        "sft": {
            "learning_rate": 2e-3, "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 3,
            "per_device_train_batch_size": 4, "num_train_epochs": 1, "gradient_checkpointing": False, "bf16": False,
            "use_cpu": args.cpu, "disable_tqdm": True, "logging_strategy": "no", "save_strategy": "steps", "save_steps": 16,
        },
        "tasks": tasks,
        "evaluation": {"tasks": "all", "gauges": {"general": general}, "bootstrap": 0},
        "sweep": {"seeds": args.seeds},
    }  # fmt: skip


def main() -> None:
    """Train, merge, score, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--data", type=Path, required=True, help="folder of TASK.train.jsonl and TASK.test.jsonl")
    parser.add_argument("--general", required=True, help="general text to measure the loss of, rows with a text")
    parser.add_argument("--out", type=Path, default=Path("recall-out"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", type=int, default=48, help="test rows of each task")
    parser.add_argument("--cpu", action="store_true", help="not on a GPU")
    args = parser.parse_args()
    trained = {arm: train_stream(plan(args, arm == "experts")).results["runs"] for arm in ("experts", "sequential")}
    print(json.dumps({arm: {run: r["matrix"]["scores"] for run, r in runs.items()} for arm, runs in trained.items()}))


if __name__ == "__main__":
    main()
