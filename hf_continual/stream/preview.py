"""What a dry run says of methods that depend on what a model thinks of the rows: measured on a few rows.

Only plans with such a method load weights here.
"""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path

from hf_continual.methods.base import Method
from hf_continual.stream.models import load_for_training
from hf_continual.stream.prepared import Prepared
from hf_continual.tasks import Task
from hf_continual.trainer.trainer import ContinualTrainer

logger = logging.getLogger(__name__)

ROWS = 32


def previews(prepared: Prepared) -> list[str]:
    """What methods say of the first rows of each task, one line for each.

    Args:
        prepared: The prepared plan.

    Returns:
        The lines; none, and nothing is loaded, if no method measures rows.
    """
    lines = []
    for task in prepared.runs:
        for method in prepared.methods(task):
            if method.previews():
                try:
                    lines.append(f"{task.name}: {_said(prepared, task, method)}")
                except Exception as error:  # a preview must never stop a dry run; the reason is shown
                    logger.debug("the preview failed", exc_info=True)
                    lines.append(f"{task.name}: no preview of {method.name} ({type(error).__name__}: {error})")
    return lines


def _said(prepared: Prepared, task: Task, method: Method) -> str:
    rows = task.train
    assert rows is not None
    with tempfile.TemporaryDirectory() as folder:
        model, peft_config = load_for_training(prepared.plan, None)
        trainer = ContinualTrainer(
            model=model,
            args=prepared.config(task, Path(folder)),
            train_dataset=rows.select(range(min(ROWS, len(rows)))),
            processing_class=prepared.tokenizer,
            peft_config=peft_config,
            methods=[method],
        )
        return method.preview(trainer.run, folder)
