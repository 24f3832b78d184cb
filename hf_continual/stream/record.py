"""The record of a run's plan: the same plan goes on, a changed one is refused with the difference."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from hf_continual.durable import read_json, write_json
from hf_continual.methods.base import Method
from hf_continual.stream.prepare import Prepared, fingerprint
from hf_continual.stream.source import PlanError

PLAN = "plan.json"

# What may differ between two attempts without changing a result.
FREE = ("output_dir", "evaluation.batch_size", "evaluation.bootstrap", "evaluation.solved_at", "sweep")
SHOWN = re.compile(
    r"(^|\.)sft\.(disable_tqdm|log\w*|report_to|run_name|save_total_limit|dataloader_(num_workers|pin_memory))$"
)


def plain_plan(prepared: Prepared) -> dict[str, Any]:
    """The plan as plain data; rows by their number and hash, so that a changed file is a changed plan."""
    plan = prepared.plan
    data = _plain(plan.model_dump(exclude={"tasks", "sweep", "output_dir"}))
    data["tasks"] = []
    for task, planned in zip(prepared.stream, plan.tasks, strict=True):
        entry = _plain(planned.model_dump(exclude={"train", "test"}))
        for which, source, rows in (("train", planned.train, task.train), ("test", planned.test, task.test)):
            named = (
                source
                if isinstance(source, str)
                else _plain(source)
                if isinstance(source, Mapping)
                else "rows in Python"
            )
            entry[which] = None if rows is None else {"source": named, **(fingerprint(rows) or {})}
        data["tasks"].append(entry)
    if prepared.memory is not None and prepared.memory.start:
        data["memory"]["start"] = {"source": data["memory"]["start"], **(fingerprint(prepared.memory.start) or {})}
    for name, rows in prepared.gauges.items():
        data["evaluation"]["gauges"][name]["rows"] = fingerprint(rows)
    return data


def _plain(data: Any) -> Any:
    if isinstance(data, Method):
        return {data.name: data.describe()}
    if isinstance(data, Mapping):
        return {str(k): _plain(v) for k, v in data.items()}
    if isinstance(data, Sequence) and not isinstance(data, str):
        return [_plain(v) for v in data]
    if data is None or isinstance(data, str | int | float | bool):
        return data
    if callable(data):
        return f"{data.__module__}:{data.__qualname__}"
    return repr(data)


def keep_plan(output_dir: Path, now: dict[str, Any]) -> None:
    """Write the plan of a new run, or compare it with what the folder was begun with.

    Tasks added at the end are no change: the run goes on with them.

    Args:
        output_dir: The run's folder.
        now: The plan as plain data.

    Raises:
        PlanError: If it differs; shows the difference.
    """
    file = output_dir / PLAN
    if file.is_file():
        then = read_json(file)
        if lines := differences(then, now):
            shown = "\n  ".join(lines[:12]) + (f"\n  and {len(lines) - 12} more" if len(lines) > 12 else "")
            raise PlanError(
                f"{output_dir} was begun with another plan:\n  {shown}\nGo on with the plan it was begun with, or give the "
                f"changed one another output_dir. Tasks may be added at the end."
            )
    elif output_dir.is_dir() and any(not p.name.endswith(".lock") for p in output_dir.iterdir()):
        raise PlanError(f"{output_dir} is not empty and holds no run of a plan. Name another output_dir.")
    write_json(file, now)


def differences(then: Any, now: Any, path: str = "") -> list[str]:
    """Every entry that differs, as ``path: old -> new``; tasks added at the end are left out."""
    if path in FREE or SHOWN.search(path):
        return []
    if isinstance(then, dict) and isinstance(now, dict):
        lines = []
        for key in [*then, *(k for k in now if k not in then)]:
            inner = f"{path}.{key}" if path else str(key)
            lines += differences(then.get(key), now.get(key), inner)
        return lines
    if isinstance(then, list) and isinstance(now, list) and (path == "tasks" or len(then) == len(now)):
        lines = [f"{path}[{i}]: {_short(t)} -> left out" for i, t in enumerate(then[len(now) :], start=len(now))]
        for i, (a, b) in enumerate(zip(then, now, strict=False)):
            lines += differences(a, b, f"{path}[{i}]")
        return lines
    return [] if then == now else [f"{path}: {_short(then)} -> {_short(now)}"]


def _short(value: Any) -> str:
    text = repr(value["name"] if isinstance(value, dict) and "name" in value else value)
    return text if len(text) < 80 else text[:77] + "..."


@contextlib.contextmanager
def only_one(output_dir: Path) -> Iterator[None]:
    """Refuse a second process that would write the same run; a killed one leaves nothing that blocks.

    Args:
        output_dir: The run's folder.

    Yields:
        None: While this process owns it.

    Raises:
        PlanError: If another process is running it.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    lock = FileLock(output_dir / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise PlanError(
            f"{output_dir} is being run by another process. Wait for it, or name another output_dir."
        ) from None
    try:
        yield
    finally:
        lock.release()
