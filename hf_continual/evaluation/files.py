"""Where the scores and predictions of a run lie: written by plans, read again by the check of a card."""

from __future__ import annotations

from pathlib import Path

SCORES = Path("continual") / "scores.json"  # in the folder of a model, or of the base's scores
PREDICTIONS = "predictions"  # in the run's folder


def file_name(task: str) -> str:
    """A task's or gauge's name as it is part of the names of files."""
    return task.replace(" ", "-")


def predictions_file(output_dir: Path, stage: str, task: str) -> Path:
    """Where the predictions of a moment on a task are kept."""
    return output_dir / PREDICTIONS / f"{stage}.{file_name(task)}.jsonl"
