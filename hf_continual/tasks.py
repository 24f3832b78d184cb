"""What is learned, in which order, and what each task goes on from."""

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
        index: Place in the sequence, counted from 0; a single run is task 0.
        train: Rows to learn, of any type SFTTrainer takes, or None when the trainer holds them.
        test: Rows ``{"prompt", "completion"}`` to score the task with; None where it is not scored.
        parent: Name of the task whose model this one goes on from, or ``"base"`` for the base model; None is
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


def name_among(task: Task, known: Sequence[str]) -> str:
    """What a task is called among those that were learned before; one without a name is always a new one.

    Args:
        task: The task.
        known: Names of earlier tasks.

    Returns:
        Its name, or ``"task"``, ``"task-1"``, ... where nobody named it.
    """
    if task.name != Task.name or task.name not in known:
        return task.name
    return next(name for i in range(1, len(known) + 1) if (name := f"{task.name}-{i}") not in known)


class TaskStream:
    """Tasks in the order in which they are learnt; each gets its index.

    A task goes on from the one before it unless it names another `parent`, so a stream may branch.

    Args:
        tasks: The tasks; their names must differ and be fit for a folder.

    Raises:
        ValueError: If there is no task, a name is used twice, is reserved or holds a slash, or a parent is
            unknown, learnt later, or its own descendant.
    """

    def __init__(self, tasks: Sequence[Task]) -> None:
        names = [task.name for task in tasks]
        if not names:
            raise ValueError("A task sequence needs at least one task.")
        for name in names:
            if names.count(name) > 1 or not name or "/" in name:
                raise ValueError(f"The task name {name!r} must be used once, not be empty and hold no '/'.")
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
        """The task that this one goes on from; None is the base model."""
        place = self._parents[task.index]
        return None if place is None else self.tasks[place]

    def lineage(self, task: Task) -> list[Task]:
        """The tasks that a model has learnt, oldest first, the task itself last."""
        parent = self.parent(task)
        return [*(self.lineage(parent) if parent else []), task]


def check_parents(tasks: Sequence[tuple[str, str | None]]) -> list[int | None]:
    """Resolve what each task goes on from.

    Args:
        tasks: Name and parent of each task, in order; see `Task.parent`.

    Returns:
        Index of each task's parent, None for the base model.

    Raises:
        ValueError: If a parent is unknown, learnt later, or its own descendant.
    """
    places = {name: i for i, (name, _) in enumerate(tasks)}
    parents: list[int | None] = []
    for i, (name, parent) in enumerate(tasks):
        if parent is not None and parent != BASE and parent not in places:
            raise ValueError(
                f"task {name!r} goes on from {parent!r}, which is no task of this sequence ({', '.join(places)}) "
                f"and not {BASE!r}."
            )
        parents.append((i - 1 if i else None) if parent is None else places.get(parent))
    for i, (name, _) in enumerate(tasks):
        path, at = [name], parents[i]
        while at is not None and tasks[at][0] not in path:
            path.append(tasks[at][0])
            at = parents[at]
        if at is not None:
            raise ValueError(
                f"circular parents: {' -> '.join([*path, tasks[at][0]])}. One of them must go on from 'base'."
            )
    for i, (name, _) in enumerate(tasks):
        if (parent := parents[i]) is not None and parent > i:
            raise ValueError(
                f"task {name!r} goes on from {tasks[parent][0]!r}, which is learnt after it. Put the parent first."
            )
    return parents
