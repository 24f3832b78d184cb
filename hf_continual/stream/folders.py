"""One folder per task, complete or absent, and the loop over them that can be killed at any moment.

``OUT/task-00-NAME/`` is complete: model, ``continual/task.json`` and ``continual/scores.json``. Until then the task
lives in ``task-00-NAME.partial``: checkpoints while it is trained, ``continual/trained.json`` once its model is
saved, then one score after the other. A restarted process resumes after the last of these that is complete.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from hf_continual import stopping
from hf_continual.atomic_files import DamagedFile, read_checked, write_checked
from hf_continual.evaluation.files import SCORES
from hf_continual.evaluation.result import Scored
from hf_continual.metrics import AccuracyMatrix
from hf_continual.stream.saved import changed_files, saved_files
from hf_continual.stream.scores import PARTIAL, keep_score, read_scores, read_stage
from hf_continual.tasks import Task, TaskStream

logger = logging.getLogger(__name__)

TRAINED = Path("continual") / "trained.json"
MEMORY = Path("continual") / "memory.jsonl"

Value = TypeVar("Value")


class Learner(Protocol):
    """The interface between the loop and the code that trains and scores."""

    def learn(self, task: Task, parent: Path | None, folder: Path) -> dict[str, Any]:
        """Train a task from its parent's folder (None is the base model), resuming from checkpoints in `folder`.

        Leaves the model in `folder`, and returns facts for ``task.json``.
        """

    def columns(self, task: Task | None) -> Sequence[Task]:
        """The tasks to score after a task, or on the base model (None)."""

    def score(self, folder: Path | None, tasks: Sequence[Task], done: Callable[[str, Scored], None]) -> None:
        """Score the model of a folder (None is the base model) on tasks, reporting each result once it is measured."""


def main_decides(question: Callable[[], Value]) -> Value:
    """Compute an answer on the main process only, so that all processes act alike."""
    box: list[Any] = [question() if PartialState().is_main_process else None]
    return broadcast_object_list(box)[0]


def wait() -> None:
    """Wait until all processes get here."""
    PartialState().wait_for_everyone()


def train_tasks(stream: TaskStream, output_dir: Path, learner: Learner) -> AccuracyMatrix:
    """Learn tasks one after the other, and after each score the tasks that `columns` returns.

    Args:
        stream: The tasks.
        output_dir: Parent of the tasks' folders; finished work in them is not repeated.
        learner: Trains and scores.

    Returns:
        The accuracy matrix without a base row, read back from the folders.
    """
    for task in stream:
        parent = stream.parent(task)
        learn_task(task, None if parent is None else output_dir / parent.folder, output_dir, learner)
    return AccuracyMatrix(read_scores(stream, output_dir))


def learn_task(task: Task, parent: Path | None, output_dir: Path, learner: Learner) -> None:
    """Train and score one task, resuming where an earlier attempt was interrupted."""
    done, partial = output_dir / task.folder, output_dir / f"{task.folder}{PARTIAL}"
    finished = main_decides(done.is_dir)
    if finished:
        logger.info("%s: already trained", task.name)
        if PartialState().is_main_process and read_trained(done) is None:
            facts = {"name": task.name, "index": task.index, "parent": parent.name if parent else None, "steps": None}
            write_checked(done / TRAINED, facts)
    elif main_decides(lambda: (partial / TRAINED).is_file() and read_trained(partial) is not None):
        logger.info("%s: already trained, scores are missing", task.name)
    else:
        if PartialState().is_main_process:
            (partial / SCORES).unlink(missing_ok=True)  # of a model that is no longer known
        check_saved(parent)
        facts = learner.learn(task, parent, partial)
        wait()
        if PartialState().is_main_process:
            write_checked(partial / TRAINED, {**facts, "files": saved_files(partial)})
        wait()
        stopping.check()
    score_stage(done if finished else partial, task.folder, learner.columns(task), output_dir, learner)
    if not finished:
        if PartialState().is_main_process:
            for checkpoint in partial.glob("checkpoint-*"):
                shutil.rmtree(checkpoint)
            partial.rename(done)
        wait()


def score_stage(
    folder: Path, stage: str, tasks: Sequence[Task], output_dir: Path, learner: Learner, base: bool = False
) -> None:
    """Score the tasks that are not scored yet.

    Args:
        folder: Folder of the scores, and of the model unless it is the base model.
        stage: Name of the stage in the predictions' file names, such as ``task-00-cities``.
        tasks: The tasks to score.
        output_dir: Parent of the predictions.
        learner: The learner that scores.
        base: Whether to score the base model.
    """
    missing = main_decides(
        lambda: [t.name for t in tasks if read_stage(folder).get(t.name, {}).get("status") != "MEASURED"]
    )
    if not missing:
        return

    def keep(name: str, scored: Scored) -> None:
        if PartialState().is_main_process:
            keep_score(folder, stage, output_dir, next(t for t in tasks if t.name == name), scored)

    check_saved(None if base else folder)
    learner.score(None if base else folder, [t for t in tasks if t.name in missing], keep)
    wait()


def read_trained(folder: Path) -> dict[str, Any] | None:
    """Read the facts recorded when a task's model was saved.

    Args:
        folder: The task's folder.

    Returns:
        The facts; None, with a warning, if they are lost. Until the task is scored, its model then does not count
        as saved and training resumes from its last checkpoint; after that, only the number of steps is unknown.
    """
    try:
        return read_checked(folder / TRAINED)
    except FileNotFoundError:
        problem = f"{folder / TRAINED} is missing."
    except DamagedFile as error:
        problem = str(error)
    lost = "training resumes from the last checkpoint" if folder.name.endswith(PARTIAL) else "its steps are not known"
    logger.warning("%s %s.", problem, lost.capitalize())
    return None


def check_saved(folder: Path | None) -> None:
    """Refuse a task's model that differs from the saved one, before it is scored or trained further.

    Args:
        folder: The task's folder; None is the base model, which the plan's record checks.

    Raises:
        DamagedFile: If a file is missing or was changed since.
    """
    if folder is None:
        return

    def said() -> str | None:
        try:
            check_unchanged(folder)
        except DamagedFile as error:
            return str(error)
        return None

    if refused := main_decides(said):
        raise DamagedFile(refused)


def check_unchanged(folder: Path) -> None:
    """Like `check_saved`, for this process only."""
    facts = (read_trained(folder) or {}) if (folder / TRAINED).is_file() else {}
    if found := changed_files(facts.get("files", {}), folder) if "files" in facts else []:
        raise DamagedFile(
            f"{folder} does not contain the model that was saved there: {'; '.join(found)}. Restore the files from a copy; or delete "
            f"{folder} and the folders of the tasks that were trained on top of it, and the same command trains them again."
        )
