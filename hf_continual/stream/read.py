"""Reading a plan: from YAML, a mapping or a TaskStream; mistakes as one sentence with file and line."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import fields as dataclass_fields
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from hf_continual.data.benchmarks import BENCHMARKS
from hf_continual.named import did_you_mean
from hf_continual.stream.earlier import check_memory
from hf_continual.stream.plan import (
    Between,
    EvaluationPlan,
    GaugePlan,
    MemoryPlan,
    MergePlan,
    ModelPlan,
    Plan,
    SweepPlan,
    TaskPlan,
)
from hf_continual.stream.source import Key, PlanError, Where, read_yaml
from hf_continual.tasks import TaskStream

_PARTS: dict[str, type[BaseModel]] = {
    "model": ModelPlan,
    "evaluation": EvaluationPlan,
    "sweep": SweepPlan,
    "memory": MemoryPlan,
}
_BRANCHES = {"Between", "MemoryPlan"}


def read_plan(plan: str | Path | Mapping[str, Any] | TaskStream, **changes: Any) -> tuple[Plan, Where]:
    """Read and check a plan, without loading rows or weights.

    Args:
        plan: A YAML file, a mapping of `Plan`'s fields, or a `TaskStream` with the other fields in `changes`.
        **changes: Fields that replace the plan's.

    Returns:
        The plan, and where its entries are written.

    Raises:
        FileNotFoundError: If the file does not exist.
        PlanError: If something in it is unknown, missing or of the wrong type.
    """
    where = Where()
    if isinstance(plan, TaskStream):
        data: Any = {"tasks": plan}
    elif isinstance(plan, str | Path):
        data, where = read_yaml(Path(plan))
    else:
        data = dict(plan)
    if not isinstance(data, dict):
        raise where.error(
            (), f"a plan is a mapping with at least model, output_dir and tasks, not {type(data).__name__}."
        )
    data = {**data, **changes}
    data["tasks"], origins = _entries(data.get("tasks"), where)
    try:
        read = Plan.model_validate(data)
    except ValidationError as error:
        raise _explained(error, where, origins) from None
    where.lines = _spread(where.lines, origins)
    _check_names(read, where)
    check_memory(read, where)
    return read, where


def _entries(tasks: Any, where: Where) -> tuple[list[Any], list[tuple[Key, ...]]]:
    """Tasks as mappings, benchmarks spread out, and which entry of the plan each comes from."""
    if isinstance(tasks, Mapping):
        tasks = [tasks]
    if tasks is None or isinstance(tasks, str) or not isinstance(tasks, Sequence | TaskStream) or len(tasks) == 0:
        raise where.error(("tasks",), "a plan needs at least one task: tasks: [{name: ..., train: ..., test: ...}].")
    found: list[Any] = []
    origins: list[tuple[Key, ...]] = []
    for i, task in enumerate(tasks):
        entries = [task]
        if isinstance(task, Mapping) and "benchmark" in task:
            entries = _benchmark(dict(task), where, ("tasks", i))
        elif not isinstance(task, Mapping) and hasattr(task, "train"):
            entries = [{"name": task.name, "train": task.train, "test": task.test, "parent": task.parent}]
        found += entries
        origins += [("tasks", i)] * len(entries)
    return found, origins


def _spread(lines: dict[tuple[Key, ...], int], origins: Sequence[tuple[Key, ...]]) -> dict[tuple[Key, ...], int]:
    """Lines of the tasks by their place in the plan as read, where an entry may stand for several."""
    found = {path: line for path, line in lines.items() if path[:1] != ("tasks",) or len(path) == 1}
    for i, origin in enumerate(origins):
        found |= {("tasks", i, *path[2:]): line for path, line in lines.items() if path[:2] == origin}
    return found


def _benchmark(entry: dict[str, Any], where: Where, path: tuple[Key, ...]) -> list[dict[str, Any]]:
    name = entry.pop("benchmark")
    if name not in BENCHMARKS:
        raise where.error((*path, "benchmark"), f"unknown benchmark {name!r}; known are {', '.join(BENCHMARKS)}.")
    own = BENCHMARKS[name].__code__.co_varnames[: BENCHMARKS[name].__code__.co_argcount]
    options = {k: entry.pop(k) for k in list(entry) if k in own}
    try:
        # What the entry says of a task goes before what the benchmark says.
        return [{**task, **copy.deepcopy(entry)} for task in BENCHMARKS[name](**options)]
    except (TypeError, ValueError, OSError) as error:
        raise where.error(path, str(error)) from error


def _explained(error: ValidationError, where: Where, origins: list[tuple[Key, ...]]) -> PlanError:
    """The first of pydantic's errors as one sentence with its place."""
    errors = error.errors()
    # Of a union pydantic reports every branch: of a mapping, the branch that is one says what is wrong.
    if isinstance(errors[0]["input"], Mapping):
        errors = [e for e in errors if _BRANCHES & set(e["loc"])] or errors
    # A mistyped key may also be a missing one; the mistake is what helps.
    said = next((e for e in errors if e["type"] == "extra_forbidden"), errors[0])
    # Names of branches are no keys of the plan.
    loc = [k for k in said["loc"] if isinstance(k, int) or not ("[" in k or k in _BRANCHES)]
    path: list[Key] = [*origins[int(loc[1])], *loc[2:]] if loc[:1] == ["tasks"] and len(loc) > 1 else list(loc)
    if said["type"] == "extra_forbidden":
        known = _known(loc)
        hint = did_you_mean(loc[-1], known)
        return where.error(path, f"unknown key {loc[-1]!r}.{hint} Known are {', '.join(known)}.")
    if said["type"] == "missing":
        return where.error(path[:-1], f"the key {path[-1]!r} is missing.")
    given = said["input"]
    return where.error(
        path, f"got {given!r} ({type(given).__name__}): {said['msg'].replace('Input should be', 'expected')}."
    )


