"""A sequence of tasks: a fresh trainer per task, handed over only through the task's folder.

``OUT/task-00-NAME/`` is complete or absent: a task is trained in ``task-00-NAME.partial`` with its checkpoints,
and renamed when its model and scores are written. So a run killed at any moment goes on from what is there.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trl import SFTTrainer

from hf_continual.evaluation.result import Score
from hf_continual.metrics import AccuracyMatrix
from hf_continual.tasks import Task, TaskStream

logger = logging.getLogger(__name__)

SCORES = Path("continual") / "scores.json"

Learn = Callable[[Task, Path | None, Path], SFTTrainer]
Evaluate = Callable[[SFTTrainer, Task], tuple[Score, list[dict[str, Any]]]]


def train_tasks(stream: TaskStream, output_dir: Path, learn: Learn, evaluate: Evaluate) -> AccuracyMatrix:
    """Learn tasks one after the other and score every task seen after each.

    Args:
        stream: The tasks.
        output_dir: Where the tasks' folders are kept; finished ones are not learnt again.
        learn: Trains one task and returns its trainer. It is given the task, the folder of the task before
            (None for the first) and the folder to train in, whose checkpoints it resumes if there are any.
        evaluate: Scores a trained model on one task, and tells what it answered to each row.

    Returns:
        The accuracy matrix without a base row, read back from the folders.
    """
    previous: Path | None = None
    for task in stream:
        done = output_dir / task.folder
        if not done.is_dir():
            partial = output_dir / f"{task.folder}.partial"
            partial.mkdir(parents=True, exist_ok=True)
            trainer = learn(task, previous, partial)
            _score(stream, task, trainer, evaluate, partial)
            trainer.save_model(str(partial))
            for checkpoint in partial.glob("checkpoint-*"):
                shutil.rmtree(checkpoint)
            if trainer.is_world_process_zero():
                partial.rename(done)
            trainer.accelerator.wait_for_everyone()
        else:
            logger.info("%s is there already and is not learnt again.", done)
        previous = done
    return AccuracyMatrix(read_scores(stream, output_dir))


def _score(stream: TaskStream, task: Task, trainer: SFTTrainer, evaluate: Evaluate, folder: Path) -> None:
    scores = {}
    predictions = folder / "continual" / "predictions"
    predictions.mkdir(parents=True, exist_ok=True)
    for seen in stream.tasks[: task.index + 1]:
        score, rows = evaluate(trainer, seen)
        scores[seen.name] = score.to_dict()
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (predictions / f"{seen.name}.jsonl").write_text(lines, encoding="utf-8")
    (folder / SCORES).write_text(json.dumps(scores, indent=1), encoding="utf-8")


def read_scores(stream: TaskStream, output_dir: Path) -> list[list[float | None]]:
    """The rows of the accuracy matrix of the tasks that are finished."""
    rows: list[list[float | None]] = []
    for task in stream:
        file = output_dir / task.folder / SCORES
        if not file.is_file():
            break
        scores = json.loads(file.read_text(encoding="utf-8"))
        rows.append([scores[t.name]["value"] if t.name in scores else None for t in stream])
    return rows
