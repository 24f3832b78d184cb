"""Run a prepared plan: task after task, each learned, saved, scored and recorded."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import PartialState
from filelock import FileLock

from hf_continual import stopping
from hf_continual.atomic_files import DamagedFile, read_lines, read_object, write_json, write_lines
from hf_continual.disk import writing
from hf_continual.stream.folders import MEMORY, learn_task, main_decides, score_stage, wait
from hf_continual.stream.learner import PlanLearner, find_merge
from hf_continual.stream.plan import Plan
from hf_continual.stream.plan_lines import PlanError, Where
from hf_continual.stream.plan_record import keep_plan, only_one, plain_plan
from hf_continual.stream.prepared import Prepared
from hf_continual.stream.publish import write_stage_card
from hf_continual.stream.results import StreamResult, collect
from hf_continual.stream.scores import read_stage
from hf_continual.stream.start import from_merged
from hf_continual.stream.stored_run import BASE_FOLDER, RESULTS
from hf_continual.stream.trackers import log_matrix
from hf_continual.tasks import Task

logger = logging.getLogger(__name__)


def run_prepared(prepared: Prepared, output_dir: Path, base_dir: Path | None = None) -> StreamResult:
    """Run a prepared plan.

    Args:
        prepared: The plan.
        output_dir: The run's folder.
        base_dir: Folder that holds the base model's scores; by default the run's own.

    Returns:
        The measurements.
    """
    base_dir = base_dir or output_dir
    main = PartialState().is_main_process
    check_merge(prepared.plan, prepared.where)
    with _explained(output_dir), only_one(output_dir) if main else contextlib.nullcontext():
        refuse_on_all(lambda: keep_plan(output_dir, plain_plan(prepared)))
        prepared = with_start(prepared, base_dir)
        if prepared.plan.evaluation.base:
            _score_base(prepared, base_dir)
            _check_unsolved(prepared, base_dir)
            _check_one_direction(prepared, base_dir / BASE_FOLDER)
        learner = PlanLearner(prepared, output_dir)
        for task in prepared.runs:
            stopping.check()
            parent = prepared.runs.parent(task)
            learn_task(task, None if parent is None else output_dir / parent.folder, output_dir, learner)
            _check_one_direction(prepared, output_dir / task.folder)
            if main:
                _mend_kept_rows(prepared, task, output_dir / task.folder)
                found = collect(prepared, output_dir, base_dir).results
                if not _same(output_dir / RESULTS, found):  # a resumed run passes finished tasks again
                    write_json(output_dir / RESULTS, found)
                    log_matrix(found, output_dir, prepared.plan.sft)
                last = prepared.joint is not None or task.name in found["tasks"][-1:]
                write_stage_card(prepared, task, output_dir, base_dir, found["intervals"] if last else None)
        wait()
        return collect(prepared, output_dir, base_dir)


def with_start(prepared: Prepared, output_dir: Path) -> Prepared:
    """Log what happens to the adapter that a plan starts from, and merge it into its base if requested.

    Args:
        prepared: The prepared plan.
        output_dir: The run's folder.

    Returns:
        The plan, with the merged base as its model if there is one.
    """
    return replace(prepared, plan=from_merged(prepared.plan, output_dir, prepared.tokenizer))


def _explained(output_dir: Path) -> contextlib.AbstractContextManager[None]:
    return writing(
        output_dir,
        f"Finished work stays in {output_dir}. Free space there; then the same command resumes where it stopped.",
    )


def _mend_kept_rows(prepared: Prepared, task: Task, folder: Path) -> None:
    """Rewrite the rows that a finished task hands on, if its file no longer holds them."""
    if prepared.memory is None:
        return
    wanted = json.loads(json.dumps(prepared.memory.after[task.name]))
    try:
        found = read_lines(folder / MEMORY)
        if _without_source(found) == _without_source(wanted):
            return
        problem = f"{folder / MEMORY} does not hold the {len(wanted)} rows that the plan keeps after {task.name!r}."
    except (DamagedFile, FileNotFoundError) as error:
        problem = f"{folder / MEMORY} is missing." if isinstance(error, FileNotFoundError) else str(error)
    logger.warning("%s It is rewritten from the rows of the plan.", problem)
    write_lines(folder / MEMORY, wanted)


def _same(file: Path, results: dict[str, Any]) -> bool:
    """Whether the file already holds these results."""
    try:
        return read_object(file) == json.loads(json.dumps(results))
    except (DamagedFile, FileNotFoundError):
        return False


def _without_source(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows without the path that they were read from, which may have moved."""
    return [{k: v for k, v in row.items() if k != "memory_source"} for row in rows]


def _score_base(prepared: Prepared, base_dir: Path) -> None:
    """Score the base model; if a sweep's runs share it, one scores and the others wait."""
    learner = PlanLearner(prepared, base_dir)
    base_dir.mkdir(parents=True, exist_ok=True)
    with FileLock(base_dir / ".base.lock") if PartialState().is_main_process else contextlib.nullcontext():
        score_stage(base_dir / BASE_FOLDER, BASE_FOLDER, learner.columns(None), base_dir, learner, base=True)


def refuse_on_all(check: Callable[[], None]) -> None:
    """Run a check on the main process, and fail on all processes if it fails.

    Args:
        check: Raises PlanError.

    Raises:
        PlanError: The error of the check.
    """

    def said() -> str | None:
        try:
            check()
        except PlanError as error:
            return str(error)
        return None

    if refused := main_decides(said):
        raise PlanError(refused)


def check_merge(plan: Plan, where: Where) -> None:
    """Refuse a merge that cannot be imported, before anything is trained."""
    if plan.merge is None:
        return
    try:
        find_merge(plan.merge.function)
    except ValueError as error:
        raise where.error(("between_tasks", "merge"), str(error)) from error


def _check_one_direction(prepared: Prepared, folder: Path) -> None:
    """Refuse tasks of which only some are scored by a loss: a mean over them would be meaningless."""
    scores = main_decides(lambda: read_stage(folder))
    lower: dict[bool, str] = {}
    for task in prepared.scored():
        if task.name in scores:
            lower.setdefault(bool(scores[task.name].get("lower_is_better")), task.name)
    if len(lower) == 2:
        raise prepared.where.error(
            ("evaluation", "metric"),
            f"{lower[True]!r} is scored by a loss (lower is better) and {lower[False]!r} is not, so a mean over both, and "
            f"what was forgotten, would be meaningless. Give all tasks one kind of metric; measure the other as a gauge.",
        )


def _check_unsolved(prepared: Prepared, base_dir: Path) -> None:
    """Refuse tasks that the base model can already do: their change is drift, not forgetting."""
    limit = prepared.plan.evaluation.solved_at
    scores = main_decides(lambda: read_stage(base_dir / BASE_FOLDER))
    for task in prepared.scored():
        cell = scores.get(task.name, {})
        if limit is None or cell.get("value") is None or cell.get("lower_is_better"):
            continue
        if cell["value"] >= limit:
            raise prepared.where.error(
                ("tasks", task.index),
                f"the base model scores {cell['value']:.2f} on {task.name!r} before learning it (n = {cell['n']}): this "
                f"measures drift, not forgetting. Choose a task that the base cannot do, or set evaluation: "
                f"{{solved_at: null}} to measure it anyway.",
            )
