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
RATES, MEMORY_ROWS, SHARES = (1e-3, 2e-3, 4e-3), (2, 4, 6), (0.2, 0.5, 0.8)  # what tuning tries
LONG = 2 * ROUNDS
SHARE = 4  # memory's rows of a batch that give `mixed` KIF's numbers of task rows and memory rows
Arm = dict[str, Any]


def mixed(rows: int) -> Arm:
    """The memory mixed into every batch: so many of its rows are memory's."""
    return {"batch": ROWS - rows, "methods": [{"replay": {"rows": "kept", "per_batch": rows}}]}


def kif(**options: Any) -> Arm:
    """KIF with options; its outer steps are steps of the arm."""
    return {"methods": [{"kif": {"memory": "kept", "inner_steps": INNER, "outer_steps": OUTER, **options}}]}


def merged(function: str, **options: Any) -> Arm:
    """Each task trained from the base model, all models so far merged."""
    return {"between_tasks": {"merge": {"function": function, "start": "base", "options": options}}}


def rate_arms() -> dict[str, Arm]:
    """Plain training at each rate, on the tuning seeds."""
    return {f"sequential_{rate:g}": {"rate": rate} for rate in RATES}


def strength_arms(rate: float) -> dict[str, Arm]:
    """As many tries for mixing as for KIF, on the tuning seeds."""
    tries = {f"mixed_{rows}": mixed(rows) for rows in MEMORY_ROWS} | {f"kif_{s}": kif(top_share=s) for s in SHARES}
    return {name: {**arm, "rate": rate} for name, arm in tries.items()}


def claim_arms(rate: float, rows: int, share: float) -> dict[str, Arm]:
    """The claim's arms.

    Args:
        rate: Learning rate of all arms.
        rows: Memory's rows of a batch that tuning chose.
        share: KIF's share of the weights that tuning chose.

    Returns:
        The arms; a tuned arm that equals the default arm is left out.
    """
    arms = {
        "sequential": {},
        "mixed": mixed(SHARE),
        "kif": kif(),
        # The rows of the paper's ablation table.
        "kif_no_identification": kif(rule="sum"),
        "kif_weighted": kif(rule="weighted"),
        "kif_adaptive": kif(rule="adaptive", temperature=0.25),
        "kif_no_shared": kif(rule="no_shared"),
        "kif_static": kif(old_importance="static"),
        "average": merged("linear"),
        "recall": merged("recall"),
        "joint": {"between_tasks": "joint"},
        "kif_code": kif(rule="code", uncertainty=True),
    }
    if rows != SHARE:
        arms["mixed_tuned"] = mixed(rows)
    if share != SHARES[0]:
        arms["kif_tuned"] = kif(top_share=share)
    arms |= {
        "mixed_24": {**mixed(SHARE), "rounds": LONG},
        "kif_24": {**kif(), "rounds": LONG},
    }  # added later, see README.md
    arms |= {"task_arithmetic": merged("task-arithmetic", scale=0.5), "ties": merged("ties", dtype="float32")}
    return {name: {**arm, "rate": rate} for name, arm in arms.items()}


def task_of(aspect: str, index: int, change: dict[str, Any], data: Path, rounds: int) -> dict[str, Any]:
    """A task of the plan: the first has no memory, so it is plain training with the steps and rows of every arm."""
    later = index > 0
    steps = rounds * INNER if later and "kif" in str(change.get("methods")) else rounds * (INNER + OUTER)
    return {
        "name": aspect, "train": str(data / f"{aspect}.train.jsonl"), "test": str(data / f"{aspect}.test.jsonl"),
        "sft": {"max_steps": steps, "per_device_train_batch_size": change.get("batch", ROWS) if later else ROWS},
    }  # fmt: skip


def plan(change: Arm, seed: int, model: Path, out: Path, rounds: int = ROUNDS, base: bool = False) -> dict[str, Any]:
    """The plan of an arm and a seed.

    Args:
        change: The arm.
        seed: Seed of world, adapter and order of the rows.
        model: The base model's folder; ``data/`` is next to it.
        out: Folder of the run.
        rounds: Rounds of a task.
        base: Whether the base model is scored too.

    Returns:
        A plan for `train_stream`.
    """
    data, rounds = model.parent / "data", change.get("rounds", rounds)
    tasks = [task_of(aspect, i, change, data, rounds) for i, aspect in enumerate(TASKS)]
    between = change.get("between_tasks", "continue")
    sft = {
        "learning_rate": change["rate"], "lr_scheduler_type": "linear", "warmup_steps": 10, "use_cpu": True, "bf16": False,
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
        "evaluation": {"tasks": "seen", "base": base, "bootstrap": 0, "batch_size": 256, "gauges": {"general": general}},
    }  # fmt: skip
