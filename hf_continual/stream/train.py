"""`train_stream`: runs a plan from the first task to the last, no matter when it is killed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_continual import stopping
from hf_continual.stream.check_run import check_run
from hf_continual.stream.plan import Plan
from hf_continual.stream.plan_lines import Where
from hf_continual.stream.prepare import prepare
from hf_continual.stream.read_plan import read_plan
from hf_continual.stream.results import StreamResult
from hf_continual.stream.run_plan import run_prepared
from hf_continual.stream.sweep import run_sweep
from hf_continual.tasks import TaskStream


def train_stream(
    plan: str | Path | Mapping[str, Any] | TaskStream, *, only: str | None = None, **changes: Any
) -> StreamResult:
    """Learn the tasks of a plan one after the other, and measure retention after each.

    A fresh trainer learns each task from the previous task's folder, and every model is scored as it was
    saved. Finished work in `output_dir` is not repeated: if killed at any moment, the same call resumes and
    ends with the matrix and the weights of an undisturbed run. When stopped by SIGTERM, SIGINT, SIGUSR1 or
    `max_minutes`, it saves and ends the process with exit code 75.

    Example:
        >>> result = train_stream("plan.yaml")
        >>> stream = TaskStream([Task("law", train=law, test=law_test), Task("tax", train=tax, test=tax_test)])
        >>> result = train_stream(stream, model="Qwen/Qwen2.5-0.5B", output_dir="out", peft={"r": 16})
        >>> result.matrix.backward_transfer

    Args:
        plan: A YAML file, a mapping of `hf_continual.stream.plan.Plan`'s fields, or a `TaskStream` with the other
            fields in `changes`.
        only: Name of the only run of a sweep to make.
        **changes: Fields that replace the plan's.

    Returns:
        The accuracy matrix and all measurements. For a plan with a `sweep`, the results of all runs, and the
        matrix of the last.

    Raises:
        FileNotFoundError: If the plan does not exist.
        PlanError: If it cannot be run, or the folder was started with another one. Says where and what to do.
        RuntimeError: If a task could not be scored.
        Stopped: If the process was asked to stop.
    """
    return run_read(*read_plan(plan, **changes), only)


def run_read(read: Plan, where: Where, only: str | None = None) -> StreamResult:
    """Like `train_stream`, for a plan that was already read.

    Args:
        read: The plan.
        where: Places of its entries.
        only: Name of the only run of a sweep to make.

    Returns:
        The measurements.

    Raises:
        PlanError: If there is no such run, or the plan cannot be run.
    """
    if read.sweep is None and only is not None:
        raise where.error((), f"the plan has no sweep, so there is no run {only!r} to choose.")
    with stopping.listening("Finished work is saved; the same call resumes.", read.max_minutes):
        if read.sweep is not None:
            return run_sweep(read, where, only)
        prepared = prepare(read, where)
        check_run(prepared)
        return run_prepared(prepared, Path(read.output_dir))
