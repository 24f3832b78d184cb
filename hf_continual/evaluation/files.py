"""Paths of a run's scores and predictions: written by plans, read by the card check."""

from __future__ import annotations

from pathlib import Path

SCORES = Path("continual") / "scores.json"  # in the folder of a model, or of the base's scores
PREDICTIONS = "predictions"  # in the run's folder


def file_name(task: str) -> str:
    """A task's or gauge's name as used in file names."""
    return task.replace(" ", "-")


def predictions_file(output_dir: Path, stage: str, task: str) -> Path:
    """The file of a model's predictions on a task."""
    return output_dir / PREDICTIONS / f"{stage}.{file_name(task)}.jsonl"
