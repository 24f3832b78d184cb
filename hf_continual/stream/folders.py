"""One folder per task, complete or absent, and the loop over them that can be killed at any moment.

``OUT/task-00-NAME/`` is complete: model, ``continual/task.json`` and ``continual/scores.json``. Until then the task
lives in ``task-00-NAME.partial``: checkpoints while it is trained, ``continual/trained.json`` once its model is
saved, then one score after the other. A process that starts again goes on behind the last of these.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from hf_continual.durable import read_json, write_json, write_lines
from hf_continual.evaluation.result import Scored
from hf_continual.metrics import AccuracyMatrix
from hf_continual.tasks import Task, TaskStream

logger = logging.getLogger(__name__)

SCORES = Path("continual") / "scores.json"
TRAINED = Path("continual") / "trained.json"
MEMORY = Path("continual") / "memory.jsonl"
PREDICTIONS = "predictions"

Value = TypeVar("Value")


class Learner(Protocol):
    """What the loop asks of whoever trains and scores."""

    def learn(self, task: Task, parent: Path | None, folder: Path) -> dict[str, Any]:
        """Train a task from its parent's folder (None is the base model), going on from checkpoints in `folder`.

        Leaves the model in `folder`, and returns facts for ``task.json``.
        """

    def columns(self, task: Task | None) -> Sequence[Task]:
        """The tasks to score after a task, or on the base model (None)."""

    def score(self, folder: Path | None, tasks: Sequence[Task], done: Callable[[str, Scored], None]) -> None:
        """Score the model of a folder (None is the base model) on tasks, telling each result as it is there."""


def main_decides(question: Callable[[], Value]) -> Value:
    """An answer that only the main process looks up, so that all processes act alike."""
    box: list[Any] = [question() if PartialState().is_main_process else None]
    return broadcast_object_list(box)[0]


def wait() -> None:
    """Until all processes are here."""
    PartialState().wait_for_everyone()


def train_tasks(stream: TaskStream, output_dir: Path, learner: Learner) -> AccuracyMatrix:
    """Learn tasks one after the other and score after each what `columns` names.

    Args:
        stream: The tasks.
        output_dir: Where the tasks' folders are kept; what is finished in them is not done again.
        learner: Trains and scores.

    Returns:
        The accuracy matrix without a base row, read back from the folders.
    """
    for task in stream:
        parent = stream.parent(task)
        learn_task(task, None if parent is None else output_dir / parent.folder, output_dir, learner)
    return AccuracyMatrix(read_scores(stream, output_dir))


def learn_task(task: Task, parent: Path | None, output_dir: Path, learner: Learner) -> None:
    """Train and score one task, from wherever an earlier attempt was interrupted."""
    done, partial = output_dir / task.folder, output_dir / f"{task.folder}.partial"
    finished = main_decides(done.is_dir)
    if finished:
        logger.info("%s: trained already", task.name)
    elif main_decides((partial / TRAINED).is_file):
        logger.info("%s: trained already, scores are missing", task.name)
    else:
        facts = learner.learn(task, parent, partial)
        wait()
        if PartialState().is_main_process:
            write_json(partial / TRAINED, facts)
        wait()
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
    """Score what is not scored yet.

    Args:
        folder: Where the scores are kept, and the model unless it is the base model.
        stage: Name of the moment in the names of predictions, such as ``task-00-cities``.
        tasks: What is scored.
        output_dir: Where predictions go.
        learner: Scores.
        base: Whether the base model is scored.
    """
    missing = main_decides(
        lambda: [t.name for t in tasks if read_stage(folder).get(t.name, {}).get("status") != "MEASURED"]
    )
    if not missing:
        return

    def keep(name: str, scored: Scored) -> None:
        if PartialState().is_main_process:
            keep_score(folder, stage, output_dir, next(t for t in tasks if t.name == name), scored)

    learner.score(None if base else folder, [t for t in tasks if t.name in missing], keep)
    wait()


def keep_score(folder: Path, stage: str, output_dir: Path, task: Task, scored: Scored) -> None:
    """Write predictions, then the score that rests on them."""
    from hf_continual.evaluation.prompts import prompt_hash

    rows = task.test if task.test is not None else [{} for _ in scored.rows]
    lines = [
        {
            "row_id": i, "prompt_hash": prompt_hash(dict(row)), "prediction": r.prediction, "reference": r.reference,
            "score": r.score, **({"weight": r.weight} if r.weight != 1 else {}), **r.also,
        }
        for i, (row, r) in enumerate(zip(rows, scored.rows, strict=True))
    ]  # fmt: skip
    write_lines(predictions_file(output_dir, stage, task.name), lines)
    entry = scored.score.to_dict()
    if scored.nll is not None and not scored.lower_is_better:
        entry["nll"] = scored.nll.to_dict()
    write_json(folder / SCORES, {**read_stage(folder), task.name: entry})
    logger.info(
        "%s: %s = %.4f", stage, task.name, scored.score.value if scored.score.value is not None else float("nan")
    )


def keep_error(folder: Path, name: str, protocol: str, error: str) -> None:
    """Write that an evaluation failed; it is measured again by the next attempt."""
    entry = {"value": None, "n": 0, "protocol": protocol, "status": "ERROR", "error": error}
    write_json(folder / SCORES, {**read_stage(folder), name: entry})


def predictions_file(output_dir: Path, stage: str, task: str) -> Path:
    """Where the predictions of a moment on a task are kept."""
    return output_dir / PREDICTIONS / f"{stage}.{task.replace(' ', '-')}.jsonl"


def read_stage(folder: Path) -> dict[str, Any]:
    """The scores of a moment by name; empty where there are none."""
    file = folder / SCORES
    return read_json(file) if file.is_file() else {}


def read_scores(stream: TaskStream, output_dir: Path) -> list[list[float | None]]:
    """The rows of the accuracy matrix of the tasks that are finished."""
    rows: list[list[float | None]] = []
    for task in stream:
        scores = read_stage(output_dir / task.folder)
        if not scores:
            break
        rows.append([scores.get(t.name, {}).get("value") for t in stream])
    return rows
