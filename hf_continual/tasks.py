"""What is learned, in which order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class Task:
    """One task of a sequence.

    Args:
        name: Name in tables, folders and logs.
        index: Place in the sequence, counted from 0; a single run is task 0.
        train: Rows to learn, of any type SFTTrainer takes, or None when the trainer holds them.
        test: Rows ``{"prompt", "completion"}`` to score the task with.
    """

    name: str = "task"
    index: int = 0
    train: Dataset | None = None
    test: Dataset | None = None

    @property
    def folder(self) -> str:
        """Name of the folder that the task's model is kept in, such as ``task-00-cities``."""
        return f"task-{self.index:02d}-{self.name.replace(' ', '-')}"


class TaskStream:
    """Tasks in the order in which they are learnt; each gets its index.

    Args:
        tasks: The tasks; their names must differ and be fit for a folder.

    Raises:
        ValueError: If there is no task, or a name is used twice or holds a slash.
    """

    def __init__(self, tasks: Sequence[Task]) -> None:
        names = [task.name for task in tasks]
        if not names:
            raise ValueError("A task sequence needs at least one task.")
        for name in names:
            if names.count(name) > 1 or not name or "/" in name:
                raise ValueError(f"The task name {name!r} must be used once, not be empty and hold no '/'.")
        self.tasks = tuple(replace(task, index=i) for i, task in enumerate(tasks))

    def __iter__(self) -> Iterator[Task]:
        return iter(self.tasks)

    def __len__(self) -> int:
        return len(self.tasks)

    def __getitem__(self, index: int) -> Task:
        return self.tasks[index]
