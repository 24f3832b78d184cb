"""A plan's cost, as tables for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from hf_continual.disk import size


def dry_run_report(plans: Sequence[tuple[str, Mapping[str, Any]]]) -> RenderableType:
    """Show what would be done, without doing it.

    Args:
        plans: Name and description of each run; a single one without a sweep.

    Returns:
        A table per run with its totals.
    """
    parts: list[RenderableType] = []
    for name, plan in plans:
        title = f"{name + ': ' if name else ''}{plan['model']} -> {plan['output_dir']}"
        table = Table(title=title, title_justify="left")
        branches = any(
            t["parent"] != before
            for t, before in zip(plan["tasks"], ["base", *(t["name"] for t in plan["tasks"])], strict=False)
        )
        for column in ("task", "rows", "tokens", "replay", "steps", "trainable", "memory", "test"):
            table.add_column(column, justify="left" if column == "task" else "right", overflow="fold")
        for task in plan["tasks"]:
            table.add_row(
                task["name"] + (f"\n  from {task['parent']}" if branches else ""), f"{task['rows']:,}",
                f"{task['tokens']:,}", f"{100 * task['replay_share']:.0f} %" if task["replay_share"] else "",
                f"{task['steps']:,}" + (f" + {task['extra_steps']:,}" if task["extra_steps"] else ""), f"{task['trainable']:,}", size(task["memory_bytes"]),
                "" if task["test_rows"] is None else f"{task['test_rows']:,}",
            )  # fmt: skip
        methods = {t["name"]: ", ".join(t["methods"]) for t in plan["tasks"] if t["methods"]}
        lines = [
            *([plan["start"]] if plan["start"] else []),
            *plan["notes"],
            f"between tasks: {plan['between_tasks']}; processes: {plan['processes']}; parameters: {plan['parameters']:,}",
            "methods: " + ("; ".join(f"{t}: {m}" for t, m in methods.items()) or "none: plain fine-tuning"),
            *plan.get("previews", ()),
            *_memory(plan["tasks"]),
            *_micro_batches(plan["tasks"]),
            f"total: {plan['steps']:,} steps and {plan['scored_rows']:,} rows to score; memory of a process about "
            f"{size(plan['memory_bytes'])} (rough: activations); disk at most {size(plan['disk_bytes'])}",
            *_time(plan.get("time")),
        ]
        if plan["memory_bytes"] > plan["memory_here_bytes"]:
            lines.append(
                f"that is more memory than the {size(plan['memory_here_bytes'])} of this machine: lower "
                f"per_device_train_batch_size, a method's per_batch or max_length, or set gradient_checkpointing"
            )
        parts += [table, Text("\n".join(lines)), Text("")]
    if len(plans) > 1:
        steps, disk = sum(p["steps"] for _, p in plans), sum(p["disk_bytes"] for _, p in plans)
        parts.append(Text(f"{len(plans)} runs: {steps:,} steps, disk at most {size(disk)}"))
    return Group(*parts)


def _time(found: Mapping[str, Any] | None) -> list[str]:
    """A run's duration, and its price."""
    if found is None:
        return []
    if found["seconds"] is None:
        return [f"no estimate of the time: the probe failed ({found['why']})"]
    price = "" if found["price"] is None else f", {found['price']:.2f} at the given price per hour"
    return [
        f"time about {_duration(found['seconds'])}{price}: {_duration(found['training_seconds'])} of training, "
        f"{_duration(found['scoring_seconds'])} of scoring (from a probe of two blocks on {found['device']}; loading, saving and "
        f"generation not counted)"
    ]


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _memory(tasks: Sequence[Mapping[str, Any]]) -> list[str]:
    """Rows that each task is given from earlier ones, and hands on."""
    rows = {t["name"]: t["memory_rows"] for t in tasks if t["memory_rows"] is not None}
    shown = "; ".join(f"{name}: given {n['given']:,}, hands on {n['kept']:,}" for name, n in rows.items())
    return [f"buffer, in rows: {shown}"] if shown else []


def _micro_batches(tasks: Sequence[Mapping[str, Any]]) -> list[str]:
    """Rows that replay adds to a micro-batch, if it adds whole rows."""
    largest = max((t["micro_batch"] for t in tasks), key=lambda m: m["tokens"])
    if not largest["added_rows"]:
        return []
    return [
        f"a micro-batch holds {largest['task_rows']} rows of the task and {largest['added_rows']} that methods add, about "
        f"{largest['tokens']:,} tokens with padding"
    ]