def _known(loc: Sequence[Key]) -> list[str]:
    part: type[BaseModel] = Plan
    if loc[0] == "tasks":
        part = TaskPlan
    elif "gauges" in loc:
        part = GaugePlan
    elif loc[0] == "between_tasks":
        part = MergePlan if len(loc) > 2 else Between
    elif len(loc) > 1:
        part = _PARTS.get(str(loc[0]), Plan)
    return list(part.model_fields) + (["benchmark"] if part is TaskPlan else [])


def _check_names(plan: Plan, where: Where) -> None:
    """Names that must be those of tasks, and options that must be those of SFTConfig and LoraConfig."""
    from peft import LoraConfig
    from trl import SFTConfig

    names = [task.name for task in plan.tasks]
    asked: list[tuple[tuple[Key, ...], str]] = []
    if isinstance(plan.evaluation.tasks, list):
        asked += [(("evaluation", "tasks", i), name) for i, name in enumerate(plan.evaluation.tasks)]
    for i, task in enumerate(plan.tasks):
        asked += [(("tasks", i, "evaluate", k), name) for k, name in enumerate(task.evaluate)]
    tested = {task.name for task in plan.tasks if task.test is not None}
    for path, name in asked:
        if name not in names:
            hint = did_you_mean(name, names)
            raise where.error(
                path,
                f"task {name!r} is to be evaluated but is not defined.{hint} The plan's tasks are {', '.join(names)}.",
            )
        if name not in tested:
            raise where.error(path, f"task {name!r} is to be evaluated and has no test rows. Give it `test:`.")
    for label, options, cls in [
        (("sft",), plan.sft, SFTConfig),
        (("peft",), plan.peft or {}, LoraConfig),
        *[(("tasks", i, "sft"), task.sft, SFTConfig) for i, task in enumerate(plan.tasks)],
    ]:
        known = [f.name for f in dataclass_fields(cls) if f.init] + ["fresh_methods"] * (cls is SFTConfig)
        for key in options:
            if key not in known:
                hint = did_you_mean(key, known)
                raise where.error((*label, key), f"{cls.__name__} has no option {key!r}.{hint}")
            if cls is SFTConfig and key in ("output_dir", "seed", "data_seed", "push_to_hub", "resume_from_checkpoint"):
                raise where.error(
                    (*label, key), f"{key!r} is the plan's to set: say `output_dir` and `seed` at the top of the plan."
                )
