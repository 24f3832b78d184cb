"""Every arm as what it changes in the plan, and the plan of an arm and a seed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from world import ASPECTS

TASKS = ASPECTS[:4]
ROUNDS, INNER, OUTER, ROWS = (
    12,
    8,
    4,
    12,
)  # rounds of a task, steps of a round on the task and on memory, rows of a step
RATE = 3e-3


def mixed(rows: int, rate: float = RATE) -> dict[str, Any]:
    """The memory mixed into every batch: so many of its rows are memory's."""
    return {"batch": ROWS - rows, "methods": [{"replay": {"rows": "kept", "per_batch": rows}}], "rate": rate}


def kif(rate: float = RATE, **options: Any) -> dict[str, Any]:
    """KIF with options; its outer steps are steps of the arm."""
    return {
        "methods": [{"kif": {"memory": "kept", "inner_steps": INNER, "outer_steps": OUTER, **options}}],
        "rate": rate,
    }


def merged(function: str, **options: Any) -> dict[str, Any]:
    """Each task trained from the base model, all models so far merged."""
    return {"between_tasks": {"merge": {"function": function, "start": "base", "options": options}}}


CLAIM: dict[str, dict[str, Any]] = {
    "sequential": {},
    "mixed": mixed(4),
    "kif": kif(),
    "kif_code": kif(rule="code", uncertainty=True),
    # The rows of the paper's ablation table.
    "kif_no_identification": kif(rule="sum"),
    "kif_weighted": kif(rule="weighted"),
    "kif_adaptive": kif(rule="adaptive", temperature=0.25),
    "kif_no_shared": kif(rule="no_shared"),
    "kif_static": kif(old_importance="static"),
    "joint": {"between_tasks": "joint"},
    "average": merged("linear"),
    "recall": merged("recall"),
    "task_arithmetic": merged("task-arithmetic", scale=0.5),
    "ties": merged("ties", dtype="float32"),
}
TUNING: dict[str, dict[str, Any]] = {
    **{f"sequential_rate_{rate:g}": {"rate": rate} for rate in (1e-3, 2e-3, 4e-3)},
    **{f"mixed_{rows}": mixed(rows) for rows in (2, 4, 6)},
    **{f"kif_{share}": kif(top_share=share) for share in (0.2, 0.5, 0.8)},
}  # fmt: skip
ARMS = {**TUNING, **CLAIM}


def task_of(aspect: str, index: int, change: dict[str, Any], data: Path, rounds: int) -> dict[str, Any]:
    """A task of the plan: the first has no memory, so it is plain training with the steps and rows of every arm."""
    later = index > 0
    steps = rounds * INNER if later and "kif" in str(change.get("methods")) else rounds * (INNER + OUTER)
    return {
        "name": aspect, "train": str(data / f"{aspect}.train.jsonl"), "test": str(data / f"{aspect}.test.jsonl"),
        "sft": {"max_steps": steps, "per_device_train_batch_size": change.get("batch", ROWS) if later else ROWS},
    }  # fmt: skip


def plan(arm: str, seed: int, model: Path, out: Path, rounds: int = ROUNDS) -> dict[str, Any]:
    """The plan of an arm and a seed.

    Args:
        arm: A key of `ARMS`.
        seed: Seed of world, adapter and order of the rows.
        model: The base model's folder; ``data/`` is next to it.
        out: Folder of the run.
        rounds: Rounds of a task.

    Returns:
        A plan for `train_stream`.
    """
    change, data = ARMS[arm], model.parent / "data"
    tasks = [task_of(aspect, i, change, data, rounds) for i, aspect in enumerate(TASKS)]
    between = change.get("between_tasks", "continue")
    sft = {
        "learning_rate": change.get("rate", RATE), "lr_scheduler_type": "linear", "warmup_steps": 10, "use_cpu": True, "bf16": False,
        "gradient_checkpointing": False, "disable_tqdm": True, "logging_strategy": "no", "save_strategy": "no", "max_length": 32,
        "per_device_train_batch_size": ROWS,
    }  # fmt: skip
    if between == "joint":
        sft["max_steps"] = rounds * (INNER + OUTER) * len(tasks)
        for task in tasks:
            del task["sft"]
    methods = change.get("methods", [])
    general = {"rows": str(data / "general.jsonl"), "split": "train", "metric": {"general_loss": {"max_length": 32}}}
    return {
        "model": {"path": str(model), "dtype": "float32"}, "output_dir": str(out), "seed": seed, "data_seed": seed,
        "peft": {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"},
        "sft": sft, "methods": methods, "tasks": tasks, "between_tasks": between,
        **({"memory": {"policy": "class_balanced", "share": 0.02, "by": "completion"}} if methods else {}),
        "evaluation": {"tasks": "seen", "base": arm == "sequential", "bootstrap": 0, "batch_size": 256, "gauges": {"general": general}},
    }  # fmt: skip
