"""The figures of an accuracy matrix, as an `evaluate.Metric`."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate

from hf_continual.metrics import AccuracyMatrix

DESCRIPTION = """\
Retention over a sequence of tasks: overall performance, backward and forward transfer, forgetting. Row i of `scores`
holds the score on every task after task i was learned."""

INPUTS = """
Args:
    scores: One list per learned task, with a score for each task; None if it was not measured.
    base: Scores of the base model, for forward transfer.
    lower_is_better: Whether the scores are losses.
Returns:
    The figures by name; None if a cell that they need is missing.
"""

CITATION = """\
@inproceedings{lopezpaz2017gradient,
  title = {Gradient Episodic Memory for Continual Learning},
  author = {Lopez-Paz, David and Ranzato, Marc'Aurelio},
  booktitle = {NeurIPS},
  year = {2017}
}"""


class ContinualLearning(evaluate.Metric):
    """``evaluate.load(module_path("continual_learning")).compute(scores=[[.9, .1], [.5, .8]], base=[.1, .1])``."""

    def _info(self) -> evaluate.MetricInfo:
        row = datasets.Sequence(datasets.Value("float64"))
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features({"scores": row}),
        )

    def _compute(  # pyrefly: ignore[bad-override]
        self, scores: Any, base: list[float] | None = None, lower_is_better: bool = False
    ) -> dict[str, Any]:
        matrix = AccuracyMatrix([list(row) for row in scores], base, lower_is_better)
        return {**matrix.summary, "per_task_minimum": matrix.per_task_minimum}
