"""Scores of a model during training, at steps given in the plan."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from hf_continual.atomic_files import DamagedFile, read_checked, write_checked
from hf_continual.stream.prepare import Prepared
from hf_continual.tasks import Task

logger = logging.getLogger(__name__)

CURVE = Path("continual") / "curve.json"


class Curve(TrainerCallback):
    """Scores the model on all rows during training; training is not affected.

    Args:
        trainer: The trainer.
        steps: Optimizer steps after which to score; 0 is before the first.
        tasks: The tasks to score.
        prepared: The prepared plan.
        file: File of the points, by step. A point in it is not measured again.

    Raises:
        ValueError: If the weights are sharded over processes, which cannot be scored during training.
    """

    def __init__(
        self, trainer: Any, steps: Sequence[int], tasks: Sequence[Task], prepared: Prepared, file: Path
    ) -> None:
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            raise ValueError("a task's `curve` needs whole weights on each process; drop it under FSDP and DeepSpeed.")
        self.trainer, self.steps, self.tasks, self.prepared, self.file = trainer, set(steps), tasks, prepared, file

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure the point at step 0."""
        self._point(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure a point after a step."""
        self._point(state.global_step)

    def _point(self, step: int) -> None:
        if step not in self.steps or not self.trainer.is_world_process_zero():
            return
        points = _points(self.file)
        if str(step) in points:
            return
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        point = {}
        for task in self.tasks:
            scored = self.prepared.scorers[task.name](model, self.prepared.tokenizer, task.test)
            point[task.name] = {"value": scored.score.value, "nll": None if scored.nll is None else scored.nll.value}
        write_checked(self.file, {**points, str(step): point})


def read_curve(folder: Path) -> dict[str, Any]:
    """The points of a finished task by step; empty if there are none."""
    if folder.is_dir() and not (folder / CURVE).is_file():
        logger.warning("%s is missing: the scores from this task's training are not known.", folder / CURVE)
    return dict(sorted(_points(folder / CURVE).items(), key=lambda item: int(item[0])))


def _points(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        return read_checked(file)
    except DamagedFile as error:
        raise DamagedFile(
            f"{error} The scores from training are lost and cannot be measured again. Delete {file} to run "
            f"without them, or its task's folder {file.parents[1]} to train the task again."
        ) from error
