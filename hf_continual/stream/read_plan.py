"""Read a plan from YAML, a mapping or a TaskStream; mistakes are reported in one sentence with file and line.

Nothing here imports torch or transformers: a mistake in a plan is reported within a second.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from hf_continual.data.benchmarks import BENCHMARKS
from hf_continual.named import did_you_mean
from hf_continual.stream.baselines import with_baselines
from hf_continual.stream.check_plan import check_plan
from hf_continual.stream.overrides import override
from hf_continual.stream.plan import (
    ArmPlan,
    BaselinesPlan,
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
from hf_continual.stream.plan_lines import Key, PlanError, Where, read_yaml
from hf_continual.tasks import TaskStream

_PARTS: dict[str, type[BaseModel]] = {
    "model": ModelPlan,
    "evaluation": EvaluationPlan,
    "sweep": SweepPlan,
    "memory": MemoryPlan,
    "baselines": BaselinesPlan,
}
_BRANCHES = {"Between", "MemoryPlan"}
# Expected types, with an example, in place of pydantic's wording.
_EXAMPLES = {
    "orders": "a mapping of names to lists of tasks, such as {a: [law, tax], b: [tax, law]}",
    "arms": "a mapping of arms to their changes, such as {plain: {}, o_lora: {methods: [o_lora], between_tasks: new_adapter}}",
    "methods": "a mapping of arms to methods, such as {plain: [], replay: [{replay: {rows: earlier_tasks}}]}",
}
Said = TypeVar("Said")


def read_plan(
    plan: str | Path | Mapping[str, Any] | TaskStream, overrides: Sequence[str] = (), **changes: Any
) -> tuple[Plan, Where]:
    """Read and check a plan, without loading rows or weights.

    Args:
        plan: A YAML file, a mapping of `Plan`'s fields, or a `TaskStream` with the other fields in `changes`.
        overrides: Single entries that override the plan's, as ``KEY=VALUE``; see `hf_continual.stream.overrides`.
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
    elif isinstance(plan, Mapping):
        data = dict(plan)
    else:
        raise TypeError(
            f"a plan is a YAML file, a mapping or a TaskStream, got {type(plan).__name__}. Tasks in a list become one: "
            f"TaskStream([Task(...), Task(...)])."
        )
    if not isinstance(data, dict):
        raise where.error(
            (), f"a plan is a mapping with at least model, output_dir and tasks, not {type(data).__name__}."
        )
    if "tasks" not in data and "tasks" not in changes and "methods" in data and where.file is not None:
        raise where.error(
            (),
            f"this is not a plan: it has no tasks. If it holds training arguments, as most recipes do, train with it: hf-continual "
            f"train --config {where.file} --model MODEL --train ROWS.",
        )
    data = override(copy.deepcopy(data) if overrides else dict(data), overrides, where)
    return check_read({**data, **changes}, where)


def check_read(data: dict[str, Any], where: Where) -> tuple[Plan, Where]:
    """Check the entries of a plan.

    Args:
        data: The plan as plain data.
        where: Places of its entries.

    Returns:
        The plan, and where its entries are written.

    Raises:
        PlanError: If something in it is unknown, missing or of the wrong type.
    """
    data["tasks"], origins = _entries(data.get("tasks"), where)
    try:
        read = Plan.model_validate(data)
    except ValidationError as error:
        raise _explained(error, where, origins) from None
    where.lines = _spread(where.lines, origins)
    where.overridden = _spread(where.overridden, origins)
    read = with_baselines(read, where)
    check_plan(read, where)
    return read, where


def _entries(tasks: Any, where: Where) -> tuple[list[Any], list[tuple[Key, ...]]]:
    """Tasks as mappings, benchmarks expanded, and the entry of the plan that each comes from."""
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


def _spread(lines: dict[tuple[Key, ...], Said], origins: Sequence[tuple[Key, ...]]) -> dict[tuple[Key, ...], Said]:
    """Lines of the tasks by their place in the plan as read; one entry may expand to several."""
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
        # The entry's values for a task override the benchmark's.
        return [{**task, **copy.deepcopy(entry)} for task in BENCHMARKS[name](**options)]
    except (TypeError, ValueError, OSError) as error:
        raise where.error(path, str(error)) from error


def _explained(error: ValidationError, where: Where, origins: list[tuple[Key, ...]]) -> PlanError:
    """Pydantic's first error as one sentence with its place."""
    errors = error.errors()
    # For a union pydantic reports every branch: for a mapping, the mapping branch has the useful error.
    if isinstance(errors[0]["input"], Mapping):
        errors = [e for e in errors if _BRANCHES & set(e["loc"])] or errors
    # A mistyped key is also a missing one; reporting the typo helps more.
    said = next((e for e in errors if e["type"] == "extra_forbidden"), errors[0])
    # Names of branches are not keys of the plan.
    loc = [k for k in said["loc"] if isinstance(k, int) or not ("[" in k or k in _BRANCHES)]
    path: list[Key] = [*origins[int(loc[1])], *loc[2:]] if loc[:1] == ["tasks"] and len(loc) > 1 else list(loc)
    if said["type"] == "extra_forbidden":
        known = _known(loc)
        hint = did_you_mean(loc[-1], known)
        return where.error(path, f"unknown key {loc[-1]!r}.{hint} Known are {', '.join(known)}.")
    if said["type"] == "missing":
        return where.error(path[:-1], f"the key {path[-1]!r} is missing.")
    given = said["input"]
    expected = said["msg"].replace("Input should be", "expected").replace("valid dictionary", "mapping")
    if loc[0] == "sweep" and len(loc) == 2 and said["type"] == "dict_type":
        expected = f"expected {_EXAMPLES[str(loc[1])]}"
    return where.error(path, f"got {given!r} ({type(given).__name__}): {expected}.")


def _known(loc: Sequence[Key]) -> list[str]:
    part: type[BaseModel] = Plan
    if loc[0] == "tasks":
        part = TaskPlan
    elif "gauges" in loc:
        part = GaugePlan
    elif loc[0] == "between_tasks":
        part = MergePlan if len(loc) > 2 else Between
    elif "baselines" in loc:
        part = BaselinesPlan
    elif loc[:2] == ["sweep", "arms"] and len(loc) > 3:
        part = ArmPlan if len(loc) == 4 else {"memory": MemoryPlan, "between_tasks": Between}.get(str(loc[3]), ArmPlan)
    elif len(loc) > 1:
        part = _PARTS.get(str(loc[0]), Plan)
    return list(part.model_fields) + (["benchmark"] if part is TaskPlan else [])
