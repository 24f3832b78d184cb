"""Tasks, their order, and the task that each continues from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import Dataset

BASE = "base"


@dataclass(frozen=True)
class Task:
    """One task of a sequence.

    Args:
        name: Name in tables, folders and logs.
        index: Place in the sequence, counted from 0; a single run's task is 0.
        train: Rows to learn, of any type SFTTrainer takes, or None if the trainer holds them.
        test: Rows ``{"prompt", "completion"}`` to score the task with; None if it is not scored.
        parent: Name of the task whose model this one continues from, or ``"base"`` for the base model; None is
            the task before.
    """

    name: str = "task"
    index: int = 0
    train: Dataset | None = None
    test: Dataset | None = None
    parent: str | None = None

    @property
    def folder(self) -> str:
        """Name of the folder that the task's model is kept in, such as ``task-00-cities``."""
        return f"task-{self.index:02d}-{self.name.replace(' ', '-')}"


class TaskStream:
    """Tasks in the order in which they are learned; each gets its index.

    A task continues from the one before it unless it names another `parent`, so a stream may branch.

    Args:
        tasks: The tasks; their names must be unique and valid folder names.

    Raises:
        ValueError: If there are no tasks, a name is used twice, is reserved or contains a slash, or a parent is
            unknown, learned later, or its own descendant.
    """

    def __init__(self, tasks: Sequence[Task]) -> None:
        names = [task.name for task in tasks]
        if not names:
            raise ValueError("A task sequence needs at least one task.")
        for name in names:
            if names.count(name) > 1 or not name or "/" in name:
                raise ValueError(f"The task name {name!r} must be unique, non-empty and contain no '/'.")
        if BASE in names:
            raise ValueError(f"The task name {BASE!r} means the base model; give the task another name.")
        self.tasks = tuple(replace(task, index=i) for i, task in enumerate(tasks))
        self._parents = check_parents([(task.name, task.parent) for task in self.tasks])

    def __iter__(self) -> Iterator[Task]:
        return iter(self.tasks)

    def __len__(self) -> int:
        return len(self.tasks)

    def __getitem__(self, index: int) -> Task:
        return self.tasks[index]

    def parent(self, task: Task) -> Task | None:
        """The task that this one continues from; None is the base model."""
        place = self._parents[task.index]
        return None if place is None else self.tasks[place]

    def lineage(self, task: Task) -> list[Task]:
        """The tasks that a model has learned, oldest first, the task itself last."""
        parent = self.parent(task)
        return [*(self.lineage(parent) if parent else []), task]


def check_parents(tasks: Sequence[tuple[str, str | None]]) -> list[int | None]:
    """Resolve what each task continues from.

    Args:
        tasks: Name and parent of each task, in order; see `Task.parent`.

    Returns:
        Index of each task's parent, None for the base model.

    Raises:
        ValueError: If a parent is unknown, learned later, or its own descendant.
    """
    places = {name: i for i, (name, _) in enumerate(tasks)}
    parents: list[int | None] = []
    for i, (name, parent) in enumerate(tasks):
        if parent is not None and parent != BASE and parent not in places:
            raise ValueError(
                f"task {name!r} continues from {parent!r}, which is not a task of this sequence ({', '.join(places)}) "
                f"or {BASE!r}."
            )
        parents.append((i - 1 if i else None) if parent is None else places.get(parent))
    for i, (name, _) in enumerate(tasks):
        path, at = [name], parents[i]
        while at is not None and tasks[at][0] not in path:
            path.append(tasks[at][0])
            at = parents[at]
        if at is not None:
            raise ValueError(
                f"circular parents: {' -> '.join([*path, tasks[at][0]])}. One of them must continue from 'base'."
            )
    for i, (name, _) in enumerate(tasks):
        if (parent := parents[i]) is not None and parent > i:
            raise ValueError(
                f"task {name!r} continues from {tasks[parent][0]!r}, which is learned after it. Put the parent first."
            )
    return parents
