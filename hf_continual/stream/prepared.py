"""A prepared plan: what all later modules read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from datasets import Dataset

from hf_continual.evaluation.table import Scorer
from hf_continual.methods.base import Method
from hf_continual.methods.table import build_methods
from hf_continual.stream.past_rows import KeptRows, with_earlier
from hf_continual.stream.plan import Plan
from hf_continual.stream.plan_gauges import with_earlier_tests
from hf_continual.stream.plan_lines import Where
from hf_continual.tasks import Task, TaskStream
from hf_continual.trainer.config import ContinualConfig


@dataclass(frozen=True)
class Prepared:
    """Everything a run needs except the weights.

    Args:
        plan: As read.
        where: Where its entries are written.
        stream: The tasks with their rows.
        tokenizer: The model's.
        scorers: Scorer of each scored task and gauge by name.
        gauges: Rows of each gauge by name; None if its metric has its own.
        memory: Rows kept for later tasks, None if none are.
        joint: All tasks' training rows as the one task of a joint run; None if tasks are learned one after another.
    """

    plan: Plan
    where: Where
    stream: TaskStream
    tokenizer: Any
    scorers: Mapping[str, Scorer]
    gauges: Mapping[str, Dataset | None]
    memory: KeptRows | None = None
    joint: Task | None = None

    @property
    def runs(self) -> TaskStream:
        """What is trained, one run after the other: the tasks, or all of them at once."""
        return self.stream if self.joint is None else TaskStream([self.joint])

    def learned(self, run: Task) -> list[Task]:
        """The tasks that a model knows after one of `runs`, oldest first."""
        return self.stream.lineage(run) if self.joint is None else list(self.stream)

    def scored(self, tasks: Sequence[Task] | None = None) -> list[Task]:
        """The tasks that have rows to be scored with."""
        return [t for t in (self.stream if tasks is None else tasks) if t.test is not None]

    @property
    def line(self) -> list[Task]:
        """The scored tasks that the last model knows: the columns of the accuracy matrix."""
        return self.scored(self.learned(self.runs[len(self.runs) - 1]))

    def columns_after(self, task: Task | None) -> list[Task]:
        """The tasks to score after one of `runs`; None is the base model, which is scored on all of them."""
        asked = self.plan.evaluation.tasks
        if task is None or asked == "all":
            return self.scored()
        names = set(asked) if isinstance(asked, list) else {t.name for t in self.learned(task)}
        planned = self.plan.tasks if self.joint is not None else [self.plan.tasks[task.index]]
        names |= {name for entry in planned for name in entry.evaluate}
        return [t for t in self.scored() if t.name in names]

    def options(self, task: Task) -> dict[str, Any]:
        """Options of SFTConfig for a task."""
        return {**self.plan.sft, **self.plan.tasks[task.index].sft}

    def config(self, task: Task, folder: Path) -> ContinualConfig:
        """The training arguments of a task."""
        defaults: dict[str, Any] = {"save_total_limit": 1, "report_to": "none"}
        seed = self.plan.seed
        return ContinualConfig(
            output_dir=str(folder),
            task_name=task.name,
            task_index=task.index,
            seed=seed,
            **{**defaults, **with_earlier_tests(self.options(task), task, self.runs)},
        )

    def methods(self, task: Task) -> list[Method]:
        """Fresh methods for a task, rows of earlier tasks put in."""
        own = self.plan.tasks[task.index].methods
        description = self.plan.methods if own is None else own
        if isinstance(description, Sequence) and description and all(isinstance(m, Method) for m in description):
            return [replace(m) for m in description]  # pyrefly: ignore[bad-specialization]
        return build_methods(with_earlier(description, task, self.runs, self.memory))
