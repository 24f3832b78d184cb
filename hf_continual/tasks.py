"""What is learned, in which order."""

from __future__ import annotations

from dataclasses import dataclass
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
