"""Errors in a run, and likely mistakes, reported once its rows are read and before weights are loaded."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from typing import Any

from hf_continual.stream.on_paper import explained, on_paper, place_of_methods, steps_of
from hf_continual.stream.prepared import Prepared
from hf_continual.tasks import Task

logger = logging.getLogger(__name__)


def check_run(prepared: Prepared) -> None:
    """Try adapters and methods on the model without weights, and log likely mistakes.

    Args:
        prepared: The prepared plan.

    Raises:
        PlanError: If adapters, methods or curves do not fit; names the place.
    """
    for note in notes(prepared):
        logger.warning("%s", note)
    tried: list[Any] = []
    for task in prepared.runs:
        methods = prepared.methods(task)
        described = [(type(m), m.describe()) for m in methods]
        if described not in tried:
            tried.append(described)
            model, _, _ = on_paper(prepared.plan, prepared.where, methods)
            with explained(prepared.where, place_of_methods(prepared, task)):
                for method in methods:
                    method.prepare_model(model, task)
        with tempfile.TemporaryDirectory() as folder:
            args: Any = prepared.config(task, Path(folder))
        if args.max_steps > 0 or not args.packing:
            check_curve(prepared, task, steps_of(args, len(task.train or ()), 0, 1))


def check_curve(prepared: Prepared, task: Task, steps: int) -> None:
    """Refuse points of a curve that training never reaches.

    Args:
        prepared: The prepared plan.
        task: One of its tasks.
        steps: Number of its steps.

    Raises:
        PlanError: If there is one; names the place.
    """
    for i, step in enumerate(prepared.plan.tasks[task.index].curve):
        if not 0 <= step <= steps:
            raise prepared.where.error(
                ("tasks", task.index, "curve", i),
                f"step {step} is never reached: task {task.name!r} has {steps} optimizer steps. Give steps from 0 to {steps}.",
            )


def notes(prepared: Prepared) -> list[str]:
    """List what is allowed but is likely a mistake.

    Args:
        prepared: The prepared plan.

    Returns:
        Messages.
    """
    found = []
    for task, planned in zip(prepared.stream, prepared.plan.tasks, strict=True):
        for key, asked, rows in (
            ("train_rows", planned.train_rows, task.train),
            ("test_rows", planned.test_rows, task.test),
        ):
            if asked is not None and rows is not None and len(rows) < asked:
                where = prepared.where.of(("tasks", task.index, key))
                found.append(f"{where}: {asked:,} rows were requested, but there are {len(rows):,}; all are used.")
    tasks, steps = len(prepared.stream), prepared.plan.sft.get("max_steps", -1)
    if prepared.joint is not None and steps > 0 and tasks > 1:
        found.append(
            f"{prepared.where.of(('sft', 'max_steps'))}: the joint run has {steps:,} steps in all. A sequence with this setting "
            f"trains {tasks} x {steps:,} = {tasks * steps:,}; say so many for a comparison on the same number of steps."
        )
    if not prepared.scored() and not prepared.gauges and not prepared.plan.sft.get("gauges"):
        found.append(
            "No task has test rows and there are no gauges: nothing will be measured, so forgetting will go unnoticed. Give the "
            "tasks `test:` rows."
        )
    return found
