"""Train one task into the output folder itself, scored before and after."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState

from hf_continual.atomic_files import read_object, write_json
from hf_continual.disk import writing
from hf_continual.evaluation.result import Scored
from hf_continual.stream.check_run import check_run
from hf_continual.stream.folders import main_decides, score_stage, wait
from hf_continual.stream.learner import PlanLearner
from hf_continual.stream.models import is_adapter
from hf_continual.stream.plan_record import keep_plan, plain_plan
from hf_continual.stream.prepared import Prepared
from hf_continual.stream.run_plan import refuse_on_all, with_start
from hf_continual.stream.scores import keep_score, read_stage
from hf_continual.stream.stored_run import AFTER, BASE_FOLDER, TRAIN_RESULTS
from hf_continual.tasks import Task

logger = logging.getLogger(__name__)


def train_single(prepared: Prepared, folder: Path) -> dict[str, Any]:
    """Train the one task of a plan; finished work in the folder is not repeated.

    Args:
        prepared: The prepared plan of one task.
        folder: Folder of the model, and of checkpoints during training.

    Returns:
        ``output_dir``, ``kind`` (model or adapter), ``steps``, and the scores ``before`` and ``after``, None without test rows.

    Raises:
        PlanError: If the folder was started with other arguments.
    """
    check_run(prepared)
    way_out = f"Finished work stays in {folder}. Free space there; then the same command resumes where it stopped."
    with writing(folder, way_out):
        refuse_on_all(lambda: keep_plan(folder, plain_plan(prepared)))
        prepared = with_start(prepared, folder)
        task, learner = prepared.stream[0], PlanLearner(prepared, folder)
        base = folder / BASE_FOLDER
        if prepared.plan.evaluation.base:
            score_stage(base, BASE_FOLDER, learner.columns(None), folder, learner, base=True)
        trained = main_decides(lambda: _read(folder / TRAIN_RESULTS))
        if trained is None:
            trained = learner.train(task, None, folder, folder)
            if PartialState().is_main_process:
                kind = "adapter" if is_adapter(folder) else "model"
                trained = {
                    "output_dir": str(folder),
                    "kind": kind,
                    "steps": trained["steps"],
                    "methods": trained["methods"],
                }
                write_json(folder / TRAIN_RESULTS, trained)
                for checkpoint in folder.glob("checkpoint-*"):
                    shutil.rmtree(checkpoint)
            wait()
        else:
            logger.info("%s already holds the trained model.", folder)
        after = folder / AFTER
        missing = main_decides(lambda: [t for t in learner.columns(task) if t.name not in read_stage(after)])
        if missing:
            learner.score(folder, missing, lambda name, scored: _keep(after, folder, missing, name, scored))
            wait()
        result = {**trained, "before": read_stage(base).get(task.name), "after": read_stage(after).get(task.name)}
        if PartialState().is_main_process:
            write_json(folder / TRAIN_RESULTS, result)
    return result


def _keep(after: Path, folder: Path, tasks: Sequence[Task], name: str, scored: Scored) -> None:
    if PartialState().is_main_process:
        keep_score(after, AFTER, folder, next(t for t in tasks if t.name == name), scored)


def _read(file: Path) -> dict[str, Any] | None:
    return read_object(file) if file.is_file() else None
