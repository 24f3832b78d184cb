"""Joint training: all tasks' rows in one run, the upper bound that papers call multi-task learning (MTL)."""

from __future__ import annotations

from collections.abc import Iterable

from hf_continual.data.joining import join_rows
from hf_continual.methods.base import Method
from hf_continual.stream.past_rows import TRAINABLE
from hf_continual.stream.plan import JOINT
from hf_continual.tasks import Task, TaskStream


def joint_task(stream: TaskStream) -> Task:
    """The rows of all tasks as one task.

    Args:
        stream: The tasks with their training rows.

    Returns:
        A first task called ``joint``; its rows stand in the order of the tasks, and the trainer shuffles them.

    Raises:
        ValueError: If the rows are not of one type.
    """
    parts = [(task.name, task.train) for task in stream if task.train is not None]
    first, rows = parts[0]
    wanted = next((kind for kind in TRAINABLE if set(kind) <= set(rows.column_names)), ())
    for name, found in parts:
        if not set(wanted) <= set(found.column_names):
            raise ValueError(
                f"task {name!r} has rows with {', '.join(found.column_names)} and task {first!r} has {', '.join(wanted)}: one "
                f"run trains rows of one type. Map them with the task's columns, or train the tasks one after the other."
            )
    return Task(JOINT, 0, join_rows(parts, wanted, "train the tasks one after the other"))


def check_joint_methods(methods: Iterable[Method]) -> None:
    """Refuse methods that do nothing without an earlier task.

    Args:
        methods: The methods of the joint run.

    Raises:
        ValueError: If there is one.
    """
    for method in methods:
        if method.needs_earlier_task():
            raise ValueError(
                f"{method.name} works between tasks, and between_tasks: joint trains all of them in one run, where it would do "
                f"nothing. Take it out (in a sweep's arm: methods: []), or say between_tasks: continue."
            )
