"""What a plan cannot say where all tasks are trained in one run; told without importing torch."""

from __future__ import annotations

from typing import Any

from hf_continual.stream.plan import MemoryPlan, Plan, TaskPlan
from hf_continual.stream.plan_lines import Key, Where
from hf_continual.tasks import BASE


def check_joint(plan: Plan, where: Where) -> None:
    """Refuse what lies between tasks, and training options that differ from task to task.

    Args:
        plan: As read, with ``between_tasks: joint``.
        where: Where its entries are written.

    Raises:
        PlanError: If there is such an entry; says where.
    """
    if isinstance(plan.memory, MemoryPlan):
        raise where.error(
            ("memory",),
            "memory keeps rows for later tasks, and between_tasks: joint trains all rows in one run. Take it out; an arm of a sweep "
            "does that with memory: null.",
        )
    for i, task in enumerate(plan.tasks):
        if task.parent not in (None, BASE if i == 0 else plan.tasks[i - 1].name):
            raise where.error(
                ("tasks", i, "parent"),
                f"task {task.name!r} continues from {task.parent!r}, and between_tasks: joint trains all tasks in one run from the "
                f"plan's model, without branches. Take the parent out, or give each branch its own plan.",
            )
        _check_same(plan, where, i)


def _check_same(plan: Plan, where: Where, index: int) -> None:
    """Refuse a task that is to be trained in another way than the first."""
    first, task = plan.tasks[0], plan.tasks[index]
    asked, given = {**plan.sft, **first.sft}, {**plan.sft, **task.sft}
    for key in (k for k in {**asked, **given} if asked.get(k) != given.get(k)):
        owner = index if key in task.sft else 0
        raise where.error(
            ("tasks", owner, "sft", key),
            f"{key} is {_said(asked, key)} for task {first.name!r} and {_said(given, key)} for {task.name!r}, and between_tasks: "
            f"joint trains both in one run. Set it once, in the plan's sft.",
        )
    for name in ("methods", "curve"):
        own, others = _own(plan, task, name), _own(plan, first, name)
        if own is not others and own != others:
            place: tuple[Key, ...] = ("tasks", index if getattr(task, name) else 0, name)
            raise where.error(
                place,
                f"{name} of tasks differ: {others!r} for task {first.name!r}, {own!r} for task {task.name!r}, and between_tasks: joint "
                f"trains both in one run. Give all tasks the same.",
            )


def _said(options: dict[str, Any], key: str) -> str:
    return repr(options[key]) if key in options else "not set"


def _own(plan: Plan, task: TaskPlan, name: str) -> Any:
    own = getattr(task, name)
    return plan.methods if name == "methods" and own is None else own
